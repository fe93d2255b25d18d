"""`headrace report`: one well-formed file that needs nothing else, true to the run, whatever the model has written."""

import html.parser
import json
import math
from pathlib import Path
from typing import Any

import msgspec
import pytest
import redis
import yaml
from typer.testing import CliRunner

from headrace.common.config import load_recipe
from headrace.common.redis.keys import Keys
from headrace.common.wire.group_samples import RolloutSample
from headrace.launcher.__main__ import app
from headrace.launcher.report.curves import MAX_POINTS, Series, downsample, draw, ticks_between
from headrace.launcher.report.headline import settings
from headrace.launcher.report.problems import incidents, unhealthy_spans
from tests.launcher.test_cli_logs import LEARNER
from tests.support.seeded_run import evaluation_row, group_sample, seed_run, step_rows
from tests.support.shown_episodes import episode_group

AT = 1_795_000_000.0
HOSTILE = "</pre></script><script>alert(1)</script><img src=//evil.example/x onerror=alert(2)>\x1b[2J\"'"
VOID = {"meta", "br", "img", "line", "polyline", "circle"}


class Page(html.parser.HTMLParser):
    """Its elements, balanced, and its text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.feed(text)
        assert not self.open, self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open and self.open[-1] == tag, (tag, self.open)
            self.open.pop()

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += attrs

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture
def runs(tmp_path: Path, keys: Keys) -> Path:
    folder = tmp_path / keys.run
    (folder / "logs").mkdir(parents=True)
    config = load_recipe("configs/tiny-cpu.yaml", ["learner.steps=40"]).config
    settings = config.model_dump(mode="json", exclude={"redis_url"})
    settings["task"]["settings"] = {"note": HOSTILE, "url": "http://user:secret-word@host/x"}
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    rows = [{"kind": "step", **row} for row in step_rows(40, AT)]
    rows[10]["kl_behaviour_proximal"] = math.nan
    rows[20] |= {"skipped_updates": 1.0}
    rows += [{"kind": "evaluation", **evaluation_row(20, AT)}, {"kind": "evaluation", **evaluation_row(40, AT)}]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "metrics.jsonl").write_text(text + '{"kind": "step", "st')
    (folder / "logs" / "learner.log").write_text(LEARNER + f"2026-11-23T01:00:09.000Z ERROR learner: {HOSTILE}\n")
    return tmp_path


def report(runs: Path, run: str, *arguments: str, code: int = 0) -> Any:
    result = CliRunner().invoke(app, ["report", "--run", run, "--runs-folder", str(runs), *arguments])
    assert result.exit_code == code, (result.output, result.exception)
    return result


def test_a_report_of_files_alone(runs: Path, keys: Keys) -> None:
    assert report(runs, keys.run).stdout == f"{runs / keys.run / 'report.html'}\n"
    page = Page((runs / keys.run / "report.html").read_text())
    for said in ("40 of 40", "0.720 → 0.740", "skipped_updates", "the learner failed", "pass@2 0.840", "learner.steps"):
        assert said in page.text, said
    assert "no Redis; looked for" in page.text, "why there is no account"
    assert {"svg", "table", "details"} <= page.tags


def test_it_needs_nothing_else_and_runs_nothing(
    runs: Path, keys: Keys, redis_url: str, client: redis.Redis, tmp_path: Path
) -> None:
    seed_run(client, keys, at=AT)
    rollout = RolloutSample(HOSTILE, 1.0, 0.5, "stop", [HOSTILE, " b"], [3, 4], [-1.0, -1.0], [-1.0, -3.0])
    group = msgspec.structs.replace(
        group_sample(0, 40, AT), id="0-hostile", replica=HOSTILE, prompt=[{"role": HOSTILE, "content": HOSTILE}]
    )
    group = msgspec.structs.replace(group, rollouts=[rollout])
    client.xadd(keys.samples, {"id": group.id, "group": msgspec.json.encode(group)})
    client.xadd(keys.samples, {"id": "broken", "group": b"{"})
    output = tmp_path / "out.html"
    found = report(runs, keys.run, "--redis-url", redis_url, "--output", str(output), "--json")
    assert json.loads(found.stdout) == {"run": keys.run, "report": str(output)}
    text = output.read_text()
    page = Page(text)
    assert not page.tags & {"script", "img", "link", "iframe", "object", "embed", "base", "form", "a"}
    assert all(not name.startswith("on") and name not in ("src", "href", "srcset") for name, _ in page.attributes)
    assert "url(" not in text and "@import" not in text and "default-src 'none'" in text
    assert page.text.count(HOSTILE) >= 4, "said as it was written: completion, prompt, log, setting"
    assert "secret-word" not in text and "host/x" in text
    assert ("class", "g4") in page.attributes and (
        "title",
        "version 4, engine -1.000, learner -3.000",
    ) in page.attributes
    assert "dead" in page.text and "violations" in page.text, "the audit's account"


def test_an_episode_is_shown_as_a_conversation(
    runs: Path, keys: Keys, redis_url: str, client: redis.Redis, tmp_path: Path
) -> None:
    seed_run(client, keys, at=AT, num_groups=0)
    client.xadd(keys.samples, {"group": msgspec.json.encode(episode_group(at=AT))})
    output = tmp_path / "out.html"
    report(runs, keys.run, "--redis-url", redis_url, "--output", str(output))
    page = Page(output.read_text())
    for said in ("history rewritten by the agent", "Summary: 17 * 24 = 408", "reward 1, tool_calls 3, tool_errors 0"):
        assert said in page.text, said
    assert "tool 0.05 s" in page.text and "assistant 0.77 s, versions 42" in page.text
    assert "failed episodes before it: 1, ended by the limit of turns" in page.text
    assert page.text.count("ZeroDivisionError") == 1


def test_what_is_not_there_is_refused(runs: Path, keys: Keys) -> None:
    assert "there is nothing to report" in report(runs, "nope", code=2).stderr
    assert "expected 1 to 64 letters" in report(runs, "../x", code=2).stderr


def test_a_run_that_has_only_begun(runs: Path, keys: Keys) -> None:
    for name in ("metrics.jsonl", "logs/learner.log"):
        (runs / keys.run / name).unlink()
    report(runs, keys.run)
    page = Page((runs / keys.run / "report.html").read_text())
    assert "none yet" in page.text and "nothing was measured" in page.text


def test_a_spell_lasts_as_long_as_the_median_of_five_is_bad() -> None:
    rows = [{"kind": "step", "step": step, "ess": 0.9, "kl_behaviour_proximal": 0.0} for step in range(1, 31)]
    rows[3]["kl_behaviour_proximal"] = 9.0
    for row in rows[9:16]:
        row["kl_behaviour_proximal"] = 0.1
    for row in rows[24:]:
        row["ess"] = math.nan
    found = [
        (one.threshold.name, one.first_step, one.last_step, one.worst, one.is_alarm)
        for one in unhealthy_spans(rows, True)
    ]
    assert found == [("kl_behaviour_proximal", 12, 18, 0.1, False), ("ess", 27, 30, -math.inf, True)]


def test_warnings_that_differ_in_numbers_are_one() -> None:
    from headrace.common.process.logs import LogLine

    lines = [LogLine(at, "WARNING", "learner", {}, f"waiting for {at} s") for at in (5.0, 10.5, 20.0)]
    lines += [
        LogLine(30.0, "ERROR", "generation", {"replica": "generation-1"}, "dead"),
        LogLine(1.0, "INFO", "x", {}, "x"),
    ]
    (first, second), left_out = incidents(lines)
    assert (first.count, first.first_at, first.last_at, first.text) == (3, 5.0, 20.0, "waiting for 5.0 s")
    assert second.service == "generation-1" and left_out == 0
    many = [LogLine(float(at), "WARNING", "x", {}, "x" * at) for at in range(1, 100)] + lines
    kept, left_out = incidents(many)
    assert len(kept) == 60 and left_out == 41 and any(one.level == "ERROR" for one in kept)


def test_settings_say_what_differs_from_the_default() -> None:
    config = load_recipe("configs/tiny-cpu.yaml", ["optimizer.lr=1e-3"]).config
    found = {one.name: one for one in settings(config.model_dump(mode="json"))}
    assert not found["optimizer.lr"].is_default and found["learner.max_staleness"].is_default
    assert found["optimizer.lr"].default is not None and found["model.path"].default is None


def test_curves_leave_out_what_is_not_finite_and_are_thinned() -> None:
    picture = draw([Series('"<b>', [(1, 0.0), (2, math.nan), (3, 1.0)])])
    assert picture.count("<circle") == 2 and "<b>" not in picture and "nan" not in picture
    assert "nothing was measured" in draw([Series("x", [(1, math.inf)])])
    points = downsample([(step, float(step)) for step in range(10_001)])
    assert len(points) <= MAX_POINTS and points[0][1] == 12.5 and points[-1][0] == 10_000
    assert ticks_between(0.0, 1.0) == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert ticks_between(3.0, 3.0)[0] <= 3.0 <= ticks_between(3.0, 3.0)[-1]
    assert ticks_between(-0.013, 0.004) == [-0.015, -0.01, -0.005, 0.0, 0.005]
