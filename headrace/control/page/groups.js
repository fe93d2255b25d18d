/* The list of the group browser: recent groups by kind, state and replica. The newest comes first, but the list does not
   move while the pointer or the focus is in it. */

import { RequestFailed, get } from "./api.js";
import { byId, el, keep, setHidden, setText } from "./dom.js";
import { clock, fixed, plural } from "./format.js";
import { openGroup } from "./group_view.js";

const MOST = 60;
const STATE_TEXT = { trained: "trained", uniform: "uniform rewards", stale: "too stale", evaluated: "evaluated" };
const groupAddress = (id) => `#group/${encodeURIComponent(id)}`;

export function startGroups(store) {
  const form = byId("group-filters"),
    list = byId("group-list");
  let shown = [],
    newer = [],
    numKept = 0,
    opened = null;

  async function load() {
    const wanted = new URLSearchParams([...new FormData(form)].filter(([, value]) => value));
    wanted.set("limit", String(MOST));
    try {
      const answer = await get(`groups?${wanted}`);
      shown = answer.groups;
      newer = [];
      numKept = answer.num_kept;
      store.touch("groups");
      if (opened === null && shown.length) {
        opened = (shown.find((one) => one.state === "trained") ?? shown[0]).id;
        openGroup(opened, false);
      }
    } catch (error) {
      if (!(error instanceof RequestFailed)) throw error;
      setText(byId("groups-summary"), error.message);
    }
  }

  function arrived(group) {
    const filters = Object.fromEntries(new FormData(form));
    if (Object.entries(filters).some(([name, value]) => value && group[name] !== value)) return;
    newer = [group, ...newer.filter((one) => one.id !== group.id)].slice(0, MOST);
    store.touch("groups");
  }

  function paint() {
    const isHeld = list.matches(":hover") || list.contains(document.activeElement);
    if (!isHeld && newer.length) {
      const fresh = new Set(newer.map((one) => one.id));
      shown = [...newer, ...shown.filter((one) => !fresh.has(one.id))].slice(0, MOST);
      newer = [];
    }
    keep(list, shown, (one) => one.id, make, write);
    for (const item of list.children) {
      if (item.dataset.key === opened) item.firstChild.setAttribute("aria-current", "true");
      else item.firstChild.removeAttribute("aria-current");
    }
    const waiting = newer.length
      ? `; ${newer.length} newer ${newer.length === 1 ? "appears" : "appear"} when you leave the list`
      : "";
    setText(
      byId("groups-summary"),
      shown.length
        ? `The newest ${shown.length} that match${numKept ? `, of ${numKept} kept` : ""}${waiting}.`
        : "",
    );
    setHidden(byId("groups-empty"), shown.length > 0);
    byId("browser").classList.toggle("is-empty", !shown.length && opened === null);
  }

  function route() {
    if (!location.hash.startsWith("#group/")) return;
    opened = decodeURIComponent(location.hash.slice("#group/".length));
    openGroup(opened, true);
    paint();
  }

  form.addEventListener("change", load);
  for (const leaving of ["pointerleave", "focusout"]) list.addEventListener(leaving, () => store.touch("groups"));
  window.addEventListener("hashchange", route);
  store.on(["groups"], paint);
  store.on(["replicas"], () => {
    const select = form.elements.replica,
      ids = store.get("replicas").replicas.map((one) => one.id);
    const known = new Set([...select.options].map((one) => one.value));
    for (const id of ids) if (!known.has(id)) select.append(el("option", { value: id }, id));
  });
  route();
  return { load, arrived };
}

function make(group) {
  return el(
    "li",
    {},
    el(
      "a",
      { href: groupAddress(group.id) },
      el("span", { class: "line" }, el("b"), el("span", { class: "state" }), el("time")),
      el("span", { class: "prompt" }),
      el("span", { class: "line muted" }, el("span", { class: "rewards" }), el("span")),
    ),
  );
}

function write(item, group) {
  const [head, prompt, foot] = item.firstChild.children;
  item.dataset.state = group.state;
  setText(head.children[0], `step ${group.step}`);
  setText(head.children[1], STATE_TEXT[group.state] ?? group.state);
  setText(head.children[2], clock(group.decided_at));
  setText(prompt, group.prompt || "(a prompt without text)");
  setText(foot.children[0], rewardsText(group.rewards));
  setText(foot.children[1], group.replica);
}

const rewardsText = (rewards) =>
  `${plural(rewards.length, "completion")}, reward ${fixed(rewards.reduce((sum, one) => sum + one, 0) / Math.max(1, rewards.length), 2)}`;
