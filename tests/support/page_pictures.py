"""Takes the pictures of the live page for the documents, from a run that is in progress on this machine:

    headrace up configs/tiny-cpu.yaml --run arithmetic --set learner.steps=120 --set evaluation.interval_steps=10 &
    python -m tests.support.page_pictures arithmetic

Waits until the run has completed `--after-step` steps, then writes docs/page-overview.png and docs/page-group.png.
Without a run it writes docs/page-episode.png and docs/page-episode-narrow.png, from a scripted group.
"""

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx
import redis
from PIL import Image

from headrace.common.process.run_token import read_token_file
from headrace.common.redis.keys import Keys
from tests.support.page_in_chromium import a_browser, a_control, a_page, add_group, open_page
from tests.support.redis_servers import as_launched
from tests.support.seeded_run import seed_run
from tests.support.shown_episodes import episode_group

DOCS = Path(__file__).parents[2] / "docs"
WIDTH, OVERVIEW_HEIGHT, GROUP_HEIGHT = 1280, 1086, 815
NUM_GROUPS = 60
"""As many as the page lists."""
POLL_INTERVAL_S = 1.0
EPISODES_STEP = 42
EPISODE_PICTURES = ((1280, 1150, "#groups", "page-episode.png"), (390, 1500, ".completion", "page-episode-narrow.png"))
"""Of each: width, height, the element at its top, its file."""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.support.page_pictures")
    parser.add_argument("run", nargs="?")
    parser.add_argument("--runs-folder", type=Path, default=Path("runs"))
    parser.add_argument("--after-step", type=int, default=60)
    parser.add_argument("--out", type=Path, default=DOCS)
    arguments = parser.parse_args()
    if arguments.run is None:
        episode_pictures(arguments.out)
    else:
        run_pictures(arguments.runs_folder / arguments.run, arguments.after_step, arguments.out)


def run_pictures(folder: Path, after_step: int, out: Path) -> None:
    url, token = (folder / "control-url").read_text().strip(), read_token_file(folder / "token")
    with httpx.Client(base_url=url, trust_env=False, timeout=30) as http:
        while http.get("/status").raise_for_status().json()["step"] < after_step:
            time.sleep(POLL_INTERVAL_S)
        group, rollout, token_index = most_telling(http)
    with a_browser() as browser, a_page(browser, WIDTH, OVERVIEW_HEIGHT) as page:
        open_page(page, url, token)
        page.locator("#charts-health canvas").nth(2).wait_for()
        page.locator("#evaluations-rows tr").first.wait_for()
        picture(page, out / "page-overview.png")
        page.set_viewport_size({"width": WIDTH, "height": GROUP_HEIGHT})
        open_group(page, group)
        page.locator(".tokens").nth(rollout).locator("span").nth(token_index).hover()
        scroll_to(page, "#groups")
        picture(page, out / "page-group.png")


def episode_pictures(out: Path) -> None:
    keys, group = Keys("episodes"), episode_group(step=EPISODES_STEP, at=time.time())
    with tempfile.TemporaryDirectory() as folder, as_launched(Path(folder)) as redis_url:
        with redis.Redis.from_url(redis_url) as client:
            seed_run(client, keys, EPISODES_STEP, num_groups=0)
            add_group(client, keys, group)
        with a_control(redis_url, keys) as url, a_browser() as browser:
            for width, height, place, name in EPISODE_PICTURES:
                with a_page(browser, width, height) as page:
                    open_page(page, url)
                    open_group(page, group.id)
                    page.get_by_role("button", name="weight version").click()
                    scroll_to(page, ".completion")
                    scroll_to(page, place)
                    picture(page, out / name)


def open_group(page: Any, name: str) -> None:
    page.evaluate("(id) => { location.hash = `#group/${encodeURIComponent(id)}`; }", name)
    page.locator("#reader-title").filter(has_text=name).wait_for()


def scroll_to(page: Any, selector: str) -> None:
    page.locator(selector).first.evaluate("(one) => one.scrollIntoView({ behavior: 'instant' })")


def most_telling(http: httpx.Client) -> tuple[str, int, int]:
    """The listed group with the largest log-probability gap in its first two completions, that completion and token."""
    found: list[tuple[float, str, int, int]] = []
    for summary in http.get("/groups", params={"state": "trained", "limit": NUM_GROUPS}).json()["groups"]:
        detail = http.get(f"/groups/{summary['id']}").json()
        for place, rollout in enumerate(detail["rollouts"][:2]):
            pairs = zip(rollout["proximal_logprobs"], rollout["behaviour_logprobs"], strict=True)
            found += [(abs(ours - engine), summary["id"], place, i) for i, (ours, engine) in enumerate(pairs)]
    _, name, place, index = max(found)
    return name, place, index


def picture(page: Any, path: Path) -> None:
    """With a palette of 256 colours, which is enough for the page and a third of the size."""
    page.screenshot(path=path, animations="disabled")
    Image.open(path).convert("RGB").quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)


if __name__ == "__main__":
    main()
