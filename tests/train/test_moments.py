"""AdamW with moments kept in BF16, and what every optimizer does with a bad gradient or a foreign state."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from dsv3.errors import UserError
from dsv3.train.muon import MasterMuon
from dsv3.train.optim import MasterAdamW
from tests.variants import BASE, random_model, random_tokens

pytestmark = pytest.mark.usefixtures("one_thread")


def linear(generator: torch.Generator, dtype: torch.dtype = torch.float32) -> nn.Linear:
    layer = nn.Linear(7, 5)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(generator=generator)
    return layer.to(dtype)


def give_gradients(model: nn.Module, generator: torch.Generator, scale: float = 1.0) -> None:
    for parameter in model.parameters():
        parameter.grad = scale * torch.randn(parameter.shape, generator=generator).to(parameter.dtype)


def test_bf16_moments_follow_the_equations_rounded_once_a_step(generator):
    beta1, beta2, eps, decay, rate = 0.9, 0.95, 1e-6, 0.1, 0.01
    model = linear(generator)
    optimizer = MasterAdamW(model, betas=(beta1, beta2), eps=eps, weight_decay=decay, moments=torch.bfloat16)
    expected = {name: p.detach().double() for name, p in model.named_parameters()}
    m = {name: torch.zeros_like(p, dtype=torch.bfloat16) for name, p in model.named_parameters()}
    v = {name: torch.zeros_like(p, dtype=torch.bfloat16) for name, p in model.named_parameters()}
    for step in range(1, 6):
        give_gradients(model, generator)
        for name, p in model.named_parameters():
            gradient = p.grad.double()
            wide_m = beta1 * m[name].double() + (1 - beta1) * gradient
            wide_v = beta2 * v[name].double() + (1 - beta2) * gradient**2
            if p.dim() > 1:
                expected[name] *= 1 - rate * decay
            expected[name] -= rate * (wide_m / (1 - beta1**step)) / ((wide_v / (1 - beta2**step)).sqrt() + eps)
            m[name], v[name] = wide_m.float().bfloat16(), wide_v.float().bfloat16()
        optimizer.step(rate, clip=1e9)
        for name, p in model.named_parameters():
            torch.testing.assert_close(p.detach().double(), expected[name], rtol=1e-5, atol=1e-6)
    state = optimizer.state()
    for name in m:
        # FP32 and FP64 may fall on two sides of a rounding boundary: one unit in the last place of BF16.
        for kind, reference in (("exp_avg", m[name]), ("exp_avg_sq", v[name])):
            assert state[f"{kind}.{name}"].dtype == torch.bfloat16
            torch.testing.assert_close(state[f"{kind}.{name}"], reference, rtol=2**-7, atol=1e-6)


def test_the_default_keeps_moments_in_fp32(generator):
    model = linear(generator, torch.bfloat16)
    optimizer = MasterAdamW(model)
    model(torch.randn(3, 7, generator=generator).bfloat16()).sum().backward()
    optimizer.step(0.01, 1.0)
    assert {value.dtype for value in optimizer.state().values()} == {torch.float32}


@pytest.mark.parametrize("make", [MasterAdamW, MasterMuon])
def test_training_with_bf16_moments_stays_close(make, seed):
    """The same model on the same data: curves of FP32 and of BF16 moments lie together, and go down."""
    curves = {}
    for moments in (None, torch.bfloat16):
        generator = torch.Generator().manual_seed(seed)
        torch.manual_seed(seed)
        model = random_model(BASE, generator)
        optimizer = make(model, moments=moments)
        tokens = random_tokens(BASE, (2, 24), generator)
        curve = []
        for _ in range(20):
            logits = model(tokens[:, :-1]).logits
            loss = nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
            loss.backward()
            optimizer.step(3e-3, 1.0)
            curve.append(loss.item())
        curves[moments] = curve
    full, narrow = curves[None], curves[torch.bfloat16]
    assert full != narrow
    assert full[-1] < 0.7 * full[0]
    assert all(abs(a - b) < 0.03 * full[0] for a, b in zip(full, narrow, strict=True))


def test_a_second_moment_in_bf16_shrinks_at_every_beta_that_is_allowed():
    """1 - 2^-8 is the last beta at which no BF16 value is stuck; one nearer to 1 is refused."""
    values = torch.arange(128, dtype=torch.float32) / 128 + 1  # every significand of BF16
    for beta in (0.95, 1 - 2**-8):
        assert bool(((values * beta).bfloat16() < values.bfloat16()).all())
        MasterAdamW(nn.Linear(2, 2), betas=(0.9, beta), moments=torch.bfloat16)
    assert not bool(((values * 0.999).bfloat16() < values.bfloat16()).any())
    with pytest.raises(UserError, match=r"0\.999.*BF16"):
        MasterAdamW(nn.Linear(2, 2), betas=(0.9, 0.999), moments=torch.bfloat16)
    with pytest.raises(UserError, match=r"0\.999.*BF16"):
        MasterMuon(nn.Linear(2, 2), momentum=0.999, moments=torch.bfloat16)
    with pytest.raises(UserError, match="float16"):
        MasterAdamW(nn.Linear(2, 2), moments=torch.float16)


@pytest.mark.parametrize("make", [MasterAdamW, MasterMuon])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gradient_that_is_not_finite_changes_nothing(make, bad, dtype, generator):
    model = linear(generator, dtype)
    optimizer = make(model)
    x = torch.randn(3, 7, generator=generator).to(dtype)
    model(x).square().sum().backward()
    optimizer.step(0.01, 1.0)
    weights = {name: value.clone() for name, value in optimizer.masters().items()}
    state = {name: value.clone() for name, value in optimizer.state().items()}
    model(x * bad).square().sum().backward()
    assert not math.isfinite(optimizer.grad_norm())
    assert not math.isfinite(optimizer.step(0.01, 1.0))
    assert optimizer.gradients() == {}
    assert all(torch.equal(value, weights[name]) for name, value in optimizer.masters().items())
    assert all(torch.equal(value, state[name]) for name, value in optimizer.state().items())
    model(x).square().sum().backward()
    assert math.isfinite(optimizer.step(0.01, 1.0))
    assert not any(torch.equal(value, weights[name]) for name, value in optimizer.masters().items())


def test_a_norm_that_is_known_already_is_taken(generator):
    model, twin = linear(generator), nn.Linear(7, 5)
    twin.load_state_dict(model.state_dict())
    give_gradients(model, generator)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        q.grad = p.grad.clone()
    one, two = MasterAdamW(model), MasterAdamW(twin)
    norm = one.grad_norm()
    assert norm == pytest.approx(math.sqrt(sum(float(g.square().sum()) for g in one.gradients().values())))
    assert one.step(0.01, 0.5, norm) == norm == two.step(0.01, 0.5)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("writer, reader", [(MasterAdamW, MasterMuon), (MasterMuon, MasterAdamW)])
def test_the_state_of_another_optimizer_is_refused(writer, reader, generator):
    first, second = linear(generator), linear(generator)
    wrote, reads = writer(first), reader(second)
    for model, optimizer in ((first, wrote), (second, reads)):
        give_gradients(model, generator)
        optimizer.step(0.01, 1.0)
    before = {name: value.clone() for name, value in reads.state().items()}
    with pytest.raises(UserError, match="weight"):
        reads.load_state(wrote.state())
    assert all(torch.equal(value, before[name]) for name, value in reads.state().items())


def test_a_state_that_lacks_a_part_or_has_another_shape_is_refused(generator):
    model = linear(generator)
    optimizer = MasterAdamW(model)
    give_gradients(model, generator)
    optimizer.step(0.01, 1.0)
    state = optimizer.state()
    with pytest.raises(UserError, match=r"lacks exp_avg_sq\.weight"):
        optimizer.load_state({key: value for key, value in state.items() if key != "exp_avg_sq.weight"})
    with pytest.raises(UserError, match=r"exp_avg\.weight of shape \[5, 6\], expected \[5, 7\]"):
        optimizer.load_state({**state, "exp_avg.weight": torch.zeros(5, 6)})
