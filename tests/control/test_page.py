"""Controlling a run by the live page: sign-in, live numbers, commands, settings, restarts of control."""

import contextlib
import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
import redis

from headrace.common.http.addresses import bearer_header
from headrace.common.redis.keys import Keys
from headrace.common.wire import encode
from headrace.common.wire.desired_state import CHECKPOINTS, DESIRED_REPLICAS, EVALUATIONS, PAUSED, SETTINGS, STOP
from headrace.control.http.page import PAGE
from tests.support.fake_services import until
from tests.support.page_in_chromium import (
    TOKEN,
    ControlProcess,
    a_browser,
    a_control,
    a_page,
    add_event,
    add_group,
    add_row,
    keep_shot,
    open_page,
)
from tests.support.seeded_run import evaluation_row, group_sample, heartbeat, seed_run, step_rows

NUM_STEPS = 40


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with a_browser() as opened:
        yield opened


@pytest.fixture(scope="module")
def drained() -> Iterator[tuple[str, list[tuple[str, str]]]]:
    """A replica's address, and what is asked of it: paths and who asks."""
    asked: list[tuple[str, str]] = []

    class Replica(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked.append((self.path, self.headers.get("Authorization", "")))
            self.send_response(200)
            self.send_header("Content-Length", "2")
            self.end_headers()
            self.wfile.write(b"{}")

        def log_message(self, *_: object) -> None:
            return

    with ThreadingHTTPServer(("127.0.0.1", 0), Replica) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}", asked
        server.shutdown()


@pytest.fixture(scope="module")
def run_keys() -> Keys:
    return Keys("test-page")


@pytest.fixture(scope="module")
def control(redis_url: str, run_keys: Keys, drained: tuple[str, list[tuple[str, str]]]) -> Iterator[str]:
    with redis.Redis.from_url(redis_url) as client:
        seed_run(client, run_keys, NUM_STEPS, replica_url=drained[0])
    with a_control(redis_url, run_keys) as running:
        yield running


@pytest.fixture
def page(browser: Any, control: str) -> Iterator[Any]:
    with a_page(browser) as opened:
        open_page(opened, control)
        yield opened


def wait_for_text(page: Any, selector: str, text: str) -> None:
    page.locator(selector).filter(has_text=text).first.wait_for()


def command_field(client: redis.Redis, keys: Keys, name: str) -> str | None:
    value = client.hget(keys.control, name)
    return None if value is None else value.decode()


def press_and_wait(page: Any, name: str) -> None:
    page.get_by_role("button", name=name, exact=True).click()
    page.locator("#notices p").last.wait_for()


def press_for_one_more(page: Any, client: redis.Redis, keys: Keys, name: str, field: str) -> None:
    told = str(int(command_field(client, keys, field) or 0) + 1)
    page.get_by_role("button", name=name, exact=True).click()
    until(lambda: command_field(client, keys, field) == told, f"{name} once more in Redis")


def test_the_link_signs_in_and_the_address_forgets_the_token(page: Any) -> None:
    assert TOKEN not in page.url
    assert page.get_by_role("button", name="Pause", exact=True).is_enabled()
    page.reload()
    page.get_by_role("button", name="Pause", exact=True).wait_for()
    page.get_by_role("button", name="Sign out").click()
    page.get_by_role("button", name="Sign in to control the run").wait_for()
    assert page.evaluate("sessionStorage.length") == 0


def test_a_typed_token_is_tested_before_it_is_kept(browser: Any, control: str) -> None:
    with a_page(browser) as page:
        open_page(page, control, token=None)
        wait_for_text(page, "#run-step", f"step {NUM_STEPS} of")
        page.get_by_role("button", name="Sign in to control the run").click()
        page.get_by_role("textbox", name="Token").fill("another run's")
        page.get_by_role("textbox", name="Token").press("Enter")
        wait_for_text(page, "#sign-in-message", "not the run's token")
        page.get_by_role("textbox", name="Token").fill(TOKEN)
        page.get_by_role("textbox", name="Token").press("Enter")
        page.get_by_role("button", name="Pause", exact=True).wait_for()


def test_controls_ask_to_sign_in_without_a_token(browser: Any, control: str) -> None:
    with a_page(browser) as page:
        open_page(page, control, token=None)
        page.get_by_role("button", name="Sign in to scale").click()
        assert page.locator("#sign-in").is_visible()
        page.keyboard.press("Escape")
        assert page.get_by_role("button", name=re.compile("^Drain")).count() == 0


def test_a_protected_run_asks_to_sign_in(browser: Any, redis_url: str, client: redis.Redis) -> None:
    keys = Keys("test-page-protected")
    seed_run(client, keys, 3)
    config = json.loads(client.get(keys.config) or b"")
    client.set(keys.config, json.dumps({**config, "control": {**config["control"], "require_token_for_reads": True}}))
    with a_control(redis_url, keys) as control, a_page(browser) as page:
        page.goto(control)
        page.get_by_role("textbox", name="Token").fill(TOKEN)
        page.get_by_role("textbox", name="Token").press("Enter")
        wait_for_text(page, "#run-step", "step 3 of")


def test_numbers_are_updated_live(page: Any, client: redis.Redis, run_keys: Keys) -> None:
    wait_for_text(page, "#figures", f"{NUM_STEPS}")
    page.locator("#group-list li").first.wait_for()
    row = {**step_rows(NUM_STEPS + 1, 0)[-1], "step": NUM_STEPS + 1, "time_s": 1.0, "sampled_reward_mean": 0.4321}
    add_row(client, run_keys, "step", row)
    add_row(client, run_keys, "evaluation", {**evaluation_row(NUM_STEPS + 1, 1.0), "held_out": 0.8768})
    client.set(run_keys.replica("generation-1"), encode(heartbeat("generation-1", "http://127.0.0.1:9", 77)), ex=3600)
    add_event(client, run_keys, "checkpoint", {"text": "a checkpoint of step 41 is durable"})
    add_group(client, run_keys, group_sample(4321, NUM_STEPS + 1, 1.0))
    wait_for_text(page, "#run-step", f"step {NUM_STEPS + 1} of")
    wait_for_text(page, "#figures", "0.432")
    wait_for_text(page, "#evaluations-rows", "0.877")
    wait_for_text(page, "#charts-learning .legend", "0.877")
    wait_for_text(page, "#replica-table tr", "v78")
    wait_for_text(page, "#event-list", "a checkpoint of step 41 is durable")
    wait_for_text(page, "#group-list", "Mia has 4321 boxes")


def test_pause_resume_checkpoint_and_evaluate_reach_redis(page: Any, client: redis.Redis, run_keys: Keys) -> None:
    press_and_wait(page, "Pause")
    assert command_field(client, run_keys, PAUSED) is not None
    wait_for_text(page, "#verdict-text", "aused")
    press_and_wait(page, "Resume")
    page.get_by_role("button", name="Pause", exact=True).wait_for()
    assert command_field(client, run_keys, PAUSED) is None
    for name, field in (("Checkpoint", CHECKPOINTS), ("Evaluate", EVALUATIONS)):
        press_for_one_more(page, client, run_keys, name, field)


def test_stop_asks_for_confirmation(page: Any, client: redis.Redis, run_keys: Keys) -> None:
    page.get_by_role("button", name="Stop…").click()
    page.get_by_role("dialog").get_by_role("button", name="Cancel").click()
    assert command_field(client, run_keys, STOP) is None
    page.get_by_role("button", name="Stop…").click()
    page.get_by_role("button", name="Stop the run").click()
    page.locator("#notices p").wait_for()
    assert command_field(client, run_keys, STOP) is not None
    page.get_by_role("button", name="Stopping…").wait_for()
    client.hdel(run_keys.control, STOP)


def test_the_replica_target_is_set_and_cleared(page: Any, client: redis.Redis, run_keys: Keys) -> None:
    field = page.get_by_label("Replicas to keep")
    field.fill("3")
    press_and_wait(page, "Scale")
    assert command_field(client, run_keys, DESIRED_REPLICAS) == "3"
    wait_for_text(page, "#scale-summary", "target 3")
    field.fill("0")
    page.get_by_role("button", name="Scale", exact=True).click()
    page.get_by_role("button", name="Cancel").click()
    assert command_field(client, run_keys, DESIRED_REPLICAS) == "3"
    page.get_by_role("button", name="Clear target").click()
    wait_for_text(page, "#scale-summary", "no target set")
    assert command_field(client, run_keys, DESIRED_REPLICAS) is None


def test_a_drain_reaches_the_replica(page: Any, drained: tuple[str, list[tuple[str, str]]]) -> None:
    page.get_by_role("button", name="Drain generation-0").click()
    page.get_by_role("button", name="Drain", exact=True).click()
    page.locator("#notices p").wait_for()
    assert drained[1] == [("/drain", f"Bearer {TOKEN}")]


def test_settings_are_accepted_rejected_and_not_overwritten(
    page: Any, client: redis.Redis, run_keys: Keys, control: str
) -> None:
    rate, apply = page.get_by_label("optimizer.lr", exact=True), page.locator("#settings-apply")
    rate.fill("1e-5")
    apply.click()
    wait_for_text(page, "#settings-message", "Accepted")
    assert json.loads(command_field(client, run_keys, SETTINGS) or "")["values"] == {"optimizer.lr": 1e-5}
    wait_for_text(page, "#settings-rows tr", "1e−5")
    rate.fill("-3")
    apply.click()
    wait_for_text(page, "#settings-message", "optimizer.lr")
    assert rate.input_value() == "-3"

    def overtaken(route: Any) -> None:
        body = {"settings": {"actor.eps_clip": 0.3}}
        assert httpx.patch(f"{control}/settings", json=body, headers=bearer_header(TOKEN)).status_code == 200
        route.continue_()

    page.route(lambda url: url.endswith("/settings"), overtaken, times=1)
    rate.fill("2e-5")
    apply.click()
    wait_for_text(page, "#settings-message", "The present settings are shown above")
    wait_for_text(page, "#settings-rows tr", "0.3")
    page.get_by_role("button", name="Reset optimizer.lr").click()
    wait_for_text(page, "#settings-message", "Accepted")
    assert json.loads(command_field(client, run_keys, SETTINGS) or "")["values"] == {"actor.eps_clip": 0.3}


def test_pausing_needs_no_mouse(page: Any, client: redis.Redis, run_keys: Keys) -> None:
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    page.keyboard.press("Enter")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Pause"
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    page.keyboard.press("Enter")
    page.locator("#notices p").wait_for()
    assert command_field(client, run_keys, PAUSED) is not None
    page.get_by_role("button", name="Resume", exact=True).wait_for()  # the answer comes a moment before the new state
    page.keyboard.press("Enter")
    page.get_by_role("button", name="Pause", exact=True).wait_for()
    assert page.evaluate("document.activeElement.textContent") == "Pause", "the focus was lost"
    client.hdel(run_keys.control, PAUSED)


def test_a_restart_of_control_is_survived(browser: Any, redis_url: str, client: redis.Redis, tmp_path: Path) -> None:
    keys = Keys("test-page-restart")
    seed_run(client, keys, 10)
    control = ControlProcess(redis_url, keys)
    with contextlib.closing(control), a_page(browser) as page:
        control.start()
        open_page(page, control.url)
        wait_for_text(page, "#run-step", "step 10 of")
        control.close()
        wait_for_text(page, "#connection-text", "reconnecting since")
        keep_shot(page, tmp_path, "reconnecting")
        for row in step_rows(14, 0)[10:]:
            add_row(client, keys, "step", row)
        add_event(client, keys, "checkpoint", {"text": "while control was away"})
        control.start()
        page.wait_for_selector("#connection[data-state=live]")
        wait_for_text(page, "#run-step", "step 14 of")
        wait_for_text(page, "#event-list", "while control was away")
        page.locator("#charts-learning summary").click()
        page.locator("#charts-learning tbody th").filter(has_text="14").wait_for()
        told = page.locator("#charts-learning tbody th").all_inner_texts()
        assert [int(step) for step in told if int(step) > 9] == [14, 13, 12, 11, 10], "rows were missed or taken twice"


def test_the_page_inserts_no_html_and_names_no_other_origin() -> None:
    for path in (path for path in PAGE.iterdir() if path.suffix in (".js", ".css", ".html")):
        text = path.read_text()
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|new Function", text), path
        assert not re.search(r"https?://", text), f"{path.name} names another place"
        assert not re.search(r" on[a-z]+=| style=|<script>|<style", text) or path.suffix != ".html", path
