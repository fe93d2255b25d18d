"""`headrace` on a machine with GPUs: what its services are shown of them, and what is refused."""

import json
import re
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import redis
from rich.console import Console

from headrace.common.config import load_recipe
from headrace.common.hardware import device
from headrace.common.redis.keys import Keys
from headrace.common.wire.desired_state import Launcher, parse_launcher
from headrace.launcher.check.command import check_recipe
from headrace.launcher.placement import devices
from tests.support.fake_gpus import FakeGpus
from tests.support.fake_services import RECIPE, Fakes, Faking, ended, faking, until

__all__ = ["faking"]
QUICK = "supervisor.POLL_INTERVAL_S = 0.02; restart_policy.PAUSES_S = (0, 0.05)"
SEES = "shown = os.environ.get('CUDA_VISIBLE_DEVICES', 'all') + ' ' + os.environ.get('CUDA_DEVICE_ORDER', '-')\n"
LEARNER = f"{SEES}note('sees ' + shown + ' --shares-gpu' * ('--shares-gpu' in arguments))\nsignal.pause()"
REPLICA = f"""
name = option("--name")
on(signal.SIGTERM, lambda: (note("drains " + name), sys.exit(0)))
{SEES}
note(name + " sees " + shown + " --shares-gpu" * ("--shares-gpu" in arguments))
while True:
    signal.pause()
"""
CUDA = ["--set", "learner.device=cuda", "--set", "generation.engine.device=cuda"]


def on_gpus(fakes: Fakes, gpus: FakeGpus, *arguments: str, visible: str | None = None) -> "subprocess.Popen[str]":
    """`headrace up`; without `visible` nobody has named any GPU."""
    unset = "import os; os.environ.pop('CUDA_VISIBLE_DEVICES')" if visible is None else ""
    command = ["up", RECIPE, "--run", fakes.run.name, *CUDA, *arguments]
    settings = "\n".join([QUICK, gpus.settings, unset])
    return fakes.headrace(*command, settings=settings, PATH=gpus.path, CUDA_VISIBLE_DEVICES=visible or "")


def stopped(process: "subprocess.Popen[str]") -> str:
    process.send_signal(signal.SIGINT)
    return ended(process, 0)


def sees(*gpus: str, order: str = "PCI_BUS_ID") -> list[str]:
    return [f"generation generation-{index} sees {names} {order}" for index, names in enumerate(gpus)]


def test_four_replicas_on_eight_gpus_simply_work(faking: Faking, tmp_path: Path) -> None:
    fakes = faking(learner=LEARNER, generation=REPLICA)
    process = on_gpus(fakes, FakeGpus(tmp_path, 8), "--replicas", "4")
    fakes.wait_for("learner sees 0 PCI_BUS_ID", *sees("1", "2", "3", "4"))
    output = stopped(process)
    assert "] GPU 0 (80 GiB): the learner\n" in output and "] GPU 4 (80 GiB): generation-3\n" in output
    assert "] GPU 7 (80 GiB): free for one more replica\n" in output


def test_ranks_and_tensor_parallelism_take_what_they_need_of_the_callers_list(faking: Faking, tmp_path: Path) -> None:
    fakes = faking(learner=LEARNER, generation=REPLICA)
    settings = ["--set", "learner.num_ranks=2", "--set", "generation.engine.tp_size=2"]
    process = on_gpus(fakes, FakeGpus(tmp_path, 8), *settings, visible="7,GPU-0,1,3,GPU-5555")
    fakes.wait_for("learner sees 7,GPU-0 -", *sees("1,3", order="-"))
    stopped(process)


def test_what_runs_on_the_cpu_is_shown_no_gpu(faking: Faking, tmp_path: Path) -> None:
    fakes = faking(learner=LEARNER, generation=REPLICA)
    gpus = FakeGpus(tmp_path, 1)
    process = on_gpus(fakes, gpus, "--set", "generation.engine.device=cpu", "--replicas", "2")
    fakes.wait_for("learner sees 0 PCI_BUS_ID", *sees("", "", order="-"))
    stopped(process)
    process = on_gpus(fakes, gpus, "--set", "learner.device=cpu", "--set", "generation.engine.device=cpu")
    fakes.wait_for("learner sees  -")
    output = stopped(process)
    assert "the GPU is not used: the recipe's device is cpu, and --set learner.device=auto" in output


def test_scale_gives_and_takes_gpus_and_refuses_more_than_there_are(faking: Faking, tmp_path: Path) -> None:
    """An order of before, of a launcher with more GPUs, is obeyed as far as it goes."""
    fakes = faking(learner=LEARNER, generation=REPLICA)
    gpus = FakeGpus(tmp_path, 4)
    process = on_gpus(fakes, gpus)
    fakes.wait_for("learner sees 0 PCI_BUS_ID", *sees("1"))
    ended(fakes.headrace("scale", "3"), 0)
    fakes.wait_for(*sees("1", "2", "3"))
    refusal = "headrace: 4 replicas: the run's launcher has GPUs for 3; expected 3 at most"
    assert ended(fakes.headrace("scale", "4"), 2).startswith(refusal)
    ended(fakes.headrace("scale", "2"), 0)
    fakes.wait_for("generation drains generation-2")
    ended(fakes.headrace("scale", "3"), 0)
    fakes.wait_for(sees("1", "2", "3")[2], times=2)
    with redis.Redis.from_url((fakes.run / "redis-url").read_text()) as client:
        client.hset(Keys("faked").control, "desired_replicas", 1)
        fakes.wait_for("generation drains generation-1")
        client.hset(Keys("faked").control, "desired_replicas", 9)
    fakes.wait_for(*sees("1", "2", "3")[1:], times=2)
    output = stopped(process)
    assert output.count("] 9 replicas are requested, and the GPUs here are enough for 3\n") == 1
    assert "] 3 replicas, as far as the GPUs go\n" in output
    assert not [line for line in fakes.lines() if "generation-3" in line]


def test_a_drained_replicas_gpus_are_free_only_when_it_has_ended(faking: Faking, tmp_path: Path) -> None:
    fakes = faking(
        learner=LEARNER,
        generation=f"""
name = option("--name")
def end():
    note("asked " + name)
    go_on = pathlib.Path(__file__).with_name("go-on")
    while not go_on.exists():
        time.sleep(0.02)
    note("ends " + name)
    sys.exit(0)
on(signal.SIGTERM, end)
{SEES}
note(name + " sees " + shown)
while True:
    signal.pause()
""",
    )
    process = on_gpus(fakes, FakeGpus(tmp_path, 3), "--replicas", "2")
    fakes.wait_for(*sees("1", "2"))
    ended(fakes.headrace("scale", "1"), 0)
    fakes.wait_for("generation asked generation-1")
    ended(fakes.headrace("scale", "2"), 0)
    with redis.Redis.from_url((fakes.run / "redis-url").read_text()) as client:
        until(lambda: client.hget(Keys("faked").control, "desired_replicas") == b"2", "the order")
    fakes.executable.with_name("go-on").touch()
    fakes.wait_for(sees("1", "2")[1], times=2)
    lines = [line for line in fakes.lines() if "generation-1" in line]
    assert lines[1:] == ["generation asked generation-1", "generation ends generation-1", sees("1", "2")[1]]
    stopped(process)


ADVISES = "tell_learner(advice='it waits', advised_replicas=6)\n"


def test_advice_is_followed_as_far_as_the_gpus_go(faking: Faking, tmp_path: Path) -> None:
    fakes = faking(learner=ADVISES + LEARNER, generation=REPLICA)
    process = on_gpus(fakes, FakeGpus(tmp_path, 3), "--set", "generation.autoscale=true")
    fakes.wait_for(*sees("1", "2"))
    assert "] 2 replicas, as advised: it waits\n" in stopped(process)


def test_too_few_gpus_are_refused_before_anything_starts(faking: Faking, tmp_path: Path) -> None:
    fakes = faking(learner=LEARNER, generation=REPLICA)
    output = ended(on_gpus(fakes, FakeGpus(tmp_path, 2), "--replicas", "4"), 2)
    assert output == (
        "headrace: 2 GPUs are visible (0, 1), and learner.num_ranks 1 and 4 replicas of generation.engine.tp_size 1 "
        "need "
        "5; expected generation.replicas 1 at most (headrace up --replicas 1), or more GPUs\n"
    )
    assert not fakes.run.exists()


def test_one_gpu_is_shared_by_the_split_that_is_proposed(faking: Faking, tmp_path: Path) -> None:
    """The proposal, taken at its word, is accepted; and both services are told that they share."""
    fakes = faking(learner=LEARNER, generation=REPLICA)
    gpus = FakeGpus(tmp_path, 1, gib=24)
    output = ended(on_gpus(fakes, gpus), 2)
    proposed = re.search(r"or more GPUs: (learner.memory_fraction=0\.\d\d) is proposed", output)
    assert proposed, output
    process = on_gpus(fakes, gpus, "--set", proposed[1])
    fakes.wait_for("learner sees 0 PCI_BUS_ID --shares-gpu", *sees("0", order="PCI_BUS_ID --shares-gpu"))
    assert ended(fakes.headrace("scale", "2"), 2).startswith("headrace: 2 replicas: the run's launcher has GPUs for 1")
    assert "of its memory, generation-0 the rest\n" in stopped(process)


Seen = Callable[[int, int], None]


@pytest.fixture
def seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Seen:
    """So many GPUs with so many GiB are seen by this process, with all installed that they need."""

    def see(count: int, gib: int) -> None:
        gpus = FakeGpus(tmp_path, count, gib=gib)
        monkeypatch.setattr(device, "DEVICE_FILES", gpus.files)
        monkeypatch.setattr(devices, "missing_for_cuda", lambda is_engine: "")
        monkeypatch.setenv("PATH", gpus.path)
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES")

    return see


@pytest.mark.parametrize(
    ("gib", "settings", "line"),
    [
        (24, ["learner.memory_fraction=0.9"], "learner.memory_fraction 0.9 leaves 0.0 GiB of GPU 0 for the engine's"),
        (24, ["learner.memory_fraction=0.001"], "of GPU 0 is 0.0 GiB, and the learner needs 0.1 GiB by estimate"),
        (
            24,
            ["learner.memory_fraction=0.5", "generation.engine.memory_fraction=0.4"],
            "generation.engine.memory_fraction 0.4: on a GPU that it shares the engine has what",
        ),
        (4, [], "GPU 0 has 4.0 GiB, and learner and engine do not fit it together"),
        (0, ["learner.memory_fraction=0.5"], "the memory of GPU 0 is not known: sharing it needs"),
    ],
)
def test_a_split_that_cannot_be_is_refused(seen: Seen, gib: int, settings: list[str], line: str) -> None:
    seen(1, gib)
    cuda = ["learner.device=cuda", "generation.engine.device=cuda"]
    with pytest.raises(ValueError) as caught:
        devices.assign_devices(load_recipe(Path(RECIPE), [*cuda, *settings]).config)
    assert line in str(caught.value) and "\n" not in str(caught.value)


def test_check_prints_who_gets_what_or_what_is_missing(
    seen: Seen, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen(4, 80)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,2,1,0")
    cuda = ["learner.device=cuda", "generation.engine.device=cuda", "generation.engine.tp_size=2"]
    check_recipe(load_recipe(Path(RECIPE), cuda), Console(width=200), as_json=False)
    shown = capsys.readouterr().out
    assert "devices   GPU 3 (80 GiB): the learner\n          GPUs 2, 1 (80 GiB each): generation-0\n" in shown
    check_recipe(load_recipe(Path(RECIPE), [*cuda, "learner.num_ranks=3"]), Console(width=200), as_json=True)
    told = json.loads(capsys.readouterr().out)
    assert told["devices"] == [] and any("4 GPUs are visible (3, 2, 1, 0), and" in note for note in told["notes"])


def test_a_gpu_without_what_it_needs_is_refused_where_it_is_asked_for_by_name(
    seen: Seen, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen(2, 80)
    monkeypatch.setattr(device, "_is_cuda_torch", lambda: False)
    monkeypatch.setattr(devices, "missing_for_cuda", device.missing_for_cuda)
    config = load_recipe(Path(RECIPE), ["learner.device=cuda"]).config
    with pytest.raises(ValueError, match=r"learner\.device is 'cuda', and not installed here: a CUDA build of torch"):
        devices.assign_devices(config)
    auto = load_recipe(Path(RECIPE), ["learner.device=auto", "generation.engine.device=auto"]).config
    (note,) = devices.assign_devices(auto).notes
    assert note.startswith("the GPU is not used: not installed here: a CUDA build of torch")


def test_a_launcher_says_how_many_replicas_it_can_keep() -> None:
    launcher = Launcher("machine process 1", 7)
    assert parse_launcher(str(launcher)) == launcher
    assert parse_launcher("another version's").max_replicas == 64
    launcher.check_capacity(7)
    with pytest.raises(ValueError, match="8 replicas: the run's launcher has GPUs for 7; expected 7 at most"):
        launcher.check_capacity(8)
