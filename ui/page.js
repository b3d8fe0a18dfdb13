const byId = id => document.getElementById(id), talks = [...document.querySelectorAll(".talk")];
const shown = () => talks.filter(talk => !talk.hidden);
const words = talks.map(talk => [...talk.querySelectorAll("b, p, dd, .says")].map(x => x.textContent).join(" ").toLowerCase());
function filter() {
  const intention = byId("intention").value, outcome = byId("outcome").value, text = byId("text").value.toLowerCase();
  talks.forEach((talk, i) => talk.hidden = !!(intention && talk.dataset.intention !== intention)
    || !!(outcome && !talk.dataset.outcome.split(" ").includes(outcome)) || !words[i].includes(text));
  byId("count").textContent = `${shown().length} of ${talks.length}`;
}
function toggle() {
  const open = shown().some(talk => !talk.open);
  shown().forEach(talk => talk.open = open);
}
function move(by) {
  const heads = shown().map(talk => talk.firstElementChild), at = heads.indexOf(document.activeElement.closest(".talk")?.firstElementChild);
  const next = heads[at < 0 ? 0 : Math.min(heads.length - 1, Math.max(0, at + by))];
  if (next) { next.focus(); next.scrollIntoView({block: "center"}); }
}
const keys = {"/": () => byId("text").focus(), j: () => move(1), k: () => move(-1), o: toggle};
document.addEventListener("keydown", event => {
  if (event.key === "Escape") { event.preventDefault(); document.activeElement.blur(); }  // a search field would be emptied unseen
  if (/INPUT|SELECT/.test(event.target.tagName) || event.ctrlKey || event.metaKey || event.altKey) return;
  if (keys[event.key]) { event.preventDefault(); keys[event.key](); }
});
for (const id of ["intention", "outcome", "text"]) byId(id).addEventListener("input", filter);
byId("all").addEventListener("click", toggle);
filter();
