"""Memory of training: what the forward pass keeps for the backward pass, under each `Transformer.recompute`.

Ours is "selective" (norms, MLA's up-projections and SwiGLU outputs are made again); the peers are "none", which keeps
everything, and "full", torch's checkpointing of every block. One model, one batch, all three in turn: bytes kept per
token, part by part; the most that a whole step holds; the time of a step; and whether all gradients agree in every bit.
A second table shows how many tokens' logits ever exist at once with V3's vocabulary of 129,280 words.

    python benchmarks/bench_memory.py            # preset bench, BF16
    python benchmarks/bench_memory.py --quick    # preset micro, seconds
    python benchmarks/bench_memory.py --json     # one JSON object
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, get_args

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dsv3.config import ModelConfig
from dsv3.model.balance import LoadBalancer
from dsv3.model.block import Block
from dsv3.model.experts import Experts, SwiGLU
from dsv3.model.mla import MultiHeadLatentAttention
from dsv3.model.mtp import MTPModule
from dsv3.model.norm import RMSNorm
from dsv3.model.router import Router
from dsv3.model.transformer import Recompute, Transformer
from dsv3.ops.cross_entropy import linear_cross_entropy, reference_linear_cross_entropy
from dsv3.train.step import backward_step

MODES: tuple[Recompute, ...] = get_args(Recompute)
PARTS: dict[type[nn.Module], str] = {
    RMSNorm: "RMSNorm",
    MultiHeadLatentAttention: "attention",
    Router: "router",
    Experts: "routed experts",
    SwiGLU: "shared experts, dense FFN",
    Block: "residual stream, dispatch, combine",
    MTPModule: "joined inputs of MTP",
}
VOCABULARY = 129280


class MemoryWatch(TorchDispatchMode):
    """`with MemoryWatch() as watch:` counts the bytes of every storage allocated inside, until it is freed.

    It watches memory and not what autograd's hooks are shown: hooks do not nest, and a graph has other ways of keeping
    things. It sees the backward pass too, on any device; only scratch space inside a kernel stays unseen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.part = "embedding, other"  # what new memory is booked under
        self.alive_by_part: Counter[str] = Counter()
        self.alive = 0
        self.peak = 0
        self.largest: dict[tuple[int, ...], int] = {}  # shape -> bytes of the largest storage made for it
        self._known: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        for tensor in _tensors((args, kwargs)):
            self._known.add(tensor.untyped_storage())
        out = func(*args, **(kwargs or {}))
        for tensor in _tensors(out):
            storage = tensor.untyped_storage()
            if storage not in self._known:
                self._known.add(storage)
                self._count(storage, tuple(tensor.shape))
        return out

    @contextmanager
    def parts(self, model: nn.Module, names: Mapping[type[nn.Module], str]) -> Iterator[None]:
        """Book memory under the name of the innermost running module whose class has one."""
        outer: list[str] = []
        handles = []
        for module in model.modules():
            name = names.get(type(module))
            if name is None:
                continue

            def enter(*_: Any, name: str = name) -> None:
                outer.append(self.part)
                self.part = name

            def leave(*_: Any) -> None:
                self.part = outer.pop()

            handles += [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _count(self, storage: torch.UntypedStorage, shape: tuple[int, ...]) -> None:
        size, part = storage.nbytes(), self.part
        self.alive += size
        self.alive_by_part[part] += size
        self.peak = max(self.peak, self.alive)
        self.largest[shape] = max(size, self.largest.get(shape, 0))
        weakref.finalize(storage, self._free, size, part)

    def _free(self, size: int, part: str) -> None:
        self.alive -= size
        self.alive_by_part[part] -= size


def kept_by_part(model: Transformer, tokens_BS: Tensor) -> Counter[str]:
    """Bytes that are still there once the forward pass is over and only its graph is held, by part of the model."""
    with MemoryWatch() as watch, watch.parts(model, PARTS):
        hidden = model.hidden_states(tokens_BS, aux_loss_scale=0.1)
        loss = torch.stack([h.sum() for h in (hidden.main_BSD, *hidden.mtp)]).sum()
        del hidden
        kept = +watch.alive_by_part
        del loss
    return kept


def train_step(model: Transformer, tokens_BS1: Tensor) -> None:
    """Forward and backward as the trainer runs them; gradients are added up in the model."""
    backward_step(
        model, LoadBalancer(model), tokens_BS1, micro_batch_size=len(tokens_BS1), mtp_weight=0.3, eos_token_id=None
    )


def peak_of_step(model: Transformer, tokens_BS1: Tensor) -> int:
    """Most bytes alive at once in a step that adds to gradients which are there already."""
    train_step(model, tokens_BS1)
    with MemoryWatch() as watch:
        train_step(model, tokens_BS1)
    return watch.peak


def logits_at_once(loss: Callable[[Tensor, Tensor, Tensor], Tensor], tokens: int, width: int) -> int:
    """Most rows of a [rows, V] tensor made by `loss` and its gradient, for the vocabulary of V3."""
    x = torch.randn(tokens, width, requires_grad=True)
    weight = torch.randn(VOCABULARY, width, requires_grad=True)
    labels = torch.randint(VOCABULARY, (tokens,))
    with MemoryWatch() as watch:
        loss(x, weight, labels).backward()
    return max(math.prod(shape[:-1]) for shape in watch.largest if shape and shape[-1] == VOCABULARY)


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Everything that the tables show, as plain values."""
    torch.manual_seed(0)
    device = torch.device(arguments.device)
    config = ModelConfig.preset(arguments.preset)
    model = Transformer(config).to(device, getattr(torch, arguments.dtype))
    tokens_BS1 = torch.randint(config.vocab_size, (arguments.batch, arguments.seq_len + 1), device=device)
    count = arguments.batch * arguments.seq_len

    def synchronize() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()

    kept, peak, gradients = {}, {}, {}
    for mode in MODES:
        model.recompute = mode
        kept[mode] = {part: size / count for part, size in kept_by_part(model, tokens_BS1[:, :-1]).items()}
        peak[mode] = peak_of_step(model, tokens_BS1) / count
        model.zero_grad()
        train_step(model, tokens_BS1)
        gradients[mode] = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    same = {mode: _same_bits(gradients[mode], gradients["none"]) for mode in MODES}
    del gradients

    seconds: dict[str, list[float]] = {mode: [] for mode in MODES}
    for _ in range(arguments.rounds):  # in turn, so that a busy moment of the machine hits all of them
        for mode in MODES:
            model.recompute = mode
            synchronize()
            start = time.perf_counter()
            train_step(model, tokens_BS1)
            synchronize()
            seconds[mode].append(time.perf_counter() - start)
    medians = {mode: statistics.median(times) for mode, times in seconds.items()}
    total = {mode: sum(parts.values()) for mode, parts in kept.items()}
    return {
        "preset": arguments.preset,
        "dtype": arguments.dtype,
        "device": str(device),
        "tokens": [arguments.batch, arguments.seq_len],
        "kept_bytes_per_token": kept,
        "kept_bytes_per_token_total": total,
        "peak_bytes_per_token": peak,
        "seconds_per_step": medians,
        "gradients_equal_none_bitwise": same,
        "logits": {
            "vocabulary": VOCABULARY,
            "tokens": arguments.logit_tokens,
            "at_once_chunked": logits_at_once(linear_cross_entropy, arguments.logit_tokens, 64),
            "at_once_reference": logits_at_once(reference_linear_cross_entropy, arguments.logit_tokens, 64),
        },
        "ratios": {
            "kept_selective_to_none": total["selective"] / total["none"],
            "kept_full_to_none": total["full"] / total["none"],
            "time_selective_to_none": medians["selective"] / medians["none"],
            "time_full_to_none": medians["full"] / medians["none"],
        },
    }


def show(result: dict[str, Any]) -> None:
    """The same for people."""
    B, S = result["tokens"]
    print(f"{result['preset']}, {result['dtype']}, {result['device']}, {B} x {S} tokens; bytes per token\n")
    print(f"{'kept for the backward pass':36}" + "".join(f"{mode:>12}" for mode in MODES))
    kept = result["kept_bytes_per_token"]
    for part in sorted({part for parts in kept.values() for part in parts}, key=lambda p: -kept["none"].get(p, 0)):
        print(f"{part:36}" + "".join(f"{kept[mode].get(part, 0):12,.0f}" for mode in MODES))
    print(f"{'all':36}" + "".join(f"{result['kept_bytes_per_token_total'][mode]:12,.0f}" for mode in MODES))
    print(f"{'most alive in a step':36}" + "".join(f"{result['peak_bytes_per_token'][mode]:12,.0f}" for mode in MODES))
    print(f"{'ms per step (median)':36}" + "".join(f"{1e3 * result['seconds_per_step'][mode]:12.1f}" for mode in MODES))
    same = ("yes" if result["gradients_equal_none_bitwise"][mode] else "no" for mode in MODES)
    print(f"{'gradients those of none, bit for bit':36}" + "".join(f"{answer:>12}" for answer in same))

    logits = result["logits"]
    row = 4 * logits["vocabulary"] / 1e6
    print(f"\nFP32 logits that exist at once, {logits['tokens']:,} tokens, {logits['vocabulary']:,} words")
    for name, key in (("plain cross-entropy", "at_once_reference"), ("chunked (training)", "at_once_chunked")):
        print(f"{name:36}{logits[key]:12,} tokens {row * logits[key]:9,.1f} MB")

    ratios = result["ratios"]
    print(
        f"\nagainst none: selective keeps {ratios['kept_selective_to_none']:.3f} of the bytes in "
        f"{ratios['time_selective_to_none']:.3f} of the time; "
        f"full {ratios['kept_full_to_none']:.3f} in {ratios['time_full_to_none']:.3f}"
    )


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _same_bits(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def _parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="preset micro, two short sequences, three rounds")
    parser.add_argument("--preset", default="bench")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32", "float64"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=7, help="steps of each kind that are timed")
    parser.add_argument("--logit-tokens", type=int, default=2048)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    arguments = parser.parse_args(argv)
    if arguments.quick:
        arguments.preset, arguments.batch, arguments.seq_len = "micro", 2, 64
        arguments.rounds, arguments.logit_tokens = 3, 256
    return arguments


if __name__ == "__main__":
    parsed = _parse()
    measured = measure(parsed)
    print(json.dumps(measured)) if parsed.json else show(measured)
