/* The table of replicas, and the form above it that sets how many to keep. Rows are updated in place. */

import { byId, el, keep, setHidden, setText } from "./dom.js";
import { bytes, clock, count, duration, milliseconds, percent, plural } from "./format.js";
import { confirmed } from "./steering.js";

const COLUMNS = [
  { name: "Replica", of: (one) => one.id },
  { name: "State", of: (one) => one.state },
  { name: "Weights", of: (one) => `v${one.weight_version}`, isNumber: true },
  { name: "Version lag", of: (one) => (one.versions_behind ? plural(one.versions_behind, "version") : "0"), isNumber: true },
  { name: "In flight", of: (one) => count(one.groups_in_flight), isNumber: true },
  { name: "Groups", of: (one) => count(one.groups_committed), isNumber: true },
  { name: "Tokens", of: (one) => count(one.tokens_generated), isNumber: true },
  { name: "Tokens/s", of: (one) => count(one.tokens_per_s), isNumber: true },
  { name: "Idle", of: (one) => percent(one.idle_share), isNumber: true },
  { name: "Swaps", of: (one) => count(one.swap_pauses.count), isNumber: true },
  { name: "Pause p50", of: (one) => milliseconds(one.swap_pauses.p50_ms), isNumber: true },
  { name: "Pause p95", of: (one) => milliseconds(one.swap_pauses.p95_ms), isNumber: true },
  { name: "Latest pause", of: (one) => milliseconds(one.swap_pauses.latest_ms), isNumber: true },
  { name: "Fetched", of: (one) => (one.swap_pauses.count ? bytes(one.swap_pauses.fetched_bytes) : "–"), isNumber: true },
  { name: "Seen for", of: (one, now) => duration(now - one.seen_since_at), isNumber: true },
];

export function startReplicas(store, steering) {
  const table = byId("replica-table");
  table.tHead.append(
    el(
      "tr",
      {},
      ...COLUMNS.map((one) => el("th", { scope: "col", class: one.isNumber ? "n" : null }, one.name)),
      el("th", { scope: "col" }, el("span", { class: "hidden" }, "Drain")),
    ),
  );
  const body = table.tBodies[0];
  const drain = async (id) => {
    const text = `${id} finishes the groups it has in flight, takes no more, and exits. The launcher starts another one if the target is higher.`;
    if (await confirmed(`Drain ${id}?`, text, "Drain"))
      await steering.send("POST", `replicas/${encodeURIComponent(id)}/drain`);
  };

  store.on(["replicas"], () => {
    const { replicas } = store.get("replicas");
    keep(
      body,
      replicas,
      (one) => one.id,
      (one) => makeRow(one, drain),
      (row, one) => writeRow(row, one, store.now()),
    );
    setHidden(table, replicas.length === 0);
    setHidden(byId("replicas-empty"), replicas.length > 0);
    setText(byId("replicas-summary"), weightsText(replicas));
  });
}

function makeRow(one, drain) {
  return el(
    "tr",
    {},
    ...COLUMNS.map((column, i) =>
      el(i ? "td" : "th", { scope: i ? null : "row", class: column.isNumber ? "n" : null, "data-label": column.name }),
    ),
    el(
      "td",
      { class: "act" },
      el("button", { class: "quiet drain", onclick: () => drain(one.id), "aria-label": `Drain ${one.id}` }, "Drain…"),
    ),
  );
}

function writeRow(row, one, now) {
  COLUMNS.forEach((column, i) => setText(row.cells[i], column.of(one, now)));
  const why = one.reason ? `${one.state}: ${one.reason}` : one.state;
  if (one.state !== "running") setText(row.cells[1], why);
  row.dataset.state = one.state;
  row.classList.toggle("behind", one.versions_behind > 1);
  row.lastChild.firstChild.disabled = one.state === "draining";
}

/** How many replicas have the newest weights, and how long a swap pauses them. */
function weightsText(replicas) {
  if (!replicas.length) return "";
  const newest = Math.max(...replicas.map((one) => one.weight_version));
  const current = replicas.filter((one) => one.weight_version === newest).length;
  const pauses = replicas
    .map((one) => one.swap_pauses.p50_ms)
    .filter((one) => one !== null)
    .sort((a, b) => a - b);
  const paused = pauses.length ? `; a swap pauses ${milliseconds(pauses[Math.floor(pauses.length / 2)])} (p50)` : "";
  return `${current} of ${replicas.length} have the newest weights among them, v${newest}${paused}. First seen at ${clock(Math.min(...replicas.map((one) => one.seen_since_at)))}.`;
}

export function startScale(store, steering) {
  const input = byId("scale-number");
  let isTouched = false;
  input.addEventListener("input", () => {
    isTouched = true;
  });

  store.on(["status", "steering"], () => {
    const counts = store.get("status")?.replicas;
    setText(byId("scale-submit"), steering.maySteer ? "Scale" : "Sign in to scale");
    setHidden(byId("scale-clear"), !steering.maySteer || !counts || counts.desired === null);
    if (!counts) return;
    setText(byId("scale-summary"), scaleText(counts));
    if (!isTouched && document.activeElement !== input) input.value = String(counts.desired ?? counts.live);
  });

  byId("scale").addEventListener("submit", async (event) => {
    event.preventDefault();
    if (!steering.maySteer) return steering.signIn();
    const number = Number(input.value);
    const text = "All replicas end: generation stops and the learner waits until you set another target.";
    if (number === 0 && input.value !== "" && !(await confirmed("Scale to 0?", text, "Scale to 0"))) return;
    if (await steering.send("PUT", "replicas/desired", { replicas: input.value === "" ? null : number }))
      isTouched = false;
  });
  byId("scale-clear").addEventListener("click", async () => {
    if (await steering.send("PUT", "replicas/desired", { replicas: null })) isTouched = false;
  });
}

function scaleText({ live, running, desired, advised, advice, launcher }) {
  const parts = [
    `${plural(live, "replica")} live, ${running} running; ${desired === null ? "no target set" : `target ${desired}`}.`,
  ];
  if (advised !== null) parts.push(`Advised: ${advised}${advice ? ` (${advice})` : ""}.`);
  if (!launcher) parts.push("headrace up is not running, so a new target would have no effect.");
  return parts.join(" ");
}
