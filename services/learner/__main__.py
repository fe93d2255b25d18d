"""The learner's process: reads the configuration, takes up the run where it stands, serves, loops, reports.

    python -m services.learner --config configs/tiny-cpu.yaml --run demo --redis-url redis://127.0.0.1:6379

Exit codes: 0 complete or stopped on request, 1 failed, 2 refused before anything started, 3 fenced off by a newer
learner.
"""

import argparse
import json
import logging
import os
import shutil
import signal
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import redis

from common.config import ConfigError, RunConfig, load_recipe
from common.http_service import listen, serve_in_thread, token_at, url_of
from common.keys import Keys
from common.logs import set_up_logging
from common.preflight import check_model_folder, check_task
from common.redis_client import connect, durability_problem

_log = logging.getLogger("services.learner")


def main() -> int:
    arguments = _parse_arguments()
    set_up_logging("learner")
    try:
        return _run(arguments)
    except (ConfigError, ValueError) as error:
        print(f"headrace learner: {error}", file=sys.stderr)
        return 2
    except redis.RedisError as error:
        print(f"headrace learner: Redis: {error}", file=sys.stderr)
        return 1


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m services.learner")
    parser.add_argument("--config", required=True, type=Path)
    parser.add_argument("--run", default=os.environ.get("HEADRACE_RUN", "demo"))
    parser.add_argument("--runs-folder", type=Path, default=Path("runs"))
    parser.add_argument("--redis-url", default=os.environ.get("HEADRACE_REDIS_URL"))
    parser.add_argument("--host", default=None, help="overrides learner.host")
    parser.add_argument("--port", type=int, default=None, help="overrides learner.port")
    return parser.parse_args()


def _run(arguments: argparse.Namespace) -> int:
    config = load_recipe(arguments.config).config
    keys = Keys(arguments.run)
    redis_url = arguments.redis_url or config.redis_url
    if not redis_url:
        raise ValueError("no Redis: expected --redis-url, HEADRACE_REDIS_URL or redis_url in the configuration")
    check_model_folder(config.model.path)
    task = check_task(config)
    client = connect(redis_url)
    problem = durability_problem(client)
    if problem and config.durability == "strict":
        raise ValueError(f"the Redis at {redis_url} may lose writes: {problem}; or set durability: relaxed")
    client.set(keys.config, config.model_dump_json())
    sock = listen(
        config.learner.host if arguments.host is None else arguments.host,
        config.learner.port if arguments.port is None else arguments.port,
    )
    folder = arguments.runs_folder / arguments.run
    token = token_at(folder / "token")
    return _learn(config, folder, token, client, keys, sock, task)


def _learn(config: RunConfig, folder: Path, token: str, client: Any, keys: Keys, sock: Any, task: Any) -> int:
    from services.learner.api import Switches, make_app
    from services.learner.assembly import assemble
    from services.learner.store import Fenced

    switches = Switches()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: switches.stop.set())
    loop, tokenizer = assemble(config, folder, token, client, keys, url_of(sock), task, switches)
    if loop.is_at_last_step and (folder / "summary.json").exists():
        _log.info("run %s is complete: more learner.steps would go on with it", folder.name)
        return 0

    def status() -> dict[str, Any]:
        progress = loop.progress
        waits = progress.phase.startswith(("waiting", "evaluating"))
        return {
            "service": "learner",
            "run": folder.name,
            "phase": "paused" if switches.paused.is_set() else progress.phase,
            "reason": loop.intake.why_waiting() if waits else "",
            "step": progress.step,
            "steps": config.learner.steps,
            "version": loop.versions.current,
            "counts": dict(loop.intake.counts),
            "latest": progress.latest,
        }

    with serve_in_thread(make_app(loop.versions.root, status, switches, token), sock):
        try:
            is_complete = loop.run()
        except Fenced as error:
            _log.error("%s", error)
            return 3
        except Exception as error:  # noqa: BLE001 - the process's top
            _log.exception("the learner failed")
            with suppress(Fenced, redis.RedisError):
                loop.store.report({"phase": "failed", "reason": str(error)})
            return 1
        if is_complete:
            _write_results(loop, folder, tokenizer)
        loop.close()
    return 0


def _write_results(loop: Any, folder: Path, tokenizer: Any) -> None:
    from services.learner.report import draw_curve, summarise

    replicas = loop.store.replicas()
    lags = [replica.waiting_s / replica.serving_s for replica in replicas if replica.serving_s > 0]
    counts = {**loop.intake.counts, "dead": loop.store.num_dead()}
    summary = summarise(loop.metrics.rows, counts, sum(lags) / max(1, len(lags)))
    policy = folder / "policy"
    shutil.rmtree(policy, ignore_errors=True)
    loop.trainer.policy.save(policy, tokenizer)
    draw_curve(loop.metrics.rows, folder / "reward-curve.png")
    (folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")


if __name__ == "__main__":
    sys.exit(main())
