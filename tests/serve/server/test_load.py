"""The load test of benchmarks/, for a few seconds."""

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("httpx")

from benchmarks.load_serve import run_load


def test_clients_that_come_and_go(seed):
    report = run_load(clients=20, seconds=1, seed=seed % 1000, compare=5)
    assert not report.failures, report.to_json()
    assert report.outcomes["answered"] and report.outcomes["left"] and report.outcomes["garbage"], report.to_json()
    assert len(report.answers) == 5 and 503 in report.drained
