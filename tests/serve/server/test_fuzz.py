"""The server against schemathesis, which makes up requests from the server's own description. Run by name: -m slow."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("httpx")

import httpx

from tests.serve.server.conftest import Served
from tests.serve.server.sound_requests import narrowed

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"


def described(served: Served) -> dict[str, Any]:
    description: dict[str, Any] = httpx.get(f"{served.url}/openapi.json").json()
    return description


def test_the_description_says_what_is_answered(served):
    description = described(served)
    assert {CHAT, COMPLETIONS, "/v1/models", "/health", "/ready", "/metrics"} <= set(description["paths"])
    responses = description["paths"][CHAT]["post"]["responses"]
    assert {"200", "400", "401", "404", "413", "429", "503"} <= set(responses) and "422" not in responses


def fuzz(served: Served, description: dict[str, Any], folder: Path, options: str) -> dict[str, Counter[str]]:
    """How often each path was answered with each status while schemathesis asked; fails on what it finds."""
    command = shutil.which("schemathesis")
    if command is None:
        pytest.skip("schemathesis is not installed")
    before = answers(served)
    (folder / "openapi.json").write_text(json.dumps(description))
    options += " --suppress-health-check all --request-timeout 30 --no-color"
    checks = "--checks not_a_server_error,status_code_conformance"
    done = subprocess.run(
        [command, "run", str(folder / "openapi.json"), "--url", served.url, *options.split(), *checks.split()],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    return {path: counts - before[path] for path, counts in answers(served).items()}


def answers(served: Served) -> dict[str, Counter[str]]:
    """Requests so far by path and status, as the server counts them."""
    counts: dict[str, Counter[str]] = {CHAT: Counter(), COMPLETIONS: Counter()}
    for line in httpx.get(f"{served.url}/metrics").text.splitlines():
        labels = dict(re.findall(r'(\w+)="([^"]*)"', line))
        if line.startswith("dsv3_http_requests_total") and labels["path"] in counts:
            counts[labels["path"]][labels["status"]] += int(float(line.split()[-1]))
    return counts


@pytest.mark.slow
def test_no_request_breaks_the_server(served, tmp_path):
    """Anything of the description, and against it."""
    counts = fuzz(served, described(served), tmp_path, "--phases fuzzing,coverage --max-examples 50")
    assert all(of_path["400"] > 50 for of_path in counts.values())


@pytest.mark.slow
def test_sound_requests_reach_the_engine_and_do_not_break_it(served, tmp_path):
    description = narrowed(described(served), "tiny")
    description["paths"] = {path: description["paths"][path] for path in (CHAT, COMPLETIONS)}
    counts = fuzz(served, description, tmp_path, "--phases fuzzing --mode positive --max-examples 100")
    for of_path in counts.values():
        assert of_path["200"] > 60 and of_path["200"] > 0.8 * of_path.total(), counts
