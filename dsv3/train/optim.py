"""AdamW as the report has it, with FP32 master weights and FP32 gradient accumulation under a BF16 model.

A BF16 weight of size 1 cannot move by less than 1/256, and the sum of many BF16 gradients loses the small ones.
So a parameter that is narrower than FP32 has a master copy here, and its gradient is added to an FP32 sum as soon
as autograd has it. FP32 parameters are their own masters.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn


class MasterAdamW:
    """Decoupled weight decay on matrices, none on norms; global-norm clipping."""

    def __init__(
        self,
        model: nn.Module,
        *,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.1,
    ) -> None:
        self._parameters = dict(model.named_parameters())
        self._masters = {name: _master(parameter) for name, parameter in self._parameters.items()}
        for name, parameter in self._parameters.items():
            if self._masters[name] is not parameter:
                parameter.register_post_accumulate_grad_hook(_accumulate_into(self._masters[name]))
        groups = [
            {"params": [m for m in self._masters.values() if m.dim() >= 2], "weight_decay": weight_decay},
            {"params": [m for m in self._masters.values() if m.dim() < 2], "weight_decay": 0.0},
        ]
        self._adamw = torch.optim.AdamW(groups, lr=0.0, betas=betas, eps=eps, fused=True)

    def step(self, learning_rate: float, clip: float) -> float:
        """Clip, update masters, round them into the model, clear gradients. Returns the norm before clipping."""
        norm = float(nn.utils.clip_grad_norm_(list(self._masters.values()), clip))
        for group in self._adamw.param_groups:
            group["lr"] = learning_rate
        self._adamw.step()
        self.zero_grad()
        self._round_masters()
        return norm

    def zero_grad(self) -> None:
        """Forget the gradients of the step."""
        self._adamw.zero_grad(set_to_none=True)

    def masters(self) -> dict[str, Tensor]:
        """The FP32 weights by parameter name: what a checkpoint saves."""
        return {name: master.detach() for name, master in self._masters.items()}

    def load_masters(self, weights: Mapping[str, Tensor]) -> None:
        """Take FP32 weights (all of them), and round them into the model."""
        with torch.no_grad():
            for name, master in self._masters.items():
                master.copy_(weights[name])
        self._round_masters()

    def state(self) -> dict[str, Tensor]:
        """Moments and step counts by parameter name, flat: `exp_avg.NAME`, `exp_avg_sq.NAME`, `step.NAME`."""
        return {
            f"{key}.{name}": value
            for name, master in self._masters.items()
            for key, value in self._adamw.state[master].items()
        }

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Take what `state` gave; a parameter without moments (before its first step) keeps none."""
        for name, master in self._masters.items():
            entry = {
                key: state[f"{key}.{name}"] for key in ("exp_avg", "exp_avg_sq", "step") if f"{key}.{name}" in state
            }
            if entry:
                self._adamw.state[master] = {
                    key: value.to(torch.float32 if key == "step" else master.device).clone()
                    for key, value in entry.items()
                }

    @torch.no_grad()
    def _round_masters(self) -> None:
        for name, parameter in self._parameters.items():
            if self._masters[name] is not parameter:
                parameter.copy_(self._masters[name])


def _master(parameter: nn.Parameter) -> nn.Parameter:
    if parameter.dtype.itemsize >= 4:
        return parameter
    return nn.Parameter(parameter.detach().float())


def _accumulate_into(master: nn.Parameter):  # type: ignore[no-untyped-def]
    def hook(parameter: Tensor) -> None:
        assert parameter.grad is not None
        if master.grad is None:
            master.grad = parameter.grad.float()
        else:
            master.grad.add_(parameter.grad)
        parameter.grad = None

    return hook
