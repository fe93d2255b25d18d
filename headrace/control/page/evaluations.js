/* The table of held-out evaluations: pass@1, further pass@k, and which one is the best. */

import { byId, el, keep, setHidden, setText } from "./dom.js";
import { clock, count, fixed } from "./format.js";

export function startEvaluations(store) {
  let columns = "";
  store.on(["steps"], () => {
    const evaluations = [...store.get("steps").evaluations].reverse().slice(0, 200);
    const more = [...new Set(evaluations.flatMap((one) => Object.keys(one.pass_at)))]
      .filter((k) => k !== "1")
      .sort((a, b) => a - b)
      .slice(0, 2);
    const names = ["Step", "pass@1", ...more.map((k) => `pass@${k}`), "Completions", "Time"];
    if (names.join() !== columns) {
      columns = names.join();
      byId("evaluations-head").replaceChildren(
        el("tr", {}, ...names.map((name) => el("th", { scope: "col", class: "n" }, name))),
      );
      byId("evaluations-rows").replaceChildren();
    }
    const make = () =>
      el("tr", {}, ...names.map((_, i) => el(i ? "td" : "th", { scope: i ? null : "row", class: "n" })));
    keep(
      byId("evaluations-rows"),
      evaluations,
      (one) => one.step,
      make,
      (row, one) => {
        const texts = [
          String(one.step),
          fixed(one.held_out, 3),
          ...more.map((k) => fixed(one.pass_at[k], 3)),
          count(one.num_completions),
          clock(one.at),
        ];
        texts.forEach((text, i) => setText(row.cells[i], text));
        row.classList.toggle("best", one.is_best);
        row.title = one.is_best ? "best so far" : "";
      },
    );
    setHidden(byId("evaluations-head"), evaluations.length === 0);
    setHidden(byId("evaluations-empty"), evaluations.length > 0);
  });
}
