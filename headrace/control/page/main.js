/* The live page: reads what control knows once, then follows its events; after a broken connection it catches up. Each
   part of the page paints from the board and knows nothing of the others. */

import { Refused, get, takeTokenFromAddress, token } from "./api.js";
import { Board } from "./store.js";
import { startCharts } from "./chart_specs.js";
import { byId, setText } from "./dom.js";
import { startEvaluations } from "./evaluations.js";
import { startEvents } from "./events.js";
import { startFigures } from "./key_figures.js";
import { startFlow } from "./pipeline.js";
import { clock } from "./format.js";
import { startGroups } from "./groups.js";
import { startOrders } from "./command_buttons.js";
import { startReplicas, startScale } from "./replicas.js";
import { startSettings } from "./settings.js";
import { Steering } from "./steering.js";
import { Steps } from "./steps.js";
import { follow } from "./event_stream.js";
import { startVerdict } from "./verdict.js";

const MAX_POINTS = 2000;
const RECENT_EVENTS = 200;

takeTokenFromAddress();
const board = new Board();
board.set("steps", new Steps());
board.set("axis", "step");
let again = () => {};
const steering = new Steering(board, () => again());
const groups = startGroups(board);
const settings = startSettings(board, steering);
const events = startEvents(board);
for (const start of [startVerdict, startFigures, startCharts, startEvaluations, startFlow]) start(board);
for (const start of [startOrders, startReplicas, startScale]) start(board, steering);

function takeStatus(status) {
  const before = board.get("status");
  if (before && before.run !== status.run) location.reload();
  board.set("clock-offset", status.at - Date.now() / 1000);
  board.set("status", status);
}

/** Rows that came while the history was on its way are added after it. */
let early = null;
function takeStep(row) {
  if (early) early.push(row);
  else {
    board.get("steps").append(row);
    board.touch("steps");
  }
}

async function readHistory() {
  const steps = board.get("steps");
  early = [];
  try {
    const after = steps.cursor === null ? "" : `&after=${encodeURIComponent(steps.cursor)}`;
    steps.merge(await get(`history?max_points=${MAX_POINTS}${after}`));
  } finally {
    const rows = early;
    early = null;
    rows.forEach(takeStep);
    board.touch("steps");
  }
}

const takes = {
  status: takeStatus,
  replicas: (value) => board.set("replicas", value),
  step: takeStep,
  evaluation: (value) => {
    board.get("steps").evaluate(value);
    board.touch("steps");
  },
  group: groups.arrived,
  event: events.arrived,
};

/** Everything anew; of the history only what came since. */
async function catchUp() {
  const reads = [
    get("status").then(takeStatus),
    get("replicas").then(takes.replicas),
    readHistory(),
    get(`events/recent?limit=${RECENT_EVENTS}`).then(events.load),
    groups.load(),
    settings.load(),
  ];
  for (const read of await Promise.allSettled(reads)) {
    if (read.status === "rejected" && !(read.reason instanceof Refused)) throw read.reason;
  }
}

const linkSays = {
  live: () => "live",
  reconnecting: (since) => `reconnecting since ${clock(since / 1000)}`,
  locked: () => "sign in to read",
};

again = follow({
  onOpen: catchUp,
  onEvent: (name, value) => takes[name]?.(value),
  onState: ({ state, since }) => {
    byId("link").dataset.state = state;
    setText(byId("link-text"), linkSays[state](since));
    if (state === "locked")
      steering.signIn(token() ? "Control does not take this token." : "This run is only shown to who has its token.");
  },
});
