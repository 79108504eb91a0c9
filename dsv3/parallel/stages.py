"""What one rank of a pipeline holds of a `Transformer`, and how a chunk goes through one of its stages.

The model is cut from outside. `RankModel` keeps the modules of the rank's stages under the names they have in the
whole model (`layers.7.self_attn...`, `mtp.0...`), so that checkpoints, optimizers and the balancer see a model with
fewer parts and nothing else. Stages of one rank that use the same module (the embedding, for MTP) share its parameters.

Between stages travels one tensor [B, P, D]: the main model's S positions and behind them, once there are some, the
hidden states of the MTP depths, S - 1 positions, S - 2, ...

Shapes: B batch, S tokens of the sequences, P positions travelling, D model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dsv3.model.block import Block
from dsv3.model.context import Context
from dsv3.model.mtp import MTPModule
from dsv3.model.router import Routing
from dsv3.model.transformer import Transformer
from dsv3.parallel.layout import StagePart
from dsv3.parallel.overlap import block_on
from dsv3.parallel.pieces import Chunk
from dsv3.parallel.tape import Tape

Loss = Callable[[tuple[Tensor, ...], Tensor, int], Tensor]
"""(hidden states of depth k = 0, 1, .., [B, S-k, D]; the head's weight [V, D]; the micro-batch's number) -> scalar."""


class RankModel(nn.Module):
    """The modules of some stages of `model`, by their names in it; the parameters are shared with `model`."""

    def __init__(self, model: Transformer, parts: Sequence[StagePart]) -> None:
        super().__init__()
        self.config = model.config
        self.embed_tokens = model.embed_tokens if any(part.embedding or part.mtp for part in parts) else None
        self.layers = nn.ModuleDict({str(i): model.layers[i] for i in _union(part.layers for part in parts)})
        self.norm = model.norm if any(part.norm for part in parts) else None
        self.lm_head = model.lm_head if any(part.loss for part in parts) else None
        self.mtp = nn.ModuleDict({str(k): model.mtp[k] for k in _union(part.mtp for part in parts)})


def module_names(model: Transformer) -> list[str]:
    """The modules that a layout moves, in one order."""
    layers = [f"layers.{i}" for i in range(model.config.num_hidden_layers)]
    return ["embed_tokens", *layers, "norm", "lm_head", *(f"mtp.{k}" for k in range(len(model.mtp)))]


def holders(name: str, ranks: Sequence[Sequence[StagePart]]) -> tuple[int, ...]:
    """The ranks that hold the module, parameter or buffer `name` of the whole model, from the parts of each rank.

    None holds what the model does not have.

    More than one holds what DualPipe keeps twice, and the embedding where MTP is on another rank.
    """
    where, _, rest = name.partition(".")
    number = int(rest.partition(".")[0]) if where in ("layers", "mtp") else -1
    return tuple(rank for rank, parts in enumerate(ranks) if any(_holds(part, where, number) for part in parts))


@dataclass
class StagePass:
    """One micro-batch's forward through one stage: where it came in, where it goes out, and the tape between.

    The gradients of both are in the tape's slots (`slot_of`).
    """

    tape: Tape
    arrived: Tensor | None  # [B, P, D]; None in the stage with the embedding
    output: Tensor  # [B, P', D] to the next stage, or the loss
    routings: dict[str, Routing]


class Stage:
    """One stage on the modules of its rank."""

    def __init__(self, model: RankModel, part: StagePart) -> None:
        self.model, self.part = model, part

    def forward(
        self,
        tape: Tape,
        arrived: Tensor | None,
        tokens_BS: Tensor,
        context: Context,
        loss: Callable[[tuple[Tensor, ...], Tensor], Tensor],
        *,
        mtp: bool,
        in_stages: bool,
    ) -> Chunk[StagePass]:
        """`in_stages` cuts blocks where they communicate, so that a driver can let another chunk compute there."""
        model, part, S = self.model, self.part, tokens_BS.shape[1]
        routings: dict[str, Routing] = {}
        if part.embedding:
            embed_tokens = _part(model.embed_tokens)
            hiddens: tuple[Tensor, ...] = (tape.run(embed_tokens, tokens_BS, uses=[embed_tokens]),)
        else:
            assert arrived is not None
            arrived = tape.enter(arrived)
            hiddens = (arrived,)
            if mtp and part.mtp.start:
                lengths = [max(S - k, 0) for k in range(part.mtp.start + 1)]
                hiddens = tape.run(Tensor.split, arrived, lengths, 1)
        for i in part.layers:
            block = model.layers[str(i)]
            assert isinstance(block, Block)
            h_BSD, routing = yield from block_on(tape, block, hiddens[0], context, in_stages=in_stages)
            hiddens = (h_BSD,)
            if routing is not None:
                routings[f"layers.{i}"] = routing
        if part.norm:
            norm = _part(model.norm)
            hiddens = (tape.run(norm, hiddens[0], uses=[norm]),)
        for k in part.mtp if mtp else ():
            h_BSD, routing = yield from self._mtp(k, tape, hiddens[-1], tokens_BS, context, in_stages=in_stages)
            hiddens = (*hiddens, h_BSD)
            if routing is not None:
                routings[f"mtp.{k}"] = routing
        if part.loss:
            head = model.lm_head
            assert head is not None
            output = tape.run(lambda *h: loss(h, head.weight), *hiddens, uses=[head])
        else:
            output = hiddens[0] if len(hiddens) == 1 else tape.run(_join, *hiddens)
        return StagePass(tape, arrived, output, routings)

    def _mtp(
        self, k: int, tape: Tape, previous_BSD: Tensor, tokens_BS: Tensor, context: Context, *, in_stages: bool
    ) -> Chunk[tuple[Tensor, Routing | None]]:
        """`MTPModule.forward` of depth k + 1 on a tape."""
        depth, S = k + 1, tokens_BS.shape[1]
        if depth >= S:
            return tape.run(_first, previous_BSD, 0), None  # too short for this depth
        module, embed_tokens = self.model.mtp[str(k)], _part(self.model.embed_tokens)
        assert isinstance(module, MTPModule)

        def enter(previous_BSD: Tensor) -> Tensor:
            return module.merge(_first(previous_BSD, S - depth), embed_tokens(tokens_BS[:, depth:]))

        entrance = [module.enorm, module.hnorm, module.eh_proj, embed_tokens]
        h_BSD = tape.run_block(enter, previous_BSD, uses=entrance)
        h_BSD, routing = yield from block_on(tape, module.block, h_BSD, context.behind(depth), in_stages=in_stages)
        return tape.run(module.norm, h_BSD, uses=[module.norm]), routing


def payload_positions(part: StagePart, S: int, *, mtp: bool) -> int:
    """P of what travels into this stage: S, and S - k for every MTP depth k that stages before it have made."""
    return S + sum(max(S - k, 0) for k in range(1, part.mtp.start + 1) if mtp)


def _part(module: nn.Module | None) -> nn.Module:
    assert module is not None
    return module


def _first(hidden_BSD: Tensor, positions: int) -> Tensor:
    return hidden_BSD[:, :positions]


def _join(*hiddens: Tensor) -> Tensor:
    return torch.cat(hiddens, dim=1)


def _holds(part: StagePart, where: str, number: int) -> bool:
    match where:
        case "embed_tokens":
            return part.embedding or bool(part.mtp)
        case "layers":
            return number in part.layers
        case "norm":
            return part.norm
        case "mtp":
            return number in part.mtp
        case "lm_head":
            return part.loss
    return False


def _union(ranges: Iterable[range]) -> list[int]:
    return sorted({i for numbers in ranges for i in numbers})
