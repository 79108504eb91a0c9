"""The kernels of our own give what the definitions give, row by row the same bits, and nothing outside inference."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from torch.overrides import TorchFunctionMode

from dsv3.model.rope import rotate
from dsv3.model.router import select_experts
from dsv3.ops import native
from dsv3.ops.attention import absorbed_attention
from dsv3.ops.experts import reference_grouped_swiglu
from dsv3.ops.latents import Latents
from dsv3.ops.quantized import quantize_rows
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


@pytest.mark.parametrize("rows", [1, 3, 4, 9])
def test_linear(rows, generator):
    x, weight = random(rows, 160, generator=generator)[:, 32:], random(20, 128, generator=generator)
    out = native.linear(x, weight)
    assert_close(out, x.double() @ weight.double().T)
    for row in range(rows):
        assert torch.equal(native.linear(x[row : row + 1], weight), out[row : row + 1])


@pytest.mark.parametrize("counts", [[3, 0, 1, 4], [0, 0, 0, 1], [300, 0, 1, 0], [0, 0, 0, 0]])
def test_experts(counts, generator):
    D, F, N, E = 64, 32, sum(counts), len(counts)
    x, gate_up, down = (random(*shape, generator=generator) for shape in ((N, D), (E, 2 * F, D), (E, D, F)))
    weights, counts_E = torch.rand(N, generator=generator), torch.tensor(counts)
    out = native.experts(x, weights, counts_E, gate_up, down)
    if not N:
        assert out.shape == (0, D)
        return
    assert_close(out, reference_grouped_swiglu(x.double(), weights.double(), counts_E, gate_up.double(), down.double()))
    expert = torch.arange(E).repeat_interleave(counts_E)
    for row in torch.randperm(N, generator=generator)[:4].tolist():
        alone = torch.nn.functional.one_hot(expert[row], E)
        one = native.experts(x[row : row + 1], weights[row : row + 1], alone, gate_up, down)
        assert torch.equal(one, out[row : row + 1])


def test_int8(generator):
    """The product with the weight that integers and scales stand for."""
    E, D, F, counts_E = 3, 64, 32, torch.tensor([2, 0, 5])
    x, weights = random(7, D, generator=generator), torch.rand(7, generator=generator)
    gate_up, down = (random(*shape, generator=generator) for shape in ((E, 2 * F, D), (E, D, F)))
    (q_gate_up, s_gate_up), (q_down, s_down) = quantize_rows(gate_up), quantize_rows(down)
    out = native.linear(x, q_gate_up[1], s_gate_up[1].squeeze(1))
    assert_close(out, x.double() @ (q_gate_up[1] * s_gate_up[1].double()).T)
    for row in range(7):
        assert torch.equal(native.linear(x[row : row + 1], q_gate_up[1], s_gate_up[1].squeeze(1)), out[row : row + 1])
    out = native.experts(x, weights, counts_E, q_gate_up, q_down, (s_gate_up, s_down))
    exact = reference_grouped_swiglu(
        x.double(), weights.double(), counts_E, q_gate_up * s_gate_up.double(), q_down * s_down.double()
    )
    assert_close(out, exact)


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
    assert native.linear(x, weight) is not None
    assert native.linear(x.float(), weight.float()) is None
    assert native.linear(x[:, :40], weight[:, :40].contiguous()) is None
    with torch.inference_mode(False):
        assert native.linear(x, weight) is None and native.rms_norm(x, weight[0], 1e-6) is None


def test_of_any_default_dtype(generator):
    """Scratch is FP32 whatever torch makes by default: half of it would be written past its end."""
    q, up = random(1, 2, 8, 64, generator=generator), random(8, 64, 512, generator=generator)
    latents, scores_TE = Latents(random(1, 9, 544, generator=generator)), torch.rand(2, 16, generator=generator)
    made = []

    class Watched(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            made.extend([out] if isinstance(out, torch.Tensor) and "empty" in func.__name__ else [])
            return out

    torch.set_default_dtype(torch.bfloat16)
    try:
        with Watched():
            assert native.latent_attention(*q.split(32, dim=-1), latents, up, 0.3, None) is not None
    finally:
        torch.set_default_dtype(torch.float32)
    assert any(x.nbytes == torch.get_num_threads() * 8 * 512 * 4 for x in made)
    biased = {"chosen": 2, "groups": 1, "kept_groups": 1, "pairs": False, "normalised": True, "factor": 1.0}
    assert native.select_experts(scores_TE, torch.zeros(16), **biased) is not None
    assert native.select_experts(scores_TE, torch.zeros(16).bfloat16(), **biased) is None


def test_only_a_library_that_nobody_else_can_have_written_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert native.library.__wrapped__() is not None
    folder = tmp_path / "dsv3"
    (built,) = folder.iterdir()
    for path in (folder, built):
        assert not path.stat().st_mode & 0o077
        path.chmod(0o777)
        assert native.library.__wrapped__() is None
        path.chmod(0o700)
    assert native.library.__wrapped__() is not None
    monkeypatch.setattr(os, "geteuid", lambda: folder.stat().st_uid + 1)
    assert native.library.__wrapped__() is None


def test_without_a_home_there_are_no_kernels(monkeypatch):
    def nowhere():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(native.Path, "home", nowhere)
    assert native.library.__wrapped__() is None


def test_it_can_be_switched_off():
    code = "from dsv3.ops import native; print(native.library())"
    run = [sys.executable, "-c", code]
    assert subprocess.check_output(run, env={**os.environ, "DSV3_NATIVE": "0"}, text=True).strip() == "None"
    assert subprocess.check_output(run, env={**os.environ, "CXX": "no-such-compiler"}, text=True).strip() == "None"
