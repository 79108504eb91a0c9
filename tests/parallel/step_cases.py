"""What the ranks of `test_steps.py` run: the same optimizer steps alone and together."""

from __future__ import annotations

import torch

from dsv3.config import ModelConfig
from dsv3.model.balance import LoadBalancer
from dsv3.model.transformer import Transformer
from dsv3.parallel.expert import distribute_experts
from dsv3.parallel.mesh import Mesh
from dsv3.parallel.ranks import Ranks
from dsv3.parallel.shard import Part, cast_whole, shard_parameters
from dsv3.train.muon import MasterMuon
from dsv3.train.optim import MasterAdamW
from dsv3.train.step import Losses, backward_step
from tests.parallel.world import mesh_of

OPTIMIZERS = {"adamw": MasterAdamW, "muon": MasterMuon}


class Side:
    """A model with its optimizer and balancer, alone or on a mesh."""

    def __init__(
        self, config: ModelConfig, seed: int, mesh: Mesh, dtype: torch.dtype, recompute: str, optimizer: str
    ) -> None:
        torch.manual_seed(seed)
        self.model = Transformer(config)
        if dtype == torch.float64:
            self.model.double()
        self.model.recompute = recompute
        distribute_experts(self.model, mesh)
        self.sharding = shard_parameters(self.model, mesh, dtype)
        weights = {n: self.sharding.own(n, p.detach()).clone() for n, p in self.model.named_parameters()}
        cast_whole(self.model, dtype, self.sharding)
        self.optimizer = OPTIMIZERS[optimizer](self.model, sharding=self.sharding)
        self.optimizer.load_masters(weights)
        self.ranks = Ranks(mesh)
        self.balancer = LoadBalancer(self.model, self.ranks.sum_counts)

    def backward(self, tokens_BS1: torch.Tensor, micro_batch_size: int, mtp_weight: float) -> Losses:
        first, count = self.ranks.share(len(tokens_BS1))
        return backward_step(
            self.model,
            self.balancer,
            tokens_BS1[first : first + count],
            micro_batch_size=micro_batch_size,
            mtp_weight=mtp_weight,
            eos_token_id=1,
            ranks=self.ranks,
        )


def rows_of(part: Part, whole: torch.Tensor) -> torch.Tensor:
    return whole[part.begin : part.end]


def compare_steps(
    *,
    layout: dict[str, int],
    seed: int,
    steps: int = 1,
    batch: int = 6,
    micro_batch_size: int = 6,
    mtp_weight: float = 0.3,
    alpha: float = 0.01,
    gamma: float = 0.001,
    recompute: str = "none",
    dtype: str = "float64",
    node_size: int | None = None,
    first_experts_only: bool = False,
    optimizer: str = "adamw",
) -> dict[str, float]:
    """|ours - theirs| / |theirs| at its worst, of losses, gradients, weights, biases and loads, over `steps` steps.

    steps: 0 is the first one up to its gradients. first_experts_only: no token goes to the second half of the experts.
    """
    kind = getattr(torch, dtype)
    config = ModelConfig.preset("micro").replace(aux_loss_alpha=alpha)
    mesh = mesh_of(node_size, **layout)
    alone = Side(config, seed, Mesh(), kind, recompute, optimizer)
    together = Side(config, seed, mesh, kind, recompute, optimizer)
    random = torch.Generator().manual_seed(seed)
    if first_experts_only:
        for side in (alone, together):
            for name, buffer in side.model.named_buffers():
                if name.endswith("e_score_correction_bias"):
                    buffer[:4], buffer[4:] = 50, 0
    worst: dict[str, float] = {}

    def note(what: str, ours: torch.Tensor, theirs: torch.Tensor) -> None:
        if theirs.numel():
            difference = (ours - theirs).double().norm() / theirs.double().norm().clamp_min(1e-30)
            worst[what] = max(worst.get(what, 0.0), float(difference))

    for _ in range(max(steps, 1)):
        tokens = torch.randint(2, config.vocab_size, (batch, 17), generator=random)
        tokens[:, 8] = 1
        losses = alone.backward(tokens, batch, mtp_weight), together.backward(tokens, micro_batch_size, mtp_weight)
        for field in ("main", "balance"):
            note(field, *(torch.tensor(getattr(side, field), dtype=torch.float64) for side in reversed(losses)))
        if mtp_weight:
            note("mtp", *(torch.tensor(side.mtp, dtype=torch.float64) for side in reversed(losses)))
        theirs, ours = alone.optimizer.gradients(), together.optimizer.gradients()
        assert theirs.keys() == ours.keys()
        theirs = {
            name: rows_of(together.sharding.part(name, gradient), theirs[name]) for name, gradient in ours.items()
        }
        for name, gradient in ours.items():
            note("gradient", gradient, theirs[name])
        note("all gradients", *(torch.cat([side[name].flatten() for name in ours]) for side in (ours, theirs)))
        if not steps:
            return worst
        norms = alone.optimizer.grad_norm(), together.optimizer.grad_norm()
        note("norm", torch.tensor(norms[1]), torch.tensor(norms[0]))
        for side, norm in zip((alone, together), norms, strict=True):
            side.optimizer.step(3e-3, 0.5, norm)
        loads = alone.balancer.update(gamma), together.balancer.update(gamma)
        assert loads[0].keys() == loads[1].keys()
        for name, counts in loads[0].items():
            note("load", loads[1][name].double(), counts.double())
    theirs, ours = alone.optimizer.masters(), together.optimizer.masters()
    for name, master in ours.items():
        note("parameter", master, rows_of(together.sharding.part(name, master), theirs[name]))
    buffers = dict(together.model.named_buffers())
    for name, buffer in alone.model.named_buffers():
        note("bias", buffers[name], buffer)
    # What the model computes with now is what was updated.
    with torch.no_grad():
        hidden = [side.model.hidden_states(tokens[:, :-1]).main_BSD for side in (together, alone)]
    note("hidden", *hidden)
    return worst
