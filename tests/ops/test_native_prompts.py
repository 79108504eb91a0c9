"""The kernels for prompts give what the definitions give, and write every place."""

from __future__ import annotations

import copy

import pytest
import torch

from dsv3 import compat
from dsv3.model.context import make_context, whole_sequences
from dsv3.model.experts import LocalDispatcher
from dsv3.model.router import Router, Routing
from dsv3.ops import native, native_prompts
from dsv3.ops.attention import expanded_attention, expanded_partial, reference_attention
from dsv3.ops.experts import reference_grouped_swiglu
from dsv3.ops.native import Stored, bf16_weight
from dsv3.ops.quantized import quantize_rows
from dsv3.ops.rows import sum_rows
from tests.ops.test_native import assert_close, random
from tests.variants import BASE

pytestmark = pytest.mark.skipif(native.library() is None, reason="no compiler, or not Linux: nothing to test")
needs_products = pytest.mark.skipif(not compat.cpu_has_bf16_gemm(), reason="no kernels without products of BF16")


@pytest.fixture(params=[1, 3], ids=["1 thread", "3 threads"], autouse=True)
def inference(request):
    torch.set_num_threads(request.param)
    with torch.inference_mode():
        yield
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """Whatever is allocated is NaN, or an absurd integer, until written."""

    def poison(new_empty):
        def made(self, *args, **kwargs):
            out = new_empty(self, *args, **kwargs)
            return out.fill_(float("nan") if out.is_floating_point() else -(2**40))

        return made

    monkeypatch.setattr(torch.Tensor, "new_empty", poison(torch.Tensor.new_empty))


@needs_products
@pytest.mark.parametrize("counts", [[13, 0, 1, 70], [0, 0, 0, 5], [2, 3, 4, 8], [0, 0, 0, 0]])
@pytest.mark.parametrize(("D", "F"), [(64, 32), (96, 160)])
def test_experts(counts, D, F, generator, monkeypatch):
    monkeypatch.setattr(compat, "cpu_has_amx", lambda: False)
    N, E, counts_E = sum(counts), len(counts), torch.tensor(counts)
    x, gate_up, down = (random(*shape, generator=generator) for shape in ((N, D), (E, 2 * F, D), (E, D, F)))
    weights = torch.rand(N, generator=generator) + 0.1
    expert = torch.arange(E).repeat_interleave(counts_E)
    for e in range(E):  # an expert's last rows are padding, and one before them weighs nothing
        rows = (expert == e).nonzero().flatten()
        weights[rows[-2:]] = 0.0
        weights[rows[: len(rows) // 4]] = 0.0
    out = native_prompts.experts(x, weights, counts_E, bf16_weight(gate_up), bf16_weight(down))
    if not N:
        assert out.shape == (0, D)
        return
    assert_close(out, reference_grouped_swiglu(x.double(), weights.double(), counts_E, gate_up.double(), down.double()))
    for row in torch.randperm(N, generator=generator)[:4].tolist():
        alone = torch.nn.functional.one_hot(expert[row], E)
        maps = bf16_weight(gate_up), bf16_weight(down)
        one = native_prompts.experts(x[row : row + 1], weights[row : row + 1], alone, *maps)
        assert torch.equal(one, out[row : row + 1])


@needs_products
def test_int8(generator, monkeypatch):
    """The product with the weight that integers and scales stand for."""
    monkeypatch.setattr(compat, "cpu_has_amx", lambda: False)
    E, D, F, counts_E = 3, 96, 64, torch.tensor([20, 0, 35])
    x, weights = random(55, D + 8, generator=generator)[:, 4:-4], torch.rand(55, generator=generator) + 0.1
    (q_gate_up, s_gate_up), (q_down, s_down) = (
        quantize_rows(random(*shape, generator=generator)) for shape in ((E, 2 * F, D), (E, D, F))
    )
    gate_up, down = Stored(q_gate_up, s_gate_up.squeeze(-1), D), Stored(q_down, s_down.squeeze(-1), F)
    exact = q_gate_up * s_gate_up.double(), q_down * s_down.double()
    out = native_prompts.experts(x, weights, counts_E, gate_up, down)
    assert_close(out, reference_grouped_swiglu(x.double(), weights.double(), counts_E, *exact))
    for stored in (gate_up.unbind()[1], Stored(q_down[0, :80], s_down[0, :80, 0].contiguous(), F)):
        weight = stored.weight * stored.scale.double().unsqueeze(1)
        rows = x[:, : stored.num_inputs]
        out = native_prompts.linear(rows, stored)
        assert_close(out, rows.double() @ weight.T)
        assert torch.equal(native_prompts.linear(rows[7:8], stored), out[7:8])


@pytest.mark.parametrize("unit", [1, 4])
@pytest.mark.parametrize(("T", "K", "E"), [(37, 3, 8), (5, 1, 20), (0, 2, 4)])
def test_rows_on_their_way_and_back(T, K, E, unit, generator, monkeypatch):
    monkeypatch.setattr("dsv3.model.experts.row_alignment", lambda *sizes: unit)
    x = random(T, 64, generator=generator)
    scores_TE = torch.rand(T, E, generator=generator)
    ids_TK = scores_TE.topk(K).indices
    routing = Routing(ids_TK, scores_TE.gather(1, ids_TK), scores_TE, ids_TK.new_zeros(E))
    ours = LocalDispatcher().dispatch(x, routing)
    monkeypatch.setattr(native_prompts, "group_rows", lambda *args: None)
    plain = LocalDispatcher().dispatch(x, routing)
    for name in ("rows_ND", "weights_N", "counts_E", "tokens_N", "places_TK"):
        assert torch.equal(getattr(ours, name), getattr(plain, name)), name
    rows = random(len(ours.rows_ND), 64, generator=generator)
    out = sum_rows(rows, ours.tokens_N, ours.places_TK)
    assert_close(out, rows.double()[ours.places_TK].sum(1)) if T else None
    assert out.shape == (T, 64)


@needs_products
@pytest.mark.parametrize(("B", "S", "T"), [(1, 1, 1), (1, 100, 100), (2, 30, 77), (1, 26, 300), (3, 7, 513)])
@pytest.mark.parametrize(("H", "N", "R", "V"), [(1, 32, 32, 16), (3, 64, 32, 80)])
@pytest.mark.parametrize("causal", [True, False])
def test_expanded_attention(B, S, T, H, N, R, V, causal, generator, monkeypatch):
    monkeypatch.setattr(native_prompts, "_PACKED", 2 * T * (N + R + V))  # two heads at a time, or one for each thread
    q_nope, _, q_rope = random(B, S, H, N + 32 + R, generator=generator).split((N, 32, R), dim=-1)
    k_nope, v = random(B, T, H, N + V, generator=generator).split((N, V), dim=-1)
    latents = torch.full((B, T + 5, 64 + R), float("nan")).bfloat16()  # of which only the rotated part may be looked at
    k_rope = latents[:, :T, 64:].copy_(random(B, T, R, generator=generator))
    inputs, scale = (q_nope, q_rope, k_nope, k_rope, v), 0.2
    q_nope64, q_rope64, k_nope64, k_rope64, v64 = (x.double() for x in inputs)
    q = torch.cat((q_nope64, q_rope64), -1).transpose(1, 2)
    k = torch.cat((k_nope64, k_rope64.unsqueeze(2).expand(-1, -1, H, -1)), -1).transpose(1, 2)
    sees = torch.ones(S, T, dtype=torch.bool).tril(T - S) if causal else torch.ones(S, T, dtype=torch.bool)
    exact = reference_attention(q, k, v64.transpose(1, 2), scale, sees)
    out, lse = native_prompts.expanded_attention(*inputs, scale, causal=causal)
    assert_close(out, exact.transpose(1, 2))
    exact_lse = (q @ k.transpose(2, 3) * scale).masked_fill(~sees, float("-inf")).logsumexp(-1)
    torch.testing.assert_close(lse.double(), exact_lse, atol=1e-4, rtol=1e-4)
    partial = expanded_partial(*inputs, scale, None, causal=causal)
    assert torch.equal(partial.out_BHSV, out.transpose(1, 2).float()) and torch.equal(partial.lse_BHS, lse)
    masked = expanded_attention(*inputs, scale, sees[None, None])  # plain PyTorch
    assert_close(masked, exact.transpose(1, 2))
    if causal:
        assert torch.equal(expanded_attention(*inputs, scale, None), out)


@needs_products
def test_scores_that_are_far_apart(generator):
    """A later block's larger score: what was summed before must vanish, and nothing may overflow."""
    T, V = 600, 32
    k_nope, v = torch.zeros(1, T, 1, 32).bfloat16(), random(1, T, 1, V, generator=generator)
    for place, size in ((10, 3.0), (300, 300.0), (555, -300.0)):
        k_nope[0, place, 0, 0] = size
    q_nope = torch.ones(1, 2, 1, 32).bfloat16()
    rope = torch.zeros(1, T, 32).bfloat16()
    out, lse = native_prompts.expanded_attention(q_nope, rope[:, :2, None], k_nope, rope, v, 1.0, causal=False)
    assert torch.equal(out, v[:, 300:301].expand(-1, 2, -1, -1)) and torch.equal(lse, torch.full((1, 1, 2), 300.0))


@needs_products
def test_what_is_not_a_number_stays_so(generator):
    q, v = random(1, 40, 1, 64, generator=generator), random(1, 40, 1, 32, generator=generator)
    k_rope = random(1, 40, 32, generator=generator)
    k_rope[0, 20, 3] = float("nan")
    out, _ = native_prompts.expanded_attention(*q.split(32, dim=-1), q[..., :32], k_rope, v, 1.0, causal=True)
    assert not out[:, :20].isnan().any() and out[:, 20:].isnan().all()


def test_nothing_is_taken_that_is_not_for_the_kernels(generator):
    x, weights, counts = random(12, 64, generator=generator), torch.ones(12), torch.tensor([12])
    gate_up, down = random(1, 64, 64, generator=generator), random(1, 64, 32, generator=generator)
    odd = random(1, 64, 24, generator=generator)
    q, k_rope = random(1, 4, 2, 32, generator=generator), random(1, 4, 32, generator=generator)
    ids = torch.zeros(12, 1, dtype=torch.int64)
    maps = bf16_weight(gate_up), bf16_weight(down)
    assert native_prompts.experts(x, weights, counts, *maps) is not None
    assert native_prompts.experts(x.float(), weights, counts, *maps) is None
    assert native_prompts.experts(x, weights, counts, bf16_weight(gate_up[:, :48]), bf16_weight(odd)) is None
    assert native_prompts.expanded_attention(q, q, q.float(), k_rope, q, 1.0, causal=True) is None
    assert native_prompts.expanded_attention(q[..., :16], q, q[..., :16], k_rope, q, 1.0, causal=True) is None
    assert native_prompts.expanded_attention(q, q, q, k_rope, q[..., :8], 1.0, causal=True) is None
    with torch.inference_mode(False):
        assert native_prompts.experts(x, weights, counts, *maps) is None
        assert native_prompts.group_rows(x, ids, weights[:, None], 1, 1) is None
        assert native_prompts.sum_rows(x, ids) is None
        assert native_prompts.expanded_attention(q, q, q, k_rope, q, 1.0, causal=True) is None


@pytest.mark.parametrize("scoring", ["sigmoid", "softmax"])
@pytest.mark.parametrize(("T", "E"), [(7, 16), (64, 6), (0, 6)])
@pytest.mark.parametrize("biased", [False, True])
def test_route(T, E, scoring, biased, generator):
    config = BASE.replace(
        n_routed_experts=E,
        hidden_size=48,
        scoring_func=scoring,
        topk_method="noaux_tc" if biased else "greedy",
        **{"n_group": 2, "topk_group": 1, "num_experts_per_tok": 3},
    )
    router = Router(config)
    router.weight.copy_(torch.randn(E, 48, generator=generator))
    if biased:
        router.e_score_correction_bias.copy_(torch.rand(E, generator=generator))
    x = random(1, T, 48, generator=generator)
    context = make_context(config, whole_sequences(T), x.device)
    ours = router(x, context)
    with torch.inference_mode(False):
        plain = copy.deepcopy(router).requires_grad_(False)(x.clone(), context)
    torch.testing.assert_close(ours.scores_TE, plain.scores_TE)
    assert torch.equal(ours.expert_ids_TK, plain.expert_ids_TK) and torch.equal(ours.counts_E, plain.counts_E)
    torch.testing.assert_close(ours.weights_TK, plain.weights_TK)
    for t in range(T):
        assert torch.equal(router(x[:, t : t + 1], context).scores_TE[0], ours.scores_TE[t])
