/* The live page: reads the state of the run once, then follows control's events; after a lost connection it reads what
   it has missed. Each part of the page renders from the store and does not know the others. */

import { RequestFailed, get, takeTokenFromAddress, token } from "./api.js";
import { Store } from "./store.js";
import { startCharts } from "./charts.js";
import { byId, setText } from "./dom.js";
import { startEvaluations } from "./evaluations.js";
import { startEvents } from "./events.js";
import { startKeyFigures } from "./key_figures.js";
import { startPipeline } from "./pipeline.js";
import { clock } from "./format.js";
import { startGroups } from "./groups.js";
import { startCommandButtons } from "./command_buttons.js";
import { startReplicas, startScale } from "./replicas.js";
import { startSettings } from "./settings.js";
import { Steering } from "./steering.js";
import { Steps } from "./steps.js";
import { follow } from "./event_stream.js";
import { startVerdict } from "./verdict.js";

const MAX_POINTS = 2000;
const RECENT_EVENTS = 200;

takeTokenFromAddress();
const store = new Store();
store.set("steps", new Steps());
store.set("axis", "step");
let again = () => {};
const steering = new Steering(store, () => again());
const groups = startGroups(store);
const settings = startSettings(store, steering);
const events = startEvents(store);
for (const start of [startVerdict, startKeyFigures, startCharts, startEvaluations, startPipeline]) start(store);
for (const start of [startCommandButtons, startReplicas, startScale]) start(store, steering);

function takeStatus(status) {
  const before = store.get("status");
  if (before && before.run !== status.run) location.reload();
  store.set("clock-offset", status.at - Date.now() / 1000);
  store.set("status", status);
}

/** Rows that arrive while the history is being read are added after it. */
let early = null;
function takeStep(row) {
  if (early) early.push(row);
  else {
    store.get("steps").append(row);
    store.touch("steps");
  }
}

async function readHistory() {
  const steps = store.get("steps");
  early = [];
  try {
    const after = steps.cursor === null ? "" : `&after=${encodeURIComponent(steps.cursor)}`;
    steps.merge(await get(`history?max_points=${MAX_POINTS}${after}`));
  } finally {
    const rows = early;
    early = null;
    rows.forEach(takeStep);
    store.touch("steps");
  }
}

const handlers = {
  status: takeStatus,
  replicas: (value) => store.set("replicas", value),
  step: takeStep,
  evaluation: (value) => {
    store.get("steps").evaluate(value);
    store.touch("steps");
  },
  group: groups.arrived,
  event: events.arrived,
};

/** Reads everything again, and of the history only the new rows. */
async function catchUp() {
  const reads = [
    get("status").then(takeStatus),
    get("replicas").then(handlers.replicas),
    readHistory(),
    get(`events/recent?limit=${RECENT_EVENTS}`).then(events.load),
    groups.load(),
    settings.load(),
  ];
  for (const read of await Promise.allSettled(reads)) {
    if (read.status === "rejected" && !(read.reason instanceof RequestFailed)) throw read.reason;
  }
}

const connectionText = {
  live: () => "live",
  reconnecting: (since) => `reconnecting since ${clock(since / 1000)}`,
  locked: () => "sign in to read",
};

again = follow({
  onOpen: catchUp,
  onEvent: (name, value) => handlers[name]?.(value),
  onState: ({ state, since }) => {
    byId("connection").dataset.state = state;
    setText(byId("connection-text"), connectionText[state](since));
    if (state === "locked")
      steering.signIn(token() ? "Control rejects this token." : "Reading this run requires its token.");
  },
});
