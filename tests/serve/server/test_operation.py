"""A server in service: its figures, its end, clients that go away, and an engine that dies."""

from __future__ import annotations

import json
import logging
import signal
import socket
import threading
from typing import Any

import pytest

from tests.serve.server.conftest import NEVER_ENDS, Served, make_engine, start_server, until

httpx = pytest.importorskip("httpx")
parser = pytest.importorskip("prometheus_client.parser")

ASK = {"model": "tiny", "prompt": "a", "max_tokens": 2}
LONG = ASK | NEVER_ENDS


def events_of(response: Any) -> list[str]:
    return [line.removeprefix("data: ") for line in response.iter_lines() if line]


def test_metrics(served: Served):
    with httpx.Client(base_url=served.url, timeout=30) as http:
        http.post("/v1/completions", json=ASK)
        http.post("/v1/completions", json=ASK | {"n": 0})
        response = http.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain")
    families = {family.name: family.samples for family in parser.text_string_to_metric_families(response.text)}
    samples = [sample for family in families.values() for sample in family]
    value = {(s.name, *(text for _, text in sorted(s.labels.items()))): s.value for s in samples}
    metrics = served.engine.metrics
    assert value["dsv3_output_tokens_total",] == metrics.output_tokens
    assert value["dsv3_prompt_tokens_total",] == metrics.prompt_tokens
    assert value["dsv3_requests_running",] == value["dsv3_requests_waiting",] == 0
    assert value["dsv3_up",] == 1 and value["dsv3_cache_blocks",] == metrics.cache_blocks
    assert value["dsv3_finished_total", "length"] == metrics.requests_finished["length"]
    first = metrics.time_to_first_token
    assert value["dsv3_time_to_first_token_seconds_count",] == first.count == sum(first.counts)
    assert value["dsv3_time_to_first_token_seconds_bucket", "+Inf"] == first.count
    loads = [value["dsv3_expert_tokens_total", str(expert), "layers.1"] for expert in range(8)]
    assert loads == metrics.expert_load["layers.1"]
    assert value["dsv3_expert_imbalance", "layers.1"] == pytest.approx(max(loads) * 8 / sum(loads))
    assert value["dsv3_http_requests_total", "POST", "/v1/completions", "400"] >= 1
    depths = [f"{depth + 1}" for depth in range(len(metrics.drafted))]
    assert [value["dsv3_drafts_total", depth] for depth in depths] == metrics.drafted
    for name in ("prefix_cache_hit_ratio", "draft_acceptance_ratio"):
        assert 0 <= value[f"dsv3_{name}",] <= 1


def post(url: str, body: dict[str, Any]) -> socket.socket:
    """A request on a bare socket, which can be closed at any moment."""
    host, port = url.removeprefix("http://").split(":")
    content = json.dumps(body).encode()
    connection = socket.create_connection((host, int(port)), timeout=30)
    head = f"POST /v1/completions HTTP/1.1\r\nhost: {host}\r\ncontent-type: application/json\r\n"
    connection.sendall(f"{head}content-length: {len(content)}\r\n\r\n".encode() + content)
    return connection


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_is_worked_for_no_longer(stream, served, caplog):
    caplog.set_level(logging.INFO, logger="dsv3")
    before = served.engine.metrics.requests_finished.get("cancelled", 0)
    connection = post(served.url, LONG | {"stream": stream, "n": 2})
    if stream:
        assert connection.recv(100).startswith(b"HTTP/1.1 200")
    until(lambda: served.service.num_under_way == 2)
    connection.close()
    until(lambda: served.engine.metrics.requests_finished.get("cancelled", 0) == before + 2)
    until(lambda: served.service.num_under_way == 0)
    figures = httpx.get(f"{served.url}/metrics").text
    assert 'status="500"' not in figures and (stream or 'status="499"' in figures)
    (line,) = [record.fields for record in caplog.records if record.fields.get("method") == "POST"]
    assert "error" not in line and line.get("disconnected", line["status"] == 499)


def test_a_client_that_goes_away_inside_its_own_request(served):
    connection = socket.create_connection(("127.0.0.1", int(served.url.rsplit(":", 1)[1])))
    connection.sendall(
        b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: 100\r\n"
        b"content-type: application/json\r\n\r\n{"
    )
    connection.close()
    assert httpx.get(f"{served.url}/health").status_code == 200


def test_sigterm_lets_what_is_under_way_finish(tokenizer):
    with start_server(make_engine(tokenizer)) as served, httpx.Client(base_url=served.url, timeout=60) as http:
        assert http.get("/ready").status_code == 200
        with http.stream("POST", "/v1/completions", json=LONG | {"max_tokens": 300}) as stream:
            served.server.handle_exit(signal.SIGTERM, None)
            with httpx.Client(base_url=served.url, timeout=60) as another:
                until(lambda: another.get("/ready").status_code == 503)
                assert another.get("/health").status_code == 200
                refused = another.post("/v1/completions", json=ASK)
                assert refused.status_code == 503 and "retry-after" in refused.headers
            events = events_of(stream)
        assert events[-1] == "[DONE]" and json.loads(events[-2])["choices"][0]["finish_reason"] in ("length", "stop")
        until(lambda: served.server.should_exit)
        assert not served.service.engine.alive


def test_what_does_not_finish_in_time_is_cut_off_and_told(tokenizer):
    with (
        start_server(make_engine(tokenizer), drain_seconds=0.1) as served,
        httpx.Client(base_url=served.url, timeout=60) as http,
        http.stream("POST", "/v1/completions", json=LONG | {"n": 8}) as stream,
    ):
        lines = stream.iter_lines()
        next(lines)
        served.server.handle_exit(signal.SIGTERM, None)
        events = [line.removeprefix("data: ") for line in lines if line]
        assert json.loads(events[-1])["error"]["code"] == "unavailable"


def test_a_second_signal_ends_it_at_once(tokenizer):
    with start_server(make_engine(tokenizer)) as served:
        for _ in range(2):
            served.server.handle_exit(signal.SIGINT, None)
        until(lambda: served.server.should_exit)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_an_engine_that_dies_says_so(tokenizer):
    engine = make_engine(tokenizer)
    with start_server(engine) as served, httpx.Client(base_url=served.url, timeout=60) as http:
        with http.stream("POST", "/v1/completions", json=LONG) as stream:
            lines = stream.iter_lines()
            next(lines)

            def step() -> None:
                raise RuntimeError("secret of the inside")

            engine.step = step
            events = [line.removeprefix("data: ") for line in lines if line]
        error = json.loads(events[-1])["error"]
        assert error["type"] == "server_error" and "secret" not in json.dumps(error)
        assert http.get("/health").status_code == http.get("/ready").status_code == 503
        response = http.post("/v1/completions", json=ASK)
        assert response.status_code == 503 and "secret" not in response.text
        assert "dsv3_up 0.0" in http.get("/metrics").text


def test_a_defect_in_one_request_is_hidden_and_harms_no_other(tokenizer, monkeypatch, caplog):
    with start_server(make_engine(tokenizer)) as served, httpx.Client(base_url=served.url, timeout=60) as http:
        with monkeypatch.context() as patched:
            patched.setattr(served.service, "describe", lambda: 1 / 0)
            response = http.get("/v1/models")
        assert response.status_code == 500 and response.json()["error"]["code"] == "defect"
        assert "ZeroDivision" not in response.text
        until(lambda: "ZeroDivision" in caplog.text)
        assert response.headers["x-request-id"] and http.get("/v1/models").status_code == 200


def test_many_at_once_are_as_alone(served):
    """Greedy answers of twenty clients at the same time, each equal to its own when nobody else was there."""
    prompts = [f"{number} is" for number in range(20)]
    alone = [httpx.post(f"{served.url}/v1/completions", json=body(p), timeout=60).json() for p in prompts[:4]]
    answers: dict[str, Any] = {}

    def ask(prompt: str) -> None:
        answers[prompt] = httpx.post(f"{served.url}/v1/completions", json=body(prompt), timeout=60).json()

    threads = [threading.Thread(target=ask, args=(prompt,)) for prompt in prompts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [answers[prompt]["choices"] for prompt in prompts[:4]] == [answer["choices"] for answer in alone]
    assert len({answer["choices"][0]["text"] for answer in answers.values()}) > 10


def body(prompt: str) -> dict[str, Any]:
    return ASK | {"prompt": prompt, "max_tokens": 20, "temperature": 0}
