/* The pipeline as a row of stages, each with its content, and which side waits for the other. */

import { byId, el, keep, setHidden, setText } from "./dom.js";
import { count, percent, plural } from "./format.js";

export function startPipeline(store) {
  store.on(["status", "replicas"], () => {
    const status = store.get("status");
    if (!status) return;
    keep(byId("stages"), stages(status), (one) => one.name, makeStage, writeStage);
    const waits = presentWaits(status);
    keep(
      byId("waits"),
      waits,
      (one) => one.who,
      () => el("li", {}, el("b"), " ", el("span")),
      (item, one) => {
        setText(item.firstChild, one.who);
        setText(item.lastChild, one.text);
      },
    );
    setHidden(byId("waits"), waits.length === 0);
    setText(byId("pipeline-summary"), bottleneck(status));
  });
}

function stages({ queues, replicas, rates, phase, weight_version: version, counts }) {
  const waiting = Math.max(0, queues.open_tickets - queues.leased_tickets);
  return [
    {
      name: "Tickets",
      value: count(waiting),
      unit: "waiting",
      note: `${queues.leased_tickets} in flight${queues.evaluation_tickets ? `, ${queues.evaluation_tickets} for an evaluation` : ""}`,
    },
    {
      name: "Replicas",
      value: String(replicas.running),
      unit: "running",
      note: idle(rates.replicas_idle_share, "for tickets"),
      isIdle: rates.replicas_idle_share > 0.3,
    },
    {
      name: "Scored groups",
      value: count(queues.group_stream_length),
      unit: "in the stream",
      note: "waiting, in training, or kept until checkpointed twice",
    },
    {
      name: "Learner",
      value: phase,
      isWord: true,
      note: idle(rates.learner_idle_share, "for groups"),
      isIdle: rates.learner_idle_share > 0.3,
    },
    { name: "Weights", value: `v${version}`, note: `from ${count(counts.trained)} trained groups; sent to the replicas` },
  ];
}

const idle = (share, what) => (share === null ? "not measured yet" : `idle ${percent(share)}, waiting ${what}`);

function bottleneck({ rates }) {
  const { learner_idle_share: learner, replicas_idle_share: replicas } = rates;
  if (learner === null && replicas === null) return "Idle times are known after the first steps.";
  if (learner < 0.1 && replicas < 0.1) return "Neither side waits for the other.";
  return learner > replicas
    ? `The learner waits for the replicas ${percent(learner)} of its time.`
    : `The replicas wait for the learner ${percent(replicas)} of their time.`;
}

/** One line for each reason; replicas that wait for the same share a line. */
function presentWaits({ waits: standing, reason }) {
  const byText = new Map();
  const isKnown = !reason || standing.some((one) => one.component === "learner");
  for (const { component, text } of isKnown ? standing : [{ component: "learner", text: reason }, ...standing])
    byText.set(text, [...(byText.get(text) ?? []), component]);
  return [...byText]
    .map(([text, who]) => ({ who: who.length > 3 ? plural(who.length, "replica") : who.join(", "), text }))
    .slice(0, 8);
}

function makeStage() {
  return el(
    "li",
    {},
    el("span", { class: "name" }),
    el("span", { class: "value" }, el("b"), el("span", { class: "unit" })),
    el("span", { class: "note" }),
  );
}

function writeStage(item, one) {
  const [name, value, note] = item.children;
  setText(name, one.name);
  setText(value.firstChild, one.value);
  setText(value.lastChild, one.unit ? ` ${one.unit}` : "");
  setText(note, one.note);
  item.classList.toggle("idle", Boolean(one.isIdle));
  item.classList.toggle("word", Boolean(one.isWord));
}
