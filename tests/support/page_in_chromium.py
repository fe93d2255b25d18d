"""The live page in a real Chromium, with a real control service and a real Redis."""

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
import redis

from headrace.common.config import RunConfig
from headrace.common.http.addresses import free_port, listen, socket_url
from headrace.common.process.run_token import TOKEN_VARIABLE
from headrace.common.redis.client import connect
from headrace.common.redis.keys import MAX_EVENTS, MAX_HISTORY, MAX_SAMPLES, Keys
from headrace.common.wire.group_samples import GroupSample
from headrace.control.assembly import running_app, serving
from tests.support.guard import GUARD_S

TOKEN = "the-run's-token"
CHROMIUM = next((path for path in ("/usr/bin/chromium", "/usr/bin/chromium-browser") if Path(path).exists()), None)
ARGUMENTS = [
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
]
SHOTS_VARIABLE = "HEADRACE_PAGE_SHOTS"
"""A folder for the screenshots."""
AXE = Path(__file__).parent / "vendor" / "axe.min.js"


class ControlProcess:
    """The control service of a run as a process; it has the same address after every start."""

    def __init__(self, redis_url: str, keys: Keys) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._command = [sys.executable, "-m", "headrace.control", "--run", keys.run, "--port", str(self.port)]
        self._environment = {**os.environ, TOKEN_VARIABLE: TOKEN, "HEADRACE_REDIS_URL": redis_url}
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        self._process = subprocess.Popen(self._command, env=self._environment, cwd=Path(__file__).parents[2])
        deadline = time.monotonic() + GUARD_S
        while True:
            with contextlib.suppress(httpx.HTTPError):
                if httpx.get(f"{self.url}/healthz", timeout=GUARD_S).status_code == 200:
                    return
            assert self._process.poll() is None, "control has ended"
            assert time.monotonic() < deadline, "control does not answer"
            time.sleep(0.05)

    def close(self) -> None:
        if self._process is not None:
            self._process.send_signal(signal.SIGTERM)
            self._process.wait(GUARD_S)
            self._process = None


@contextlib.contextmanager
def a_control(redis_url: str, keys: Keys) -> Iterator[str]:
    """The address of a control service in a thread."""
    sock = listen("127.0.0.1", 0)
    is_up, is_over = threading.Event(), threading.Event()

    async def serve() -> None:
        with connect(redis_url) as client:
            config = RunConfig.model_validate_json(client.get(keys.config) or b"")
        parts = running_app(keys.run, config, redis_url, TOKEN, config.control.require_token_for_reads)
        async with parts as (app, monitor), serving(app, monitor, sock):
            is_up.set()
            while not is_over.is_set():
                await asyncio.sleep(0.05)

    thread = threading.Thread(target=asyncio.run, args=(serve(),), name="control", daemon=True)
    thread.start()
    assert is_up.wait(GUARD_S), "control does not start"
    yield socket_url(sock)
    is_over.set()
    thread.join(GUARD_S)
    assert not thread.is_alive(), "control does not end"


@contextlib.contextmanager
def a_browser() -> Iterator[Any]:
    """A Chromium. While it is open, this thread has a running event loop, so nothing else may start one."""
    sync_api = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("no Chromium is installed")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield browser
        browser.close()


@contextlib.contextmanager
def a_page(browser: Any, width: int = 1280, height: int = 900, **settings: Any) -> Iterator[Any]:
    """A new tab; fails at the end if the page had an error other than a lost connection."""
    context = browser.new_context(viewport={"width": width, "height": height}, **settings)
    page = context.new_page()
    page.set_default_timeout(1e3 * GUARD_S)
    wrong: list[str] = []
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("dialog", lambda dialog: wrong.append(f"a dialog: {dialog.message}"))
    page.on("console", lambda said: wrong.append(said.text) if said.type == "error" else None)
    yield page
    context.close()
    unexpected = [text for text in wrong if "Failed to load resource" not in text and "ERR_" not in text]
    assert not unexpected, unexpected


def open_page(page: Any, url: str, token: str | None = TOKEN) -> None:
    page.goto(f"{url}/#token={token}" if token else f"{url}/")
    page.wait_for_selector("#connection[data-state=live]")
    page.wait_for_selector("#verdict:not([data-level=unknown])")


def add_row(client: redis.Redis, keys: Keys, kind: str, row: dict[str, Any]) -> None:
    """Writes a step or an evaluation as the learner does."""
    client.xadd(keys.history, {"kind": kind, "row": json.dumps(row)}, maxlen=MAX_HISTORY, approximate=True)
    client.hset(keys.learner, mapping={"step": row["step"], "weight_version": row["step"] + 1})


def add_event(client: redis.Redis, keys: Keys, kind: str, event: dict[str, Any]) -> None:
    client.xadd(keys.events, {"kind": kind, "event": json.dumps(event)}, maxlen=MAX_EVENTS, approximate=True)


def add_group(client: redis.Redis, keys: Keys, group: GroupSample) -> None:
    summary = {"id": group.id, "kind": group.kind, "state": group.state, "step": group.step}
    fields = summary | {"group": msgspec.json.encode(group)}
    client.xadd(keys.samples, fields, maxlen=MAX_SAMPLES, approximate=True)


def faults_of(page: Any) -> list[str]:
    """The serious faults that axe finds, each with its elements."""
    page.evaluate(f"() => {{ if (!window.axe) {{ {AXE.read_text()} }} }}")
    found = page.evaluate("() => axe.run(document, {resultTypes: ['violations']}).then((all) => all.violations)")
    return [
        f"{one['id']}: {one['help']}: {[node['html'][:160] + str(node['any'][:1])[:300] for node in one['nodes'][:4]]}"
        for one in found
        if one["impact"] in ("serious", "critical")
    ]


def keep_shot(page: Any, folder: Path, name: str, full: bool = False) -> None:
    kept = Path(os.environ.get(SHOTS_VARIABLE) or folder)
    kept.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=kept / f"{name}.png", full_page=full)
