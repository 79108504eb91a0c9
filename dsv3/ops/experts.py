"""Many SwiGLU MLPs over rows that lie grouped by expert: the arithmetic of DeepSeekMoE.

Shapes: N rows (all the (token, expert) pairs, grouped by expert), E experts, D model, F expert width.
`counts_E` says how many rows each expert has; a group may be empty; counts sum to N. `weights_N` is what each row's
answer weighs; it is multiplied in before the down-projection, which is linear: there its gradient needs nothing that
the backward pass does not have at hand.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from dsv3.ops import native, native_prompts
from dsv3.ops.swiglu import reference_swiglu, weighted_swiglu, weighted_swiglu_backward

_FEW_ROWS = 8  # for each expert: from there on oneDNN's products are faster than our kernel


def reference_grouped_swiglu(
    x_ND: Tensor, weights_N: Tensor, counts_E: Tensor, gate_up_EGD: Tensor, down_EDF: Tensor
) -> Tensor:
    """weight * down_e (silu(gate_e x) * up_e x) for every row x of every expert e; G = 2F, gate first. Returns [N, D].

    Weights may be wider than x; the result has x's dtype.
    """
    groups = x_ND.split(counts_E.tolist())
    answers = torch.cat(
        [
            reference_swiglu(x @ w1.T) @ w2.T
            for x, w1, w2 in zip(groups, gate_up_EGD.unbind(), down_EDF.unbind(), strict=True)
        ]
    )
    return (answers * weights_N.unsqueeze(1)).to(x_ND.dtype)


def grouped_swiglu(x_ND: Tensor, weights_N: Tensor, counts_E: Tensor, gate_up_EGD: Tensor, down_EDF: Tensor) -> Tensor:
    """`reference_grouped_swiglu`, fast: torch's grouped GEMM where a kernel exists, one GEMM per expert elsewhere.

    In inference on a CPU there are kernels of our own, one for a few rows, one for many.
    """
    ours = native.experts if few_rows(x_ND, counts_E) else native_prompts.experts
    maps = (native.bf16_weight(gate_up_EGD), native.bf16_weight(down_EDF))
    if (fast := ours(x_ND, weights_N, counts_E, *maps)) is not None:
        return fast
    kernel = _grouped_mm_swiglu if _has_grouped_gemm(x_ND) else _LoopSwiGLU.apply
    out: Tensor = kernel(x_ND, weights_N, counts_E, gate_up_EGD, down_EDF)
    return out


def few_rows(x_ND: Tensor, counts_E: Tensor) -> bool:
    """Whether reading the weights is what takes the time. A `TorchFunctionMode` may decide it otherwise."""
    if has_torch_function((x_ND,)):
        decided: bool = handle_torch_function(few_rows, (x_ND,), x_ND, counts_E)
        return decided
    return len(x_ND) <= _FEW_ROWS * len(counts_E)


def row_alignment(x_ND: Tensor, num_rows: int, num_experts: int) -> int:
    """What to pad every expert's rows to a multiple of, for speed.

    A CPU compiles a matrix product for its shape, and with as many rows as happen to come to an expert every product
    has a shape of its own: half the time would go into compiling. With padding the same few shapes come again and
    again. At most an eighth is added to what an expert gets on average.
    """
    return 1 if _has_grouped_gemm(x_ND) else max(1, min(32, num_rows // num_experts // 8))


def _has_grouped_gemm(x: Tensor) -> bool:
    return x.is_cuda and x.dtype == torch.bfloat16


def _grouped_mm_swiglu(
    x_ND: Tensor, weights_N: Tensor, counts_E: Tensor, gate_up_EGD: Tensor, down_EDF: Tensor
) -> Tensor:
    # Offsets stay on the device: no synchronisation.
    offsets = counts_E.cumsum(0).to(torch.int32)
    h = F.grouped_mm(x_ND, gate_up_EGD.transpose(1, 2), offs=offsets)
    return F.grouped_mm(weighted_swiglu(h, weights_N), down_EDF.transpose(1, 2), offs=offsets)


class _LoopSwiGLU(torch.autograd.Function):
    """One GEMM per expert, written straight into its rows, with the backward by hand.

    Autograd would index the stacked weight once per expert (a full-size zero gradient each) and make weight
    gradients in transposed layout, to be copied. Here each gradient is computed in its weight's own layout and
    place. Only the input and the pre-activation are saved; the SwiGLU output is computed again in backward.
    """

    @staticmethod
    def forward(ctx, x, weights, counts, gate_up, down):  # type: ignore[no-untyped-def]
        spans = _spans(counts)
        h = x.new_empty(x.shape[0], gate_up.shape[1])
        for e, a, b in spans:
            torch.mm(x[a:b], gate_up[e].T, out=h[a:b])
        y = torch.empty_like(x)
        act = weighted_swiglu(h, weights)
        for e, a, b in spans:
            torch.mm(act[a:b], down[e].T, out=y[a:b])
        ctx.save_for_backward(x, weights, h, gate_up, down)
        ctx.spans = spans
        return y

    @staticmethod
    def backward(ctx, dy):  # type: ignore[no-untyped-def]
        x, weights, h, gate_up, down = ctx.saved_tensors
        dy = dy.contiguous()
        act = weighted_swiglu(h, weights)
        d_down, d_act = torch.empty_like(down), torch.empty_like(act)
        for e, a, b in ctx.spans:
            torch.mm(dy[a:b].T, act[a:b], out=d_down[e])
            torch.mm(dy[a:b], down[e], out=d_act[a:b])
        dh, d_weights = weighted_swiglu_backward(h, weights, d_act)
        d_gate_up, dx = torch.empty_like(gate_up), torch.empty_like(x)
        for e, a, b in ctx.spans:
            torch.mm(dh[a:b].T, x[a:b], out=d_gate_up[e])
            torch.mm(dh[a:b], gate_up[e], out=dx[a:b])
        # An expert without rows has a zero gradient.
        for e in set(range(len(down))).difference(e for e, _, _ in ctx.spans):
            d_down[e], d_gate_up[e] = 0, 0
        return dx, d_weights, None, d_gate_up, d_down


def _spans(counts_E: Tensor) -> list[tuple[int, int, int]]:
    """(expert, first row, end row) of every expert that has rows."""
    spans, start = [], 0
    for expert, count in enumerate(counts_E.tolist()):
        if count:
            spans.append((expert, start, start + count))
        start += count
    return spans
