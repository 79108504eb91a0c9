"""What the ranks of `test_pipeline.py` run: a step over a pipeline beside the same step in one process."""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import pipelining

from dsv3.model.balance import LoadBalancer
from dsv3.model.context import make_context, whole_sequences
from dsv3.model.transformer import Transformer
from dsv3.ops.cross_entropy import IGNORE
from dsv3.parallel.expert import distribute_experts
from dsv3.parallel.layout import StagePart, balanced_layout, parse_layout
from dsv3.parallel.lending import Lender
from dsv3.parallel.mesh import Mesh
from dsv3.parallel.pipeline import PassInput, Pipeline
from dsv3.parallel.pipeline_sharding import PipelineSharding
from dsv3.parallel.ranks import Ranks
from dsv3.parallel.shard import shard_parameters
from dsv3.parallel.stages import RankModel
from dsv3.parallel.timeline import save_spans
from dsv3.plan.pipeline import Span
from dsv3.plan.schedules import make_schedule
from dsv3.train.pipelined import pipelined_backward_step
from dsv3.train.step import Losses, backward_step, labels_at
from tests.parallel.step_cases import OPTIMIZERS
from tests.parallel.world import mesh_of
from tests.variants import BASE, random_model, random_tokens

MODELS = {
    "D=1": BASE.replace(num_hidden_layers=6, aux_loss_alpha=0.3),
    "D=2, two dense": BASE.replace(
        num_hidden_layers=6, num_nextn_predict_layers=2, first_k_dense_replace=2, aux_loss_alpha=0.3
    ),
    "no MTP, greedy": BASE.replace(
        num_hidden_layers=7, num_nextn_predict_layers=0, topk_method="greedy", aux_loss_alpha=0.0
    ),
}
EOS = 3


@cache
def built(name: str, seed: int, dtype: torch.dtype) -> Transformer:
    return random_model(MODELS[name], torch.Generator().manual_seed(seed), dtype)


def lopsided(model: Transformer) -> Transformer:
    """A copy in which every token goes to the first half of the experts."""
    model = copy.deepcopy(model)
    for name, bias in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            bias[: len(bias) // 2] += 10
    return model


@cache
def batch(name: str, seed: int, sequences: int) -> Tensor:
    return random_tokens(MODELS[name], (sequences, 10), torch.Generator().manual_seed(seed + 1))


def mesh_with(ep: int, node_size: int | None = None) -> Mesh:
    """As many pipeline ranks as ep leaves; data-parallel ranks are the ep ranks."""
    return mesh_of(node_size, pp=int(os.environ["WORLD_SIZE"]) // ep, ep=ep)


def divided(
    whole: Transformer, parts: Sequence[StagePart], mesh: Mesh, schedule: str, overlap: bool
) -> tuple[Pipeline, PipelineSharding]:
    """What this rank has of `whole`, which is changed."""
    pipeline, lender, dtype = Pipeline(whole, parts, mesh, schedule=schedule, overlap=overlap), Lender(), whole.dtype
    distribute_experts(pipeline.model, mesh)
    sharding = PipelineSharding(shard_parameters(pipeline.model, mesh, dtype, lender.divide), pipeline, mesh)
    pipeline.compute_with(lender.lend, dtype)
    return pipeline, sharding


def alone(
    whole: Transformer, name: str, seed: int, sequences: int, **settings: Any
) -> tuple[dict[str, Tensor], Losses, dict[str, Tensor]]:
    """Gradients, losses and counts of one process. Below FP64 sequence by sequence, so that rounding is alike."""
    model = copy.deepcopy(whole)
    balancer = LoadBalancer(model)
    size = sequences if model.norm.weight.dtype == torch.float64 else 1
    losses = backward_step(model, balancer, batch(name, seed, sequences), micro_batch_size=size, **settings)
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return gradients, losses, balancer.update(0.0)


def flat(losses: Losses) -> list[float]:
    return [losses.main, *losses.mtp, losses.balance]


def step_differences(
    *,
    schedule: str,
    layout: str | int,
    seed: int,
    sequences: int,
    micro_batch_size: int = 2,
    isolate: bool = False,
    ep: int = 1,
    node_size: int | None = None,
    empty_rank: bool = False,
    model: str = "D=1",
    mtp_weight: float = 0.3,
    recompute: str = "none",
    overlap: bool = False,
    dtype: str = "float32",
    axes: dict[str, int] | None = None,
) -> dict[str, float]:
    """Largest differences of a pipeline step from one process, on this rank: of gradients relative, losses, counts.

    layout: a string, or the number of stages of a balanced one. ep: ranks that share a layer's experts, node_size of
    them on a node; empty_rank: no token goes to the second of two. axes: a whole mesh, perhaps with shared parameters.
    """
    kind = getattr(torch, dtype)
    mesh = mesh_with(ep, node_size) if axes is None else mesh_of(**axes)
    ranks = Ranks(mesh)
    settings = {"mtp_weight": mtp_weight, "eos_token_id": EOS, "isolate": isolate}
    whole = built(model, seed, kind)
    if empty_rank:
        whole = lopsided(whole)
    expected, losses, loads = alone(whole, model, seed, sequences, **settings)
    config = MODELS[model]
    whole = copy.deepcopy(whole)
    whole.recompute = recompute
    parts = parse_layout(layout, config) if isinstance(layout, str) else balanced_layout(config, layout)
    pipeline, sharding = divided(whole, parts, mesh, schedule, overlap)
    balancer = LoadBalancer(pipeline.model, lambda counts: ranks.sum_counts(pipeline.sum_counts(counts)))
    first, count = ranks.share(sequences)
    tokens_BS1 = batch(model, seed, sequences)[first : first + count]
    found = pipelined_backward_step(
        pipeline, balancer, tokens_BS1, micro_batch_size=micro_batch_size, ranks=ranks, **settings
    )

    parameters = dict(pipeline.model.named_parameters())
    gradients = sharding.reduce({name: p.grad for name, p in parameters.items() if p.grad is not None})
    rows = {name: sharding.part(name, gradient) for name, gradient in gradients.items()}
    expected |= {name: expected[name][part.begin : part.end] for name, part in rows.items()}
    worst = {"missing": float(len((expected.keys() & parameters.keys()) ^ gradients.keys()))}
    worst["gradient"] = max(
        float((gradients[name] - expected[name]).norm() / expected[name].norm().clamp_min(1e-30)) for name in gradients
    )
    apart = torch.stack([(gradients[name] - expected[name]).norm() for name in gradients]).norm()
    worst["all gradients"] = float(apart / torch.stack([expected[name].norm() for name in gradients]).norm())
    worst["loss"] = max(abs(a - b) for a, b in zip(flat(found), flat(losses), strict=True))
    counted = balancer.update(0.0)
    pipeline.close()
    worst["counts"] = float(max((int((c - loads[name]).abs().max()) for name, c in counted.items()), default=0))
    return worst


def training_differences(
    *,
    schedule: str,
    layout: str,
    seed: int,
    chunks: int,
    steps: int,
    ep: int = 1,
    axes: dict[str, int] | None = None,
    optimizer: str = "adamw",
) -> dict[str, float]:
    """After some optimizer steps (clipped, biases moved): largest differences of weights, biases, losses and loads.

    axes: as in `step_differences`.
    """
    whole = built("D=1", seed, torch.float64)
    alone = copy.deepcopy(whole)
    mesh = mesh_with(ep) if axes is None else mesh_of(**axes)
    ranks, sequences = Ranks(mesh), chunks * mesh.data.size
    parts = parse_layout(layout, whole.config)
    pipeline, sharding = divided(copy.deepcopy(whole), parts, mesh, schedule, mesh.ep.size > 1)
    model = pipeline.model
    make = OPTIMIZERS[optimizer]
    optimizers = make(alone), make(model, sharding=sharding)
    balancers = LoadBalancer(alone), LoadBalancer(model, lambda counts: ranks.sum_counts(pipeline.sum_counts(counts)))
    before = {name: p.detach().clone() for name, p in alone.named_parameters()}
    settings = {"micro_batch_size": 1, "mtp_weight": 0.3, "eos_token_id": EOS}
    worst = dict.fromkeys(("loss", "load", "weight", "bias"), 0.0)
    for step in range(steps):
        tokens_BS1 = batch("D=1", seed + step, sequences)
        expected = backward_step(alone, balancers[0], tokens_BS1, **settings)
        first, count = ranks.share(sequences)
        own_BS1 = tokens_BS1[first : first + count]
        found = pipelined_backward_step(pipeline, balancers[1], own_BS1, ranks=ranks, **settings)
        worst["loss"] = max(worst["loss"], *(abs(a - b) for a, b in zip(flat(found), flat(expected), strict=True)))
        norms = [optimizer.step(0.01, 0.5) for optimizer in optimizers]
        worst["loss"] = max(worst["loss"], abs(norms[0] - norms[1]))
        loads = [balancer.update(0.01) for balancer in balancers]
        worst["load"] = max(worst["load"], *(float((c - loads[0][name]).abs().max()) for name, c in loads[1].items()))
    pipeline.close()
    weights, buffers = dict(alone.named_parameters()), dict(alone.named_buffers())
    for name, master in optimizers[1].masters().items():
        assert not torch.equal(before[name], weights[name]), f"{name} has not moved"
        part = sharding.part(name, master)
        expected_p = weights[name].detach()[part.begin : part.end]
        worst["weight"] = max(worst["weight"], float((master - expected_p).norm() / expected_p.norm()))
    for name, bias in model.named_buffers():
        worst["bias"] = max(worst["bias"], float((bias - buffers[name]).abs().max()))
    return worst


def recorded_step(*, seed: int, run: str) -> None:
    """One step whose operations are written into the folder `run`."""
    whole = copy.deepcopy(built("D=1", seed, torch.float32))
    mesh = mesh_with(1)
    pipeline = Pipeline(whole, balanced_layout(whole.config, 2), mesh, schedule="DualPipe")
    spans: list[Span] = []
    pipelined_backward_step(
        pipeline,
        LoadBalancer(pipeline.model),
        batch("D=1", seed, 4),
        micro_batch_size=1,
        mtp_weight=0.3,
        eos_token_id=EOS,
        record=spans.append,
    )
    pipeline.close()
    save_spans(Path(run), 1, pipeline.schedule(4), mesh.pp.index, spans)


class PlainStage(nn.Module):
    """A stage as torch's pipelining wants it: tokens or hidden states in, hidden states or logits out."""

    def __init__(self, model: RankModel, part: StagePart) -> None:
        super().__init__()
        self.model, self.part = model, part

    def forward(self, x: Tensor) -> Tensor:
        model, part = self.model, self.part
        context = make_context(model.config, whole_sequences(x.shape[1]), x.device)
        if part.embedding:
            x = model.embed_tokens(x)
        for i in part.layers:
            x = model.layers[str(i)](x, context)[0]
        if part.norm:
            x = model.norm(x)
        return model.lm_head(x) if part.loss else x


def torch_differences(*, schedule: str, stages: int, seed: int, chunks: int) -> float:
    """Largest relative difference of gradients between torch's schedule of this name and one process."""
    mesh = mesh_with(1)
    name = "no MTP, greedy"
    whole = copy.deepcopy(built(name, seed, torch.float64))
    expected, _, _ = alone(whole, name, seed, chunks, mtp_weight=0.0, eos_token_id=EOS)
    parts = balanced_layout(whole.config, stages)
    own = make_schedule(schedule.replace("ZeroBubble", ""), mesh.pp.size, 2 * mesh.pp.size).stages[mesh.pp.index]
    model = RankModel(whole, [parts[i] for i in own])
    held = [
        pipelining.PipelineStage(PlainStage(model, parts[i]), i, stages, torch.device("cpu"), group=mesh.pp.group)
        for i in own
    ]
    labels = labels_at(batch(name, seed, chunks), 0, EOS)
    count = int((labels != IGNORE).sum())

    def loss(logits: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(logits.flatten(0, 1), target.flatten(), ignore_index=IGNORE, reduction="sum") / count

    make = getattr(pipelining, f"Schedule{schedule}")
    runner = make(held if len(held) > 1 else held[0], chunks, loss_fn=loss, scale_grads=False)
    first, last = 0 in own, stages - 1 in own
    inputs = (batch(name, seed, chunks)[:, :-1],) if first else ()
    runner.step(*inputs, **({"target": labels, "losses": []} if last else {}))
    gradients = {name: p.grad for name, p in model.named_parameters()}
    return max(float((g - expected[name]).norm() / expected[name].norm()) for name, g in gradients.items())


def evaluation_difference(*, schedule: str, stages: int, seed: int, chunks: int) -> float:
    """How far the summed loss of forward passes is from one process; every rank has the sum."""
    whole = built("D=1", seed, torch.float64)
    mesh = mesh_with(1)
    pipeline = Pipeline(copy.deepcopy(whole), balanced_layout(whole.config, stages), mesh, schedule=schedule)
    tokens = batch("D=1", seed, chunks)[:, :-1]
    total = torch.zeros(1, dtype=torch.float64)

    def loss(hiddens: tuple[Tensor, ...], weight_VD: Tensor, micro_batch: int) -> Tensor:
        (hidden_BSD,) = hiddens
        total.add_((micro_batch + 1) * (hidden_BSD @ weight_VD.T).logsumexp(-1).sum())
        return total.clone()

    pipeline.evaluate([PassInput(part) for part in tokens.split(1)], loss)
    assert not any(p.grad is not None for p in pipeline.model.parameters())
    with torch.no_grad():
        logits = whole(tokens).logits
    expected = (torch.arange(1, chunks + 1) * logits.logsumexp(-1).sum(-1)).sum()
    total = pipeline.sum_(total)
    pipeline.close()
    return float((total - expected).abs() / expected.abs())
