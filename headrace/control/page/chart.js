/* One chart: lines over steps or time on a canvas (uPlot), thresholds as dashed lines, a legend with the numbers under
   the pointer, and the same in words and as a table for who does not see it. Only what is on the screen is drawn. */

import { asTable, inWords } from "./chart_text.js";
import { el, setText } from "./dom.js";
import { NONE, count, duration } from "./format.js";
import { drawThresholds, powersOfTen, rangeOf, thresholdsOf } from "./thresholds.js";

const SYNC = "run";
const FONT = "11px system-ui, sans-serif";

/**
 * A spec has `title`, `unit`, `format(value)`, `series` [{label, of(steps) → values, or {x, y} of its own, color,
 * dash, width, fill, isPoints}], and may have `isLog`, `floor` (of a logarithm), `min`, `max`, `check` (whose thresholds
 * are drawn), `height`, `empty`.
 */
export class Chart {
  #plot = null;
  #isSeen = false;
  #isStale = true;
  #known = null;
  #thresholds = [];

  constructor(mount, spec) {
    this.spec = spec;
    this.values = spec.series.map(() => el("b", {}, NONE));
    const keys = spec.series.map((one, i) =>
      el(
        "li",
        {},
        el("i", {
          class: `swatch c${one.color}${one.dash ? " dash" : ""}${one.isPoints ? " dot" : ""}${one.alpha ? " thin" : ""}`,
        }),
        `${one.label} `,
        this.values[i],
      ),
    );
    this.canvas = el("div", { class: "plot", role: "img", "aria-label": spec.title });
    this.summary = el("summary", {}, "Numbers");
    this.table = el("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": `${spec.title}, numbers` });
    this.details = el("details", { ontoggle: () => this.#writeTable() }, this.summary, this.table);
    this.empty = el("p", { class: "muted", hidden: true }, spec.empty ?? "Nothing yet: the first step draws here.");
    this.root = el(
      "figure",
      { class: "panel chart" },
      el("figcaption", {}, el("h3", {}, spec.title), el("span", { class: "unit" }, spec.unit ?? "")),
      el("ul", { class: "legend" }, ...keys),
      this.canvas,
      this.empty,
      this.details,
    );
    mount.append(this.root);
    this.canvas.style.height = `${spec.height ?? 150}px`;
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

  /** `axis`: "step" or "time". */
  update(steps, axis, checks) {
    this.#known = { steps, axis };
    this.#thresholds = thresholdsOf(checks?.find((one) => one.name === this.spec.check));
    this.#isStale = true;
    if (this.#isSeen) this.#draw();
  }

  #size() {
    return { width: Math.max(120, this.canvas.clientWidth), height: this.canvas.clientHeight };
  }

  #draw() {
    if (!this.#known) return;
    this.#isStale = false;
    this.data = this.#columns();
    const isEmpty = !this.data.slice(1).some((column) => column.some((value) => value !== null && value !== undefined));
    this.root.classList.toggle("is-empty", isEmpty);
    this.empty.hidden = !isEmpty;
    if (isEmpty) return;
    if (this.#plot) this.#plot.setData(this.data);
    else this.#plot = new uPlot(this.#options(), this.data, this.canvas);
    this.#writeLegend(null);
    this.#writeSummary();
    if (this.details.open) this.#writeTable();
  }

  #columns() {
    const { steps, axis } = this.#known;
    const x = axis === "time" ? (steps.columns.wall_s ?? []) : steps.columns.step;
    const floor = (values) =>
      this.spec.isLog ? values.map((v) => (v === null ? null : Math.max(v, this.spec.floor))) : values;
    const own = [],
      aligned = [x];
    for (const one of this.spec.series) {
      const values = one.of(steps, axis);
      if (Array.isArray(values)) aligned.push(floor(values.length ? values : new Array(x.length).fill(null)));
      else own.push([values.x, floor(values.y)]);
    }
    return own.length ? uPlot.join([aligned, ...own]) : aligned;
  }

  #options() {
    const style = getComputedStyle(document.documentElement);
    const color = (name) => style.getPropertyValue(`--${name}`).trim();
    const axis = {
      stroke: color("muted"),
      font: FONT,
      grid: { stroke: color("grid"), width: 1 },
      ticks: { show: false },
    };
    return {
      ...this.#size(),
      legend: { show: false },
      padding: [8, 10, 0, 0],
      cursor: { sync: { key: SYNC }, drag: { x: false, y: false, setScale: false }, y: false, points: { size: 6 } },
      scales: {
        x: { time: false },
        y: { distr: this.spec.isLog ? 3 : 1, range: (_, low, high) => rangeOf(this.spec, this.#thresholds, low, high) },
      },
      axes: [
        {
          ...axis,
          size: 26,
          space: 70,
          values: (_, ticks) => ticks.map((v) => (this.#known.axis === "time" ? duration(v) : count(v))),
        },
        {
          ...axis,
          size: 50,
          space: 28,
          ...(this.spec.isLog && { splits: (_, __, low, high) => powersOfTen(low, high), filter: (_, at) => at }),
          values: (_, ticks) => ticks.map((v) => (this.spec.tick ?? this.spec.format)(v)),
        },
      ],
      series: [
        {},
        ...this.spec.series.map((one) => ({
          stroke: color(`s${one.color}`),
          width: one.width ?? 1.5,
          dash: one.dash,
          spanGaps: true,
          alpha: one.alpha ?? 1,
          fill: one.fill ? `${color(`s${one.color}`)}${one.fill}` : undefined,
          points: { show: one.isPoints ?? false, size: 7, fill: color(`s${one.color}`) },
        })),
      ],
      hooks: {
        draw: [(plot) => drawThresholds(plot, this.spec, this.#thresholds, color)],
        setCursor: [(plot) => this.#writeLegend(plot.cursor.idx)],
      },
    };
  }

  /** Under the pointer, or the latest. */
  #writeLegend(index) {
    this.spec.series.forEach((one, i) => {
      const column = this.data[i + 1];
      const value = index === null || index === undefined ? latest(column) : column[index];
      setText(this.values[i], value === null || value === undefined ? NONE : this.spec.format(value));
    });
  }

  #writeSummary() {
    const place = this.spec.told ?? 0;
    const words = inWords(this.data[0], this.data[place + 1], this.spec.format, this.#known.axis);
    if (!words) return;
    setText(this.summary, words.span);
    this.canvas.setAttribute(
      "aria-label",
      `${this.spec.title}: ${this.spec.series[place].label} ${words.now}; ${words.span}`,
    );
  }

  #writeTable() {
    if (this.details.open && this.data) this.table.replaceChildren(asTable(this.data, this.spec, this.#known.axis));
  }
}

function latest(column) {
  for (let i = column.length - 1; i >= 0; i--) if (column[i] !== null && column[i] !== undefined) return column[i];
  return null;
}
