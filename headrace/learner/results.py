"""What a complete run leaves in its folder."""

import json
import logging
import shutil
from pathlib import Path
from typing import Any

from headrace.common.process.atomic_files import file_entry
from headrace.learner.loop import Loop
from headrace.learner.reporting.summary import draw_curve, summarise

_log = logging.getLogger("headrace.learner")


def write_results(loop: Loop, folder: Path, tokenizer: Any) -> None:
    """Writes the policy, the summary and the reward curve into the run's folder."""
    replicas = loop.store.replicas()
    lags = [replica.waiting_s / replica.serving_s for replica in replicas if replica.serving_s > 0]
    counts = {**loop.intake.settlement_log.counts, "dead": loop.store.num_dead()}
    summary = summarise(loop.reporter.metrics.rows, counts, sum(lags) / max(1, len(lags)))
    policy = folder / "policy"
    shutil.rmtree(policy, ignore_errors=True)
    loop.trainer.policy.save(policy, tokenizer)
    for path in sorted(policy.glob("*.safetensors")):
        _log.info("step %d, weights in %s with SHA-256 %s", loop.progress.step, path, file_entry(path).sha256)
    draw_curve(loop.reporter.metrics.rows, folder / "reward-curve.png")
    (folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
