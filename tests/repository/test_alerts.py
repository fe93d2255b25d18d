"""Every alert of deploy/prometheus fires on what it is about, alone, and not on a run that is well."""

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from headrace.common.process.waiting import Reason
from tests.support.scraping import tool

ROOT = Path(__file__).parents[2]
ALERTS = ROOT / "deploy" / "prometheus" / "alerts.yml"
MINUTES = 90
NUM_SAMPLES = 4 * MINUTES
NOW = f"0+15x{NUM_SAMPLES}"
"""Of a time that is always this moment."""
STARVED = 'headrace_current_wait_seconds{run="r",who="learner",reason="waiting_for_groups"}'
DISK = 'headrace_current_wait_seconds{run="r",who="learner",reason="checkpoint_failing"}'
TRAINING, FAILED = 'headrace_phase{run="r",phase="training"}', 'headrace_phase{run="r",phase="failed"}'
FINISHED = 'headrace_phase{run="r",phase="finished"}'
UP = 'up{job="headrace-control",instance="control:8080"}'
RUNNING = 'headrace_replica_state{run="r",replica="a",state="running"}'
QUARANTINED = 'headrace_replica_state{run="r",replica="a",state="quarantined"}'
COMMITTED = 'headrace_replica_groups_total{run="r",replica="a"}'
LOOKED, CHECKPOINTED = "headrace_control_latest_poll_timestamp_seconds", "headrace_checkpoint_timestamp_seconds"


def of_run(name: str) -> str:
    return f'{name}{{run="r"}}'


def of_replica(name: str) -> str:
    return f'{name}{{run="r",replica="a"}}'


BEHIND = of_replica("headrace_replica_versions_behind")


def value(check: str) -> str:
    return f'headrace_check_value{{run="r",check="{check}"}}'


def always(number: float) -> str:
    return f"{number}x{NUM_SAMPLES}"


WELL = {
    UP: always(1),
    of_run(LOOKED): NOW,
    of_run("headrace_learner_silent_seconds"): "1 16 2 " * (NUM_SAMPLES // 3),
    TRAINING: "1 0 " * (NUM_SAMPLES // 2),
    'headrace_phase{run="r",phase="waiting"}': "0 1 " * (NUM_SAMPLES // 2),
    FAILED: always(0),
    FINISHED: always(0),
    STARVED: "0 70 " * (NUM_SAMPLES // 2),
    DISK: always(0),
    of_run("headrace_completed_steps"): f"0+1x{NUM_SAMPLES}",
    of_run("headrace_latest_step_timestamp_seconds"): NOW,
    COMMITTED: f"0+2x{NUM_SAMPLES}",
    of_replica("headrace_replica_groups_in_flight"): always(8),
    of_replica("headrace_replica_serving_seconds_total"): NOW,
    BEHIND: "0 1 5 " * (NUM_SAMPLES // 3),
    RUNNING: always(1),
    QUARANTINED: always(0),
    'headrace_check_warning{run="r",check="versions_behind"}': always(3),
    value("kl_behaviour_proximal"): always(0.01),
    'headrace_check_alarm{run="r",check="kl_behaviour_proximal"}': always(0.2),
    value("ess"): always(0.97),
    'headrace_check_warning{run="r",check="ess"}': always(0.5),
    value("fresh_logprob_gap_rms"): always(1e-4),
    'headrace_check_warning{run="r",check="fresh_logprob_gap_rms"}': always(0.01),
    value("dropped_length_bias"): always(0.01),
    'headrace_check_warning{run="r",check="dropped_length_bias"}': always(0.05),
    value("episodes_failed_share"): always(0.01),
    'headrace_check_warning{run="r",check="episodes_failed_share"}': always(0.05),
    value("skipped_updates"): always(0),
    of_run("headrace_dead_letters"): always(3),
    of_run(CHECKPOINTED): NOW,
}
STANDS_STILL = {
    of_run("headrace_completed_steps"): always(7),
    of_run("headrace_latest_step_timestamp_seconds"): always(0),
}
TROUBLES: dict[str, tuple[dict[str, str], int, int]] = {
    # what differs, minutes at which nothing fires yet, and at which the alert does
    "HeadraceControlDown": ({UP: always(0)}, 0, 2),
    "HeadraceSnapshotStale": ({of_run(LOOKED): always(0)}, 0, 2),
    "HeadraceLearnerSilent": ({of_run("headrace_learner_silent_seconds"): always(16)}, 0, 2),
    "HeadraceRunFailed": ({FAILED: f"0x20 1x{NUM_SAMPLES}"}, 4, 6),
    "HeadraceLearnerStarved": ({STARVED: NOW}, 1, 3),
    "HeadraceNoSteps": (STANDS_STILL | {CHECKPOINTED: NOW, TRAINING: always(1)}, 14, 22),
    "HeadraceReplicaStuck": ({COMMITTED: f"0+2x40 80x{NUM_SAMPLES}"}, 18, 23),
    "HeadraceReplicaQuarantined": (
        {QUARANTINED: always(1), RUNNING: always(0), BEHIND: always(9), COMMITTED: always(9)},
        0,
        25,
    ),
    "HeadraceReplicaBehind": ({BEHIND: always(5)}, 1, 3),
    "HeadraceKlHigh": ({value("kl_behaviour_proximal"): always(0.21)}, 0, 2),
    "HeadraceEssLow": ({value("ess"): always(0.49)}, 0, 2),
    "HeadraceDroppedAreLong": ({value("dropped_length_bias"): always(0.06)}, 0, 2),
    "HeadraceEpisodesFail": ({value("episodes_failed_share"): always(0.06)}, 0, 2),
    "HeadraceNumericsDisagree": ({value("fresh_logprob_gap_rms"): always(0.02)}, 0, 2),
    "HeadraceUpdatesSkipped": ({value("skipped_updates"): always(1)}, 0, 2),
    "HeadraceDeadLettersGrowing": ({of_run("headrace_dead_letters"): f"3x40 4x{NUM_SAMPLES}"}, 9, 12),
    "HeadraceCheckpointFails": ({DISK: NOW}, 0, 2),
    "HeadraceCheckpointOld": ({of_run(CHECKPOINTED): always(0)}, 59, 67),
}
EXCUSED = {
    "a run that is complete": STANDS_STILL
    | {TRAINING: always(0), 'headrace_phase{run="r",phase="waiting"}': always(0), FINISHED: always(1)}
    | {value("kl_behaviour_proximal"): always(0.5), value("ess"): always(0.1), value("skipped_updates"): always(2)}
    | {value("fresh_logprob_gap_rms"): always(1), of_run(CHECKPOINTED): always(0), COMMITTED: always(9)}
    | {of_replica("headrace_replica_groups_in_flight"): always(0)},
    "a replica without tickets": {COMMITTED: always(9), of_replica("headrace_replica_groups_in_flight"): always(0)},
    "a replica on its first, long tickets": {
        COMMITTED: always(0),
        of_replica("headrace_replica_serving_seconds_total"): always(500),
    },
    "dead letters that were purged": {of_run("headrace_dead_letters"): f"3x40 0x{NUM_SAMPLES}"},
    "a paused run": STANDS_STILL
    | {TRAINING: always(0), 'headrace_phase{run="r",phase="waiting"}': always(0)}
    | {'headrace_phase{run="r",phase="paused"}': always(1), of_run(CHECKPOINTED): always(0)},
}


def fires(name: str, series: dict[str, str], firing: dict[int, list[str]]) -> dict[str, Any]:
    """A test for promtool: which alerts, and no others, fire at which minute."""
    asked = 'count by (alertname) (ALERTS{alertstate="firing"})'
    return {
        "name": name,
        "interval": "15s",
        "input_series": [{"series": one, "values": values} for one, values in (WELL | series).items()],
        "promql_expr_test": [
            {
                "expr": asked,
                "eval_time": f"{minute}m",
                "exp_samples": [{"labels": f'{{alertname="{alert}"}}', "value": 1} for alert in alerts],
            }
            for minute, alerts in firing.items()
        ],
    }


def check(folder: Path, *tests: dict[str, Any]) -> None:
    file = folder / "alerts_test.yml"
    file.write_text(yaml.safe_dump({"rule_files": [str(ALERTS)], "evaluation_interval": "15s", "tests": list(tests)}))
    done = subprocess.run([tool("promtool"), "test", "rules", str(file)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def rules() -> list[dict[str, Any]]:
    return [rule for rule in yaml.safe_load(ALERTS.read_text())["groups"][0]["rules"] if "alert" in rule]


def test_every_alert_is_tested_and_says_what_to_do() -> None:
    assert [rule["alert"] for rule in rules()] == list(TROUBLES)
    for rule in rules():
        assert rule["labels"]["severity"] in ("warning", "critical")
        assert rule["annotations"].keys() == {"summary", "description"} and len(rule["annotations"]["description"]) > 40


def test_wait_reasons_named_by_alerts_exist() -> None:
    expressions = " ".join(rule["expr"] for rule in rules())
    reasons = {code for codes in re.findall(r'reason=~?"([^"]+)"', expressions) for code in codes.split("|")}
    assert len(reasons) == 3 and reasons <= {reason.value for reason in Reason}


def test_nothing_fires_on_a_run_that_is_well(tmp_path: Path) -> None:
    check(tmp_path, fires("well", {}, {minute: [] for minute in (1, 5, 20, 60, 80)}))


@pytest.mark.parametrize("alert", TROUBLES)
def test_an_alert_fires_on_its_trouble_alone(alert: str, tmp_path: Path) -> None:
    series, before, after = TROUBLES[alert]
    check(tmp_path, fires(alert, series, {before: [], after: [alert]}))


def test_what_is_as_it_should_be_is_excused(tmp_path: Path) -> None:
    minutes: dict[int, list[str]] = {minute: [] for minute in (3, 12, 25, 70)}
    check(tmp_path, *(fires(name, series, minutes) for name, series in EXCUSED.items()))


def test_the_configuration_is_valid() -> None:
    config = ALERTS.with_name("prometheus.yml")
    done = subprocess.run([tool("promtool"), "check", "config", str(config)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
