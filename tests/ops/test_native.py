"""The kernels of our own give what the definitions give, row by row the same bits, and nothing outside inference."""

from __future__ import annotations

import pytest
import torch

from dsv3.model.rope import rotate
from dsv3.model.router import select_experts
from dsv3.ops import native
from dsv3.ops.attention import absorbed_attention
from dsv3.ops.experts import reference_grouped_swiglu
from dsv3.ops.latents import Latents
from dsv3.ops.native import Stored, bf16_weight
from dsv3.ops.quantized import Int4Weight, Int8Weight, dequantize_int4
from dsv3.ops.rms_norm import reference_rms_norm
from tests.variants import BASE

pytestmark = pytest.mark.skipif(native.library() is None, reason="no compiler, or not Linux: nothing to test")


@pytest.fixture(params=[1, 2], ids=["1 thread", "2 threads"], autouse=True)
def inference(request):
    torch.set_num_threads(request.param)
    with torch.inference_mode():
        yield
    torch.set_num_threads(1)


def random(*shape, generator):
    return torch.randn(shape, generator=generator).bfloat16()


def assert_close(out, exact):
    """To what rounding once to BF16, and inner results once each, allows."""
    assert out is not None and out.dtype == torch.bfloat16 and out.shape == exact.shape
    torch.testing.assert_close(out.double(), exact, atol=0.01 * exact.abs().max().item(), rtol=0.01)


def test_rms_norm(generator):
    x, weight = random(3, 5, 96, generator=generator), random(48, generator=generator)
    for part in (x[..., :48], x[..., 48:], x[:, 1:2, :48]):
        out = native.rms_norm(part, weight, 1e-6)
        assert out.is_contiguous()
        assert_close(out, reference_rms_norm(part.double(), weight.double(), 1e-6))


@pytest.mark.parametrize("heads", [None, 3])
def test_rotate(heads, generator):
    shape = (1, 5, 40) if heads is None else (1, 5, heads, 40)
    x = random(*shape, generator=generator)[..., 24:]
    angles = torch.rand(1, 5, 8, generator=generator) * 6
    cos, sin = (f if heads is None else f.unsqueeze(2) for f in (angles.cos(), angles.sin()))
    assert_close(native.rotate(x, cos, sin), rotate(x.double(), cos.double(), sin.double()))


def as_int8(weight):
    """(stored, the weight that it stands for), of one map."""
    stored = Int8Weight.quantize(weight)
    return stored, stored.weight.double() * stored.scale.double().unsqueeze(-1)


def as_int4(weight):
    stored = Int4Weight.quantize(weight)
    return stored, dequantize_int4(stored).double()


KINDS = {"BF16": lambda weight: (bf16_weight(weight), weight.double()), "int8": as_int8, "int4": as_int4}


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("rows", [1, 3, 4, 9])
def test_linear(rows, kind, generator):
    x, weight = random(rows, 160, generator=generator)[:, 32:], random(20, 128, generator=generator)
    stored, exact = kind(weight)
    out = native.linear(x, stored)
    assert_close(out, x.double() @ exact.T)
    for row in range(rows):
        assert torch.equal(native.linear(x[row : row + 1], stored), out[row : row + 1])


@pytest.mark.parametrize("kind", [as_int8, as_int4])
def test_beside_integers_rows_are_finer_than_bf16(kind, generator):
    """One input that is 30 times all others, rows of very different sizes, zeros: nothing is lost that BF16 has."""
    sizes = torch.tensor([1e-34, 1.0, 0.0, 1e36]).unsqueeze(1)
    x = random(4, 18432, generator=generator)
    x[:, 7] = 120
    x = (x * sizes).bfloat16()
    stored, exact = kind(random(8, 18432, generator=generator) / 1024)
    out = native.linear(x, stored).double() / sizes.double().clamp_min(1e-300)
    expected = (x.double() @ exact.T) / sizes.double().clamp_min(1e-300)
    rounding = (x.double().abs() @ exact.abs().T) / sizes.double().clamp_min(1e-300) * 2**-9
    assert ((out - expected).abs() <= 0.2 * rounding + 2**-8 * expected.abs()).all()
    assert (out[2] == 0).all()


@pytest.mark.parametrize("kind", [as_int8, as_int4])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_stays_so_in_its_row(kind, value, generator):
    x = random(3, 64, generator=generator)
    x[1, 5] = value
    out = native.linear(x, kind(random(8, 64, generator=generator))[0])
    assert not out[1].isfinite().any() and out[[0, 2]].isfinite().all()


def test_sums_of_integers_do_not_overflow():
    """The largest there are, all of one sign."""
    for num_inputs in (32, 8192, 65536):
        x, ones = torch.ones(1, num_inputs).bfloat16(), torch.ones(4, num_inputs).bfloat16()
        assert native.linear(x, Int8Weight.quantize(ones)).tolist() == [[num_inputs] * 4]


@pytest.mark.parametrize("kind", [as_int8, as_int4])
@pytest.mark.parametrize("size", [1e-40, 1e-35, 1e38])
def test_beside_integers_rows_of_any_size_keep_it(kind, size, generator):
    """The smallest lose bits, but no row becomes another number, infinite or less than nothing."""
    x = (torch.randn(2, 256, generator=generator).clamp(-3, 3) * size).bfloat16()
    stored, exact = kind(random(8, 256, generator=generator) / 1024)
    expected = x.double() @ exact.T
    error = (native.linear(x, stored).double() - expected).abs().max()
    assert error <= 2**-7 * expected.abs().max() + 1e-38


def test_greedy(generator):
    for V in (5, 16, 700, 5000):
        logits = torch.randn(9, V, generator=generator).bfloat16()
        expected = [int((row == row.max()).nonzero()[0]) for row in logits]
        assert native.greedy(logits) == expected  # ties are many among so few values: the first
        broken = logits.clone()
        places = torch.randint(V, (3,), generator=generator).tolist()
        broken[1, places[0]], broken[3, places[1]], broken[5, places[2]] = float("nan"), float("inf"), -float("inf")
        broken[7] = -float("inf")
        found = native.greedy(broken)
        assert [found[row] for row in (1, 3, 7)] == [-1, -1, -1]
        assert [found[row] for row in (0, 2, 4, 6, 8)] == [expected[row] for row in (0, 2, 4, 6, 8)]
        assert found[5] == int((broken[5] == broken[5].max()).nonzero()[0])


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("counts", [[3, 0, 1, 4], [0, 0, 0, 1], [300, 0, 1, 0], [0, 0, 0, 0]])
def test_experts(counts, kind, generator):
    D, F, N, E = 128, 64, sum(counts), len(counts)
    x, gate_up, down = (random(*shape, generator=generator) for shape in ((N, D), (E, 2 * F, D), (E, D, F)))
    weights, counts_E = torch.rand(N, generator=generator), torch.tensor(counts)
    stacks, exact = [], []
    for stack in (gate_up, down):
        maps = [kind(weight) for weight in stack]
        stacks.append(Stored.stack([stored for stored, _ in maps]))
        exact.append(torch.stack([weight for _, weight in maps]))
    out = native.experts(x, weights, counts_E, *stacks)
    if not N:
        assert out.shape == (0, D)
        return
    assert_close(out, reference_grouped_swiglu(x.double(), weights.double(), counts_E, *exact))
    expert = torch.arange(E).repeat_interleave(counts_E)
    for row in torch.randperm(N, generator=generator)[:4].tolist():
        alone = torch.nn.functional.one_hot(expert[row], E)
        one = native.experts(x[row : row + 1], weights[row : row + 1], alone, *stacks)
        assert torch.equal(one, out[row : row + 1])


@pytest.mark.parametrize("H", [1, 5, 13])
@pytest.mark.parametrize(("B", "S", "T"), [(1, 1, 1), (1, 1, 200), (3, 1, 70), (2, 5, 64), (1, 9, 9)])
@pytest.mark.parametrize("masked", [False, True])
def test_latent_attention(B, S, T, H, masked, generator):
    """Over latents side by side and over a pool, in which whatever is not asked for is NaN."""
    N, C, R, V = 24, 96, 32, 20
    q = random(B, S, H, N + R, generator=generator)
    nope, rope = q.split((N, R), dim=-1)
    latents, up = random(B, T + 3, C + R, generator=generator)[:, :T], random(H, N + V, C, generator=generator) * 0.2
    mask = None
    if masked:
        mask = torch.rand(B, 1, S, T, generator=generator) < 0.5
        mask |= torch.eye(T, dtype=torch.bool)[T - S :]

    def definition(dtype):
        with torch.inference_mode(False):  # clones are no inference tensors: the plain path takes them
            inputs = (x.clone().to(dtype) for x in (nope, rope, latents, up))
            q_nope, q_rope, rows, both = inputs
            return absorbed_attention(q_nope, q_rope, Latents(rows), both, 0.3, None if mask is None else mask.clone())

    out = native.latent_attention(nope, rope, Latents(latents), up, 0.3, mask)
    assert_close(out, definition(torch.float64))
    pool = torch.full((3 * B * T + 5, C + R), float("nan"), dtype=torch.bfloat16)
    slots_BT = torch.randperm(len(pool), generator=generator)[: B * T].view(B, T)
    pool[slots_BT] = latents
    assert torch.equal(native.latent_attention(nope, rope, Latents(pool, slots_BT), up, 0.3, mask), out)
    for b in range(B):  # each sequence alone, and behind each a few keys that it may not see
        hidden = torch.cat((pool[slots_BT[b]], torch.full((7, C + R), 5.0).bfloat16())).unsqueeze(0)
        sees = torch.ones(S, T, dtype=torch.bool).tril(T - S) if mask is None else mask[b, 0]
        sees = torch.nn.functional.pad(sees, (0, 7))[None, None]
        one = native.latent_attention(nope[b : b + 1], rope[b : b + 1], Latents(hidden), up, 0.3, sees)
        assert torch.equal(one, out[b : b + 1])


def test_a_score_that_is_far_above_the_others_and_comes_late(generator):
    """The running maximum: what was summed before must vanish, and large scores must not overflow."""
    C, R, T = 32, 32, 130
    latents = random(1, T, C + R, generator=generator)
    latents[:, 100, :C] = 40
    nope, up = torch.ones(1, 1, 1, C).bfloat16(), torch.eye(C).repeat(1, 2, 1).bfloat16()
    out = native.latent_attention(nope, torch.zeros(1, 1, 1, R).bfloat16(), Latents(latents), up, 1.0, None)
    assert torch.equal(out[0, 0, 0], latents[0, 100, :C])


CASES = {
    "groups by pairs": {"n_group": 4, "topk_group": 2, "topk_method": "noaux_tc"},
    "groups by the best": {"n_group": 4, "topk_group": 3, "topk_method": "group_limited_greedy"},
    "no groups": {"n_group": 1, "topk_group": 1, "topk_method": "noaux_tc", "norm_topk_prob": False},
    "groups ignored": {"n_group": 4, "topk_group": 2, "topk_method": "greedy"},
}


@pytest.mark.parametrize("changes", CASES.values(), ids=CASES)
@pytest.mark.parametrize("ties", [False, True])
def test_select_experts(changes, ties, generator):
    config = BASE.replace(n_routed_experts=16, num_experts_per_tok=4, routed_scaling_factor=2.5, **changes)
    scores_TE, bias_E = torch.rand(50, 16, generator=generator), torch.rand(16, generator=generator) - 5
    if ties:
        scores_TE, bias_E = (scores_TE * 4).round() / 4, torch.zeros(16)
    for bias in (bias_E, None):
        ids_TK, weights_TK = select_experts(scores_TE, bias, config)
        with torch.inference_mode(False):
            expected = select_experts(scores_TE.clone(), None if bias is None else bias.clone(), config)
        assert torch.equal(ids_TK, expected[0])
        torch.testing.assert_close(weights_TK, expected[1], atol=0, rtol=1e-6)


def test_nothing_is_taken_that_is_not_for_the_kernels(generator):
    x, weight = random(2, 64, generator=generator), random(32, 64, generator=generator)
    stored = bf16_weight(weight)
    assert native.linear(x, stored) is not None
    assert native.linear(x.float(), stored) is None
    assert native.linear(x, bf16_weight(weight.float())) is None
    assert native.linear(x[:, :40], bf16_weight(weight[:, :40].contiguous())) is None
    assert native.linear(x, bf16_weight(random(64, 32, generator=generator).T)) is None
    assert native.linear(x[:, :48], stored) is None
    stacks = bf16_weight(random(1, 32, 64, generator=generator)), bf16_weight(random(1, 64, 16, generator=generator))
    assert native.experts(x, torch.ones(2), torch.tensor([2]), *stacks) is not None
    assert native.experts(x[:, :48], torch.ones(2), torch.tensor([2]), *stacks) is None
    nope, rope = random(1, 1, 2, 8, generator=generator), random(1, 1, 2, 32, generator=generator)
    latents, up = Latents(random(1, 1, 64, generator=generator)), random(2, 12, 32, generator=generator)
    assert native.latent_attention(nope, rope, latents, up, 1.0, None) is not None
    assert native.latent_attention(nope[..., ::2], rope, latents, up, 1.0, None) is None
    assert native.latent_attention(nope, rope.mT.contiguous().mT, latents, up, 1.0, None) is None
    assert native.greedy(x) is not None and native.greedy(x.float()) is None and native.greedy(x[:, ::2]) is None
    with torch.inference_mode(False):
        assert native.linear(x, stored) is None and native.rms_norm(x, weight[0], 1e-6) is None


def test_biases_of_another_dtype_are_left_alone(generator):
    scores_TE = torch.rand(2, 16, generator=generator)
    biased = {"chosen": 2, "groups": 1, "kept_groups": 1, "pairs": False, "normalised": True, "factor": 1.0}
    assert native.select_experts(scores_TE, torch.zeros(16), **biased) is not None
    assert native.select_experts(scores_TE, torch.zeros(16).bfloat16(), **biased) is None
