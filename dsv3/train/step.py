"""One optimizer step's arithmetic: the losses of a batch, the same whatever the micro-batch size.

Every loss is a sum over the step divided by a count over the step, and the counts are known from the tokens
before the first forward pass. So micro-batches simply add up, with MTP, auxiliary loss and balancing in them, and so
do processes that take different sequences of the step.

Shapes: B sequences, S tokens; tokens_BS1 has S+1 per sequence, so that the last input has a target.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import NotRequired, TypedDict, Unpack

import torch
from torch import Tensor

from dsv3.config import ModelConfig
from dsv3.data.documents import document_ids, document_mask
from dsv3.model.balance import LoadBalancer
from dsv3.model.router import Routing
from dsv3.model.transformer import Transformer
from dsv3.ops.cross_entropy import IGNORE, linear_cross_entropy
from dsv3.parallel.pipeline import PassInput
from dsv3.parallel.ranks import Ranks

Observe = Callable[[Mapping[str, Routing], int], None]
"""(routings of a forward pass by layer name, the number of its micro-batch) -> nothing."""


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
    document_BS1 = document_ids(tokens_BS1, eos_token_id)
    return labels.masked_fill(document_BS1[:, depth + 1 :] != document_BS1[:, : labels.shape[1]], IGNORE)


@dataclass(frozen=True)
class MicroBatch:
    """Sequences of one forward pass; padding counts for nothing and is there because other processes run one."""

    tokens_BS1: Tensor
    is_padding: bool = False


def micro_batches(tokens_BS1: Tensor, size: int, ranks: Ranks) -> Iterator[MicroBatch]:
    """This process's sequences in parts of `size`: as many parts on every process, since all join in every pass."""
    parts = tokens_BS1.split(size) if len(tokens_BS1) else ()
    yield from map(MicroBatch, parts)
    for _ in range(len(parts), int(ranks.gather(len(parts)).max())):
        yield MicroBatch(tokens_BS1.new_zeros(1, tokens_BS1.shape[1]), is_padding=True)


def pass_input(part: MicroBatch, isolate_at: int | None) -> PassInput:
    """What a forward pass over `part` reads. isolate_at: as of `StepSettings`."""
    inputs_BS = part.tokens_BS1[:, :-1]
    return PassInput(
        inputs_BS,
        mask=None if isolate_at is None else document_mask(inputs_BS, isolate_at),
        valid_BS=torch.zeros_like(inputs_BS, dtype=torch.bool) if part.is_padding else None,
    )


class StepSettings(TypedDict):
    """How a step is divided and what it minimises: keyword arguments, the same however its passes are made."""

    micro_batch_size: int  # sequences per pass
    mtp_weight: float  # lambda of eq. 25; 0: the MTP modules are left out
    eos_token_id: int | None  # no target lies past it; None: the sequences are one document each
    isolate_at: NotRequired[int | None]  # attention stays inside documents, which begin with this token
    ranks: NotRequired[Ranks | None]  # None: this process alone


class StepLosses:
    """A step's micro-batches on this process: what enters, what is minimised, and the sums that are reported.

    tokens_BS1: of the step's sequences those that this process takes, perhaps none. All processes make it together,
    since a loss is divided by a count over all of them.

    Minimised: L_main + mtp_weight / D sum_k L_k (eq. 25) + alpha x the sequence-wise balance loss, each a mean
    over all the step's targets or sequences.
    """

    def __init__(self, config: ModelConfig, tokens_BS1: Tensor, **settings: Unpack[StepSettings]) -> None:
        mtp_depths, mtp_weight = config.num_nextn_predict_layers, settings["mtp_weight"]
        self._isolate_at = settings.get("isolate_at")
        self._ranks = ranks = settings.get("ranks") or Ranks()
        self.mtp = mtp_weight > 0
        self.parts = list(micro_batches(tokens_BS1, settings["micro_batch_size"], ranks))
        self._labels = [
            [labels_at(part.tokens_BS1, k, settings["eos_token_id"]) for k in range(1 + mtp_depths)]
            for part in self.parts
        ]
        for part, labels in zip(self.parts, self._labels, strict=True):
            if part.is_padding:
                labels[:] = [torch.full_like(label, IGNORE) for label in labels]
        own = [sum(int((labels[k] != IGNORE).sum()) for labels in self._labels) for k in range(1 + mtp_depths)]
        self._sequences, *self._counts = ranks.gather(tokens_BS1.shape[0], *own).sum(0).clamp_min(1).tolist()
        self._weights = [1.0, *[mtp_weight / max(mtp_depths, 1)] * mtp_depths]
        self._routers = sum(map(config.is_moe_layer, range(config.num_hidden_layers + mtp_depths * self.mtp)))
        self.aux_loss_scale = config.aux_loss_alpha / self._sequences
        self._sums = torch.zeros(mtp_depths + 2, dtype=torch.float64)  # the losses, and the balance loss

    def inputs(self) -> Iterator[PassInput]:
        """One forward pass's after the other's."""
        return (pass_input(part, self._isolate_at) for part in self.parts)

    def loss(self, hiddens: tuple[Tensor, ...], head_VD: Tensor, micro_batch: int) -> Tensor:
        """The scalar whose gradients add up to the step's. hiddens: of depth k = 0, 1, .., [B, S-k, D]."""
        losses = [
            linear_cross_entropy(h_BSD.flatten(0, 1), head_VD, labels.flatten())
            for h_BSD, labels in zip(hiddens, self._labels[micro_batch], strict=False)
        ]
        self._sums[: len(losses)] += torch.stack([loss.detach() for loss in losses]).double().cpu()
        weighted = zip(self._weights, self._counts, losses, strict=False)
        return torch.stack([weight / count * loss for weight, count, loss in weighted]).sum()

    def observe(self, routings: Mapping[str, Routing], micro_batch: int) -> None:
        """Take in the balance losses of a forward pass (their gradients come with the routings themselves)."""
        part = self.parts[micro_batch]
        share = 0.0 if part.is_padding else part.tokens_BS1.shape[0] / self._sequences / max(self._routers, 1)
        balances = (r.balance_loss for r in routings.values() if r.balance_loss is not None)
        self._sums[-1] += sum(share * float(balance) for balance in balances)

    def means(self, gather: Callable[[Tensor], Tensor] = lambda sums: sums) -> Losses:
        """The losses of the whole step; all processes ask for them together. gather: sums over a pipeline's ranks."""
        sums = self._ranks.sum_(gather(self._sums))
        main, *mtp, balance = (sums / torch.tensor([*self._counts, 1])).tolist()
        return Losses(main, tuple(mtp) if self.mtp else (), balance)


def backward_step(
    model: Transformer,
    balancer: LoadBalancer,
    tokens_BS1: Tensor,
    *,
    observe: Observe | None = None,
    **settings: Unpack[StepSettings],
) -> Losses:
    """Forward and backward of a whole step in micro-batches; gradients add up in the model (or its masters).

    What is minimised: `StepLosses`. The balancer observes each token once, and `observe` is told the same routings.
    """
    step = StepLosses(model.config, tokens_BS1, **settings)
    for number, inputs in enumerate(step.inputs()):
        hidden = model.hidden_states(
            inputs.tokens_BS,
            mask=inputs.mask,
            valid_BS=inputs.valid_BS,
            aux_loss_scale=step.aux_loss_scale,
            mtp=step.mtp,
        )
        step.loss((hidden.main_BSD, *hidden.mtp), model.lm_head.weight, number).backward()
        balancer.observe(hidden.routings)
        step.observe(hidden.routings, number)
        if observe is not None:
            observe(hidden.routings, number)
    return step.means()
