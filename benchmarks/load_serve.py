"""Many clients at once against a server: half go away in the middle of their answers, a tenth send garbage.

What has to hold: no status of 500 or more but 503 while the server drains; no stream breaks off; no cache block is held
when all is over; memory does not grow; and every answer that was read to its end is the one that its request gets when
nobody else is there (asked for again one by one, which takes about as long as the load itself). What does not hold is
named and makes the command fail. The server runs in this process, its model is a random one: what is tested is not the
model.

    python benchmarks/load_serve.py                   # 200 clients for 5 minutes, then every answer alone
    python benchmarks/load_serve.py --seconds 60 --compare 20
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import signal
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import torch

from dsv3.config import ModelConfig
from dsv3.data.tokenizer import Tokenizer
from dsv3.model.transformer import Transformer
from dsv3.serve.async_engine import AsyncEngine
from dsv3.serve.engine import Engine
from dsv3.serve.engine_config import EngineConfig
from dsv3.serve.server.config import ServerConfig
from dsv3.serve.server.listen import DrainingServer, open_socket
from dsv3.serve.server.service import Service
from dsv3.serve.server.template import ServedTemplate

MAX_GROWTH_MIB = 16  # of memory once all is warm; above, it is taken for a leak
_TEMPLATE = "{% for m in messages %}<｜User｜>{{ m.content }}{% endfor %}<｜Assistant｜>"


@dataclass
class Report:
    """What came of it."""

    statuses: Counter[int] = field(default_factory=Counter)
    outcomes: Counter[str] = field(default_factory=Counter)
    answers: list[tuple[dict[str, Any], str]] = field(default_factory=list)  # request, text
    rss_mib: list[float] = field(default_factory=list)  # once a second
    drained: Counter[int] = field(default_factory=Counter)  # statuses once SIGTERM had come
    wrong: int = 0  # answers that differ from their solo runs
    leaked_blocks: int = 0

    @property
    def server_errors(self) -> int:
        """Answers that must not be."""
        bad = sum(count for status, count in self.statuses.items() if status >= 500)
        return bad + sum(count for status, count in self.drained.items() if status >= 500 and status != 503)

    @property
    def broken(self) -> int:
        """Requests that were neither answered nor left nor refused: the connection or the stream broke off."""
        return sum(self.outcomes.values()) - sum(self.outcomes[name] for name in ("answered", "left", "garbage"))

    @property
    def failures(self) -> list[str]:
        """What should hold and does not."""
        held = {
            f"{self.server_errors} server errors": not self.server_errors,
            f"{self.broken} requests broke off": not self.broken,
            f"{self.wrong} answers differ from their solo runs": not self.wrong,
            f"{self.leaked_blocks} cache blocks or requests are still held": not self.leaked_blocks,
            f"memory grew by {self.growth_mib:.1f} MiB": self.growth_mib <= MAX_GROWTH_MIB,
            "no answer was read to its end": bool(self.answers),
        }
        return [failure for failure, ok in held.items() if not ok]

    @property
    def growth_mib(self) -> float:
        """Memory in the last fifth of the time against the second fifth, when all is warm; medians."""
        fifth = max(1, len(self.rss_mib) // 5)
        early, late = sorted(self.rss_mib[fifth : 2 * fifth]), sorted(self.rss_mib[-fifth:])
        return late[len(late) // 2] - early[len(early) // 2] if early else 0.0

    def to_json(self) -> dict[str, Any]:
        """For machines."""
        return {
            "statuses": dict(sorted(self.statuses.items())),
            "outcomes": dict(self.outcomes),
            "drained": dict(self.drained),
            "server_errors": self.server_errors,
            "answers_compared": len(self.answers),
            "answers_wrong": self.wrong,
            "leaked_blocks": self.leaked_blocks,
            "memory_growth_mib": round(self.growth_mib, 1),
            "failures": self.failures,
        }


class Client:
    """One of many: asks again and again until the time is over."""

    def __init__(self, http: httpx.AsyncClient, report: Report, seed: int) -> None:
        self._http, self._report, self._seed, self._rng = http, report, seed, random.Random(seed)

    async def run(self, until: float) -> None:
        """Ask, each time in one of the three ways."""
        draw = (self._seed % 10) / 10  # clients begin in all three ways, however short the time
        while time.monotonic() < until:
            if draw < 0.1:
                await self._send_garbage()
            else:
                await self._ask(leave=draw < 0.6)
            draw = self._rng.random()

    def _request(self) -> tuple[str, dict[str, Any]]:
        rng = self._rng
        text = " ".join(rng.choices(["red", "blue", "7", "é", "fish", "\n"], k=rng.randint(1, 60)))
        asked: dict[str, Any] = {
            "model": "load",
            "stream": True,
            "max_tokens": rng.randint(1, 60),
            "seed": rng.randrange(1 << 30),
            "temperature": rng.choice([0.0, 0.7, 1.0]),
        }
        if rng.random() < 0.3:
            asked["stop"] = [rng.choice("abcdefgh")]
        if rng.random() < 0.2:
            asked["xray"] = True
        if rng.random() < 0.5:
            return "/v1/completions", asked | {"prompt": text}
        return "/v1/chat/completions", asked | {"messages": [{"role": "user", "content": text}]}

    async def _ask(self, *, leave: bool) -> None:
        path, asked = self._request()
        patience = self._rng.randint(0, 30) if leave else None
        try:
            async with self._http.stream("POST", path, json=asked) as response:
                self._report.statuses[response.status_code] += 1
                if response.status_code != 200:
                    await response.aread()
                    await asyncio.sleep(0.05)
                    return
                text = await _read(response, patience)
        except httpx.HTTPError as error:
            self._report.outcomes[type(error).__name__] += 1
            return
        if text is None:
            self._report.outcomes["left"] += 1
        else:
            self._report.outcomes["answered"] += 1
            self._report.answers.append((asked | {"path": path}, text))

    async def _send_garbage(self) -> None:
        rng = self._rng
        path, asked = self._request()
        spoiled = [
            rng.randbytes(rng.randint(0, 400)),
            json.dumps(asked)[: rng.randint(1, 60)].encode(),
            json.dumps(asked | {rng.choice(["nope", "echo", "best_of", "audio"]): 7}).encode(),
            json.dumps(asked | {rng.choice([*asked]): rng.choice([None, [], {}, -1, "x" * 2000, 1e308])}).encode(),
            b"[" * 20_000,
        ]
        headers = {"content-type": rng.choice(["application/json", "application/json", "text/html"])}
        try:
            response = await self._http.post(path, content=rng.choice(spoiled), headers=headers)
        except httpx.HTTPError as error:
            self._report.outcomes[type(error).__name__] += 1
        else:
            self._report.statuses[response.status_code] += 1
            self._report.outcomes["garbage"] += 1


async def _read(response: httpx.Response, patience: int | None) -> str | None:
    """The text of a stream; None if patience ended before it did. Raises if it breaks off."""
    text = ""
    num_events = 0
    async for line in response.aiter_lines():
        if not line:
            continue
        data = line.removeprefix("data: ")
        if data == "[DONE]":
            return text
        for choice in json.loads(data)["choices"]:
            text += choice.get("text") or choice.get("delta", {}).get("content") or ""
        num_events += 1
        if patience is not None and num_events > patience:
            return None
    raise httpx.RemoteProtocolError("the stream broke off")


def make_service(seed: int) -> Service:
    """A random model that answers the same alone and in company."""
    tokenizer = Tokenizer.train([Path(__file__).read_text(encoding="utf-8")], 320)
    torch.manual_seed(seed)
    model = Transformer(ModelConfig.preset("micro").replace(vocab_size=tokenizer.vocab_size)).eval()
    settings = EngineConfig(cache_tokens=16_384, max_running=32, max_waiting=256, batch_invariant=True, max_length=512)
    engine = AsyncEngine(Engine(model, tokenizer, settings))
    return Service(engine, ServedTemplate(_TEMPLATE, {}), ServerConfig(), name="load")


def rss_mib() -> float:
    """Resident memory of this process; 0 where /proc does not say."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("VmRSS")), 0.0)


async def _load(url: str, report: Report, *, clients: int, seconds: float, seed: int, compare: int | None) -> None:
    until = time.monotonic() + seconds
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=120, limits=limits) as http:

        async def watch() -> None:
            while time.monotonic() < until:
                report.rss_mib.append(rss_mib())
                await asyncio.sleep(1)

        asking = [Client(http, report, seed + number).run(until) for number in range(clients)]
        await asyncio.gather(watch(), *asking)
        if compare is not None:
            report.answers = random.Random(seed).sample(report.answers, min(compare, len(report.answers)))
        for asked, text in report.answers:
            body = {name: value for name, value in asked.items() if name != "path"}
            async with http.stream("POST", asked["path"], json=body) as response:
                report.wrong += await _read(response, None) != text


async def _drain(url: str, report: Report, server: DrainingServer, *, clients: int, seed: int) -> None:
    """SIGTERM while clients ask: each gets its answer or 503, until the door is shut."""
    async with httpx.AsyncClient(base_url=url, timeout=120) as http:
        during = Report()
        until = time.monotonic() + 2
        asking = [asyncio.create_task(Client(http, during, seed + n).run(until)) for n in range(clients)]
        await asyncio.sleep(0.5)
        server.handle_exit(signal.SIGTERM, None)
        await asyncio.gather(*asking)
        report.drained = during.statuses


def run_load(*, clients: int, seconds: float, seed: int = 0, compare: int | None = None) -> Report:
    """Run it all. compare: how many of the answers are asked for again, alone; None: all."""
    service, report = make_service(seed), Report()
    config = ServerConfig(port=0, max_concurrency=2 * clients)
    with open_socket(config) as listener:
        server = DrainingServer(service, config)
        thread = threading.Thread(target=lambda: asyncio.run(server.serve([listener])))
        thread.start()
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        try:
            load = _load(url, report, clients=clients, seconds=seconds, seed=seed, compare=compare)
            asyncio.run(load)
            asyncio.run(_drain(url, report, server, clients=min(clients, 10), seed=seed + clients))
        finally:
            server.should_exit = True
            thread.join(60)
    engine = service.engine.engine
    engine.check_integrity()
    report.leaked_blocks = engine.metrics.cache_blocks_used + service.num_under_way
    return report


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=300.0)
    parser.add_argument("--compare", type=int, help="so many of the answers are asked for again, alone; all by default")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    report = run_load(clients=args.clients, seconds=args.seconds, seed=args.seed, compare=args.compare)
    values = report.to_json()
    print(json.dumps(values) if args.json else "\n".join(f"{name:20} {value}" for name, value in values.items()))
    raise SystemExit(bool(report.failures))


if __name__ == "__main__":
    main()
