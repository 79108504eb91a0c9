"""Auxiliary-loss-free balancing (spec section 5): one object counts the load and moves the selection bias.

Shapes: L MoE layers, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from dsv3.model.router import Router, Routing


def balanced_bias(bias_E: Tensor, counts_E: Tensor, gamma: float) -> Tensor:
    """The bias after one optimizer step: + gamma if underloaded, - gamma if overloaded, against the mean load."""
    # mean - count has the sign of sum - E count, which whole numbers say without rounding.
    return bias_E + gamma * (counts_E.sum() - len(counts_E) * counts_E).sign().to(bias_E.dtype)


class LoadBalancer:
    """Owns the balancing state of a model: counts each valid token once per layer, moves every bias once per step.

    `observe` takes the `Routing`s that a forward pass returned. Under recomputation the second forward's
    routings go nowhere, so nothing is counted twice. `update` is called once per optimizer step.

    `reduce` sums a [L, E] tensor over every data-like axis; on one device it is the identity.
    """

    def __init__(self, model: nn.Module, reduce: Callable[[Tensor], Tensor] | None = None) -> None:
        routers = {
            name.removesuffix(".mlp.router").removesuffix(".block"): module
            for name, module in model.named_modules()
            if isinstance(module, Router)
        }
        self._names = list(routers)
        self._routers = list(routers.values())
        self._reduce = reduce if reduce is not None else lambda counts_LE: counts_LE
        first = next(iter(routers.values()), None)
        shape = (len(routers), first.config.n_routed_experts if first is not None else 0)
        device = first.weight.device if first is not None else None
        self._counts_LE = torch.zeros(shape, dtype=torch.int64, device=device)

    def observe(self, routings: Mapping[str, Routing]) -> None:
        """Add one forward pass's counts; keys are layer names as `ModelOutput.routings` has them."""
        for index, name in enumerate(self._names):
            if name in routings:
                self._counts_LE[index] += routings[name].counts_E

    @torch.no_grad()
    def update(self, gamma: float) -> dict[str, Tensor]:
        """Move the biases by `gamma`, start counting anew, and return the step's counts per layer, [E] int64 each."""
        counts_LE = self._reduce(self._counts_LE)
        self._counts_LE = torch.zeros_like(counts_LE)
        for router, counts_E in zip(self._routers, counts_LE, strict=True):
            bias_E = router.e_score_correction_bias
            if bias_E is not None and gamma:
                bias_E.copy_(balanced_bias(bias_E, counts_E, gamma))
        return dict(zip(self._names, counts_LE, strict=True))

    def reset(self) -> None:
        """Forget what was counted since the last update (a step that is thrown away)."""
        self._counts_LE.zero_()


def max_violation(counts_E: Tensor) -> float:
    """MaxVio = max_i load_i / mean load - 1: 0 is perfect balance, E/K - 1 the worst."""
    counts = counts_E.cpu().to(torch.float64)
    return float(counts.max() / counts.mean().clamp_min(1e-12) - 1)
