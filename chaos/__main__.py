"""`python -m chaos`: the kill matrix on this machine; exit code 1 if anything was lost, trained twice or violated.

    python -m chaos --seed 7
    python -m chaos --seed 7 --faults 3 --kinds kill_redis --no-undisturbed
    python -m chaos --seed 20 --faults 20 --episodes

A run `chaos-SEED` of an earlier call is deleted first. Ctrl-C stops everything that was started.
"""

import argparse
import json
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from chaos.episodes.groups import GroupChecks
from chaos.launched import Launched
from chaos.matrix import KillMatrix
from chaos.report import print_table, problems, summarise, write_summary
from chaos.schedule import EPISODE_KINDS, KINDS, Kind, schedule
from chaos.test_bed import TestBed, clear

RECIPE, EPISODES_RECIPE = Path("configs/tiny-cpu.yaml"), Path("chaos/episodes/recipe.yaml")
UNDISTURBED_START_S = 600.0
UNDISTURBED_STEP_S = 30.0
POLL_S = 0.5


def main() -> int:
    arguments = _parse_arguments()
    started = time.monotonic()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    path = arguments.runs_folder / "chaos" / "summary.json"
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 150)

    def say(text: str) -> None:
        console.print(f"[{time.monotonic() - started:7.1f} s] {text}", markup=False, soft_wrap=True)

    try:
        summary = _measure(arguments, path, say)
    except (RuntimeError, ValueError) as error:
        say(f"FAILED: {error}")
        return 1
    except KeyboardInterrupt:
        say("stopped")
        return 130
    write_summary(summary, path)
    print_table(summary, console)
    console.print(f"  {path}")
    found = problems(summary)
    for problem in found:
        console.print(f"FAILED: {problem}")
    return 1 if found else 0


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m chaos", description="The kill matrix.")
    parser.add_argument("--seed", type=int, default=0, help="seed of the schedule")
    parser.add_argument("--faults", type=int, default=44, help="number of faults")
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--runs-folder", type=Path, default=Path("runs"))
    parser.add_argument(
        "--no-undisturbed", dest="undisturbed", action="store_false", help="skip the second run, without faults"
    )
    parser.add_argument(
        "--episodes", action="store_true", help="a task of several turns, and faults in the middle of its episodes"
    )
    parser.add_argument(
        "--kinds", type=_kinds, help=f"some of {','.join(Kind)}; default: all, or all that are possible"
    )
    arguments = parser.parse_args()
    if arguments.kinds is None:
        arguments.kinds = [*KINDS, *EPISODE_KINDS * 2] if arguments.episodes else list(KINDS)
    elif not arguments.episodes and (foreign := set(arguments.kinds) & set(EPISODE_KINDS)):
        parser.error(f"{', '.join(sorted(foreign))}: expected --episodes")
    return arguments


def _kinds(text: str) -> list[Kind]:
    try:
        return [Kind(name) for name in text.split(",")]
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{error}; expected some of {','.join(Kind)}") from error


def _measure(arguments: argparse.Namespace, path: Path, say: Any) -> dict[str, Any]:
    """The summary; `path` has it as soon as the disturbed run is complete."""
    run, runs_folder = f"chaos-{arguments.seed}", arguments.runs_folder
    path.unlink(missing_ok=True)
    recipe = EPISODES_RECIPE if arguments.episodes else RECIPE
    settings = yaml.safe_load(recipe.read_text())
    checks = GroupChecks.of_episodes(Path(settings["model"]["path"])) if arguments.episodes else GroupChecks()
    with TestBed(run, runs_folder, recipe, arguments.replicas, checks) as test_bed:
        problem = test_bed.disk.problem
        kinds = _possible(arguments.kinds, problem, say)
        faults = schedule(arguments.seed, arguments.faults, kinds)
        say(f"{len(faults)} faults on run {run} in {runs_folder / run}, seed {arguments.seed}")
        results = KillMatrix(test_bed, faults, settings["learner"]["groups_per_step"], say).run()
    held_out = undisturbed = None
    if not results.failure:
        held_out = _held_out(runs_folder / run)
        say(f"held-out pass@1 {held_out} after step {results.num_steps}")
    write_summary(summarise(results, arguments.seed, held_out, None, problem), path)
    if arguments.undisturbed and not results.failure:
        launched = Launched(f"{run}-undisturbed", runs_folder, recipe, None, arguments.replicas)
        undisturbed = _run_undisturbed(launched, results.num_steps, say)
    return summarise(results, arguments.seed, held_out, undisturbed, problem)


def _possible(kinds: Sequence[Kind], disk_problem: str, say: Any) -> list[Kind]:
    """The kinds that can be tried: the disk cannot be filled if no small disk can be mounted, which is an error in
    CI."""
    if not disk_problem or Kind.FILL_DISK not in kinds:
        return list(kinds)
    if os.environ.get("CI"):
        raise RuntimeError(f"a small disk cannot be mounted for the checkpoints: {disk_problem}")
    say(f"NOT TRIED: fill_disk, since a small disk cannot be mounted for the checkpoints: {disk_problem}")
    return [kind for kind in kinds if kind is not Kind.FILL_DISK]


def _run_undisturbed(launched: Launched, num_steps: int, say: Any) -> float | None:
    """Runs the same number of steps without faults; returns the final accuracy."""
    clear(launched.folder)
    say(f"the same without faults: run {launched.run}, {num_steps} steps")
    deadline = time.monotonic() + UNDISTURBED_START_S + UNDISTURBED_STEP_S * num_steps
    launched.start(num_steps)
    try:
        while launched.is_running:
            if time.monotonic() > deadline:
                raise RuntimeError(f"the undisturbed run is too slow; its log is {launched.log}")
            time.sleep(POLL_S)
    finally:
        launched.close()
    if launched.returncode != 0:
        raise RuntimeError(f"the undisturbed run ended with {launched.returncode}; its log is {launched.log}")
    held_out = _held_out(launched.folder)
    say(f"held-out pass@1 {held_out} after {num_steps} undisturbed steps")
    return held_out


def _held_out(folder: Path) -> float | None:
    found: float | None = json.loads((folder / "summary.json").read_text())["held_out_after"]
    return found


if __name__ == "__main__":
    sys.exit(main())
