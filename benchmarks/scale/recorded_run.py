"""Durations and lengths of a real run's groups, for simulated engines (simulated_replicas.py).

    headrace up configs/tiny-cpu.yaml --run NAME & sleep 20; headrace record --run NAME
    python -m benchmarks.scale.recorded_run runs/NAME [--tokens-per-s 2600]

Writes benchmarks/scale/recorded/demo.json: for `NUM_GROUPS` training groups, evenly spaced over the run, the seconds
from lease to the last token, and the number of tokens and the reward of each completion; further the medians of the
run's steps and weight pauses. The seconds are those of an engine with the maximum number of groups in flight, and so is
the computed speed. If other work slowed the run down, `--tokens-per-s` scales all seconds to the given speed.
"""

import argparse
import itertools
import json
import os
import statistics
from pathlib import Path

import msgspec

from benchmarks.demo import cpu_model
from headrace.common.wire import Group, decode_group
from headrace.learner.intake.recordings import Recording
from headrace.learner.reporting.summary import METRICS_FILE, read_rows

RECORDED = Path(__file__).parent / "recorded" / "demo.json"
NUM_GROUPS = 400


class RecordedGroup(msgspec.Struct, frozen=True, array_like=True):
    seconds: float
    """Seconds from the lease to the last token."""
    num_tokens: list[int]
    """For each completion."""
    rewards: list[float]


class RecordedRun(msgspec.Struct, frozen=True):
    run: str
    cpu: str
    cores: int
    load_average: float
    """The machine's load when this was written: other work makes engines slower."""
    num_recorded: int
    groups_in_flight: int
    """Maximum number at one time in the single replica."""
    groups_per_step: int
    group_size: int
    max_new_tokens: int
    recorded_tokens_per_s: float
    """The replica's measured speed in the median step."""
    tokens_per_s: float
    """The speed after scaling."""
    step_s: float
    """Median duration of a step's computation."""
    swap_pause_s: float
    groups: list[RecordedGroup]


def read_recorded(path: Path = RECORDED) -> RecordedRun:
    return msgspec.json.decode(path.read_bytes(), type=RecordedRun)


def of_run(folder: Path, tokens_per_s: float | None) -> RecordedRun:
    recording = Recording(folder / "recording.msgpack")
    places = range(0, recording.num_groups, max(1, recording.num_groups // NUM_GROUPS))
    groups = [decode_group(payload) for _, payload in recording.groups(places)]
    steps = [row for row in read_rows(folder / METRICS_FILE) if row["kind"] == "step"]
    between = itertools.pairwise(steps)
    rates = [(b["run_generated_tokens"] - a["run_generated_tokens"]) / (b["time_s"] - a["time_s"]) for a, b in between]
    recorded_tokens_per_s, config = statistics.median(rates), recording.config
    slowed = (tokens_per_s or recorded_tokens_per_s) / recorded_tokens_per_s
    step_s = statistics.median(row["proximal_s"] + row["train_s"] for row in steps)
    pause_s = statistics.median(ms for row in steps for ms in row["swap_pauses_ms"]) / 1e3
    return RecordedRun(
        run=recording.run,
        cpu=cpu_model(),
        cores=os.cpu_count() or 1,
        load_average=round(os.getloadavg()[1], 1),
        num_recorded=recording.num_groups,
        groups_in_flight=config["generation"]["max_groups_in_flight"],
        groups_per_step=config["learner"]["groups_per_step"],
        group_size=config["actor"]["group_size"],
        max_new_tokens=config["sampling"]["max_new_tokens"],
        recorded_tokens_per_s=round(recorded_tokens_per_s, 1),
        tokens_per_s=round(recorded_tokens_per_s * slowed, 1),
        step_s=round(step_s / slowed, 3),
        swap_pause_s=round(pause_s / slowed, 4),
        groups=[_recorded(group, slowed) for group in groups],
    )


def _recorded(group: Group, slowed: float) -> RecordedGroup:
    seconds = (group.timings.sampled_s - group.timings.leased_s) / slowed
    return RecordedGroup(round(seconds, 3), [one.num_trained_tokens for one in group.rollouts], group.rewards)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scale.recorded_run")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tokens-per-s", type=float)
    arguments = parser.parse_args()
    found = of_run(arguments.folder, arguments.tokens_per_s)
    lines = json.dumps(msgspec.to_builtins(found) | {"groups": []}, indent=1).removesuffix("[]\n}")
    rows = ",\n".join(f"  {msgspec.json.encode(group).decode()}" for group in found.groups)
    RECORDED.write_text(f"{lines}[\n{rows}\n ]\n}}\n")
    print(f"{len(found.groups)} of {found.num_recorded} groups in {RECORDED}: {found.tokens_per_s:.0f} tokens/s")


if __name__ == "__main__":
    main()
