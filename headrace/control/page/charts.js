/* Creates all charts and keeps them up to date. They share one horizontal axis: by step or by time, whole or zoomed. */

import { Chart } from "./chart.js";
import { EPISODES, HEALTH, LEARNING, PIPELINE } from "./chart_specs.js";
import { byId, setHidden, setText } from "./dom.js";
import { duration, number } from "./format.js";

const AXES = ["step", "time"];

export function startCharts(store) {
  const setZoom = (zoom) => store.set("zoom", zoom);
  const sections = [
    ["charts-learning", LEARNING],
    ["charts-health", HEALTH],
    ["charts-pipeline", PIPELINE],
    ["charts-episodes", EPISODES],
  ];
  const charts = sections.flatMap(([id, specs]) => specs.map((spec) => new Chart(byId(id), spec, setZoom)));
  const update = () => {
    const [steps, axis, zoom] = ["steps", "axis", "zoom"].map((topic) => store.get(topic));
    setHidden(byId("charts-episodes"), !steps?.columns.turns_mean);
    for (const chart of charts) chart.update(steps, axis, zoom ?? null, store.get("status")?.checks);
  };
  store.on(["steps", "axis", "zoom"], update);
  let known = "";
  store.on(["status"], () => {
    const thresholds = JSON.stringify(store.get("status").checks.map((one) => [one.name, one.warn, one.alarm]));
    if (thresholds !== known) update();
    known = thresholds;
  });

  store.on(["zoom"], () => {
    const zoom = store.get("zoom");
    setHidden(byId("zoom-reset"), !zoom);
    setText(byId("zoom-range"), zoom ? rangeInWords(zoom, store.get("axis")) : "");
  });
  byId("zoom-reset").addEventListener("click", () => setZoom(null));
  for (const axis of AXES) {
    byId(`x-${axis}`).addEventListener("click", () => {
      store.set("axis", axis);
      setZoom(null);
      for (const one of AXES) byId(`x-${one}`).setAttribute("aria-pressed", String(one === axis));
    });
  }
}

function rangeInWords({ min, max }, axis) {
  if (axis === "time") return `Zoomed to ${duration(min)} – ${duration(max)}.`;
  return `Zoomed to steps ${number(Math.ceil(min), 6)} – ${number(Math.floor(max), 6)}.`;
}
