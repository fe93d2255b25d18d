"""The learner's process: reads the configuration, resumes the run, serves its HTTP API and runs the loop.

    python -m headrace.learner --config configs/tiny-cpu.yaml --run demo --redis-url redis://127.0.0.1:6379
    torchrun --nproc-per-node 2 --max-restarts 3 -m -- headrace.learner --config ... --run demo

With `--replay` it trains on a recording (headrace/learner/intake/recordings.py) instead of what replicas send. Each
device has a process, started by this one (`learner.num_ranks`) or by torchrun; only rank 0 uses Redis and listens.
(Without the `--` torchrun takes `--run` for an option of its own.)

Exit codes: 0 complete or stopped on request, 1 failed, 2 refused before anything started, 3 fenced off by a newer
learner, 4 starved: nothing to do for learner.starvation_deadline_s.
"""

import argparse
import logging
import os
import signal
import sys
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import redis

from headrace.common.config import ConfigError, RunConfig, load_recipe, resolve
from headrace.common.http.addresses import listen_with_overrides, socket_url
from headrace.common.http.service import serve_in_thread
from headrace.common.metrics.endpoint import mount_metrics
from headrace.common.preflight.recipe import check_model, check_trackers
from headrace.common.preflight.task import check_task
from headrace.common.process.logs import add_process_fields, set_up_logging
from headrace.common.process.run_token import load_or_create_token
from headrace.common.process.waiting import Waits
from headrace.common.redis.client import OUTAGE_DEADLINE_S, connect, durability_problem
from headrace.common.redis.keys import Keys
from headrace.common.tasks import add_import_folder, has_rollout
from headrace.learner.context import LearnerContext
from headrace.learner.distributed.engine_wait import wait_for_engine
from headrace.learner.distributed.launch import run_ranks
from headrace.learner.intake.recordings import Recording
from headrace.learner.reporting.http_api import make_app
from headrace.learner.status import learner_status
from headrace.learner.steering.switches import Switches

_log = logging.getLogger("headrace.learner")


def main() -> int:
    _prepare_torch()
    arguments = _parse_arguments()
    set_up_logging("learner", run=arguments.run)
    ranks, code = None, 1
    try:
        config, recording = _read(arguments)
        if "WORLD_SIZE" not in os.environ and config.learner.num_ranks > 1:
            return run_ranks(config.learner.num_ranks, [sys.executable, "-m", "headrace.learner", *sys.argv[1:]])
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            ranks = _join(config)
        code = _run(arguments, config, recording, ranks)
    except (ConfigError, ValueError) as error:
        print(f"headrace learner: {error}", file=sys.stderr)
        code = 2
    except redis.RedisError as error:
        print(f"headrace learner: Redis: {error}", file=sys.stderr)
    finally:
        if ranks is not None:
            ranks.exit_all(code)
    return code


def _prepare_torch() -> None:
    """Sets what torch reads when it is imported: threads that do not spin, because an engine may share the CPU, and,
    unless the caller has chosen an allocator, one that does not fragment when micro-batches differ in length."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:  # the name in older releases of torch
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m headrace.learner")
    parser.add_argument("--config", type=Path, help="a recipe; with --replay the default is the recording's own")
    parser.add_argument("--set", dest="overrides", action="append", default=[], help="section.key=value")
    parser.add_argument("--replay", type=Path, help="a recording to train on")
    parser.add_argument("--run", default=os.environ.get("HEADRACE_RUN", "demo"))
    parser.add_argument("--runs-folder", type=Path, default=Path("runs"))
    parser.add_argument("--redis-url", default=os.environ.get("HEADRACE_REDIS_URL"))
    parser.add_argument("--new-epoch", action="store_true", help="let data other than the run's begin its next epoch")
    parser.add_argument("--host", default=None, help="overrides learner.host")
    parser.add_argument("--port", type=int, default=None, help="overrides learner.port")
    parser.add_argument(
        "--shares-gpu", action="store_true", help="wait until the engine on the same GPU has allocated its share"
    )
    return parser.parse_args()


def _read(arguments: argparse.Namespace) -> tuple[RunConfig, Recording | None]:
    recording = None if arguments.replay is None else Recording(arguments.replay)
    if arguments.config is not None:
        if arguments.config.parent.resolve() != (arguments.runs_folder / arguments.run).resolve():
            add_import_folder(arguments.config.parent)  # the run's own folder has no task
        return load_recipe(arguments.config, arguments.overrides).config, recording
    if recording is not None:
        return resolve(recording.config, str(arguments.replay), arguments.overrides).config, recording
    raise ValueError("no configuration: expected --config, or --replay with a recording that carries one")


def _join(config: RunConfig) -> Any:
    """Joins the ranks that torchrun started."""
    from headrace.learner.distributed.join import join
    from headrace.learner.model.policy import pick_device

    return join(pick_device(config.learner.device).type, config.learner.rank_deadline_s)


def _run(arguments: argparse.Namespace, config: RunConfig, recording: Recording | None, ranks: Any) -> int:
    if ranks is not None and ranks.rank > 0:
        from headrace.learner.training.leader import run_follower

        return run_follower(ranks)
    keys = Keys(arguments.run)
    redis_url = arguments.redis_url or config.redis_url
    if not redis_url:
        raise ValueError("no Redis: expected --redis-url, HEADRACE_REDIS_URL or redis_url in the configuration")
    check_model(config)
    check_trackers(config)
    task = check_task(config)
    problem = durability_problem(connect(redis_url))
    if problem and config.durability == "strict":
        raise ValueError(f"the Redis may lose writes: {problem}; or set durability: relaxed")
    waits, switches = Waits(), Switches()
    stopping = switches.stop.is_set
    client = connect(redis_url, waits, deadline_s=OUTAGE_DEADLINE_S, is_stopping=stopping, is_one_master=True)
    client.set(keys.task_method, "rollout" if has_rollout(task) else "reward")
    client.set(keys.config, config.model_dump_json(exclude={"redis_url"}))  # replicas wait for this
    sock = listen_with_overrides(config.learner, arguments.host, arguments.port)
    folder = arguments.runs_folder / arguments.run
    folder.mkdir(parents=True, exist_ok=True)
    token = load_or_create_token(folder / "token")
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: switches.stop.set())
    if arguments.shares_gpu:
        wait_for_engine(client, keys, waits, switches.stop, config.generation.engine.startup_timeout_s)
    url, is_new_epoch = socket_url(sock), arguments.new_epoch
    connections = (client, keys, url, task, switches, waits)
    return _learn(LearnerContext(config, folder, token, *connections, recording, ranks, is_new_epoch), sock)


def _learn(context: LearnerContext, sock: Any) -> int:
    from headrace.learner.assembly import assemble
    from headrace.learner.reporting.prometheus import LearnerMetrics
    from headrace.learner.results import write_results
    from headrace.learner.stages.wait_deadlines import Starved
    from headrace.learner.store.fenced_redis import Fenced

    _log.info("the libraries are imported")
    folder = context.folder
    loop, tokenizer = assemble(context)
    add_process_fields(step=lambda: loop.progress.step)
    if loop.is_at_last_step and (folder / "summary.json").exists():
        _log.info("run %s is complete: raise learner.steps to continue it", folder.name)
        loop.acknowledge_stop()
        return 0
    status = partial(learner_status, loop, folder.name)
    app = make_app(loop.versions.root, status, context.switches, context.token, loop.versions.memory)
    mount_metrics(app, LearnerMetrics(status, loop.reporter.metrics.rows, loop.intake, loop.versions))
    with serve_in_thread(app, sock):
        try:
            is_complete = loop.run()
        except Fenced as error:
            _log.error("%s", error)
            loop.switches.stop.set()  # ends retries
            return 3
        except Starved as error:
            _log.error("%s", error)
            _report_end(loop, "starved", str(error))
            return 4
        except Exception as error:  # noqa: BLE001 - the process's top
            _log.exception("the learner failed")
            _report_end(loop, "failed", str(error))
            return 1
        if is_complete:
            write_results(loop, folder, tokenizer)
        loop.close()
    return 0


def _report_end(loop: Any, phase: str, reason: str) -> None:
    from headrace.learner.store.fenced_redis import Fenced, RedisLost

    loop.switches.stop.set()  # ends retries
    with suppress(Fenced, RedisLost, redis.RedisError):
        loop.store.run_log.set_status({"phase": phase, "reason": reason, "waits": "{}"})


if __name__ == "__main__":
    sys.exit(main())
