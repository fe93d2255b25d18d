/* The visible range of the horizontal axis, `{min, max}` in its unit; null stands for the whole run. Pure. */

/** Half or twice the visible range, around `at`; null once it covers the whole run. */
export function zoomBy(factor, zoom, whole, at) {
  const { min, max } = zoom ?? whole;
  const width = (max - min) * factor;
  if (width >= whole.max - whole.min) return null;
  const start = Math.min(Math.max(at - width / 2, whole.min), whole.max - width);
  return { min: start, max: start + width };
}

/** The rows of `data` (columns, the horizontal axis first) that are visible. */
export function visibleRows(data, zoom) {
  if (!zoom) return data;
  const isVisible = data[0].map((x) => zoom.min <= x && x <= zoom.max);
  return data.map((column) => column.filter((_, i) => isVisible[i]));
}
