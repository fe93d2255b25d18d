/* The verdict in words: is the run well, since when, what to do; below it what is not as it should be. Also what the
   top bar and the tab's title say of it. */

import { byId, el, keep, setHidden, setText } from "./dom.js";
import { clock, duration, number, plural } from "./format.js";

const SIGNS = { healthy: "✓", waiting: "…", warning: "!", failed: "✕", ended: "■" };
const ORDER = ["failed", "warning", "waiting", "ended", "healthy"];
const capital = (text) => text.charAt(0).toUpperCase() + text.slice(1);

export function startVerdict(board) {
  board.on(["status"], () => paint(board.get("status")));
  const since = () => {
    const verdict = board.get("status")?.verdict;
    if (verdict)
      setText(
        byId("verdict-since"),
        `${capital(verdict.level)} for ${duration(board.now() - verdict.since_at)}, since ${clock(verdict.since_at)}`,
      );
  };
  board.on(["status"], since);
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

  const sorted = [...checks].sort((a, b) => ORDER.indexOf(a.level) - ORDER.indexOf(b.level));
  const open = sorted.filter((check) => !["healthy", "ended"].includes(check.level) && check.text !== verdict.text);
  keep(
    byId("checks-open"),
    open,
    (check) => check.name,
    () => el("li", {}, el("b"), el("span")),
    (item, check) => {
      item.dataset.level = check.level;
      setText(item.firstChild, SIGNS[check.level]);
      setText(item.lastChild, check.text);
    },
  );
  setHidden(byId("checks-open"), open.length === 0);
  const wrong = checks.filter((check) => !["healthy", "ended"].includes(check.level)).length;
  setText(
    byId("checks-summary"),
    `${plural(checks.length, "check")}, ${wrong ? `${wrong} with something to say` : "all fine"}`,
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
  const told = [
    check.name.replaceAll("_", " "),
    `${SIGNS[check.level]} ${check.level}`,
    check.text,
    number(check.value),
    number(check.warn),
    number(check.alarm),
  ];
  told.forEach((text, i) => setText(row.children[i], text));
}
