"""The kernels for prompts: many rows, where multiplying is what takes the time.

A prompt's largest products PyTorch does well, but experts get some dozens of rows each, attention multiplies by blocks,
and between products values are copied into the layouts that these want. Here that is done on the way into the cache.
As in `ops.native` each function is defined elsewhere in PyTorch; it gives None where the kernel does not take its
arguments, or is no faster.

Shapes: B sequences, S queries, T keys or tokens, H heads, N and R key width without and with RoPE, V value width;
D model, E experts, K choices of a token, F expert width, n rows.
"""

from __future__ import annotations

import ctypes
from typing import Unpack

import torch
from torch import Tensor

from dsv3 import compat
from dsv3.ops import native
from dsv3.ops.native import Stored

# As in the kernels.
_STEP = 32  # inputs that are packed at a time
_WIDTH = 16  # outputs that are computed at a time
_PANEL = 64  # outputs that are packed together
_TILE_ROWS = 24  # queries that meet the same keys at a time

_PACKED = 1 << 21  # values of keys and values that are packed at a time: they should stay in the cache


def linear(x_nI: Tensor, stored: Stored) -> Tensor | None:
    """x W^T, [n, O], of many rows. In BF16 oneDNN's products on packed weights are as fast, so this is for int8."""
    num_outputs = len(stored.weight)
    if not _multiplies(x_nI, stored) or num_outputs % _WIDTH:
        return None
    threads = torch.get_num_threads()
    out, scratch = x_nI.new_empty(len(x_nI), num_outputs), x_nI.new_empty(threads * _PANEL * stored.num_inputs)
    native.loaded().linear_many(
        *(x_nI.data_ptr(), x_nI.stride(0), stored.map, out.data_ptr(), scratch.data_ptr()),
        *(len(x_nI), stored.num_inputs, num_outputs, threads),
    )
    return out


def experts(x_nD: Tensor, weights_n: Tensor, counts_E: Tensor, gate_up_EGD: Stored, down_EDF: Stored) -> Tensor | None:
    """`ops.experts.reference_grouped_swiglu` for many rows of each expert. Rows of weight 0 at a group's end are 0."""
    (E, D), F = down_EDF.weight.shape[:2], down_EDF.num_inputs
    if not (_multiplies(x_nD, gate_up_EGD) and _multiplies(x_nD, down_EDF)):
        return None
    x_nD, weights_n, counts_E = x_nD.contiguous(), weights_n.float().contiguous(), counts_E.contiguous()
    threads = torch.get_num_threads()
    out, act = x_nD.new_empty(x_nD.shape), x_nD.new_empty(len(x_nD), F)
    scratch = x_nD.new_empty(threads * _PANEL * max(D, F))
    native.loaded().experts_many(
        *(x_nD.data_ptr(), weights_n.data_ptr(), counts_E.data_ptr(), gate_up_EGD.map, down_EDF.map),
        *(out.data_ptr(), act.data_ptr(), scratch.data_ptr(), E, D, F, threads),
    )
    return out


def _multiplies(x_nI: Tensor, stored: Stored) -> bool:
    """Whether the kernels multiply by such weights, and faster than oneDNN, which has matrix units for itself."""
    if stored.weight.dtype not in (torch.bfloat16, torch.int8) or stored.num_inputs % _STEP:
        return False
    return not compat.cpu_has_amx() and stored.is_taken and _takes(x_nI)


def route(
    x_TD: Tensor,
    router_ED: Tensor,
    bias_E: Tensor | None,
    *,
    softmax: bool,
    **choice: Unpack[native.Choice],
) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
    """What `model.router.Router` decides: ids [T, K], weights [T, K], scores [T, E] and counts [E].

    softmax: of the scores, instead of their sigmoids; the choice is that of `native.select_experts`.
    """
    E, D = router_ED.shape
    if not native.usable(x_TD) or router_ED.dtype != torch.float32 or E > native.MAX_EXPERTS or D % _WIDTH:
        return None
    if bias_E is not None and not (bias_E.dtype == torch.float32 and bias_E.is_contiguous()):
        return None
    x_TD, router_ED, T = x_TD.contiguous(), router_ED.contiguous(), len(x_TD)
    scores_TE, weights_TK = (router_ED.new_empty(T, width) for width in (E, choice["chosen"]))
    ids_TK, counts_E = (x_TD.new_empty(shape, dtype=torch.int64) for shape in (weights_TK.shape, (E,)))
    bias = None if bias_E is None else bias_E.data_ptr()
    native.loaded().route(
        *(x_TD.data_ptr(), router_ED.data_ptr(), bias, scores_TE.data_ptr()),
        *(ids_TK.data_ptr(), weights_TK.data_ptr(), counts_E.data_ptr()),
        *(T, D, E, softmax, *native.in_order(choice), torch.get_num_threads()),
    )
    return ids_TK, weights_TK, scores_TE, counts_E


def group_rows(
    x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, num_experts: int, unit: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor] | None:
    """What `model.experts.LocalDispatcher.dispatch` gives, every group filled up to a multiple of `unit`."""
    (T, K), D = ids_TK.shape, x_TD.shape[1]
    if not native.usable(x_TD) or num_experts > native.MAX_EXPERTS or weights_TK.dtype != torch.float32:
        return None
    x_TD, ids_TK, weights_TK = x_TD.contiguous(), ids_TK.contiguous(), weights_TK.contiguous()
    most = T * K + num_experts * (unit - 1)
    rows_nD, weights_n, tokens_n = x_TD.new_empty(most, D), weights_TK.new_empty(most), ids_TK.new_empty(most)
    counts_E, places_TK = ids_TK.new_empty(num_experts), torch.empty_like(ids_TK)
    tensors = (x_TD, ids_TK, weights_TK, rows_nD, weights_n, tokens_n, counts_E, places_TK)
    sizes = (T, K, D, num_experts, unit, torch.get_num_threads())
    native.loaded().prompt_rows(*(x.data_ptr() for x in tensors), *sizes)
    n = int(counts_E.sum())
    return rows_nD[:n], weights_n[:n], counts_E, tokens_n[:n], places_TK


def sum_rows(rows_nD: Tensor, places_TK: Tensor) -> Tensor | None:
    """`ops.rows.sum_rows` where every choice is served."""
    (T, K), D = places_TK.shape, rows_nD.shape[1]
    if not native.usable(rows_nD) or D % _WIDTH or not (rows_nD.is_contiguous() and places_TK.is_contiguous()):
        return None
    out = rows_nD.new_empty(T, D)
    sizes = (T, K, D, torch.get_num_threads())
    native.loaded().sum_rows(rows_nD.data_ptr(), places_TK.data_ptr(), out.data_ptr(), *sizes)
    return out


def expanded_attention(
    q_nope_BSHN: Tensor,
    q_rope_BSHR: Tensor,
    k_nope_BTHN: Tensor,
    k_rope_BTR: Tensor,
    v_BTHV: Tensor,
    scale: float,
    *,
    causal: bool,
) -> tuple[Tensor, Tensor] | None:
    """`ops.attention.expanded_attention` and each query's logarithm of its sum of exponentials, FP32 [B, H, S].

    causal: the queries are the last S of the T positions and see nothing behind their own; else everything.
    """
    (B, S, H, N), (T, R), V = q_nope_BSHN.shape, k_rope_BTR.shape[1:], v_BTHV.shape[-1]
    inputs = (q_nope_BSHN, q_rope_BSHR, k_nope_BTHN, k_rope_BTR, v_BTHV)
    if not _takes(*inputs) or N % _STEP or R % _STEP or V % _WIDTH or not min(B, S, T):
        return None
    q_nope, q_rope, k_nope, k_rope, v = (x.flatten(0, 1) for x in inputs)
    threads, width, panels = torch.get_num_threads(), -(-V // _PANEL) * _PANEL, -(-T // _PANEL)
    out, lse = q_nope.new_empty(B, S, H, V), q_nope.new_empty(B, H, S, dtype=torch.float32)
    of_head = panels * _PANEL * (N + R + width)
    together = min(B * H, max(threads, _PACKED // of_head))
    packed = q_nope.new_empty(together * of_head)
    own = q_nope.new_empty(threads * _TILE_ROWS * (N + R + 2 * width))
    native.loaded().expanded_attention(
        *(q_nope.data_ptr(), *q_nope.stride()[:2], q_rope.data_ptr(), *q_rope.stride()[:2]),
        *(k_nope.data_ptr(), *k_nope.stride()[:2], k_rope.data_ptr(), k_rope.stride(0), v.data_ptr(), *v.stride()[:2]),
        *(scale, causal, out.data_ptr(), lse.data_ptr(), packed.data_ptr(), own.data_ptr()),
        *(together, B, S, T, H, N, R, V, threads),
    )
    return out, lse


def _takes(*tensors: Tensor) -> bool:
    """Whether these are for kernels, with values side by side, on a CPU that has the instruction that they rest on."""
    if not native.usable(*tensors) or any(x.stride(-1) != 1 for x in tensors):
        return False
    return bool(ctypes.c_int64.in_dll(native.loaded(), "multiplies_pairs"))
