/* Control's server-sent events, read with fetch because an EventSource cannot send a token. Reconnects as long as the page
   is open, with growing pauses; a stream that is silent for too long counts as broken. */

import { RequestFailed, authorization } from "./api.js";

const SILENT_MS = 30_000;
const FIRST_WAIT_MS = 500;
const LONGEST_WAIT_MS = 10_000;

/**
 * `onOpen()` after every connect, `onEvent(name, value)` per event, `onState({state, since})` with `live`,
 * `reconnecting` or `locked` (control requires a token). Returns `again()`, which reconnects at once.
 */
export function follow({ onOpen, onEvent, onState }) {
  let wake = () => {};
  let abort = new AbortController();

  async function run() {
    let wait = FIRST_WAIT_MS;
    let since = Date.now();
    for (;;) {
      abort = new AbortController();
      try {
        await read(
          abort,
          () => {
            wait = FIRST_WAIT_MS;
            onState({ state: "live", since: Date.now() });
            onOpen();
          },
          onEvent,
        );
        since = Date.now();
      } catch (error) {
        if (wait === FIRST_WAIT_MS) since = Date.now();
        if (error instanceof RequestFailed && error.status === 401) {
          onState({ state: "locked", since });
          await new Promise((resolve) => {
            wake = resolve;
          });
          continue;
        }
      }
      onState({ state: "reconnecting", since });
      await new Promise((resolve) => {
        wake = resolve;
        setTimeout(resolve, wait * (0.75 + Math.random() / 2));
      });
      wait = Math.min(2 * wait, LONGEST_WAIT_MS);
    }
  }
  run();
  return function again() {
    abort.abort();
    wake();
  };
}

async function read(abort, opened, onEvent) {
  let watchdog = setTimeout(() => abort.abort(), SILENT_MS);
  try {
    const answer = await fetch("events", {
      headers: { ...authorization(), Accept: "text/event-stream" },
      signal: abort.signal,
      cache: "no-store",
    });
    if (!answer.ok) throw new RequestFailed(answer.status, `control answered ${answer.status}`);
    opened();
    const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
    let rest = "";
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      clearTimeout(watchdog);
      watchdog = setTimeout(() => abort.abort(), SILENT_MS);
      const blocks = (rest + value).replaceAll("\r\n", "\n").split("\n\n");
      rest = blocks.pop();
      for (const block of blocks) emit(block, onEvent);
    }
  } finally {
    clearTimeout(watchdog);
    abort.abort();
  }
}

function emit(block, onEvent) {
  let name = "message";
  const lines = [];
  for (const line of block.split("\n")) {
    if (line.startsWith("event:")) name = line.slice(6).trim();
    else if (line.startsWith("data:")) lines.push(line.slice(5).trimStart());
  }
  if (!lines.length) return;
  let value;
  try {
    value = JSON.parse(lines.join("\n"));
  } catch {
    return;
  }
  onEvent(name, value);
}
