// Filters of the answers, the focus among the tokens, and the updates of a running run. `history.state` survives a reload.
const byId = (id) => document.getElementById(id);
const saved = history.state ?? {};
const keep = (values) => history.replaceState(Object.assign(saved, values), "");

const filters = document.querySelector(".filters");
if (filters) {
  const [group, change, wrong, count] = ["filter-group", "filter-change", "filter-wrong", "filter-count"].map(byId);
  const cards = [...document.querySelectorAll(".answer-group .sample")];
  const apply = () => {
    let shown = 0;
    for (const card of cards) {
      const { group: own, change: changed, wrong: isWrong } = card.dataset;
      const fits = (!group?.value || own === group.value) && (!wrong.checked || isWrong === "yes")
        && (!change?.value || changed === change.value || (change.value === "changed" && changed !== "same"));
      card.hidden = !fits;
      shown += fits;
    }
    for (const each of document.querySelectorAll(".answer-group")) each.hidden = !each.querySelector(".sample:not([hidden])");
    count.textContent = `${shown} of ${cards.length} answers`;
    keep({ filters: [group?.value ?? "", change?.value ?? "", wrong.checked] });
  };
  const [ownGroup, ownChange, ownWrong] = saved.filters ?? ["", "", false];
  if (group) group.value = [...group.options].some((option) => option.value === ownGroup) ? ownGroup : "";
  if (change) change.value = ownChange;
  wrong.checked = ownWrong;
  filters.hidden = false;
  filters.addEventListener("change", apply);
  apply();
}

for (const tokens of document.querySelectorAll(".tokens[role]")) {
  tokens.addEventListener("keydown", (event) => {
    const all = [...tokens.children], at = all.indexOf(document.activeElement);
    const to = { ArrowRight: at + 1, ArrowDown: at + 1, ArrowLeft: at - 1, ArrowUp: at - 1, Home: 0, End: all.length - 1 }[event.key];
    if (at < 0 || !all[to]) return;
    event.preventDefault();
    all[at].tabIndex = -1;
    all[to].tabIndex = 0;
    all[to].focus();
  });
}

// A region that does not scroll is no stop of the Tab key.
const scrolls = new ResizeObserver((entries) => {
  for (const { target } of entries) target.tabIndex = target.scrollWidth > target.clientWidth || target.scrollHeight > target.clientHeight ? 0 : -1;
});
for (const region of document.querySelectorAll(".scroll")) scrolls.observe(region);

for (const details of document.querySelectorAll("details[id]")) {
  details.open = (saved.open ?? []).includes(details.id);
  details.addEventListener("toggle", () => keep({ open: [...document.querySelectorAll("details[id][open]")].map((each) => each.id) }));
}

const state = byId("state");
if (state.dataset.kind === "running") {
  const INTERVAL = 10, STALE = 120, loaded = Date.now(), written = Number(state.dataset.written);
  const [age, pause, stale] = ["age", "pause", "stale"].map(byId);
  let paused = saved.paused ?? false, touched = 0;
  const setPaused = (value) => {
    paused = value;
    pause.setAttribute("aria-pressed", value);
    pause.textContent = value ? "Resume updates" : "Pause updates";
    keep({ paused });
  };
  const duration = (seconds) => (seconds < 120 ? `${seconds} s` : seconds < 7200 ? `${Math.round(seconds / 60)} minutes` : `${Math.round(seconds / 3600)} hours`);
  const tick = () => {
    const seconds = Math.max(0, Math.round((Date.now() - written) / 1000));
    age.textContent = `${duration(seconds)} ago`;
    const text = seconds < STALE ? "" : "No update for some minutes: the run may be evaluating, or was killed. `mmtune report` of the run says which.";
    if (stale.textContent !== text) stale.textContent = text;
    const idle = Date.now() - touched > 3000 && document.visibilityState === "visible";
    if (!paused && idle && Date.now() - loaded > 1000 * INTERVAL) {
      keep({ focus: document.activeElement?.id ?? "" });
      location.reload();
    }
  };
  for (const event of ["pointermove", "pointerdown", "keydown", "wheel", "touchmove"]) addEventListener(event, () => { touched = Date.now(); }, { passive: true });
  pause.addEventListener("click", () => setPaused(!paused));
  age.hidden = pause.hidden = false;
  setPaused(paused);
  if (saved.focus) byId(saved.focus)?.focus({ preventScroll: true });
  tick();
  setInterval(tick, 1000);
}
