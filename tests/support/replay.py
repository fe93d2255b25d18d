"""A made-up recording, and a learner that lives on it in this process."""

import dataclasses
import json
import random
from pathlib import Path

import numpy as np
import redis

from headrace.common.config import RunConfig, load_recipe
from headrace.common.process.waiting import Waits
from headrace.common.redis.keys import Keys
from headrace.common.tasks import load_task
from headrace.common.wire import Group, Rollout, Timings, VersionSpan, encode
from headrace.learner.assembly import assemble
from headrace.learner.checkpoints.checkpoint import find_newest
from headrace.learner.context import LearnerContext
from headrace.learner.distributed.state_files import read_state
from headrace.learner.intake.recordings import Header, RecordedGroup, Recording, RecordingWriter
from headrace.learner.loop import Loop
from headrace.learner.steering.switches import Switches
from tests.support.factories import make_ticket

ROOT = Path(__file__).parents[2]
STEPS = 6
SETTINGS = [
    f"learner.steps={STEPS}",
    "learner.groups_per_step=4",
    "learner.checkpoint_interval_steps=2",
    "actor.group_size=4",
    "actor.num_mini_batches=2",
    "actor.divergence_guard=warn",
]
NUM_GROUPS = 60


def make_config(*overrides: str) -> RunConfig:
    settings = [*SETTINGS, f"model.path={ROOT}/headrace/demo/policy", *overrides]
    return load_recipe(ROOT / "configs" / "tiny-cpu.yaml", settings).config


def make_recording(path: Path) -> Path:
    writer = RecordingWriter(path, Header("recorded", make_config().model_dump(mode="json")))
    writer.add_versions({version: version - 1 for version in range(1, 7)})
    rng = random.Random(5)
    for place in range(NUM_GROUPS):
        group = random_group(rng, place)
        writer.add(RecordedGroup(f"{place + 1}-0", group.ticket.id, encode(group)))
    writer.close()
    return path


def random_group(rng: random.Random, place: int) -> Group:
    """As replicas make them: some uniform, some stale by the time they are packed, some across two versions."""
    prompt = [rng.randrange(2, 500) for _ in range(rng.randrange(8, 40))]
    ticket = make_ticket(f"0-{place}", prompt_tokens=prompt, num_completions=4)
    newest = 1 + place // 12
    rollouts = []
    for _ in range(4):
        num_tokens = rng.randrange(2, 16)
        middle = rng.randrange(1, num_tokens)
        rollouts.append(
            Rollout.of_completion(
                tokens=np.array([rng.randrange(2, 500) for _ in range(num_tokens)], np.int32),
                behaviour_logprobs=np.array([-rng.random() * 8 for _ in range(num_tokens)], np.float32),
                version_spans=[
                    VersionSpan(max(1, newest - 1), 0, middle),
                    VersionSpan(newest, middle, num_tokens),
                ],
                reward=1.0 if place % 5 == 0 else float(rng.random() < 0.5),
                finish_reason="stop",
            )
        )
    return Group(ticket, rollouts, "r", Timings(1.0, 2.0, 3.0))


def assemble_loop(
    folder: Path,
    client: redis.Redis,
    keys: Keys,
    recording: Path | None,
    *overrides: str,
    is_new_epoch: bool = False,
) -> Loop:
    """A learner as its process assembles it."""
    task, url = load_task("arithmetic", {}), "http://127.0.0.1:1"
    connections = (client, keys, url, task, Switches(), Waits())
    replayed = Recording(recording) if recording else None
    context = LearnerContext(make_config(*overrides), folder, "token", *connections, replayed)
    loop, _ = assemble(dataclasses.replace(context, is_new_epoch=is_new_epoch))
    return loop


def end(loop: Loop) -> None:
    loop.intake.stop()
    loop.close()


def state_of(folder: Path) -> dict[str, bytes]:
    found = find_newest(folder / "checkpoints")
    assert found is not None and found[0].step == STEPS
    tensors = read_state(found[1], sorted(found[0].files))
    return {name: tensor.numpy().tobytes() for name, tensor in tensors.items()}


def trained(folder: Path) -> list[list[str]]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row["tickets"] for row in rows if row["kind"] == "step"]
