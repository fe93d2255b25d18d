"""Reading the live page: groups token by token, hostile text, empty and failing runs, small screens, accessibility."""

import itertools
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import redis

from headrace.common.redis.keys import Keys
from headrace.common.wire import encode
from tests.support.page_in_chromium import (
    a_browser,
    a_control,
    a_page,
    add_event,
    add_group,
    faults_of,
    keep_shot,
    open_page,
)
from tests.support.seeded_run import group_sample, heartbeat, seed_run
from tests.support.shown_episodes import episode_group

HOSTILE = "<img src=x onerror=\"alert('x');window.taken=1\"><script>alert(1)</script>\u202egnp.exe</p>{{7*7}}"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with a_browser() as opened:
        yield opened


@pytest.fixture(scope="module")
def control(redis_url: str) -> Iterator[str]:
    keys = Keys("test-page-reading")
    with redis.Redis.from_url(redis_url) as client:
        seed_run(client, keys, 60, 3)
    with a_control(redis_url, keys) as running:
        yield running


@pytest.fixture
def page(browser: Any, control: str) -> Iterator[Any]:
    with a_page(browser) as opened:
        open_page(opened, control)
        yield opened


def classes(page: Any, completion: int) -> list[str]:
    tokens = page.locator(".tokens").nth(completion).locator("span")
    return list(tokens.evaluate_all("all => all.map((one) => one.className)"))


def test_a_group_is_read_token_by_token(page: Any, tmp_path: Path) -> None:
    page.locator("#group-filters [name=state]").select_option("trained")
    wanted = page.locator("#group-list a").filter(has_text="trained").first
    wanted.click()
    page.locator("#reader .tokens").first.wait_for()
    assert page.locator("#group-list li[data-state=uniform]").count() == 0
    assert "She has 3 boxes of 4, so 12." in page.locator(".tokens").first.inner_text().replace("\n", "")
    assert set(classes(page, 0)) == {"t-p0"}, "no gap, no colour"
    assert set(classes(page, 3)) == {"t-n4"}, "the largest gap"
    page.get_by_role("button", name="advantage", exact=True).click()
    assert set(classes(page, 0)) == {"t-p4"} and set(classes(page, 1)) == {"t-n4"}
    page.get_by_role("button", name="weight version").click()
    assert classes(page, 0) == ["t-v0"] * 5 + ["t-v1"] * 5
    page.locator(".tokens").nth(1).focus()
    for key in ("ArrowRight", "ArrowRight", "ArrowLeft"):
        page.keyboard.press(key)
    said = page.locator(".token-numbers").inner_text()
    assert 'token 2 of 10: " has"' in said and "behaviour −0.2 (p 0.819)" in said and "gap −0.01 " in said
    page.locator(".tokens").first.locator("span").nth(4).hover()
    assert "token 5 of 10" in page.locator(".token-numbers").inner_text()
    keep_shot(page, tmp_path, "group")
    name = page.url.split("#")[1]
    page.reload()
    page.locator("#reader-title").filter(has_text=name.removeprefix("group/")).wait_for()


@pytest.mark.parametrize(("width", "name"), [(1280, "episode"), (390, "episode-narrow")])
def test_an_episode_is_read_as_a_conversation(
    browser: Any, control: str, client: redis.Redis, tmp_path: Path, width: int, name: str
) -> None:
    group = episode_group(at=time.time())
    add_group(client, Keys("test-page-reading"), group)
    with a_page(browser, width, 1500) as page:
        open_page(page, control)
        page.evaluate("(id) => { location.hash = `#group/${id}`; }", group.id)
        episode = page.locator(".completion").filter(has_text="Episode 1")
        episode.locator(".turn").nth(7).wait_for()
        roles = episode.locator(".turn-head b").all_inner_texts()
        assert roles == ["assistant", "tool", "assistant", "tool", "prompt", "assistant", "tool", "assistant"]
        assert "reward 1 · tool_calls 3 · tool_errors 0 · advantage" in episode.locator("h4").inner_text()
        assert "in 4 replies · 4.0 s in the model, 130 ms in the environment" in episode.locator("h4").inner_text()
        rules = episode.locator(".turns > *").evaluate_all("all => all.map((one) => one.className)")
        assert rules == [
            "turn reply",
            "turn",
            "turn reply",
            "turn",
            "segment-rule",
            "turn",
            "turn reply",
            "turn",
            "turn reply",
        ]
        assert episode.locator(".segment-rule").inner_text() == "history rewritten by the agent"
        assert episode.locator(".call").first.inner_text() == 'calls calculate(expression = "17 * 24")'
        assert "408" in episode.locator(".said").first.inner_text() and episode.locator(".said span").count() == 0
        heads = episode.locator(".turn-head").all_inner_texts()
        assert "1.3 s in the model" in heads[0] and "v41" in heads[0] and "50 ms in the environment" in heads[3]
        assert "v42" in heads[5] and "of context cached" in heads[5]
        page.get_by_role("button", name="weight version").click()
        coloured = episode.locator(".tokens").evaluate_all("all => all.map((one) => one.lastChild.className)")
        assert coloured == ["t-v0", "t-v0", "t-v1", "t-v1"]
        episode.locator(".tokens").nth(1).locator("span").first.hover()
        first = group.rollouts[0].turns[2].start
        assert f"token {first + 1} of {len(group.rollouts[0].tokens)}:" in page.locator(".token-numbers").inner_text()
        lost = page.locator(".completion").filter(has_text="Episode 2").locator("h4").inner_text()
        assert "after 1 failed episode" in lost and "ended by the limit of turns" in lost
        assert page.evaluate("document.documentElement.scrollWidth") == width
        assert faults_of(page) == []
        page.locator("#reader").screenshot(path=tmp_path / "reader.png")
        keep_shot(page, tmp_path, name)


def test_groups_that_were_not_trained_have_no_gap(page: Any) -> None:
    page.locator("#group-filters [name=state]").select_option("uniform")
    page.locator("#group-list li[data-state=uniform] a").first.click()
    page.get_by_role("button", name="log-probability gap", disabled=True).wait_for()
    page.get_by_role("button", name="surprise", pressed=True).wait_for()


def test_hostile_text_stays_text(browser: Any, redis_url: str, client: redis.Redis) -> None:
    keys = Keys("test-page-hostile")
    seed_run(client, keys, 3, num_groups=0)
    group = group_sample(0, 3, time.time(), num_completions=1)
    rollout = msgspec.structs.replace(group.rollouts[0], text=HOSTILE, tokens=[HOSTILE] * 10)
    prompt = [{"role": HOSTILE, "content": HOSTILE, "name": HOSTILE}]
    add_group(client, keys, msgspec.structs.replace(group, prompt=prompt, rollouts=[rollout]))
    add_event(client, keys, "<b>kind</b>", {"text": HOSTILE})
    ill = msgspec.structs.replace(
        heartbeat("<b>ill</b>", "javascript:alert(1)", 3), state="quarantined", reason=HOSTILE
    )
    client.set(keys.replica("ill"), encode(ill), ex=600)
    client.hset(keys.learner, "advice", HOSTILE)
    with a_control(redis_url, keys) as control, a_page(browser) as page:
        open_page(page, control)
        page.locator("#event-list").get_by_text("onerror").first.wait_for()
        page.locator("#group-list a").first.click()
        page.locator(".tokens span").first.wait_for()
        assert HOSTILE in (page.locator(".tokens span").first.text_content() or "")
        assert HOSTILE in (page.locator(".prompt-text").text_content() or "")
        page.wait_for_timeout(300)
        assert page.evaluate("window.taken") is None
        assert page.locator("img").count() == 1 and page.locator("script").count() == 3
        assert page.locator("a[href^='javascript']").count() == 0
        assert (
            page.locator("main b").filter(has_text="kind").evaluate_all("all => all.every((b) => !b.children.length)")
        )


def test_an_empty_run_says_what_will_come(browser: Any, redis_url: str, client: redis.Redis, tmp_path: Path) -> None:
    keys = Keys("test-page-empty")
    seed_run(client, keys, 1, 0, num_groups=0, num_dead=0)
    for key in (keys.history, keys.events, keys.learner, keys.samples):
        client.delete(key)
    with a_control(redis_url, keys) as control, a_page(browser) as page:
        open_page(page, control)
        for text in ("No evaluation yet", "No replica is live", "No groups yet", "No events yet"):
            page.get_by_text(text).wait_for()
        assert page.get_by_text("No data yet").count() >= 8
        assert faults_of(page) == []
        keep_shot(page, tmp_path, "empty", full=True)


def test_a_failing_run_says_what_to_do(browser: Any, redis_url: str, client: redis.Redis, tmp_path: Path) -> None:
    keys = Keys("test-page-failing")
    seed_run(client, keys, 20, 2, num_dead=0)
    client.hset(keys.learner, mapping={"phase": "failed", "reason": "the loss is not finite in step 20"})
    reason = "version 19: the checksum of lm_head.weight differs"
    ill = msgspec.structs.replace(
        heartbeat("generation-1", "http://127.0.0.1:9", 16), state="quarantined", reason=reason
    )
    client.set(keys.replica("generation-1"), encode(ill), ex=600)
    with a_control(redis_url, keys) as control, a_page(browser, color_scheme="dark") as page:
        open_page(page, control)
        page.wait_for_selector("#verdict[data-level=critical]")
        assert "the loss is not finite" in page.locator("#verdict-text").inner_text()
        assert page.locator("#verdict-advice").inner_text() != ""
        assert page.locator("#verdict-words").get_attribute("role") == "status"
        page.locator("#replica-table tr[data-state=quarantined]").get_by_text(reason).wait_for()
        assert page.title().startswith("✕")
        assert faults_of(page) == []
        keep_shot(page, tmp_path, "failing")


def test_a_phone_scrolls_vertically_only(browser: Any, control: str, tmp_path: Path) -> None:
    with a_page(browser, 390, 844, has_touch=True) as page:
        open_page(page, control)
        page.locator("#group-list a").first.click()
        page.locator(".tokens").first.wait_for()
        page.locator("#checks-summary").click()
        page.locator(".config summary").click()
        assert page.evaluate("document.documentElement.scrollWidth") == 390
        assert faults_of(page) == []
        page.evaluate("scrollTo(0, 0)")
        keep_shot(page, tmp_path, "telephone", full=True)


def test_dark_mode_follows_the_system_until_changed(browser: Any, control: str, tmp_path: Path) -> None:
    background = "getComputedStyle(document.body).backgroundColor"
    with a_page(browser, color_scheme="dark") as page:
        open_page(page, control)
        dark = page.evaluate(background)
        page.wait_for_timeout(500)
        keep_shot(page, tmp_path, "dark", full=True)
        assert faults_of(page) == []
        page.get_by_role("button", name="Dark colours").click()
        light = page.evaluate(background)
        assert (dark, light) == ("rgb(13, 19, 24)", "rgb(244, 246, 248)")
        page.reload()
        assert page.evaluate(background) == light


def test_there_are_no_serious_accessibility_faults(page: Any, tmp_path: Path) -> None:
    page.locator("#checks-summary").click()
    page.locator("#charts-learning summary").click()
    page.wait_for_timeout(300)
    keep_shot(page, tmp_path, "light", full=True)
    assert faults_of(page) == []
    page.get_by_role("button", name="Stop…").click()
    assert faults_of(page) == []
    page.keyboard.press("Escape")
    page.get_by_role("button", name="Sign out").click()
    page.get_by_role("button", name="Sign in", exact=True).click()
    assert faults_of(page) == []
    levels = page.locator("h1, h2, h3, h4").evaluate_all("all => all.map((one) => Number(one.tagName[1]))")
    assert all(after - before <= 1 for before, after in itertools.pairwise(levels)), "a heading is skipped"
