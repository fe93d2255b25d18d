"""A long run with many replicas: how soon the live page shows it, and how smooth it stays during updates."""

import json
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import redis

from headrace.common.redis.keys import Keys
from headrace.common.wire import encode
from tests.support.page_in_chromium import a_browser, a_control, a_page, add_event, add_group, add_row, open_page
from tests.support.seeded_run import group_sample, heartbeat, seed_run, step_rows

NUM_STEPS, NUM_REPLICAS = 10_000, 64
EVENTS_PER_S, OBSERVED_S = 20, 5.0
WATCH = """() => {
  window.longTasks = []; window.frames = [];
  const note = (list) => longTasks.push(...list.getEntries().map((one) => one.duration));
  new PerformanceObserver(note).observe({type: 'longtask'});
  let last = performance.now();
  const tick = (now) => { frames.push(now - last); last = now; requestAnimationFrame(tick); };
  requestAnimationFrame(tick);
}"""


@pytest.fixture(scope="module")
def keys_of_long_run() -> Keys:
    return Keys("test-page-long")


@pytest.fixture(scope="module")
def control(redis_url: str, keys_of_long_run: Keys) -> Iterator[str]:
    with redis.Redis.from_url(redis_url) as client:
        seed_run(client, keys_of_long_run, NUM_STEPS, NUM_REPLICAS)
    with a_control(redis_url, keys_of_long_run) as running:
        yield running


def _news(redis_url: str, keys: Keys, ends_at: float) -> None:
    """A step with everything that comes with it, so that twenty events a second arrive, and all replicas change."""
    step, row = NUM_STEPS, step_rows(1, 0)[0]
    with redis.Redis.from_url(redis_url) as client:
        while time.monotonic() < ends_at:
            step += 1
            add_row(client, keys, "step", {**row, "step": step, "time_s": time.time(), "wall_s": 1.5 * step})
            add_group(client, keys, group_sample(step, step, time.time()))
            for index in range(EVENTS_PER_S // 2 - 2):
                swap = {
                    "replica": f"generation-{(8 * step + index) % NUM_REPLICAS}",
                    "weight_version": step,
                    "pause_ms": 50.0,
                }
                add_event(client, keys, "weight_swap", {**swap, "bytes": 10**6})
            with client.pipeline(transaction=False) as pipe:
                for index in range(NUM_REPLICAS):
                    beat = heartbeat(f"generation-{index}", "http://127.0.0.1:9", step, index)
                    pipe.set(keys.replica(beat.replica), encode(beat), ex=600)
                pipe.execute()
            time.sleep(0.5)


def test_ten_thousand_steps_and_64_replicas_stay_smooth(control: str, redis_url: str, keys_of_long_run: Keys) -> None:
    """Bounds are of the page's own processor time; what a busy machine adds to it is only printed."""
    with a_browser() as browser, a_page(browser) as page:
        page.add_init_script(f"({WATCH})()")
        session = page.context.new_cdp_session(page)
        session.send("Performance.enable", {"timeDomain": "threadTicks"})
        began = time.monotonic()
        open_page(page, control)
        page.locator("#charts-learning canvas").wait_for()
        first_chart_s = time.monotonic() - began
        page.wait_for_function(f"document.querySelectorAll('#replica-table tbody tr').length === {NUM_REPLICAS}")
        starting_s = _worked_s(session)
        first_row = page.locator("#replica-table tbody tr").first.element_handle()
        page.wait_for_timeout(1000)
        page.evaluate("frames.length = longTasks.length = 0")
        news = threading.Thread(target=_news, args=(redis_url, keys_of_long_run, time.monotonic() + OBSERVED_S))
        before_s, observed_from = _worked_s(session), time.monotonic()
        news.start()
        for place in ("learning", "health", "replicas", "groups"):
            page.evaluate(f"document.getElementById('{place}').scrollIntoView({{behavior: 'instant'}})")
            page.wait_for_timeout(1000 * OBSERVED_S / 4)
        news.join()
        busy_share = (_worked_s(session) - before_s) / (time.monotonic() - observed_from)
        frames, tasks = sorted(page.evaluate("frames")), page.evaluate("longTasks")
        measured: dict[str, Any] = {
            "first_chart_s": round(first_chart_s, 2),
            "processor_s_to_start": round(starting_s, 2),
            "busy_share": round(busy_share, 3),
            "frame_ms_p50": round(frames[len(frames) // 2], 1),
            "frame_ms_p95": round(frames[int(0.95 * len(frames))], 1),
            "longest_task_ms": max(tasks, default=0),
        }
        print("\n" + json.dumps(measured))
        assert first_row.evaluate("(row) => row.isConnected"), "the rows were built anew"
        page.locator("#run-step").filter(has_text="step 100").wait_for()
        page.locator("#run-step").filter(has_not_text=f"step {NUM_STEPS} ").wait_for()
        assert starting_s < 1.5, measured
        assert busy_share < 0.3, measured


def _worked_s(session: Any) -> float:
    """Processor time of the page's main thread, ever."""
    metrics = session.send("Performance.getMetrics")["metrics"]
    return float(next(one["value"] for one in metrics if one["name"] == "TaskDuration"))
