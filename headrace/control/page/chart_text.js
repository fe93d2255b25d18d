/* The content of a chart for screen readers: its course in words, and its numbers as a table. */

import { el } from "./dom.js";
import { duration } from "./format.js";

const MAX_ROWS = 25;
const isNone = (value) => value === null || value === undefined;

/** `now`: the latest value; `span`: the lowest and the highest; null where there is none. */
export function inWords(x, column, format, axis) {
  let lowest = -1;
  let highest = -1;
  let last = -1;
  column.forEach((value, i) => {
    if (isNone(value)) return;
    last = i;
    if (lowest < 0 || value < column[lowest]) lowest = i;
    if (highest < 0 || value > column[highest]) highest = i;
  });
  if (last < 0) return null;
  const text = (i) => `${format(column[i])} ${axis === "time" ? `after ${duration(x[i])}` : `at step ${x[i]}`}`;
  const isFlat = column[lowest] === column[highest];
  return { now: text(last), span: isFlat ? "unchanged" : `lowest ${text(lowest)}, highest ${text(highest)}` };
}

/** The newest row first, evenly thinned. */
export function asTable(data, spec, axis) {
  const x = data[0];
  const every = Math.max(1, Math.ceil(x.length / MAX_ROWS));
  const rows = x
    .map((_, i) => i)
    .filter((i) => (x.length - 1 - i) % every === 0)
    .reverse();
  const head = [axis === "time" ? "Time" : "Step", ...spec.series.map((one) => one.label)];
  const cell = (value) => el("td", { class: "n" }, isNone(value) ? "" : spec.format(value));
  const row = (i) =>
    el(
      "tr",
      {},
      el("th", { scope: "row" }, axis === "time" ? duration(x[i]) : String(x[i])),
      ...spec.series.map((_, place) => cell(data[place + 1][i])),
    );
  return el(
    "table",
    { class: "numbers" },
    el("thead", {}, el("tr", {}, ...head.map((name, i) => el("th", { scope: "col", class: i ? "n" : null }, name)))),
    el("tbody", {}, ...rows.map(row)),
  );
}
