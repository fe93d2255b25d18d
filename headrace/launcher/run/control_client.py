"""A client of a run's control service, and how a command finds that service.

The service's URL is `--url` (HEADRACE_URL), else the one that the run's folder holds while `headrace up` runs. The
token is HEADRACE_TOKEN, else the one in the run's folder. Every call has a deadline. What control refuses is raised as
`ValueError` with its own words.
"""

from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx

from headrace.common.http.addresses import bearer_header
from headrace.common.process.run_token import TOKEN_VARIABLE, read_token_file, token_from_environment
from headrace.common.redis.keys import Keys
from headrace.launcher.run.errors import ControlFailed, NotRunning
from headrace.launcher.run.live_runs import only_live
from headrace.launcher.run.run_folder import CONTROL_URL_FILE, read_url_file, runs_with_control

TIMEOUT_S = 15.0
"""A command may have to wait for Redis."""
PROBE_TIMEOUT_S = 3.0


class ControlClient:
    """For one run. Raises `ValueError` for a refused request, else `NotRunning` or `ControlFailed`."""

    def __init__(self, url: str, token: str) -> None:
        if not url.startswith(("http://", "https://")):
            raise ValueError(f"{url!r} is not the URL of a control service: expected http://host:port")
        self.url = url.rstrip("/")
        headers = {"User-Agent": "the headrace command"} | (bearer_header(token) if token else {})
        self._http = httpx.Client(headers=headers, timeout=TIMEOUT_S, trust_env=False)

    def get(self, path: str, **query: str | int | None) -> Any:
        given = {name: value for name, value in query.items() if value is not None}
        return self._call("GET", path, params=given)

    def send(self, method: str, path: str, body: Any = None) -> Any:
        """`method`: POST, PUT or PATCH."""
        return self._call(method, path, **({} if body is None else {"json": body}))

    def run(self, timeout_s: float = PROBE_TIMEOUT_S) -> str:
        """The name of the run whose control this is."""
        status = self._call("GET", "/status", timeout=timeout_s)
        if not isinstance(status, dict) or "run" not in status:
            raise NotRunning(f"the server at {self.url} is not a Headrace control service")
        return str(status["run"])

    def _call(self, method: str, path: str, **arguments: Any) -> Any:
        try:
            answer = self._http.request(method, self.url + path, **arguments)
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise NotRunning(f"control does not answer at {self.url}: {_words(error)}") from error
        if answer.is_success:
            with suppress(ValueError):
                return answer.json()
            raise NotRunning(f"the server at {self.url} is not a Headrace control service")
        detail = _detail(answer)
        if answer.status_code >= 500:
            raise ControlFailed(detail)
        raise ValueError(detail)


def find_control(run: str | None, url: str | None, runs_folder: Path) -> ControlClient:
    """The control service of the named run, or of the only live one."""
    if run is not None:
        Keys(run)  # refuses a name that cannot be a folder's
    if url:
        owner = run or next((name for name, found in runs_with_control(runs_folder).items() if found == url), None)
        control = ControlClient(url, _token(runs_folder / owner if owner else None))
        if (name := control.run()) != (run or name):
            raise ValueError(f"the control service at {url} is of run {name!r}, not {run!r}")
        return control
    known = {run: read_url_file(runs_folder / run, CONTROL_URL_FILE)} if run else runs_with_control(runs_folder)
    found: dict[str, ControlClient] = {}
    silent: list[str] = []
    for name, where in known.items():
        if where is None:
            continue
        control = ControlClient(where, _token(runs_folder / name))
        try:
            if control.run() == name:  # else another's, where a killed launcher has left its note
                found[name] = control
        except NotRunning as error:
            silent.append(str(error))
        except (ControlFailed, ValueError):
            found[name] = control
    only = only_live(found)
    if only is None:
        what = f"run {run!r} is not live" if run else "no run is live"
        raise NotRunning(f"{what} in {runs_folder}" + (f": {silent[0]}" if silent else "; headrace up starts one"))
    return found[only]


def _token(folder: Path | None) -> str:
    """Empty if none is known; reading may be allowed without it."""
    if given := token_from_environment():
        return given
    with suppress(ValueError):  # what is not ours to read
        return (read_token_file(folder / "token") or "") if folder else ""
    return ""


def _detail(answer: httpx.Response) -> str:
    with suppress(ValueError, TypeError, KeyError):
        told = " ".join(str(answer.json()["detail"]).split())
        if told:
            return f"{told} (set {TOKEN_VARIABLE})" if answer.status_code == 401 else told
    return f"{answer.request.method} {answer.request.url.path}: HTTP {answer.status_code}"


def _words(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
