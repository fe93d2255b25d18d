/* The steps of the run as columns of equal length, and its evaluations. A learner that resumes from a checkpoint repeats
   steps: the later row counts. Beyond `MAX_ROWS` rows the older half is thinned. */

const MAX_ROWS = 4000;

export class Steps {
  columns = { step: [] };
  evaluations = [];
  cursor = null;

  get length() {
    return this.columns.step.length;
  }

  latest(name) {
    const column = this.columns[name];
    for (let i = (column?.length ?? 0) - 1; i >= 0; i--) if (column[i] !== null) return column[i];
    return null;
  }

  /** Adds a response of `/history`. */
  merge(history) {
    const names = Object.keys(history.steps);
    if (this.length === 0) this.columns = { step: [], ...history.steps };
    else
      for (let i = 0; i < (history.steps.step ?? []).length; i++) {
        this.append(Object.fromEntries(names.map((name) => [name, history.steps[name][i]])));
      }
    for (const evaluation of history.evaluations) this.evaluate(evaluation);
    this.cursor = history.cursor;
  }

  append(row) {
    if (typeof row.step !== "number") return;
    const { step, at } = this.columns;
    const known = step.lastIndexOf(row.step);
    if (known >= 0 && at && at[known] === row.at) return;
    if (step.length && step[step.length - 1] >= row.step) {
      const keep = step.findIndex((one) => one >= row.step);
      for (const column of Object.values(this.columns)) column.length = keep;
      this.evaluations = this.evaluations.filter((one) => one.step < row.step);
    }
    const length = step.length;
    for (const name of Object.keys(row)) this.columns[name] ??= new Array(length).fill(null);
    for (const [name, column] of Object.entries(this.columns)) {
      column.push(typeof row[name] === "number" ? row[name] : null);
    }
    if (step.length > MAX_ROWS) this.#thin();
  }

  evaluate(evaluation) {
    const others = this.evaluations.filter((one) => one.step !== evaluation.step);
    if (evaluation.is_best) for (const one of others) one.is_best = false;
    this.evaluations = [...others, evaluation].sort((a, b) => a.step - b.step);
  }

  #thin() {
    const half = this.length / 2;
    for (const [name, column] of Object.entries(this.columns)) {
      this.columns[name] = column.filter((_, i) => i >= half || i % 2 === 0);
    }
  }
}
