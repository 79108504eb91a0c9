"""One optimizer step's arithmetic: the losses of a batch, the same whatever the micro-batch size.

Every loss is a sum over the step divided by a count over the step, and the counts are known from the tokens
before the first forward pass. So micro-batches simply add up, with MTP, auxiliary loss and balancing in them.

Shapes: B sequences, S tokens; tokens_BS1 has S+1 per sequence, so that the last input has a target.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dsv3.model.balance import LoadBalancer
from dsv3.model.transformer import Transformer
from dsv3.ops.cross_entropy import IGNORE, linear_cross_entropy


@dataclass(frozen=True)
class Losses:
    """Means over the step, in nats per token; `mtp` one per depth; `balance` the mean of eq. 17-20 over layers."""

    main: float
    mtp: tuple[float, ...]
    balance: float


def labels_at(tokens_BS1: Tensor, depth: int, eos_token_id: int | None) -> Tensor:
    """What depth k (0: the main model) must predict at each of its positions: token i+k+1, [B, S-k] int64.

    `IGNORE` where the target lies in the next document: past an end token between position i and the target.
    """
    labels = tokens_BS1[:, depth + 1 :]
    if eos_token_id is None:
        return labels
    ends = (tokens_BS1 == eos_token_id).cumsum(1)
    document = ends - (tokens_BS1 == eos_token_id).long()  # an end token still belongs to its document
    return labels.masked_fill(document[:, depth + 1 :] != document[:, : labels.shape[1]], IGNORE)


def backward_step(
    model: Transformer,
    balancer: LoadBalancer,
    tokens_BS1: Tensor,
    *,
    micro_batch_size: int,
    mtp_weight: float,
    eos_token_id: int | None,
) -> Losses:
    """Forward and backward of a whole step in micro-batches; gradients add up in the model (or its masters).

    Minimised: L_main + mtp_weight / D sum_k L_k (eq. 25) + alpha x the sequence-wise balance loss, each a mean
    over all the step's targets or sequences. The balancer observes each token once.
    """
    B = tokens_BS1.shape[0]
    depths = 1 + len(model.mtp)
    labels = [labels_at(tokens_BS1, k, eos_token_id) for k in range(depths)]
    counts = [max(int((label != IGNORE).sum()), 1) for label in labels]
    weights = [1.0, *[mtp_weight / max(len(model.mtp), 1)] * len(model.mtp)]
    sums = torch.zeros(depths, dtype=torch.float64)
    balance = 0.0
    for start in range(0, B, micro_batch_size):
        rows = slice(start, start + micro_batch_size)
        hidden = model.hidden_states(
            tokens_BS1[rows, :-1], aux_loss_scale=model.config.aux_loss_alpha / B, mtp=mtp_weight > 0
        )
        losses = [
            linear_cross_entropy(h.flatten(0, 1), model.lm_head.weight, label[rows].flatten())
            for h, label in zip((hidden.main_BSD, *hidden.mtp), labels, strict=False)
        ]
        torch.stack([w / n * loss for w, n, loss in zip(weights, counts, losses, strict=False)]).sum().backward()
        balancer.observe(hidden.routings)
        sums[: len(losses)] += torch.stack([loss.detach() for loss in losses]).double().cpu()
        share = hidden.main_BSD.shape[0] / B / max(len(hidden.routings), 1)
        balance += sum(share * float(r.balance_loss) for r in hidden.routings.values() if r.balance_loss is not None)
    means = (sums / torch.tensor(counts)).tolist()
    return Losses(means[0], tuple(means[1:]) if mtp_weight > 0 else (), balance)
