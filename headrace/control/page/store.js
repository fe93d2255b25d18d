/* The state of the page by topic, and the functions that render each topic. However fast data arrives, the screen is
   written at most four times a second, and only what has changed. */

const RENDER_INTERVAL_MS = 250;

export class Store {
  #values = new Map();
  #renderers = new Map();
  #dirty = new Set();
  #renderedAt = 0;
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
    const wait = Math.max(0, this.#renderedAt + RENDER_INTERVAL_MS - performance.now());
    setTimeout(() => requestAnimationFrame(() => this.#render()), wait);
  }

  /** Calls `render` after a change of any of `topics`, once for all of them. */
  on(topics, render) {
    for (const topic of topics) this.#renderers.set(topic, [...(this.#renderers.get(topic) ?? []), render]);
  }

  /** Unix time in seconds by control's clock. */
  now() {
    return Date.now() / 1000 + (this.get("clock-offset") ?? 0);
  }

  #render() {
    this.#isPlanned = false;
    this.#renderedAt = performance.now();
    const renderers = new Set([...this.#dirty].flatMap((topic) => this.#renderers.get(topic) ?? []));
    this.#dirty.clear();
    for (const render of renderers) render();
  }
}
