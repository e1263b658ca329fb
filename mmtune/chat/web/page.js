document.addEventListener("click", (event) => {
  const button = event.target.closest?.("#conversation button.copy");
  if (!button) return;
  const text = button.closest("article").querySelector(".text");
  const selection = getSelection();
  selection.selectAllChildren(text);
  document.execCommand("copy"); // navigator.clipboard needs https or loopback
  selection.removeAllRanges();
  button.textContent = "Copied";
  setTimeout(() => { button.textContent = "Copy"; }, 1500);
});
