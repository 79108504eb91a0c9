"""A model's weights packed for inference on a CPU (`ops.packed`), quantised if asked (`ops.quantized`)."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from dsv3.errors import UserError
from dsv3.model.block import Block
from dsv3.model.experts import Experts
from dsv3.model.mla import LatentUpProjection
from dsv3.model.transformer import Transformer
from dsv3.ops import native
from dsv3.ops.experts import few_rows
from dsv3.ops.packed import LinearWeight, PackedWeight, Stored, can_pack, packed_grouped_swiglu
from dsv3.ops.quantized import Int4Weight, Int8DynamicWeight, Int8Weight, QuantizedWeight, quantize_rows
from dsv3.serve.engine_config import Quantization
from dsv3.serve.fused import FusedBlock, can_fuse

Pack = Callable[[Tensor], LinearWeight]


class PackedLinear(nn.Module):
    """A linear map for inference only."""

    def __init__(self, linear: nn.Linear, pack: Pack) -> None:
        super().__init__()
        self._weight = pack(linear.weight.detach())

    def forward(self, x: Tensor) -> Tensor:
        return self._weight.linear(x)

    def weight_in_memory(self) -> Stored | None:
        """As our own kernels take it, if they do."""
        return self._weight.in_memory()


class PackedUpProjection(PackedLinear):
    """`LatentUpProjection` for inference only, never quantised.

    Decoding multiplies by its maps head by head, for which there is no kernel with int8; and prompts and decoded tokens
    should meet the same map.
    """

    def __init__(self, linear: LatentUpProjection) -> None:
        super().__init__(linear, PackedWeight)  # decoding takes it by head
        self._up_HMC = linear.by_head().detach()

    def by_head(self) -> Tensor:
        return self._up_HMC


class PackedExperts(nn.Module):
    """Routed experts for inference only."""

    def __init__(self, experts: Experts, pack: Pack) -> None:
        super().__init__()
        self._gate_up = [pack(weight) for weight in experts.gate_up_proj.detach()]
        self._down = [pack(weight) for weight in experts.down_proj.detach()]

    def forward(self, rows_ND: Tensor, weights_N: Tensor, counts_E: Tensor) -> Tensor:
        return packed_grouped_swiglu(rows_ND, weights_N, counts_E, self._gate_up, self._down)


class Int8Experts(nn.Module):
    """Routed experts in int8, for our own kernel."""

    def __init__(self, experts: Experts) -> None:
        super().__init__()
        dtype = experts.down_proj.dtype
        self._gate_up_EGD, gate_up_scale_EG1 = quantize_rows(experts.gate_up_proj.detach(), dtype)
        self._down_EDF, down_scale_ED1 = quantize_rows(experts.down_proj.detach(), dtype)
        self._scales = (gate_up_scale_EG1.float(), down_scale_ED1.float())
        self._gate_up = list(map(Int8Weight.of, self._gate_up_EGD, gate_up_scale_EG1))
        self._down = list(map(Int8Weight.of, self._down_EDF, down_scale_ED1))

    def forward(self, rows_ND: Tensor, weights_N: Tensor, counts_E: Tensor) -> Tensor:
        if few_rows(rows_ND, counts_E):
            maps = (self._gate_up_EGD, self._down_EDF, self._scales)
            fast = native.experts(rows_ND, weights_N, counts_E, *maps)
            if fast is not None:
                return fast
        return packed_grouped_swiglu(rows_ND, weights_N, counts_E, self._gate_up, self._down)

    def weights_in_memory(self) -> tuple[Stored, Stored]:
        """As our own kernels take them."""
        return (self._gate_up_EGD, self._scales[0]), (self._down_EDF, self._scales[1])


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
    if quantization in ("none", "int8") and native.takes_experts(experts.down_proj):
        return experts if quantization == "none" else Int8Experts(experts)
    return PackedExperts(experts, pack)


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
    return lambda weight_OI: (kind if kind.fits(*weight_OI.shape) else PackedWeight)(weight_OI)
