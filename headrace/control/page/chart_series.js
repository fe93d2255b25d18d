/* Series of charts: columns of the run's steps as they are, and those that are computed from them. */

/** The column with that name; empty if no step has it. */
export const column = (name) => (steps) => steps.columns[name] ?? [];

/** The mean over a window of 2 % of the values, and at least five. */
export function runningMean(values) {
  const width = Math.max(5, Math.round(values.length / 50));
  const means = [];
  let sum = 0,
    number = 0;
  values.forEach((value, i) => {
    if (value !== null) {
      sum += value;
      number += 1;
    }
    const left = values[i - width];
    if (i >= width && left !== null) {
      sum -= left;
      number -= 1;
    }
    means.push(number ? sum / number : null);
  });
  return means;
}

/** Held-out accuracy at the evaluated steps; on the time axis at the time of that step. */
export function evaluated(steps, axis) {
  const { step, wall_s: wall } = steps.columns;
  const place = (at) => {
    if (axis === "step") return at;
    const i = step.findLastIndex((one) => one <= at);
    return i < 0 ? 0 : wall[i];
  };
  return { x: steps.evaluations.map((one) => place(one.step)), y: steps.evaluations.map((one) => one.held_out) };
}

/** From the running total over ten rows, which smooths the jump of every group. */
export function generatedRate(steps) {
  const { run_generated_tokens: total, wall_s: wall } = steps.columns;
  if (!total || !wall) return [];
  return total.map((value, i) => {
    const from = Math.max(0, i - 10),
      lasted = wall[i] - wall[from];
    return lasted > 0 && value !== null && total[from] !== null ? Math.max(0, (value - total[from]) / lasted) : null;
  });
}

/** One column divided by another. */
export function ratio(steps, top, bottom) {
  const [above, below] = [steps.columns[top], steps.columns[bottom]];
  return above && below ? above.map((value, i) => (value === null || !below[i] ? null : value / below[i])) : [];
}
