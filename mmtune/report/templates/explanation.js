// The heat maps and words of the chosen token. Without this script those of the whole answer are shown.
for (const explanation of document.querySelectorAll(".explanation")) {
  explanation.addEventListener("change", (event) => {
    for (const view of explanation.querySelectorAll("[data-view]")) view.hidden = view.dataset.view !== event.target.value;
  });
}
