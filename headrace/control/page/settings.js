/* Settings that can change during the run: current value, configured value, and control's response to a change. */

import { RequestFailed, get } from "./api.js";
import { byId, el, keep, setText } from "./dom.js";
import { number } from "./format.js";

const REFRESH_INTERVAL_MS = 2000;
const value = (one) => (one === null ? "none" : number(one, 6));

export function startSettings(store, steering) {
  const form = byId("settings-form"),
    rows = byId("settings-rows");
  const showMessage = (text, isGood = false) => {
    setText(byId("settings-message"), text);
    byId("settings-message").classList.toggle("good", isGood);
  };

  async function load() {
    try {
      store.set("settings", await get("settings"));
    } catch (error) {
      if (!(error instanceof RequestFailed)) throw error;
    }
  }

  async function change(settings) {
    const body = { version: store.get("settings").version, settings };
    const done = await steering.send("PATCH", "settings", body, async (text, status) => {
      if (status === 409) await load();
      showMessage(status === 409 ? `${text} The present settings are shown above.` : text);
    });
    if (!done) return;
    for (const input of rows.querySelectorAll("input")) input.value = "";
    showMessage("Accepted. The learner applies it at its next step.", true);
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
        showMessage(`${input.name}: ${text} is not a number`);
        return input.focus();
      }
      changes[input.name] = wanted;
    }
    if (!Object.keys(changes).length) return showMessage("Nothing to change. Enter a number beside a setting.");
    return change(changes);
  });

  store.on(["settings", "steering"], () => {
    setText(byId("settings-apply"), steering.maySteer ? "Apply at the next step" : "Sign in to change settings");
    const answer = store.get("settings");
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
      byId("settings-summary"),
      version === 0
        ? "As configured."
        : applied === version
          ? `Version ${version}, applied by the learner.`
          : `Version ${version}; the learner still uses ${applied}.`,
    );
    setText(byId("config"), JSON.stringify(answer.config, null, 2));
  });
  setInterval(() => {
    const known = store.get("settings"),
      wanted = store.get("status")?.settings_version;
    if (known && (known.version !== wanted || known.applied_version !== known.version) && !document.hidden) load();
  }, REFRESH_INTERVAL_MS);
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
        { type: "button", class: "quiet needs-token", onclick: reset, "aria-label": `Reset ${one.name}` },
        "Reset",
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
