"""A model's weights packed for inference on a CPU (`ops.packed`), quantised if asked (`ops.quantized`)."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import nn

from dsv3.errors import UserError
from dsv3.model.block import Block
from dsv3.model.experts import Experts
from dsv3.model.mla import LatentUpProjection
from dsv3.model.transformer import Transformer
from dsv3.ops.large_pages import in_large_pages
from dsv3.ops.native import bf16_weight
from dsv3.ops.packed import PackedWeight, can_pack
from dsv3.ops.quantized import Int4Weight, Int8DynamicWeight, Int8Weight, QuantizedWeight
from dsv3.serve.engine_config import Quantization
from dsv3.serve.fused import FusedBlock, can_fuse
from dsv3.serve.packed_modules import Pack, PackedExperts, PackedLinear, PackedUpProjection, QuantizedExperts

# What the head's weight becomes, and those of all other maps.
_KINDS: dict[str, tuple[type[QuantizedWeight], type[QuantizedWeight]]] = {
    "int8": (Int8Weight, Int8Weight),
    "int4": (Int8Weight, Int4Weight),
    "int8-dynamic": (Int8DynamicWeight, Int8DynamicWeight),
}


@torch.no_grad()
def pack_weights(model: Transformer, quantization: Quantization = "none") -> bool:
    """Pack `model` in place where that pays, else leave it as it is; returns whether it did.

    quantization: of the head, the attention's projections but W_UK and W_UV, the FFNs and experts, and MTP's
    projection. Embedding, norms and routers stay as they are, and so do, packed, maps of a shape that the kernel does
    not take. int4 leaves the head at int8. Raises `UserError` where the model or the CPU does not allow it.

    Afterwards the model can neither be trained nor saved. Weights are freed as they are packed, so that one layer's
    are there twice at most.
    """
    pack_head, pack = _packers(model, quantization)
    if not can_pack(model.lm_head.weight):
        return False
    model.lm_head = PackedLinear(model.lm_head, pack_head)  # type: ignore[assignment]
    _pack_children(model, pack, lambda experts: _pack_experts(experts, pack, quantization))
    for holder, name, block in [*_blocks(model)]:
        if can_fuse(block):
            setattr(holder, name, FusedBlock(block))
    return True


def _blocks(model: nn.Module) -> Iterator[tuple[nn.Module, str, Block]]:
    """Every block, with the module that holds it and its name there."""
    for module in model.modules():
        for name, child in module.named_children():
            if isinstance(child, Block):
                yield module, name, child


def _pack_children(module: nn.Module, pack: Pack, pack_experts: Callable[[Experts], nn.Module]) -> None:
    """Depth first, and no list of all modules: it would keep every weight until the last is packed."""
    for name, child in module.named_children():
        if type(child) is nn.Linear:
            setattr(module, name, PackedLinear(child, pack))
        elif type(child) is LatentUpProjection:
            setattr(module, name, PackedUpProjection(child))
        elif type(child) is Experts:
            setattr(module, name, pack_experts(child))
        else:
            _pack_children(child, pack, pack_experts)


def _pack_experts(experts: Experts, pack: Pack, quantization: Quantization) -> nn.Module:
    """Where our own kernel takes experts they stay stacked, and in BF16 as they are."""
    stacks = experts.gate_up_proj, experts.down_proj
    if quantization == "none":
        if not all(bf16_weight(stack).is_taken for stack in stacks):
            return PackedExperts(experts, pack)
        for stack in stacks:
            stack.data = in_large_pages(stack.detach())
        return experts
    kind = _KINDS[quantization][1]
    fits = all(kind.fits(*stack.shape[1:]) for stack in stacks)
    return QuantizedExperts(experts, kind) if fits else PackedExperts(experts, pack)


def _packers(model: Transformer, quantization: Quantization) -> tuple[Pack, Pack]:
    if quantization == "none":
        return PackedWeight, PackedWeight
    if quantization not in _KINDS:
        raise UserError(f"quantization is '{quantization}', expected none, {', '.join(_KINDS)}")
    if model.device.type != "cpu" or model.dtype != torch.bfloat16:
        found = f"{str(model.dtype).removeprefix('torch.')} on {model.device.type}"
        raise UserError(f"{quantization} weights need a model in bfloat16 on a CPU, this one is in {found}")
    if not can_pack(model.lm_head.weight) or not all(kind.available() for kind in _KINDS[quantization]):
        raise UserError(f"this CPU or this torch has no kernel for {quantization} weights: leave the quantization out")
    head, other = (_where_it_fits(kind) for kind in _KINDS[quantization])
    return head, other


def _where_it_fits(kind: type[QuantizedWeight]) -> Pack:
    return lambda weight_OI: kind.of(weight_OI) if kind.fits(*weight_OI.shape) else PackedWeight(weight_OI)
