"""What a scrape of `/metrics` finds, for tests: samples by name and labels; and Prometheus' own opinion of it."""

import asyncio
import re
import shutil
import subprocess

import httpx
import pytest
from fastapi import FastAPI
from prometheus_client.parser import text_string_to_metric_families

from tests.support.guard import GUARD_S

Labels = frozenset[tuple[str, str]]


class Scrape:
    def __init__(self, text: str) -> None:
        self.text = text
        self.samples: dict[tuple[str, Labels], float] = {}
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                place = (sample.name, frozenset(sample.labels.items()))
                assert place not in self.samples, f"{place} is said twice"
                self.samples[place] = sample.value

    def value(self, name: str, **labels: str) -> float:
        """Of the one sample of that name with those labels, whatever others it has."""
        [found] = self.values(name, **labels)
        return found

    def values(self, name: str, **labels: str) -> list[float]:
        wanted = labels.items()
        return [value for (one, its), value in self.samples.items() if one == name and wanted <= its]

    @property
    def names(self) -> set[str]:
        return {name for name, _ in self.samples}


def scrape_app(app: FastAPI) -> Scrape:
    return Scrape(get_metrics(app, "*/*").text)


def get_metrics(app: FastAPI, accept: str) -> httpx.Response:
    """In a test that has no event loop."""

    async def ask() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://test") as http:
            return await http.get("/metrics", headers={"accept": accept})

    return asyncio.run(ask()).raise_for_status()


def scrape_url(url: str) -> Scrape:
    return Scrape(httpx.get(f"{url}/metrics", trust_env=False, timeout=GUARD_S).raise_for_status().text)


def tool(name: str) -> str:
    """Where Debian's package `prometheus` has put it; without it the test is skipped, which is an error in CI."""
    found = shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not installed")
    return found


def lint(scrape: Scrape) -> str:
    """What `promtool check metrics` finds wrong with it."""
    done = subprocess.run([tool("promtool"), "check", "metrics"], input=scrape.text, capture_output=True, text=True)
    assert done.returncode in (0, 3), done.stderr  # 3: something to complain about
    return re.sub(r"^python_.*\n", "", done.stderr + done.stdout, flags=re.M)
