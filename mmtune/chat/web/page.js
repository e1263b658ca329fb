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

// The connection: gradio reports a lost server only at the next event.
const PERIOD_MS = 3000;
let application;
async function checkConnection() {
  let problem = "";
  try {
    const response = await fetch("gradio_api/app_id", { cache: "no-store" });
    const { app_id: answered } = await response.json();
    application ??= answered;
    if (answered !== application) problem = "The server was started again, without the conversations before. Reload the page for a new one.";
  } catch {
    problem = "The server does not answer: it was ended, or the connection is lost. The conversation stays on this page.";
  }
  let line = document.querySelector("#connection");
  if (!line) {
    line = document.createElement("p");
    line.id = "connection";
    line.setAttribute("role", "alert");
    document.body.prepend(line);
  }
  if (line.textContent !== problem) line.textContent = problem;
  setTimeout(checkConnection, PERIOD_MS);
}
checkConnection();
