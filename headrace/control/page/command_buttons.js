/* The buttons that pause, resume, checkpoint, evaluate and stop the run. */

import { byId, el, setText } from "./dom.js";
import { confirmed } from "./steering.js";

export function startCommandButtons(store, steering) {
  const button = (text, act, look = "") => el("button", { type: "button", class: look, onclick: act }, text);
  const pause = button(
    "Pause",
    () => steering.send("POST", store.get("status")?.is_paused ? "resume" : "pause"),
    "primary",
  );
  const checkpoint = button("Checkpoint", () => steering.send("POST", "checkpoint"));
  const evaluate = button("Evaluate", () => steering.send("POST", "evaluations"));
  const stop = button(
    "Stop…",
    async () => {
      const status = store.get("status");
      const text = `${status?.run ?? "The run"} stops after the present step and writes a checkpoint. It can be started again from there.`;
      if (await confirmed("Stop the run?", text, "Stop the run")) await steering.send("POST", "stop");
    },
    "danger",
  );
  const signIn = button("Sign in to control the run", () => steering.signIn(), "primary");

  store.on(["status", "steering"], () => {
    const status = store.get("status");
    const wanted = steering.maySteer ? [pause, checkpoint, evaluate, stop] : [signIn];
    const place = byId("commands");
    if (place.firstChild !== wanted[0]) place.replaceChildren(...wanted);
    if (!status) return;
    const isOver = status.verdict.level === "ended";
    setText(pause, status.is_paused ? "Resume" : "Pause");
    setText(stop, status.is_stopping ? "Stopping…" : "Stop…");
    for (const one of [pause, checkpoint, evaluate]) one.disabled = isOver;
    stop.disabled = isOver || status.is_stopping;
  });
}
