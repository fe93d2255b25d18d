/* What the page knows, by topic, and who paints it. However fast news arrives, the screen is written a few times a
   second, and only what has changed. */

const PAINT_EVERY_MS = 250;

export class Board {
  #values = new Map();
  #painters = new Map();
  #dirty = new Set();
  #paintedAt = 0;
  #isPlanned = false;

  get(topic) {
    return this.#values.get(topic);
  }

  set(topic, value) {
    this.#values.set(topic, value);
    this.touch(topic);
  }

  /** The value of `topic` has changed in place. */
  touch(topic) {
    this.#dirty.add(topic);
    if (this.#isPlanned) return;
    this.#isPlanned = true;
    const wait = Math.max(0, this.#paintedAt + PAINT_EVERY_MS - performance.now());
    setTimeout(() => requestAnimationFrame(() => this.#paint()), wait);
  }

  /** `paint` runs after a change of any of `topics`, once for all of them. */
  on(topics, paint) {
    for (const topic of topics) this.#painters.set(topic, [...(this.#painters.get(topic) ?? []), paint]);
  }

  /** Seconds since 1970 by control's clock. */
  now() {
    return Date.now() / 1000 + (this.get("clock-offset") ?? 0);
  }

  #paint() {
    this.#isPlanned = false;
    this.#paintedAt = performance.now();
    const painters = new Set([...this.#dirty].flatMap((topic) => this.#painters.get(topic) ?? []));
    this.#dirty.clear();
    for (const paint of painters) paint();
  }
}
