/* The verdict: is the run well, since when, what to do; below it the checks that failed. Also writes the top bar and the
   title of the tab. */

import { byId, el, keep, setHidden, setText } from "./dom.js";
import { clock, duration, number, plural } from "./format.js";

const SIGNS = { healthy: "✓", waiting: "…", warning: "!", critical: "✕", ended: "■" };
const LEVELS = ["critical", "warning", "waiting", "ended", "healthy"];
const capital = (text) => text.charAt(0).toUpperCase() + text.slice(1);

export function startVerdict(store) {
  store.on(["status"], () => paint(store.get("status")));
  const since = () => {
    const verdict = store.get("status")?.verdict;
    if (verdict)
      setText(
        byId("verdict-since"),
        `${capital(verdict.level)} for ${duration(store.now() - verdict.since_at)}, since ${clock(verdict.since_at)}`,
      );
  };
  store.on(["status"], since);
  setInterval(since, 1000);
}

function paint(status) {
  const { verdict, checks } = status;
  byId("verdict").dataset.level = verdict.level;
  setText(byId("verdict-sign"), SIGNS[verdict.level] ?? "?");
  setText(byId("verdict-text"), capital(verdict.text));
  setText(byId("verdict-advice"), verdict.advice);
  setText(byId("run-name"), status.run);
  setText(byId("run-step"), `step ${status.step} of ${status.target_steps}`);
  const title = `${SIGNS[verdict.level] ?? "?"} ${status.run}, step ${status.step} · Headrace`;
  if (document.title !== title) document.title = title;

  const sorted = [...checks].sort((a, b) => LEVELS.indexOf(a.level) - LEVELS.indexOf(b.level));
  const open = sorted.filter((check) => !["healthy", "ended"].includes(check.level) && check.text !== verdict.text);
  keep(
    byId("open-checks"),
    open,
    (check) => check.name,
    () => el("li", {}, el("b"), el("span")),
    (item, check) => {
      item.dataset.level = check.level;
      setText(item.firstChild, SIGNS[check.level]);
      setText(item.lastChild, check.text);
    },
  );
  setHidden(byId("open-checks"), open.length === 0);
  const wrong = checks.filter((check) => !["healthy", "ended"].includes(check.level)).length;
  setText(
    byId("checks-summary"),
    `${plural(checks.length, "check")}, ${wrong ? `${wrong} not healthy` : "all healthy"}`,
  );
  keep(byId("checks"), sorted, (check) => check.name, checkRow, writeCheck);
}

function checkRow() {
  return el(
    "tr",
    {},
    el("th", { scope: "row" }),
    el("td", { class: "level" }),
    el("td", { class: "wrap" }),
    ...["", "", ""].map(() => el("td", { class: "n" })),
  );
}

function writeCheck(row, check) {
  row.dataset.level = check.level;
  const texts = [
    check.name.replaceAll("_", " "),
    `${SIGNS[check.level]} ${check.level}`,
    check.text,
    number(check.value),
    number(check.warn),
    number(check.alarm),
  ];
  texts.forEach((text, i) => setText(row.children[i], text));
}
