"""The kernels of `kernels/`, which `build` compiles: called with the addresses of tensors.

Decoding on a CPU is many small steps. PyTorch takes longer to begin an operation than a token's share of it takes to
run, and multiplies a few rows by an expert's weights far slower than memory delivers these. What an operation is, its
module in `ops` says in PyTorch; each has a kernel here that does the same in one go, for BF16 and for inference.

No compiler, no kernels: everything then runs in PyTorch. `DSV3_NATIVE=0` in the environment wants that too.

Shapes: T tokens, H heads, D width, E experts, N rows, F expert width; others where they occur.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypedDict, Unpack

import torch
from torch import Tensor

from dsv3.ops import build
from dsv3.ops.large_pages import in_large_pages
from dsv3.ops.latents import Latents


class Map(ctypes.Structure):
    """A linear map's weight for the kernels; whoever makes it keeps the tensors. bits: 16 (BF16), 8 or 4."""

    _fields_ = (("weight", ctypes.c_void_p), ("scale", ctypes.c_void_p), ("bits", ctypes.c_int64))


def _pointers_and_sizes(pointers: str, sizes: str) -> list[tuple[str, Any]]:
    fields: list[tuple[str, Any]] = [(name, ctypes.c_void_p) for name in pointers.split()]
    return fields + [(name, ctypes.c_int64) for name in sizes.split()]


class _Queries(ctypes.Structure):
    _fields_ = _pointers_and_sizes("nope rope", "nope_token nope_head rope_token rope_head")


class Piece(ctypes.Structure):
    """Latents of some sequences and who looks at which, as in `kernels/attention.h`."""

    _fields_ = _pointers_and_sizes("slots mask", "apart B S T")


class Pass(ctypes.Structure):
    """What the blocks of a pass share, as in `kernels/block.h`."""

    _fields_ = _pointers_and_sizes("cos sin slots pieces", "n num_pieces")


class Block(ctypes.Structure):
    """A block's weights and sizes, as in `kernels/block.h`."""

    _fields_ = (
        *_pointers_and_sizes("input_norm q_norm kv_norm up post_norm router bias", ""),
        *((name, Map) for name in ("q_a", "q_b", "kv_a", "o", "local_gate_up", "local_down", "gate_up", "down")),
        *_pointers_and_sizes("", "D H N R V Q C L E chosen F softmax groups kept pairs normalised"),
        *((name, ctypes.c_float) for name in ("factor", "eps", "scale")),
    )


_TYPES: dict[str, Any] = {"p": ctypes.c_void_p, "i": ctypes.c_int64, "f": ctypes.c_float, "m": Map}
_ARGUMENTS = {  # of each kernel: pointers, integers, floats, maps
    "rms_norm": "pippiif",
    "rotate": "piipppiii",
    "linear": "pimpiiii",
    "select_experts": "ppppiiiiiiif",
    "experts": "pppmmppiiiii",
    "latent_attention": "ppppfpiiiiii",
    "run_block": "pppppppppi",
    "greedy": "ppiii",
    "linear_many": "pimppiiii",
    "experts_many": "pppmmpppiiii",
    "route": "pppppppiiiiiiiiifi",
    "prompt_rows": "ppppppppiiiiii",
    "sum_rows": "pppiiii",
    "expanded_attention": "piipiipiipipiifippppiiiiiiiii",
}
_BITS = {torch.bfloat16: 16, torch.int8: 8, torch.uint8: 4}
_INPUTS = {16: 16, 8: 32, 4: 64}  # by bits: numbers of inputs are multiples of it
_TILE = 4  # outputs that are computed at a time
MAX_EXPERTS = 1024


def usable(*tensors: Tensor) -> bool:
    """Whether kernels may take these: BF16 on a CPU, in inference, and a library that could be built.

    Inference mode and not just no gradients: a backward pass that makes something again must get the forward's bits.
    """
    if not torch.is_inference_mode_enabled():
        return False
    for x in tensors:
        if x.dtype is not torch.bfloat16 or not x.is_cpu:
            return False
    return library() is not None


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled kernels, built if this machine has not built them yet; None where they cannot be."""
    found = build.load()
    if found is None:
        return None
    for name, kinds in _ARGUMENTS.items():
        kernel = found[name]
        kernel.restype, kernel.argtypes = None, [_TYPES[kind] for kind in kinds]
        setattr(found, name, kernel)
    return found


def loaded() -> ctypes.CDLL:
    """The library, where something has said that there is one."""
    found = library()
    assert found is not None
    return found


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor | None:
    """`ops.rms_norm.reference_rms_norm`, or None if the kernel does not take these."""
    D = x.shape[-1]
    if not usable(x, weight) or D % 16 or x.stride(-1) != 1:
        return None
    rows = x.reshape(-1, D)  # of a slice: a view, its rows further apart
    out = x.new_empty(x.shape)
    loaded().rms_norm(rows.data_ptr(), rows.stride(0), weight.data_ptr(), out.data_ptr(), len(rows), D, eps)
    return out


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor | None:
    """`model.rope.rotate` for x [1, T, R] or [1, T, H, R], cos and sin of T tokens in FP32; None if it is not so."""
    if not usable(x) or x.shape[0] != 1 or x.stride(-1) != 1 or not (cos.is_contiguous() and sin.is_contiguous()):
        return None
    T, R = x.shape[1], x.shape[-1]
    if cos.numel() != T * R // 2 or cos.dtype != torch.float32:
        return None
    H = x.shape[2] if x.dim() == 4 else 1
    out = x.new_empty(x.shape)
    apart = x.stride(1), x.stride(2) if x.dim() == 4 else 0
    loaded().rotate(x.data_ptr(), *apart, cos.data_ptr(), sin.data_ptr(), out.data_ptr(), T, H, R)
    return out


@dataclass(frozen=True)
class Stored:
    """Weights [..., O, I] of linear maps as they lie in memory, in the kernels' form."""

    weight: Tensor  # BF16 or int8 [..., O, I], or 4 bits: uint8 [..., O, bytes], see `kernels/maps.h`
    scale: Tensor | None  # of int8, for each output, FP32
    num_inputs: int

    @property
    def map(self) -> Map:
        """As the kernels take it."""
        scale = None if self.scale is None else self.scale.data_ptr()
        return Map(self.weight.data_ptr(), scale, _BITS[self.weight.dtype])

    @property
    def is_taken(self) -> bool:
        """Whether the kernels take such weights: their sizes, where they are, and whether there is a library."""
        bits = _BITS.get(self.weight.dtype)
        if bits is None or self.num_inputs % _INPUTS[bits] or self.weight.shape[-2] % _TILE:
            return False
        return self.weight.is_cpu and self.weight.is_contiguous() and library() is not None

    def in_large_pages(self) -> Stored:
        """The same where reading it is faster: a copy, if it is large."""
        return Stored(in_large_pages(self.weight), self.scale, self.num_inputs)

    def split(self, num_outputs: int) -> list[Stored]:
        """The outputs of a single map in pieces of so many."""
        weights = self.weight.split(num_outputs)
        scales = [None] * len(weights) if self.scale is None else self.scale.split(num_outputs)
        return [Stored(weight, scale, self.num_inputs) for weight, scale in zip(weights, scales, strict=True)]

    @staticmethod
    def stack(maps: Sequence[Stored]) -> Stored:
        """Maps of one kind and shape as a stack."""
        scales = [stored.scale for stored in maps if stored.scale is not None]
        weight = torch.stack([stored.weight for stored in maps])
        return Stored(weight, torch.stack(scales) if scales else None, maps[0].num_inputs)

    def unbind(self) -> list[Stored]:
        """The maps of a stack, one by one."""
        scales = [None] * len(self.weight) if self.scale is None else self.scale.unbind()
        return [Stored(weight, scale, self.num_inputs) for weight, scale in zip(self.weight, scales, strict=True)]


def bf16_weight(weight: Tensor) -> Stored:
    """A weight [..., O, I] as the model has it."""
    return Stored(weight, None, weight.shape[-1])


def linear(x_NI: Tensor, stored: Stored) -> Tensor | None:
    """x W^T, [N, O], or None if the kernel does not take these."""
    if not (usable(x_NI) and stored.is_taken) or x_NI.stride(1) != 1 or x_NI.shape[1] != stored.num_inputs:
        return None
    num_outputs = stored.weight.shape[0]
    out = x_NI.new_empty(len(x_NI), num_outputs)
    sizes = (len(x_NI), stored.num_inputs, num_outputs, torch.get_num_threads())
    loaded().linear(x_NI.data_ptr(), x_NI.stride(0), stored.map, out.data_ptr(), *sizes)
    return out


def greedy(logits_RV: Tensor) -> list[int] | None:
    """Of each row the index of the largest, the first among equals, -1 where a row holds NaN or its largest is not
    finite; None if the kernel does not take these."""
    if not (usable(logits_RV) and logits_RV.is_contiguous()):
        return None
    R, V = logits_RV.shape
    ids_R = logits_RV.new_empty(R, dtype=torch.int64)
    loaded().greedy(logits_RV.data_ptr(), ids_R.data_ptr(), R, V, torch.get_num_threads())
    ids: list[int] = ids_R.tolist()
    return ids


class Choice(TypedDict):
    """How experts are chosen by their scores; in the order in which the kernels take it."""

    chosen: int
    groups: int  # 1 for no choice of groups; else the
    kept_groups: int  # best ones by
    pairs: bool  # their two best experts, or their best
    normalised: bool
    factor: float


def select_experts(scores_TE: Tensor, bias_E: Tensor | None, **choice: Unpack[Choice]) -> tuple[Tensor, Tensor] | None:
    """`model.router.select_experts` of scores in FP32: (ids [T, K], weights [T, K]); or None if it is not so."""
    T, E = scores_TE.shape
    if not (torch.is_inference_mode_enabled() and scores_TE.is_cpu and scores_TE.dtype == torch.float32):
        return None
    if E > MAX_EXPERTS or not scores_TE.is_contiguous() or library() is None:
        return None
    weights_TK = scores_TE.new_empty(T, choice["chosen"])
    ids_TK = torch.empty_like(weights_TK, dtype=torch.int64)
    if bias_E is not None and not (bias_E.dtype == torch.float32 and bias_E.is_contiguous()):
        return None
    bias = None if bias_E is None else bias_E.data_ptr()
    loaded().select_experts(
        *(scores_TE.data_ptr(), bias, ids_TK.data_ptr(), weights_TK.data_ptr()),
        *(T, E, *in_order(choice)),
    )
    return ids_TK, weights_TK


def in_order(choice: Choice) -> list[float]:
    """As the kernels take it."""
    return [choice[name] for name in ("chosen", "groups", "kept_groups", "pairs", "normalised", "factor")]


def experts(x_ND: Tensor, weights_N: Tensor, counts_E: Tensor, gate_up_EGD: Stored, down_EDF: Stored) -> Tensor | None:
    """`ops.experts.reference_grouped_swiglu`, or None if the kernel does not take these."""
    (E, D), F = down_EDF.weight.shape[:2], down_EDF.num_inputs
    if not (usable(x_ND) and takes_experts(gate_up_EGD, down_EDF)) or x_ND.shape[1] != D:
        return None
    x_ND, weights_N, counts_E = x_ND.contiguous(), weights_N.float().contiguous(), counts_E.contiguous()
    out, act = torch.empty_like(x_ND), x_ND.new_empty(len(x_ND), F)
    loaded().experts(
        *(x_ND.data_ptr(), weights_N.data_ptr(), counts_E.data_ptr(), gate_up_EGD.map, down_EDF.map),
        *(out.data_ptr(), act.data_ptr(), len(x_ND), E, D, F, torch.get_num_threads()),
    )
    return out


def takes_experts(gate_up_EGD: Stored, down_EDF: Stored) -> bool:
    """Whether there is a kernel for experts with such weights."""
    return gate_up_EGD.is_taken and down_EDF.is_taken


def takes_block(latent_width: int, rope_width: int, value_width: int, hidden_width: int, num_experts: int) -> bool:
    """Whether `run_block` takes these sizes; of its maps `Stored.is_taken` says it."""
    if hidden_width % 16 or num_experts > MAX_EXPERTS:
        return False
    return _takes_attention(latent_width, rope_width, value_width)


def _takes_attention(latent_width: int, rope_width: int, value_width: int) -> bool:
    return not (latent_width % 32 or rope_width % 16 or value_width % _TILE)


def latent_attention(
    q_nope_BSHN: Tensor,
    q_rope_BSHR: Tensor,
    latents: Latents,
    up_HMC: Tensor,
    scale: float,
    mask: Tensor | None,
) -> Tensor | None:
    """`ops.attention.absorbed_attention`, or None if the kernel does not take these. Copies no latent."""
    (B, S, H, N), T, R = q_nope_BSHN.shape, latents.shape[1], q_rope_BSHR.shape[-1]
    V, C = up_HMC.shape[1] - N, up_HMC.shape[2]
    if not usable(q_nope_BSHN, q_rope_BSHR, latents.rows, up_HMC) or not _takes_attention(C, R, V):
        return None
    if q_nope_BSHN.stride(-1) != 1 or q_rope_BSHR.stride(-1) != 1:
        return None
    if latents.rows.stride()[-2:] != (C + R, 1) or not up_HMC.is_contiguous():
        return None
    nope, rope = q_nope_BSHN.flatten(0, 1), q_rope_BSHR.flatten(0, 1)
    queries = _Queries(nope.data_ptr(), rope.data_ptr(), *nope.stride()[:2], *rope.stride()[:2])
    apart = 0 if latents.slots_BT is not None else latents.rows.stride(0)
    slots = None if latents.slots_BT is None else latents.slots_BT.contiguous()
    looks = None if mask is None else mask.expand(B, 1, S, T).contiguous()
    slots_at, looks_at = (None if x is None else x.data_ptr() for x in (slots, looks))
    piece = Piece(slots_at, looks_at, apart, B, S, T)
    out = nope.new_empty(B, S, H, V)
    loaded().latent_attention(
        *(ctypes.byref(queries), latents.rows.data_ptr(), ctypes.byref(piece), up_HMC.data_ptr(), scale),
        *(out.data_ptr(), H, N, C, R, V, torch.get_num_threads()),
    )
    return out
