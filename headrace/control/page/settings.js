/* Settings that may change while the run goes on: what stands, what was configured, and control's answer to a change. */

import { Refused, get } from "./api.js";
import { byId, el, keep, setText } from "./dom.js";
import { number } from "./format.js";

const LOOK_AGAIN_MS = 2000;
const value = (one) => (one === null ? "none" : number(one, 6));

export function startSettings(board, steering) {
  const form = byId("settings-form"),
    rows = byId("settings-rows");
  const say = (text, isGood = false) => {
    setText(byId("settings-answer"), text);
    byId("settings-answer").classList.toggle("good", isGood);
  };

  async function load() {
    try {
      board.set("settings", await get("settings"));
    } catch (refused) {
      if (!(refused instanceof Refused)) throw refused;
    }
  }

  async function change(settings) {
    const body = { version: board.get("settings").version, settings };
    const done = await steering.order("PATCH", "settings", body, async (text, status) => {
      if (status === 409) await load();
      say(status === 409 ? `${text} What stands now is shown above.` : text);
    });
    if (!done) return;
    for (const input of rows.querySelectorAll("input")) input.value = "";
    say("Accepted: it counts from the learner's next step.", true);
    await load();
  }

  form.addEventListener("submit", (event) => {
    event.preventDefault();
    if (!steering.maySteer) return steering.signIn();
    const changes = {};
    for (const input of rows.querySelectorAll("input")) {
      const text = input.value.trim();
      if (!text) continue;
      const wanted = text === "none" ? null : Number(text);
      if (Number.isNaN(wanted)) {
        say(`${input.name}: ${text} is no number`);
        return input.focus();
      }
      changes[input.name] = wanted;
    }
    if (!Object.keys(changes).length) return say("Nothing to change: write a number beside a setting.");
    return change(changes);
  });

  board.on(["settings", "steering"], () => {
    setText(byId("settings-apply"), steering.maySteer ? "Apply from the next step on" : "Sign in to change them");
    const answer = board.get("settings");
    if (!answer) return;
    const settings = Object.entries(answer.settings).map(([name, one]) => ({ name, ...one }));
    keep(
      rows,
      settings,
      (one) => one.name,
      (one) => makeRow(one, () => change({ [one.name]: null })),
      writeRow,
    );
    const { version, applied_version: applied } = answer;
    setText(
      byId("settings-says"),
      version === 0
        ? "As configured."
        : applied === version
          ? `Version ${version}, which the learner works with.`
          : `Version ${version}; the learner still works with ${applied}.`,
    );
    setText(byId("config"), JSON.stringify(answer.config, null, 2));
  });
  setInterval(() => {
    const known = board.get("settings"),
      wanted = board.get("status")?.settings_version;
    if (known && (known.version !== wanted || known.applied_version !== known.version) && !document.hidden) load();
  }, LOOK_AGAIN_MS);
  return { load };
}

function makeRow(one, reset) {
  const id = `setting-${one.name.replaceAll(".", "-")}`;
  return el(
    "tr",
    {},
    el("th", { scope: "row" }, el("label", { for: id }, one.name), el("p", { class: "muted" })),
    el("td", { class: "n", "data-label": "Now" }),
    el("td", { class: "n", "data-label": "Configured" }),
    el(
      "td",
      {},
      el("input", { id, name: one.name, inputmode: "decimal", autocomplete: "off", size: "10" }),
      el(
        "button",
        { type: "button", class: "quiet needs-token", onclick: reset, "aria-label": `${one.name} as configured` },
        "as configured",
      ),
    ),
  );
}

function writeRow(row, one) {
  const [name, now, configured, act] = row.cells;
  setText(name.lastChild, one.description);
  setText(now, value(one.value));
  setText(configured, value(one.configured));
  row.classList.toggle("changed", one.value !== one.configured);
  act.lastChild.disabled = one.value === one.configured;
}
