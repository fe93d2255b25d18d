/* One chart: lines over steps or time, drawn by uPlot, with dashed lines for thresholds and a legend that shows the
   numbers under the pointer. The same content is there in words and as a table. Only charts on the screen are drawn. */

import { asTable, inWords } from "./chart_text.js";
import { el, setText } from "./dom.js";
import { NONE } from "./format.js";
import { plotOptions } from "./plot_options.js";
import { thresholdsOf } from "./thresholds.js";
import { visibleRows, zoomBy } from "./zoom.js";

const isNone = (value) => value === null || value === undefined;

/**
 * A spec has `title`, `unit`, `format(value)` and `series`, and may have `tick(value)` (format of the axis), `isLog`,
 * `floor` (the lowest value of a logarithmic axis), `min`, `max`, `check` (the check whose thresholds are drawn),
 * `height`, `empty` (the text without data) and `summary` (the series that the text describes).
 * A series has `label`, `of(steps, axis)` (values, or `{x, y}` with an axis of its own) and `color`, and may have
 * `dash`, `width`, `alpha`, `fill` and `isPoints`.
 */
export class Chart {
  #plot = null;
  #isSeen = false;
  #isStale = true;
  #steps = null;
  #state = { axis: "step", zoom: null, thresholds: [] };
  #onZoom;

  /** `onZoom({min, max} or null)`: the reader wants to see another range. */
  constructor(mount, spec, onZoom) {
    this.spec = spec;
    this.#onZoom = onZoom;
    this.#build();
    mount.append(this.root);
    new IntersectionObserver(
      (seen) => {
        this.#isSeen = seen.at(-1).isIntersecting;
        if (this.#isSeen && this.#isStale) this.#draw();
      },
      { rootMargin: "200px" },
    ).observe(this.root);
    new ResizeObserver(() => this.#plot?.setSize(this.#size())).observe(this.canvas);
    document.addEventListener("themechange", () => {
      this.#plot?.destroy();
      this.#plot = null;
      this.#isStale = true;
      if (this.#isSeen) this.#draw();
    });
  }

  /** `axis`: "step" or "time". `zoom`: the visible range, or null for all. */
  update(steps, axis, zoom, checks) {
    this.#steps = steps;
    this.#state = { axis, zoom, thresholds: thresholdsOf(checks?.find((one) => one.name === this.spec.check)) };
    this.#isStale = true;
    if (this.#isSeen) this.#draw();
  }

  #build() {
    const { spec } = this;
    this.values = spec.series.map(() => el("b", {}, NONE));
    this.canvas = el("div", { class: "plot", role: "img", tabindex: "0", "aria-label": spec.title });
    this.canvas.style.height = `${spec.height ?? 150}px`;
    this.canvas.addEventListener("keydown", (event) => this.#key(event));
    this.summary = el("summary", {}, "Numbers");
    this.table = el("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": `${spec.title}, numbers` });
    this.details = el("details", { ontoggle: () => this.#writeTable() }, this.summary, this.table);
    this.empty = el("p", { class: "muted", hidden: true }, spec.empty ?? "No data yet. The first step appears here.");
    this.root = el(
      "figure",
      { class: "panel chart" },
      el("figcaption", {}, el("h3", {}, spec.title), el("span", { class: "unit" }, spec.unit ?? "")),
      el("ul", { class: "legend" }, ...spec.series.map((one, i) => legendEntry(one, this.values[i]))),
      this.canvas,
      this.empty,
      this.details,
    );
  }

  #size() {
    return { width: Math.max(120, this.canvas.clientWidth), height: this.canvas.clientHeight };
  }

  #draw() {
    if (!this.#steps) return;
    this.#isStale = false;
    this.data = this.#columns();
    const isEmpty = !this.data.slice(1).some((column) => column.some((value) => !isNone(value)));
    this.root.classList.toggle("is-empty", isEmpty);
    this.empty.hidden = !isEmpty;
    if (isEmpty) return;
    if (this.#plot) this.#plot.setData(this.data);
    else this.#plot = new uPlot(this.#options(), this.data, this.canvas);
    this.#writeLegend(null);
    this.#writeSummary();
    if (this.details.open) this.#writeTable();
  }

  #options() {
    const onCursor = (index) => this.#writeLegend(index);
    return plotOptions(this.spec, this.#size(), () => this.#state, this.#onZoom, onCursor);
  }

  #columns() {
    const { axis } = this.#state;
    const x = axis === "time" ? (this.#steps.columns.wall_s ?? []) : this.#steps.columns.step;
    const floor = (values) =>
      this.spec.isLog ? values.map((v) => (v === null ? null : Math.max(v, this.spec.floor))) : values;
    const own = [],
      aligned = [x];
    for (const one of this.spec.series) {
      const values = one.of(this.#steps, axis);
      if (Array.isArray(values)) aligned.push(floor(values.length ? values : new Array(x.length).fill(null)));
      else own.push([values.x, floor(values.y)]);
    }
    return own.length ? uPlot.join([aligned, ...own]) : aligned;
  }

  /** Arrows move the cursor, + and − zoom around it, 0 and Escape show the whole run. */
  #key(event) {
    if (!this.#plot || event.ctrlKey || event.metaKey || event.altKey) return;
    const x = this.data[0];
    const whole = { min: x[0], max: x[x.length - 1] };
    const { min, max } = this.#state.zoom ?? whole;
    const index = Math.max(0, this.#plot.cursor.idx ?? x.findLastIndex((one) => one <= max));
    const move = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    const factor = { "+": 0.5, "=": 0.5, "-": 2 }[event.key];
    if (move) {
      const to = x[index + move];
      if (min <= to && to <= max) this.#plot.setCursor({ left: this.#plot.valToPos(to, "x"), top: 0 }, true, true);
    } else if (factor) this.#onZoom(zoomBy(factor, this.#state.zoom, whole, x[index]));
    else if (event.key === "0" || event.key === "Escape") this.#onZoom(null);
    else return;
    event.preventDefault();
  }

  /** The values at that row, or the latest ones. */
  #writeLegend(index) {
    this.spec.series.forEach((one, i) => {
      const column = this.data[i + 1];
      const value = isNone(index) ? column.findLast((each) => !isNone(each)) : column[index];
      setText(this.values[i], isNone(value) ? NONE : this.spec.format(value));
    });
  }

  #writeSummary() {
    const place = this.spec.summary ?? 0;
    const data = visibleRows(this.data, this.#state.zoom);
    const words = inWords(data[0], data[place + 1], this.spec.format, this.#state.axis);
    setText(this.summary, words?.span ?? "Numbers");
    if (!words) return;
    this.canvas.setAttribute(
      "aria-label",
      `${this.spec.title}: ${this.spec.series[place].label} ${words.now}; ${words.span}`,
    );
  }

  #writeTable() {
    if (!this.details.open || !this.data) return;
    this.table.replaceChildren(asTable(visibleRows(this.data, this.#state.zoom), this.spec, this.#state.axis));
  }
}

function legendEntry(series, value) {
  const marks = [series.dash && "dash", series.isPoints && "dot", series.alpha && "thin"].filter(Boolean);
  const swatch = el("i", { class: ["swatch", `c${series.color}`, ...marks].join(" ") });
  return el("li", {}, swatch, `${series.label} `, value);
}
