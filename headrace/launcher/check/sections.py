"""The sections that `headrace check` prints below the settings; each function here makes one, or returns None.

A function may add a note about something that does not fit this machine.
"""

import os
import shutil
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from headrace.common.hardware.device import CPU_MAX_TOTAL_TOKENS, has_bfloat16_units
from headrace.launcher.check.estimate_inputs import EstimateInputs
from headrace.launcher.estimates.device_memory import Rows, engine_bytes, learner_bytes
from headrace.launcher.estimates.duration import (
    START_S,
    cpu_speed,
    duration_warnings,
    estimate,
    format_seconds,
    gpu_speed,
)
from headrace.launcher.estimates.host_memory import (
    SHARED_MEMORY,
    SHARED_VERSIONS,
    disk_rows,
    host_rows,
    machine_memory_bytes,
    shared_memory_problem,
    weight_bytes,
)
from headrace.launcher.estimates.model_size import Shape
from headrace.launcher.estimates.traffic import delta_share, traffic_bytes
from headrace.launcher.placement.devices import plan_lines

KIB = 1024


class Section(NamedTuple):
    title: str
    lines: list[str]
    value: Any
    """The content for `--json`."""
    is_estimate: bool = True


def _rows(title: str, rows: Rows, total: str | None = None) -> Section:
    shown = rows if total is None else rows | {total: sum(rows.values())}
    return Section(title, [f"{format_bytes(num_bytes):>10}  {what}" for what, num_bytes in shown.items()], rows)


def prompts(inputs: EstimateInputs) -> Section | None:
    """The lengths of the prompts, and the room that the context leaves for completions."""
    config, lines, value = inputs.config, [], {}
    for split, trial in inputs.found.splits.items():
        low, middle, high = min(trial.lengths), int(statistics.median(trial.lengths)), max(trial.lengths)
        value[split] = {"tried": len(trial.lengths), "refused": trial.refused, "tokens": [low, middle, high]}
        longest = high + config.sampling.max_new_tokens
        lines.append(
            f"{len(trial.lengths):>10,}  {split} prompts tried: {low:,} to {high:,} tokens, {middle:,} in the middle; "
            f"{longest:,} with a completion, of a context of {inputs.found.context:,}"
        )
    if inputs.found.cost:
        lines.append(f"{'':10}  {inputs.found.cost}")
    return Section("prompts", lines, value | {"cost": inputs.found.cost}, is_estimate=False) if lines else None


def template(inputs: EstimateInputs) -> Section | None:
    """What the chat template does with an earlier reply of a conversation."""
    found = inputs.found.template
    if found is None:
        return None
    rows = [
        (found.after_user, "a reply, once a user message follows"),
        (found.reasoning_after_user, "a reply with reasoning, once a user message follows"),
        (found.after_tool, "a reply that calls a tool, once the tool's answer follows"),
    ]
    lines = [f"{history:>12}  {what}" for history, what in rows] + [f"{'':12}  {line}" for line in found.problems]
    return Section("template", lines, msgspec.to_builtins(found), is_estimate=False)


def episodes(inputs: EstimateInputs) -> Section | None:
    """How many episodes a replica plays at a time, of a task with `rollout`."""
    if not inputs.found.has_rollout:
        return None
    config, environment = inputs.config, inputs.config.environment
    num_wanted = config.generation.max_groups_in_flight * config.actor.group_size
    room = environment.workers * environment.episodes_per_worker
    lines = [
        f"{min(num_wanted, room):>10,}  episodes at a time in a replica: generation.max_groups_in_flight "
        f"{config.generation.max_groups_in_flight} of {config.actor.group_size}, and room for {room:,} in its "
        f"environment workers. One that waits for its environment holds no place in the engine"
    ]
    return Section("episodes", lines, {"wanted": num_wanted, "room": room}, is_estimate=False)


def devices(inputs: EstimateInputs) -> Section | None:
    """The devices of each service."""
    lines = plan_lines(inputs.config, inputs.notes)
    return Section("devices", lines, lines, is_estimate=False)


def learner(inputs: EstimateInputs) -> Section | None:
    if inputs.shape is None:
        return None
    ranks = inputs.config.learner.num_ranks
    rows, gpu_bytes = learner_bytes(inputs.shape, inputs.config), inputs.gpu_bytes
    needed = sum(rows.values())
    if inputs.device_of_learner == "cuda" and 0 < gpu_bytes < needed:
        inputs.notes.append(
            f"the learner needs about {format_bytes(needed)} of GPU memory, and the GPU has {format_bytes(gpu_bytes)}; "
            "expected more learner.num_ranks, gradient_checkpointing, or less learner.micro_batch_tokens"
        )
    total = "together" if ranks == 1 else f"together, on each of {ranks} ranks' devices"
    return _rows("learner", rows, total)


def engine(inputs: EstimateInputs) -> Section | None:
    if inputs.shape is None or not inputs.is_local_engine:
        return None
    return _rows("engine", _engine_rows(inputs, inputs.shape), "together, per replica")


def _engine_rows(inputs: EstimateInputs, shape: Shape) -> Rows:
    on_cpu = inputs.device_of_engine == "cpu"
    tokens = inputs.config.generation.engine.max_total_tokens or (CPU_MAX_TOTAL_TOKENS if on_cpu else None)
    is_alone = inputs.config.learner.memory_fraction is None
    return engine_bytes(shape, inputs.config, tokens, inputs.gpu_bytes if is_alone and not on_cpu else 0)


def host(inputs: EstimateInputs) -> Section | None:
    """Host memory, with all replicas on this machine."""
    if inputs.shape is None:
        return None
    config, replicas = inputs.config, inputs.config.generation.replicas
    on_device = sum(learner_bytes(inputs.shape, config).values()), sum(_engine_rows(inputs, inputs.shape).values())
    on_cpu = inputs.device_of_learner == "cpu", inputs.device_of_engine == "cpu"
    rows, of_replica = host_rows(inputs.shape, config, *on_device, on_cpu, inputs.found.has_rollout)
    rows |= {f"weights in {SHARED_MEMORY}, for all replicas here": SHARED_VERSIONS * weight_bytes(inputs.shape, config)}
    total = sum(rows.values()) + replicas * sum(of_replica.values())
    here = machine_memory_bytes()
    if 0 < here < total:
        inputs.notes.append(
            f"this machine has {format_bytes(here)} of memory, and a run with {replicas} "
            f"replica{'s' * (replicas != 1)} takes {format_bytes(total)} by estimate"
        )
    if problem := shared_memory_problem(inputs.shape, config):
        inputs.notes.append(problem)
    section = _rows("host", rows | of_replica)
    section.lines.append(f"{format_bytes(total):>10}  together, with {replicas} replica{'s' * (replicas != 1)}")
    return section


def disk(inputs: EstimateInputs) -> Section | None:
    if inputs.shape is None:
        return None
    rows = disk_rows(inputs.shape, inputs.config, delta_share(inputs.config))
    free = shutil.disk_usage(Path.cwd()).free
    if free < sum(rows.values()):
        inputs.notes.append(
            f"{format_bytes(free)} are free on the disk of {Path.cwd()}, and a run's folder takes up to "
            f"{format_bytes(sum(rows.values()))} by estimate"
        )
    return _rows("disk", rows, "a run's folder, at most, without logs and Redis' file")


def traffic(inputs: EstimateInputs) -> Section | None:
    return None if inputs.shape is None else _rows("moved", traffic_bytes(inputs.shape, inputs.config))


def times(inputs: EstimateInputs) -> Section | None:
    """Estimated times, by the measured speed of the CPU or the speed of an H100."""
    if inputs.shape is None or (inputs.device_of_learner == "cpu" and not inputs.found.flops):
        return None
    config, flops = inputs.config, inputs.found.flops
    on_cpu, on_gpu = cpu_speed(config, flops, has_bfloat16_units(), os.cpu_count() or 1), gpu_speed(config)
    of_learner = (on_cpu if inputs.device_of_learner == "cpu" else on_gpu)[0]
    of_engine = (on_cpu if inputs.device_of_engine == "cpu" else on_gpu)[1]
    prompt_tokens = inputs.prompt_tokens * (config.actor.group_size if inputs.found.cost else 1)
    found = estimate(inputs.shape, config, prompt_tokens, of_learner, of_engine, START_S[inputs.device_of_engine])
    if "cpu" in (inputs.device_of_learner, inputs.device_of_engine):
        inputs.notes.extend(duration_warnings(found, config))
    by = f"{flops / 1e9:.0f} GFLOP/s a thread, measured" if inputs.device_of_learner == "cpu" else "an H100's speed"
    rows = {
        f"to the end of the first step, the first evaluation before it (by {by}; within a factor of two or three)": (
            found.first_step
        ),
        "an evaluation": found.evaluation,
        "a step: generating its groups": found.generation,
        "a step: training on them, beside that": found.training,
    }
    lines = [f"{format_seconds(seconds):>10}  {what}" for what, seconds in rows.items()]
    return Section("time", lines, {what: round(seconds, 3) for what, seconds in rows.items()})


SECTIONS: list[Callable[[EstimateInputs], Section | None]] = [
    prompts,
    template,
    episodes,
    devices,
    learner,
    engine,
    host,
    disk,
    traffic,
    times,
]


def format_bytes(num_bytes: int) -> str:
    """A size as text, such as 2.9 GiB."""
    amount = float(num_bytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if amount < KIB:
            return f"{amount:.0f} {unit}" if unit == "B" else f"{amount:.1f} {unit}"
        amount /= KIB
    return f"{amount:.1f} TiB"
