"""The DeepSeek-V3 router (eq. 12-16): which experts a token visits and what each one's answer weighs.

Shapes: B batch, S sequence, T = B*S tokens, D model, E routed experts, G groups, K experts chosen per token.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsv3.config import ModelConfig
from dsv3.model.aux_loss import inject_loss, sequence_balance_loss
from dsv3.model.context import Context
from dsv3.ops import native, native_prompts
from dsv3.ops.recompute import recomputed


@dataclass(frozen=True)
class Routing:
    """One layer's decision for T tokens, made once and passed on: dispatched, counted, recorded, replayed."""

    expert_ids_TK: Tensor  # int64, best selection score first
    weights_TK: Tensor  # at least FP32, routed_scaling_factor included
    scores_TE: Tensor  # at least FP32, before any bias
    counts_E: Tensor  # int64, valid tokens that chose each expert
    balance_loss: Tensor | None = None  # mean over the sequences of eq. 17-20, detached: a figure for the log


def select_experts(scores_TE: Tensor, bias_E: Tensor | None, config: ModelConfig) -> tuple[Tensor, Tensor]:
    """Choose K experts per token and weigh them (spec section 4, steps 2-5).

    scores_TE: affinities s, at least FP32. bias_E: added for the selection only, never in the weights; None is no
    bias. Ties go to the lower index. Returns (expert_ids_TK int64, weights_TK in the dtype of the scores).
    """
    if (fast := native.select_experts(scores_TE, bias_E, **_choice(config))) is not None:
        return fast
    selection_TE = scores_TE.detach() if bias_E is None else scores_TE.detach() + bias_E
    if config.n_group > 1 and config.topk_method != "greedy":
        grouped_TGe = selection_TE.unflatten(1, (config.n_group, -1))
        if config.topk_method == "noaux_tc":
            group_TG = grouped_TGe.topk(2, dim=-1).values.sum(-1)
        else:
            group_TG = grouped_TGe.amax(-1)
        kept_TG = torch.zeros_like(group_TG, dtype=torch.bool)
        kept_TG.scatter_(1, _stable_topk(group_TG, config.topk_group), True)
        # -inf and not 0: a biased score may be negative, and an expert of a dropped group must never win.
        selection_TE = grouped_TGe.masked_fill(~kept_TG.unsqueeze(-1), float("-inf")).flatten(1)
    expert_ids_TK = _stable_topk(selection_TE, config.num_experts_per_tok)
    return expert_ids_TK, expert_weights(scores_TE, expert_ids_TK, config)


def _choice(config: ModelConfig) -> native.Choice:
    return {
        "chosen": config.num_experts_per_tok,
        "groups": 1 if config.topk_method == "greedy" else config.n_group,
        "kept_groups": config.topk_group,
        "pairs": config.topk_method == "noaux_tc",
        "normalised": config.norm_topk_prob,
        "factor": config.routed_scaling_factor,
    }


def expert_weights(scores_TE: Tensor, expert_ids_TK: Tensor, config: ModelConfig) -> Tensor:
    """g_i of eq. 13: the chosen scores, normalised to sum 1 (if `norm_topk_prob`), times `routed_scaling_factor`."""
    weights_TK = scores_TE.gather(1, expert_ids_TK)
    if config.norm_topk_prob:
        weights_TK = weights_TK / (weights_TK.sum(-1, keepdim=True) + 1e-20)
    return weights_TK * config.routed_scaling_factor


def _stable_topk(x: Tensor, k: int) -> Tensor:
    """Indices of the k largest in the last dimension, largest first, the lower index first among equals.

    `torch.topk` leaves the order of equals open, and with it which expert a token visits; `argmax` takes the first. x
    must have k values above -inf in every row.
    """
    left = x.clone()
    indices = []
    for _ in range(k):
        indices.append(left.argmax(-1, keepdim=True))
        left.scatter_(-1, indices[-1], float("-inf"))
    return torch.cat(indices, dim=-1)


class Router(nn.Module):
    """Scores, selection and weights of one MoE layer, all in FP32 whatever the model's dtype."""

    e_score_correction_bias: Tensor | None

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts, config.hidden_size, dtype=torch.float32))
        # A buffer: it is saved with the model and is no parameter of the optimizer.
        bias = torch.zeros(config.n_routed_experts, dtype=torch.float32) if config.topk_method == "noaux_tc" else None
        self.register_buffer("e_score_correction_bias", bias)

    def forward(self, x_BSD: Tensor, context: Context) -> Routing:
        config = self.config
        if (fast := self._fast(x_BSD, context)) is not None:
            return fast
        dtype = torch.promote_types(x_BSD.dtype, torch.float32)
        with torch.autocast(x_BSD.device.type, enabled=False):
            logits_BSE = F.linear(recomputed(Tensor.to, x_BSD, dtype), self.weight.to(dtype))
            scores_BSE = logits_BSE.sigmoid() if config.scoring_func == "sigmoid" else logits_BSE.softmax(-1)
            balance_loss = None
            if context.aux_loss_scale:
                loss_B = sequence_balance_loss(scores_BSE, config.num_experts_per_tok, context.valid_BS)
                scores_BSE = inject_loss(scores_BSE, loss_B.sum() * context.aux_loss_scale)
                balance_loss = loss_B.detach().mean()
            scores_TE = scores_BSE.flatten(0, 1)
            expert_ids_TK, weights_TK = select_experts(scores_TE, self.e_score_correction_bias, config)
        counted = expert_ids_TK if context.valid_BS is None else expert_ids_TK[context.valid_BS.flatten()]
        counts_E = torch.bincount(counted.flatten(), minlength=config.n_routed_experts)
        return Routing(expert_ids_TK, weights_TK, scores_TE.detach(), counts_E, balance_loss)

    def _fast(self, x_BSD: Tensor, context: Context) -> Routing | None:
        config = self.config
        if context.aux_loss_scale or context.valid_BS is not None:
            return None
        softmax = config.scoring_func == "softmax"
        inputs = (x_BSD.flatten(0, 1), self.weight, self.e_score_correction_bias)
        routed = native_prompts.route(*inputs, softmax=softmax, **_choice(config))
        return None if routed is None else Routing(*routed)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Router:
        # `model.bfloat16()` must not touch the router: released biases are near 5, where one BF16 step is 31 gammas.
        def keep_precision(tensor: Tensor) -> Tensor:
            out = fn(tensor)
            narrower = out.is_floating_point() and out.element_size() < tensor.element_size()
            return tensor.to(out.device) if narrower and out.element_size() < 4 else out

        return super()._apply(keep_precision, recurse)
