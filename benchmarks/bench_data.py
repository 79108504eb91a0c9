"""Speed of the data: text to token ids on disk, and token ids on disk to batches.

Tokenising: `prepare` with a given tokenizer, from files to shards: reading them twice, dividing them, FIM, splitting of
tokens, writing and hashing. The peers are the tokenizers library alone on the same texts in memory, by `encode_batch`
and by `encode_batch_fast`, the ids thrown away.
Loading: `SequenceSampler.sequences`; the peer cuts windows out of a `numpy.memmap` at random, as nanoGPT does (each
batch opens the file anew, inputs and targets are stacked apart), with no epochs and no state that could be resumed.

    python benchmarks/bench_data.py            # 10 MB of the standard library
    python benchmarks/bench_data.py --quick    # 1 MB
    python benchmarks/bench_data.py --json     # one JSON object
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import torch

from dsv3.data.batches import SequenceSampler
from dsv3.data.config import DataConfig
from dsv3.data.prepare import prepare
from dsv3.data.prepared import PreparedSource, describe
from dsv3.data.shards import Shard
from dsv3.data.sources import first_bytes, read_source
from dsv3.data.tokenizer import TOKENIZER_FILE, Tokenizer

NANO_TOKENS_PER_SECOND = 4000  # what training `nano` consumes on two CPU cores, about
SHAPES = ((16, 256), (64, 1024), (8, 4096))  # sequences, tokens in each


def alternate(tasks: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Median seconds of each task; they take turns, so that what slows the machine down slows all of them."""
    seconds: dict[str, list[float]] = {name: [] for name in tasks}
    for _ in range(rounds):
        for name, task in tasks.items():
            started = time.perf_counter()
            task()
            seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(times) for name, times in seconds.items()}


def measure_tokenising(folder: Path, max_bytes: int, vocab_size: int, rounds: int) -> dict[str, dict[str, float]]:
    """MB/s and tokens/s of text to ids, ours and the library's."""
    texts = [document.text for document in first_bytes(read_source("stdlib"), max_bytes)]
    text_bytes = sum(len(text.encode()) for text in texts)
    tokenizer = Tokenizer.train(texts, vocab_size)
    tokenizer.save(folder / "tokenizer")
    library = tokenizers.Tokenizer.from_file(str(folder / "tokenizer" / TOKENIZER_FILE))
    made = iter(range(rounds + 1))

    def ours() -> Path:
        out = folder / f"data-{next(made)}"
        prepare("stdlib", out, tokenizer, DataConfig(max_bytes=max_bytes))
        return out

    (source,) = describe(ours())["sources"]
    tokens = source["train"]["tokens"] + source["held_out"]["tokens"]
    library_tokens = sum(len(encoding) for encoding in library.encode_batch(texts, add_special_tokens=False))
    seconds = alternate(
        {
            "dsv3 prepare": ours,
            "tokenizers encode_batch": lambda: library.encode_batch(texts, add_special_tokens=False),
            "tokenizers encode_batch_fast": lambda: library.encode_batch_fast(texts, add_special_tokens=False),
        },
        rounds,
    )
    return {
        name: {
            "mb_per_second": text_bytes / 1e6 / taken,
            "tokens_per_second": (tokens if name.startswith("dsv3") else library_tokens) / taken,
        }
        for name, taken in seconds.items()
    }


def measure_loading(folder: Path, tokens: int, rounds: int) -> dict[str, dict[str, float]]:
    """Tokens/s of ids on disk to int64 batches, ours and nanoGPT's way, by shape."""
    path = folder / "ids.npy"
    ids = np.random.default_rng(0).integers(0, 4096, tokens).astype(np.uint16)
    np.save(path, ids)
    ids.tofile(folder / "ids.bin")
    shards = (Shard(path, np.lib.format.open_memmap(path, mode="r")),)
    source = PreparedSource("ids", Fraction(1), shards, shards)
    rates = {}
    for batch, length in SHAPES:
        sampler = SequenceSampler([source], length, 0)
        first = iter(range(0, 10**9, batch))

        def ours(sampler: SequenceSampler = sampler, first: Any = first, batch: int = batch) -> None:
            for _ in range(50):
                rows = sampler.sequences(next(first), batch)
                _ = rows[:, :-1], rows[:, 1:]

        def nanogpt(batch: int = batch, length: int = length) -> None:
            for _ in range(50):
                data = np.memmap(folder / "ids.bin", dtype=np.uint16, mode="r")
                starts = torch.randint(len(data) - length, (batch,)).tolist()
                torch.stack([torch.from_numpy(data[i : i + length].astype(np.int64)) for i in starts])
                torch.stack([torch.from_numpy(data[i + 1 : i + 1 + length].astype(np.int64)) for i in starts])

        seconds = alternate({"dsv3": ours, "numpy memmap": nanogpt}, rounds)
        rates[f"{batch} x {length}"] = {name: 50 * batch * length / taken for name, taken in seconds.items()}
    return rates


def main() -> None:
    """Measures both and prints them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="1 MB of text, 1M ids, 3 rounds")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    parser.add_argument("--vocab-size", type=int, default=4096)
    arguments = parser.parse_args()
    size, rounds = (1_000_000, 3) if arguments.quick else (10_000_000, 5)
    with tempfile.TemporaryDirectory() as folder:
        tokenising = measure_tokenising(Path(folder), size, arguments.vocab_size, rounds)
        loading = measure_loading(Path(folder), size, rounds)
    ours = tokenising["dsv3 prepare"]
    tokenising_ratio = {
        name: ours["mb_per_second"] / rates["mb_per_second"] for name, rates in tokenising.items() if rates is not ours
    }
    loading_ratio = {shape: rates["dsv3"] / rates["numpy memmap"] for shape, rates in loading.items()}
    report = {
        "tokenising": tokenising,
        "loading": loading,
        "tokenising_times_training": ours["tokens_per_second"] / NANO_TOKENS_PER_SECOND,
        "loading_times_training": min(rates["dsv3"] for rates in loading.values()) / NANO_TOKENS_PER_SECOND,
        "tokenising_ratio": tokenising_ratio,
        "loading_ratio": loading_ratio,
    }
    if arguments.json:
        print(json.dumps(report))
        return
    for name, rates in tokenising.items():
        print(f"{name:30} {rates['mb_per_second']:7.2f} MB/s {rates['tokens_per_second']:14,.0f} tokens/s")
    for shape, rates in loading.items():
        for name, rate in rates.items():
            print(f"{shape:12} {name:17} {2 * rate / 1e6:7.1f} MB/s {rate:14,.0f} tokens/s")
    print(
        f"training nano ({NANO_TOKENS_PER_SECOND:,} tokens/s) is outpaced {report['tokenising_times_training']:.0f} "
        f"times by tokenising, {report['loading_times_training']:.0f} times by loading"
    )
    for name, ratio in tokenising_ratio.items():
        print(f"ratio of tokenising, dsv3 prepare / {name}: {ratio:.2f}")
    for shape, ratio in loading_ratio.items():
        print(f"ratio of loading {shape}, dsv3 / numpy memmap: {ratio:.2f}")


if __name__ == "__main__":
    main()
