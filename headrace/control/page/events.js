/* The event log, the newest first. Weight swaps are frequent, so they are listed only if their kind is selected. */

import { byId, el, keep, setHidden, setText } from "./dom.js";
import { clock } from "./format.js";

const MOST = 300;

export function startEvents(store) {
  const select = byId("event-kind");
  select.append(el("option", { value: "weight_swap" }, "weight_swap"));
  select.options[0].textContent = "all but swaps";
  const kinds = new Set(["", "weight_swap"]);
  let swaps = [],
    others = [];

  function add(events) {
    for (const event of events) {
      if (!kinds.has(event.kind)) {
        kinds.add(event.kind);
        select.append(el("option", { value: event.kind }, event.kind));
      }
      if (event.kind === "weight_swap") swaps = [event, ...swaps.filter((one) => one.id !== event.id)].slice(0, MOST);
      else others = [event, ...others.filter((one) => one.id !== event.id)].slice(0, MOST);
    }
    store.touch("events");
  }

  select.addEventListener("change", () => store.touch("events"));
  store.on(["events"], () => {
    const wanted = select.value === "weight_swap" ? swaps : others.filter((one) => !select.value || one.kind === select.value);
    keep(
      byId("event-list"),
      wanted,
      (one) => one.id,
      () => el("li", {}, el("time"), el("b"), el("span")),
      (item, one) => {
        setText(item.children[0], clock(one.at));
        setText(item.children[1], one.kind);
        setText(item.children[2], one.text);
      },
    );
    setHidden(byId("events-empty"), wanted.length > 0);
  });

  return { arrived: (event) => add([event]), load: ({ events }) => add([...events].reverse()) };
}
