"""The state in Redis of a run that trains, without any service: for tests of what reads or displays a run.

It is deterministic. It is also a command, to look at the page by hand:

    python -m tests.support.seeded_run redis://127.0.0.1:6379 demo --steps 60 --replicas 3
"""

import argparse
import math
import time
from typing import Any

import msgspec
import redis

from headrace.common.config import load_recipe
from headrace.common.redis.keys import MAX_EVENTS, MAX_HISTORY, MAX_SAMPLES, TICKET_GROUP, Keys
from headrace.common.wire import Heartbeat, encode
from headrace.common.wire.group_samples import GroupSample, RolloutSample
from tests.support.factories import make_ticket

RECIPE = "configs/tiny-cpu.yaml"
GROUPS_PER_STEP = 16
STEP_S = 1.5
TOKENS_PER_STEP = 3000
EVALUATION_INTERVAL = 20
WORDS = ["She", " has", " 3", " boxes", " of", " 4", ",", " so", " 12", "."]


def seed_run(
    client: redis.Redis,
    keys: Keys,
    num_steps: int = 40,
    num_replicas: int = 2,
    learner_url: str = "",
    replica_url: str = "http://127.0.0.1:9",
    num_groups: int = 24,
    num_dead: int = 1,
    at: float | None = None,
) -> None:
    """With an empty `learner_url` control does not probe the learner. `at`: unix time of the last step. Heartbeats
    last an hour."""
    at = time.time() if at is None else at
    config = load_recipe(RECIPE, []).config
    with client.pipeline(transaction=False) as pipe:
        pipe.set(keys.config, config.model_dump_json(exclude={"redis_url"}))
        pipe.set(keys.epoch, 1)
        pipe.set(keys.launcher, "machine process 1", ex=3600)
        advice = "the learner waits 23% of its time for groups, replicas 2% of theirs for tickets"
        position = {"phase": "training", "reason": "", "step": num_steps, "weight_version": num_steps + 1}
        position |= {"checkpoint_step": num_steps, "checkpoint_time_s": at, "checkpoint_seconds": 0.2}
        position |= {"checkpoint_bytes": 8_000_000}
        advised = {"advised_replicas": num_replicas + 1, "advice": advice}
        pipe.hset(keys.learner, mapping=position | advised | ({"url": learner_url} if learner_url else {}))
        for index in range(num_replicas):
            beat = heartbeat(f"generation-{index}", replica_url, num_steps, index)
            pipe.set(keys.replica(beat.replica), encode(beat), ex=3600)
        for row in step_rows(num_steps, at):
            _announce(pipe, keys, "step", row)
            if row["step"] % EVALUATION_INTERVAL == 0:
                _announce(
                    pipe, keys, "evaluation", evaluation_row(row["step"], at - STEP_S * (num_steps - row["step"]))
                )
        for group in (group_sample(index, num_steps, at) for index in range(num_groups)):
            summary = {"id": group.id, "kind": group.kind, "state": group.state, "step": group.step}
            fields = summary | {"group": msgspec.json.encode(group)}
            pipe.xadd(keys.samples, fields, maxlen=MAX_SAMPLES, approximate=True)
        for index in range(num_replicas):
            swap = {"replica": f"generation-{index}", "weight_version": num_steps + 1, "bytes": 20_000}
            swap |= {"fetch_ms": 30.0, "apply_ms": 10.0, "pause_ms": 50.0 + index, "load_ms": 20.0}
            _event(pipe, keys, "weight_swap", swap)
        for index in range(num_dead):
            pipe.xadd(keys.dead_letters, {"id": f"0-{90_000 + index}", "reason": "scoring failed: no answer in 10 s"})
        for stream in (keys.tickets, keys.eval_tickets):
            pipe.xgroup_create(stream, TICKET_GROUP, id="0", mkstream=True)
        for index in range(8):
            pipe.xadd(keys.tickets, {"ticket": encode(make_ticket(f"0-{91_000 + index}"))})
        pipe.xreadgroup(TICKET_GROUP, "generation-0", {keys.tickets: ">"}, count=5)
        pipe.execute()


def step_rows(num_steps: int, at: float) -> list[dict[str, Any]]:
    """One row per step, the last at `at`: the reward grows, everything else is healthy."""
    return [
        {
            "step": step,
            "time_s": at - STEP_S * (num_steps - step),
            "wall_s": STEP_S * step,
            "weight_version": step + 1,
            "sampled_reward_mean": 0.3 + 0.6 * step / num_steps,
            "trained_reward_mean": 0.5,
            "run_uniform_share": 0.25,
            "run_stale_share": 0.0,
            "dropped_groups": 1.0,
            "dropped_share": 0.05,
            "dropped_completion_tokens_mean": 18.0,
            "dropped_reward_mean": 0.4,
            "dropped_length_bias": 0.01,
            "staleness_mean": 1.0 + 0.2 * math.sin(step),
            "staleness_max": 2.0,
            "staleness_in_flight_mean": 0.6,
            "staleness_in_queue_mean": 0.4 + 0.2 * math.sin(step),
            "kl_behaviour_proximal": 0.002,
            "ess": 0.98,
            "kl_at_staleness_0": 1e-6,
            "kl_at_staleness_1": 0.003,
            "clip_fraction": 0.05,
            "dual_clip_fraction": 0.0,
            "behaviour_mask_fraction": 0.001,
            "behaviour_clip_fraction": 0.0,
            "behaviour_weight_max": 1.8,
            "behaviour_weight_capped_mean": 0.99,
            "importance_ratio_max": 1.3,
            "entropy": 0.4 - 0.2 * step / num_steps,
            "fresh_logprob_gap_mean": 1e-6,
            "fresh_logprob_gap_rms": 1.2e-6,
            "fresh_logprob_gap_p999": 1e-4,
            "stale_logprob_gap_rms": 0.06,
            "fresh_tokens": 400.0,
            "loss": -0.01,
            "gradient_norm": 0.5,
            "skipped_updates": 0.0,
            "lr": 2e-4,
            "run_generated_tokens": TOKENS_PER_STEP * step,
            "batch_tokens": 2000.0,
            "wait_s": 0.3,
            "publish_s": 0.1,
            "step_s": 1.2,
            "proximal_s": 0.2,
            "train_s": 0.9,
            "completion_tokens_mean": 15.0,
            "truncated_share": 0.02,
        }
        for step in range(1, num_steps + 1)
    ]


def evaluation_row(step: int, at: float) -> dict[str, Any]:
    accuracy = {"held_out": 0.7 + step / 1000, "pass_at_1": 0.7 + step / 1000, "pass_at_2": 0.8 + step / 1000}
    counts = {"num_completions": 512, "num_dead": 0, "first_token_step_mean": float(step)}
    return {"step": step, "time_s": at, "weight_version": step + 1, "is_best": True} | accuracy | counts


def heartbeat(name: str, url: str, num_steps: int, index: int = 0) -> Heartbeat:
    return Heartbeat(
        replica=name,
        url=url,
        state="running",
        reason="",
        weight_version=num_steps + 1,
        groups_in_flight=4 + index,
        groups_committed=12 * num_steps,
        tokens_generated=TOKENS_PER_STEP * num_steps,
        waiting_s=3.0,
        serving_s=STEP_S * num_steps + 3.0,
    )


def group_sample(index: int, num_steps: int, at: float, num_completions: int = 4) -> GroupSample:
    """Every fourth group is uniform, every eighth of an evaluation, the others trained; two versions sampled each."""
    state = "evaluated" if index % 8 == 7 else "uniform" if index % 4 == 3 else "trained"
    step, is_trained = max(1, num_steps - index // 4), state == "trained"
    half = len(WORDS) // 2
    rollouts = [
        RolloutSample(
            text="".join(WORDS),
            reward=1.0 if state == "uniform" or place % 2 == 0 else 0.0,
            advantage=(0.9 if place % 2 == 0 else -0.9) if is_trained else None,
            finish_reason="stop" if place else "length",
            tokens=WORDS,
            versions=[step - 1] * half + [step] * (len(WORDS) - half),
            behaviour_logprobs=[-0.1 * (token + 1) for token in range(len(WORDS))],
            proximal_logprobs=[-0.1 * (token + 1) - 0.01 * place for token in range(len(WORDS))]
            if is_trained
            else None,
        )
        for place in range(num_completions)
    ]
    return GroupSample(
        id=f"eval-{step}-{index}" if state == "evaluated" else f"0-{index}",
        kind="eval" if state == "evaluated" else "train",
        state=state,  # type: ignore[arg-type]
        step=step,
        issued_step=step - 1,
        staleness=None if state == "evaluated" else 1,
        replica=f"generation-{index % 2}",
        prompt=[{"role": "user", "content": f"Mia has {index} boxes of 4 apples. How many apples are there?"}],
        rollouts=rollouts,
        leased_s=at - 4,
        sampled_s=at - 2,
        scored_s=at - 1.9,
        decided_s=at - index,
    )


def _announce(pipe: Any, keys: Keys, kind: str, row: dict[str, Any]) -> None:
    fields = {"kind": kind, "row": msgspec.json.encode(row)}
    pipe.xadd(keys.history, fields, maxlen=MAX_HISTORY, approximate=True)
    _event(pipe, keys, kind, {"kind": kind} | row)


def _event(pipe: Any, keys: Keys, kind: str, event: dict[str, Any]) -> None:
    pipe.xadd(keys.events, {"kind": kind, "event": msgspec.json.encode(event)}, maxlen=MAX_EVENTS, approximate=True)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.support.seeded_run")
    parser.add_argument("redis_url")
    parser.add_argument("run")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--replicas", type=int, default=2)
    arguments = parser.parse_args()
    with redis.Redis.from_url(arguments.redis_url) as client:
        client.delete(*client.scan_iter(match=f"headrace:{{{arguments.run}}}:*"), b"none")
        seed_run(client, Keys(arguments.run), arguments.steps, arguments.replicas)


if __name__ == "__main__":
    main()
