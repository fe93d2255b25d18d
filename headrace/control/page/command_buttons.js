/* Pause, resume, checkpoint, evaluate, stop. */

import { byId, el, setText } from "./dom.js";
import { confirmed } from "./steering.js";

export function startOrders(board, steering) {
  const button = (text, act, look = "") => el("button", { type: "button", class: look, onclick: act }, text);
  const pause = button(
    "Pause",
    () => steering.order("POST", board.get("status")?.is_paused ? "resume" : "pause"),
    "primary",
  );
  const checkpoint = button("Checkpoint", () => steering.order("POST", "checkpoint"));
  const evaluate = button("Evaluate", () => steering.order("POST", "evaluations"));
  const stop = button(
    "Stop…",
    async () => {
      const status = board.get("status");
      const text = `${status?.run ?? "The run"} ends after the step in progress, with a checkpoint. The same run can be started again from there.`;
      if (await confirmed("Stop the run?", text, "Stop the run")) await steering.order("POST", "stop");
    },
    "danger",
  );
  const signIn = button("Sign in to steer", () => steering.signIn(), "primary");

  board.on(["status", "steering"], () => {
    const status = board.get("status");
    const wanted = steering.maySteer ? [pause, checkpoint, evaluate, stop] : [signIn];
    const place = byId("orders");
    if (place.firstChild !== wanted[0]) place.replaceChildren(...wanted);
    if (!status) return;
    const isOver = status.verdict.level === "ended";
    setText(pause, status.is_paused ? "Resume" : "Pause");
    setText(stop, status.is_stopping ? "Stopping…" : "Stop…");
    for (const one of [pause, checkpoint, evaluate]) one.disabled = isOver;
    stop.disabled = isOver || status.is_stopping;
  });
}
