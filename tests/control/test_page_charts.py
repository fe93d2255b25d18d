"""The charts of the live page: one zoom and one cursor for all of them, by pointer and by keyboard."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import redis

from headrace.common.metrics.steps import TEXTS
from headrace.common.metrics.thresholds import EPISODE_THRESHOLDS
from headrace.common.redis.keys import Keys
from headrace.common.wire import Limits, Turn
from headrace.control.http.page import PAGE
from headrace.control.verdict.check_inputs import CheckInputs
from headrace.control.verdict.verdict import all_checks
from headrace.learner.training.episode_metrics import episode_metrics
from tests.support.factories import make_group, make_rollout, make_ticket
from tests.support.page_in_chromium import a_browser, a_control, a_page, add_row, keep_shot, open_page
from tests.support.seeded_run import seed_run, step_rows

NUM_STEPS = 60
SPECS = (PAGE / "chart_specs.js").read_text()
EPISODE_SPECS = SPECS[SPECS.index("export const EPISODES") :]
LEARNING, ENTROPY = "#charts-learning .chart", "#charts-health .chart:nth-child(5)"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with a_browser() as opened:
        yield opened


@pytest.fixture(scope="module")
def control(redis_url: str) -> Iterator[str]:
    keys = Keys("test-page-charts")
    with redis.Redis.from_url(redis_url) as client:
        seed_run(client, keys, NUM_STEPS)
    with a_control(redis_url, keys) as running:
        yield running


@pytest.fixture
def page(browser: Any, control: str) -> Iterator[Any]:
    with a_page(browser, height=3000) as opened:
        open_charts(opened, control)
        yield opened


def open_charts(page: Any, control: str, num_steps: int = NUM_STEPS) -> None:
    """On a page that is tall enough for all charts; opens the tables of two of them."""
    open_page(page, control)
    page.wait_for_function("() => document.querySelectorAll('.plot canvas').length >= 10")
    for chart in (LEARNING, ENTROPY):
        page.locator(f"{chart} summary").click()
    wait_for_steps(page, ENTROPY, 1, num_steps)


def steps_of(page: Any, chart: str) -> list[int]:
    """The steps in a chart's table, which are those that it draws; the newest first, thinned."""
    return [int(text) for text in page.locator(f"{chart} tbody th").all_inner_texts()]


def wait_for_steps(page: Any, chart: str, first: int, last: int) -> None:
    """Until all steps of the chart are within `first` and `last`, and the newest is `last`."""
    is_so = """([chart, first, last]) => {
        const steps = [...document.querySelectorAll(`${chart} tbody th`)].map((one) => Number(one.textContent));
        return steps.length > 0 && steps[0] === last && steps.at(-1) >= first;
    }"""
    page.wait_for_function(is_so, arg=[chart, first, last])


def place_of(page: Any, chart: str, share: float) -> tuple[float, float]:
    """A point within the plotting area, `share` of its width from the left."""
    box = page.locator(f"{chart} .u-over").bounding_box()
    return box["x"] + share * box["width"], box["y"] + box["height"] / 2


def drag(page: Any, chart: str, start: float, end: float) -> None:
    page.mouse.move(*place_of(page, chart, start))
    page.mouse.down()
    page.mouse.move(*place_of(page, chart, (start + end) / 2))
    page.mouse.move(*place_of(page, chart, end))
    page.mouse.up()


def test_a_drag_zooms_all_charts_and_a_double_click_resets_them(page: Any, tmp_path: Path) -> None:
    drag(page, LEARNING, 0.5, 0.75)
    for chart in (LEARNING, ENTROPY):
        wait_for_steps(page, chart, 30, 45)
    assert "Zoomed to steps" in page.locator("#zoom-range").inner_text()
    assert page.locator(".u-select").first.bounding_box()["width"] == 0, "the selection is still drawn"
    keep_shot(page, tmp_path, "zoomed")
    page.mouse.dblclick(*place_of(page, ENTROPY, 0.5))
    for chart in (LEARNING, ENTROPY):
        wait_for_steps(page, chart, 0, NUM_STEPS)
    assert page.locator("#zoom-reset").is_hidden() and page.locator("#zoom-range").inner_text() == ""


def test_a_click_does_not_zoom(page: Any) -> None:
    page.mouse.click(*place_of(page, LEARNING, 0.5))
    page.wait_for_timeout(400)
    assert page.locator("#zoom-reset").is_hidden()


def test_a_zoom_outlasts_new_steps_and_ends_with_another_axis(
    browser: Any, redis_url: str, client: redis.Redis, keys: Keys
) -> None:
    seed_run(client, keys, NUM_STEPS)
    with a_control(redis_url, keys) as control, a_page(browser, height=3000) as page:
        open_charts(page, control)
        drag(page, ENTROPY, 0.5, 0.75)
        wait_for_steps(page, LEARNING, 30, 45)
        add_row(client, keys, "step", {**step_rows(NUM_STEPS + 1, 0)[-1], "time_s": 1.0})
        page.locator("#run-step").filter(has_text=f"step {NUM_STEPS + 1}").wait_for()
        wait_for_steps(page, LEARNING, 30, 45)
        page.get_by_role("button", name="by time").click()
        page.locator("#zoom-reset").wait_for(state="hidden")
        page.get_by_role("button", name="by step").click()
        wait_for_steps(page, LEARNING, 0, NUM_STEPS + 1)


def test_the_cursor_of_one_chart_moves_in_all_charts(page: Any) -> None:
    entropy = page.locator(f"{ENTROPY} .legend b")
    latest = entropy.inner_text()
    page.mouse.move(*place_of(page, LEARNING, 0.2))
    page.mouse.move(*place_of(page, LEARNING, 0.1))
    page.wait_for_function(
        "([selector, text]) => document.querySelector(selector).textContent !== text",
        arg=[f"{ENTROPY} .legend b", latest],
    )
    early = float(entropy.inner_text())
    assert early > float(latest), "entropy falls in this run, so an early step has more of it"
    page.mouse.move(1, 1)
    page.wait_for_function(
        "([selector, text]) => document.querySelector(selector).textContent === text",
        arg=[f"{ENTROPY} .legend b", latest],
    )


def test_a_chart_is_zoomed_and_read_by_keyboard(page: Any) -> None:
    plot = page.locator(f"{LEARNING} .plot")
    plot.focus()
    before = page.locator(f"{ENTROPY} .legend b").inner_text()
    for _ in range(10):
        page.keyboard.press("ArrowLeft")
    assert page.locator(f"{ENTROPY} .legend b").inner_text() != before
    page.keyboard.press("+")
    page.locator("#zoom-reset").wait_for()
    zoomed = steps_of(page, ENTROPY)
    assert max(zoomed) - min(zoomed) <= NUM_STEPS / 2 + 1
    page.keyboard.press("0")
    page.locator("#zoom-reset").wait_for(state="hidden")
    for key, state in (("+", "visible"), ("-", "hidden")):
        page.keyboard.press(key)
        page.locator("#zoom-reset").wait_for(state=state)
    page.keyboard.press("+")
    page.get_by_role("button", name="Reset zoom").click()
    page.locator("#zoom-reset").wait_for(state="hidden")


def test_charts_of_episodes_are_there_once_a_step_has_episodes(
    browser: Any, redis_url: str, client: redis.Redis, tmp_path: Path
) -> None:
    keys, chart = Keys("test-page-episode-charts"), "#charts-episodes .chart"
    seed_run(client, keys, 3)
    with a_control(redis_url, keys) as control, a_page(browser, height=3000) as page:
        open_charts(page, control, 3)
        assert page.locator("#charts-episodes").is_hidden()
        rollout = make_rollout(turns=[Turn("assistant", 0, 0, 3, 1.0, 2.5)])
        ticket = make_ticket(num_completions=1, limits=Limits(4, 100, 100, 4))
        group = msgspec.structs.replace(make_group(rewards=(1.0,)), ticket=ticket, rollouts=[rollout])
        row = step_rows(4, 0)[-1] | episode_metrics([group])
        assert set(re.findall(r'column\("(\w+)"\)', EPISODE_SPECS)) <= set(row), "a chart names what no step has"
        add_row(client, keys, "step", row)
        page.locator(f"{chart} canvas").nth(3).wait_for()
        assert page.locator(f"{chart}:nth-child(2) .legend b").all_inner_texts() == ["1.5", "0"]
        keep_shot(page, tmp_path, "episode-charts")


def test_charts_name_existing_metrics() -> None:
    wanted = set(re.findall(r'column\("(\w+)"\)', SPECS.removesuffix(EPISODE_SPECS)))
    assert len(wanted) >= 20
    assert wanted <= set(TEXTS)


def test_thresholds_are_drawn_for_checks_that_exist() -> None:
    wanted = set(re.findall(r'check: "(\w+)"', SPECS))
    assert len(wanted) >= 4
    inputs = CheckInputs(recent={one.name: [0.0] for one in EPISODE_THRESHOLDS})
    assert wanted <= {result.check.name for result in all_checks(inputs)}


def test_the_chart_library_is_served_from_here_with_its_licence() -> None:
    vendored = PAGE / "vendor"
    assert "MIT" in (vendored / "uPlot.LICENSE").read_text()
    assert (vendored / "uPlot.min.js").read_text().startswith("/*! https://github.com/leeoniya/uPlot (v1.6")
