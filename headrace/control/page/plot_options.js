/* The options of uPlot for a chart: scales, axes, series and colours from its spec, and the behaviour of the pointer. */

import { count, duration } from "./format.js";
import { drawThresholds, powersOfTen, rangeOf } from "./thresholds.js";

const SYNC = "run";
const FONT = "11px system-ui, sans-serif";
const MIN_DRAG_PX = 5;
const SHARED_EVENTS = new Set(["mousemove", "mouseleave"]);

/**
 * `state()` gives the chart's present `{axis, zoom, thresholds}`. `onZoom({min, max})` follows a drag, `onZoom(null)` a
 * double click; `onCursor(index)` a move of the pointer over this or any other chart.
 */
export function plotOptions(spec, size, state, onZoom, onCursor) {
  const style = getComputedStyle(document.documentElement);
  const color = (name) => style.getPropertyValue(`--${name}`).trim();
  return {
    ...size,
    legend: { show: false },
    padding: [8, 10, 0, 0],
    cursor: cursorOptions(onZoom),
    scales: {
      x: { time: false, range: (_, low, high) => zoomed(state().zoom) ?? [low, high] },
      y: { distr: spec.isLog ? 3 : 1, range: (_, low, high) => rangeOf(spec, state().thresholds, low, high) },
    },
    axes: axesOptions(spec, color, () => state().axis),
    series: [{}, ...spec.series.map((one) => seriesOptions(one, color))],
    hooks: {
      draw: [(plot) => drawThresholds(plot, spec, state().thresholds, color)],
      setCursor: [(plot) => onCursor(plot.cursor.idx)],
      setSelect: [(plot) => takeSelection(plot, onZoom)],
    },
  };
}

/** Pointers are shared between charts, selections are not: a zoom reaches the other charts by `onZoom`. */
function cursorOptions(onZoom) {
  return {
    sync: { key: SYNC, filters: { pub: (event) => SHARED_EVENTS.has(event) } },
    drag: { x: true, y: false, dist: MIN_DRAG_PX, setScale: false },
    bind: { dblclick: () => () => onZoom(null) },
    y: false,
    points: { size: 6 },
  };
}

const zoomed = (zoom) => zoom && [zoom.min, zoom.max];

function takeSelection(plot, onZoom) {
  const { left, width } = plot.select;
  if (width < MIN_DRAG_PX) return;
  plot.setSelect({ left: 0, top: 0, width: 0, height: 0 }, false);
  onZoom({ min: plot.posToVal(left, "x"), max: plot.posToVal(left + width, "x") });
}

function axesOptions(spec, color, axis) {
  const common = {
    stroke: color("muted"),
    font: FONT,
    grid: { stroke: color("grid"), width: 1 },
    ticks: { show: false },
  };
  return [
    {
      ...common,
      size: 26,
      space: 70,
      values: (_, ticks) => ticks.map((value) => (axis() === "time" ? duration(value) : count(value))),
    },
    {
      ...common,
      size: 50,
      space: 28,
      ...(spec.isLog && { splits: (_, __, low, high) => powersOfTen(low, high), filter: (_, at) => at }),
      values: (_, ticks) => ticks.map((value) => (spec.tick ?? spec.format)(value)),
    },
  ];
}

function seriesOptions(one, color) {
  const stroke = color(`s${one.color}`);
  return {
    stroke,
    width: one.width ?? 1.5,
    dash: one.dash,
    spanGaps: true,
    alpha: one.alpha ?? 1,
    fill: one.fill ? `${stroke}${one.fill}` : undefined,
    points: { show: one.isPoints ?? false, size: 7, fill: stroke },
  };
}
