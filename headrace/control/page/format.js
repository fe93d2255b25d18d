/* Numbers for people, with units; a missing value is a dash. */

export const NONE = "–";
const isNone = (value) => value === null || value === undefined || Number.isNaN(value);

/** With `digits` significant digits; very small and very large numbers with a power of ten. */
export function number(value, digits = 3) {
  if (isNone(value)) return NONE;
  if (value === 0) return "0";
  const size = Math.abs(value);
  if (size < 1e-3 || size >= 1e6)
    return value
      .toExponential(Math.max(0, digits - 2))
      .replace(/\.?0*e/, "e")
      .replaceAll("-", "−")
      .replace("+", "");
  if (Number.isInteger(value)) return String(value).replace("-", "−");
  return String(Number(value.toPrecision(Math.max(digits, Math.ceil(Math.log10(size)))))).replace("-", "−");
}

/** With a fixed number of decimals, so columns line up. */
export const fixed = (value, decimals = 2) => (isNone(value) ? NONE : value.toFixed(decimals).replace("-", "−"));

export const percent = (share, decimals = 0) => (isNone(share) ? NONE : `${(100 * share).toFixed(decimals)} %`);

/** For example 12.3 k for 12 345. */
export function count(value) {
  if (isNone(value)) return NONE;
  for (const [size, unit] of [
    [1e12, "T"],
    [1e9, "G"],
    [1e6, "M"],
    [1e4, "k"],
  ]) {
    if (Math.abs(value) >= size) return `${Number((value / (unit === "k" ? 1e3 : size)).toPrecision(3))} ${unit}`;
  }
  return String(Math.round(value));
}

export function bytes(value) {
  if (isNone(value)) return NONE;
  for (const [size, unit] of [
    [1 << 30, "GiB"],
    [1 << 20, "MiB"],
    [1 << 10, "KiB"],
  ]) {
    if (value >= size) return `${Number((value / size).toPrecision(3))} ${unit}`;
  }
  return `${value} B`;
}

export function milliseconds(value) {
  if (isNone(value)) return NONE;
  return value >= 1000 ? `${(value / 1000).toFixed(1)} s` : `${Math.round(value)} ms`;
}

/** For example 1 h 7 min for 4000 s. */
export function duration(seconds) {
  if (isNone(seconds)) return NONE;
  const s = Math.max(0, seconds);
  if (s < 10) return `${s.toFixed(s < 1 && s > 0 ? 1 : 0)} s`;
  if (s < 100) return `${Math.round(s)} s`;
  const minutes = Math.round(s / 60);
  if (minutes < 60) return `${minutes} min`;
  const hours = Math.floor(minutes / 60);
  if (hours < 48) return minutes % 60 ? `${hours} h ${minutes % 60} min` : `${hours} h`;
  return `${Math.floor(hours / 24)} d ${hours % 24} h`;
}

/** For example 40 ms, 1.3 s, or 2 min. */
export const shortTime = (seconds) => (seconds < 100 ? milliseconds(1000 * seconds) : duration(seconds));

export function clock(unixSeconds) {
  if (isNone(unixSeconds)) return NONE;
  const at = new Date(unixSeconds * 1000);
  const time = at.toLocaleTimeString("en-GB");
  return at.toDateString() === new Date().toDateString()
    ? time
    : `${at.toLocaleDateString("en-GB", { day: "numeric", month: "short" })} ${time}`;
}

export const signed = (value, decimals = 3) => (isNone(value) ? NONE : (value > 0 ? "+" : "") + fixed(value, decimals));

export const plural = (amount, word, words = `${word}s`) => `${amount} ${amount === 1 ? word : words}`;
