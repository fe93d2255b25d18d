/* The thresholds of a check as dashed lines, and a vertical range in which they are visible. */

/** The thresholds of one of control's checks, the warning first; an empty list without a check. */
export function thresholdsOf(check) {
  if (!check) return [];
  return ["warn", "alarm"].filter((level) => check[level] !== null).map((level) => ({ level, at: check[level] }));
}

/** The range of the data, the relevant thresholds, a margin, and the limits of the spec. */
export function rangeOf(spec, thresholds, low, high) {
  if (low === null || high === null) return [spec.isLog ? spec.floor : 0, 1];
  const warn = thresholds.find((one) => one.level === "warn")?.at;
  const isCrossed = warn !== undefined && low <= warn && warn <= high;
  const marks = thresholds.filter((one) => one.level === "warn" || isCrossed || spec.isLog).map((one) => one.at);
  const bottom = Math.min(low, spec.min ?? low, ...marks);
  const top = Math.max(high, spec.max ?? high, ...marks);
  if (spec.isLog) return [10 ** Math.floor(Math.log10(bottom)), 10 ** Math.ceil(Math.log10(top * 1.3))];
  const air = 0.06 * (top - bottom || Math.abs(top) || 1);
  return [bottom === spec.min ? bottom : bottom - air, top === spec.max ? top : top + air];
}

/** Ticks of a logarithmic axis, at most five. */
export function powersOfTen(low, high) {
  const first = Math.round(Math.log10(low));
  const last = Math.round(Math.log10(high));
  const every = Math.ceil((last - first + 1) / 5);
  return Array.from({ length: Math.floor((last - first) / every) + 1 }, (_, i) => 10 ** (first + i * every));
}

/** Dashed lines with their names. The names are beside each other, so close lines stay readable. */
export function drawThresholds(plot, spec, thresholds, color) {
  const { ctx, bbox } = plot;
  const pixels = devicePixelRatio;
  ctx.save();
  ctx.font = `${10 * pixels}px system-ui, sans-serif`;
  ctx.textAlign = "right";
  ctx.lineJoin = "round";
  thresholds.forEach(({ level, at }, place) => {
    const y = plot.valToPos(at, "y", true);
    if (!(y >= bbox.top - 1 && y <= bbox.top + bbox.height + 1)) return;
    ctx.strokeStyle = ctx.fillStyle = color(level);
    ctx.lineWidth = 1.25 * pixels;
    ctx.setLineDash(level === "warn" ? [5 * pixels, 4 * pixels] : [2 * pixels, 3 * pixels]);
    ctx.beginPath();
    ctx.moveTo(bbox.left, y);
    ctx.lineTo(bbox.left + bbox.width, y);
    ctx.stroke();
    const label = `${level} ${(spec.tick ?? spec.format)(at)}`;
    const right = bbox.left + bbox.width - (3 + 76 * place) * pixels;
    const baseline = y - bbox.top < 11 * pixels ? y + 11 * pixels : y - 4 * pixels;
    ctx.setLineDash([]);
    ctx.strokeStyle = color("panel");
    ctx.lineWidth = 3 * pixels;
    ctx.strokeText(label, right, baseline);
    ctx.fillText(label, right, baseline);
  });
  ctx.restore();
}
