"""`headrace up`: runs the services of one run on this machine until the run is complete, and shows how it goes.

A service that ends unexpectedly is restarted (supervision/supervisor.py). The number of replicas can change while the
run is live (supervision/replicas.py), and a number set by `headrace scale` outlives the launcher. Control serves the
page; its URL is in the run's folder, and the run goes on without it. Ctrl-C stops learner (with a checkpoint) and
replicas (their tickets handed back) at the same time, then control and Redis; a second Ctrl-C kills them. Only one
launcher at a time can hold a run.
"""

import json
import os
import signal
import time
from contextlib import ExitStack
from pathlib import Path

from rich.console import Console
from rich.text import Text

from headrace.common.config import Recipe
from headrace.common.http.addresses import advertised_url, free_port
from headrace.common.preflight.installation import check_installed
from headrace.common.preflight.recipe import check_run
from headrace.common.process.logs import log_to_file
from headrace.common.process.run_token import load_or_create_token, token_from_environment
from headrace.common.redis.keys import Keys
from headrace.launcher.check.before_start import preflight_notes
from headrace.launcher.placement.devices import Devices, assign_devices, device_lines
from headrace.launcher.run.open_run import REDIS_GRACE_S
from headrace.launcher.run.processes import Service, handling_signals, python_service
from headrace.launcher.run.redis_server import launch_redis, redis_url_at, wait_for_redis
from headrace.launcher.run.run_folder import CONTROL_URL_FILE, run_lock, write_config, write_url_file
from headrace.launcher.supervision.replica_target import ReplicaTarget
from headrace.launcher.supervision.replicas import Replicas
from headrace.launcher.supervision.restart_policy import ServiceFailed, SupervisedProcess
from headrace.launcher.supervision.supervisor import Supervisor
from headrace.launcher.terminal.progress_view import ProgressView

LEARNER_GRACE_S = 120.0
REPLICA_GRACE_S = 15.0
CONTROL_GRACE_S = 10.0
SERVICE_UP_S = 60.0
"""Having been up for longer than this counts as progress of a replica, or of control."""
REFUSED, FENCED, STARVED = 2, 3, 4
"""Exit codes of a learner after which a restart would not help."""


def up(
    recipe: Recipe,
    run: str,
    runs_folder: Path,
    console: Console,
    is_target_cleared: bool = False,
    is_json: bool = False,
    is_new_epoch: bool = False,
) -> None:
    """Returns when the run is complete or was stopped. Raises `ValueError` before anything starts, later
    `ServiceFailed`.

    `is_target_cleared`: the recipe's number of replicas applies, whatever `headrace scale` set before.
    `is_new_epoch`: data other than those the run began with are accepted, from its next epoch; else they are refused.
    `is_json`: every line printed is a JSON object, the last one the summary.
    """
    keys, folder = Keys(run), runs_folder / run
    check_installed()
    check_run(recipe.config)
    devices = assign_devices(recipe.config)
    notes = preflight_notes(recipe.config)
    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        lock = stack.enter_context(run_lock(folder))
        stack.enter_context(log_to_file(folder / "logs" / "launcher.log", "launcher", run=run))
        write_config(folder, recipe)
        token = _new_token(folder / "token")
        port = free_port()
        url = recipe.config.redis_url or redis_url_at(port)
        view = ProgressView(url, keys, recipe.config.learner.steps, console, is_json)
        redis = None
        if recipe.config.redis_url is None:
            redis = _redis(folder, port, lock, view)
            stack.callback(lambda: redis.service.stop(redis.grace_s))  # in case the supervisor never starts
            wait_for_redis(redis.service, url)
        stack.enter_context(write_url_file(folder, url))
        host, page_port = recipe.config.control.host, recipe.config.control.port or free_port()
        page = advertised_url(host, page_port)
        stack.enter_context(write_url_file(folder, page, CONTROL_URL_FILE))
        stack.enter_context(view)
        view.skip_to_now()
        view.say(f"run {run} in {folder}: logs in {folder / 'logs'}")
        view.say(f"the page: {page}/#token={token}" if token else f"the page: {page}")
        for line in (*(device_lines(recipe.config, devices) if devices.gpus else ()), *devices.notes):
            view.say(line)
        for note in notes:
            view.say(f"note: {note}")
        signals: list[int] = []
        stack.enter_context(handling_signals(signals.append))
        settings = recipe.config.generation
        max_advised = settings.max_replicas if settings.autoscale else 0
        target = ReplicaTarget(url, keys, settings.replicas, max_advised, devices.max_replicas)
        target.clear_stop_and_pause()
        if is_target_cleared:
            target.clear()
        learner = _learner(folder, url, view, is_new_epoch, devices)
        drain_s = recipe.config.environment.drain_s
        replicas = Replicas(lambda index: _replica(folder, index, url, devices, drain_s), target)
        control = _control(folder, url, host, page_port)
        try:
            Supervisor(learner, replicas, control, redis, view, signals).run()
        except ServiceFailed:
            if view.num_dead_letters:
                view.say(view.dead_letters())
            raise
    if is_json:
        summary = folder / "summary.json"
        print(json.dumps({"at": time.time(), "summary": json.loads(summary.read_text()) if summary.exists() else None}))
    else:
        _print_results(folder, console)
        if view.num_dead_letters:
            console.print(Text(view.dead_letters()), soft_wrap=True)


def _new_token(path: Path) -> str:
    """Creates the run's token at its first start and returns it, to be shown once; later empty."""
    is_new = token_from_environment() is None and not path.exists()
    token = load_or_create_token(path)
    return token if is_new else ""


def _redis(folder: Path, port: int, lock: int, view: ProgressView) -> SupervisedProcess:
    """Always restarted on the same port; the append-only file restores its content."""
    return SupervisedProcess(
        lambda: launch_redis(folder / "redis", folder / "logs" / "redis.log", port, lock),
        grace_s=REDIS_GRACE_S,
        progress=view.latest_step,
    )


def _learner(folder: Path, url: str, view: ProgressView, is_new_epoch: bool, devices: Devices) -> SupervisedProcess:
    arguments = ["--config", str(folder / "config.yaml"), "--run", folder.name, "--runs-folder", str(folder.parent)]
    arguments += [*devices.arguments, *["--new-epoch"] * is_new_epoch]
    log = folder / "logs" / "learner.log"

    def start() -> Service:
        view.clear_learner_status()
        return python_service("learner", "headrace.learner", arguments, log, url, devices.learner_environment())

    return SupervisedProcess(
        start,
        grace_s=LEARNER_GRACE_S,
        progress=view.latest_step,
        no_restart_codes={REFUSED, FENCED, STARVED},
        exit_reason=view.latest_reason,
    )


def _replica(folder: Path, index: int, url: str, devices: Devices, drain_s: float) -> SupervisedProcess:
    """Always restarted on the same devices. At the end of a run it does not wait for its episodes."""
    name, logs = f"generation-{index}", folder / "logs"
    arguments = ["--run", folder.name, "--token-file", str(folder / "token"), "--name", name, "--log-folder", str(logs)]
    arguments, environment = arguments + devices.arguments, devices.replica_environment(index)
    return SupervisedProcess(
        lambda: python_service(name, "headrace.generation", arguments, logs / f"{name}.log", url, environment),
        grace_s=REPLICA_GRACE_S,
        progress=time.monotonic,
        min_progress=SERVICE_UP_S,
        no_restart_codes={REFUSED},
        end_signal=signal.SIGINT,
        drain_s=drain_s,
    )


def _control(folder: Path, url: str, host: str, port: int) -> SupervisedProcess:
    """Always restarted at the same address, so that open pages reconnect."""
    arguments = ["--run", folder.name, "--token-file", str(folder / "token"), "--host", host, "--port", str(port)]
    return SupervisedProcess(
        lambda: python_service("control", "headrace.control", arguments, folder / "logs" / "control.log", url),
        grace_s=CONTROL_GRACE_S,
        progress=time.monotonic,
        min_progress=SERVICE_UP_S,
        no_restart_codes={REFUSED},
    )


def _print_results(folder: Path, console: Console) -> None:
    summary_path = folder / "summary.json"
    if not summary_path.exists():
        console.print(f"stopped before the end; continue with: headrace up … --run {folder.name}")
        return
    summary = json.loads(summary_path.read_text())
    before, after = summary["held_out_before"], summary["held_out_after"]
    console.print(
        f"held-out pass@1 {before:.3f} → {after:.3f} in {summary['steps']} steps and {summary['wall_s']:.0f} s; "
        f"{summary['tokens_per_s']:.0f} tokens/s; weight pause p50 {summary['weight_pause_ms']['p50']:.0f} ms",
        soft_wrap=True,
    )
    for name in ("summary.json", "metrics.jsonl", "reward-curve.png", "policy", "config.yaml", "logs"):
        console.print(f"  {os.path.relpath(folder / name)}", highlight=False)
