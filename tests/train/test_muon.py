"""Newton-Schulz beside the singular value decomposition, and Muon beside its equations, matrix by matrix."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn

from dsv3.train.muon import QUINTIC, ROUNDS, MasterMuon, is_hidden_matrix, matrices, orthogonalize
from dsv3.train.optim import MasterAdamW
from tests.variants import BASE, VARIANTS, random_model, random_tokens

pytestmark = pytest.mark.usefixtures("one_thread")

SHAPES = [(1, 6, 6), (1, 9, 4), (3, 4, 11), (2, 1, 5), (1, 7, 1)]


def by_svd(matrix: Tensor) -> Tensor:
    """What `orthogonalize` does, from its definition: the polynomial on the singular values, over and over."""
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    s = s / s.square().sum().sqrt()
    a, b, c = QUINTIC
    for _ in range(ROUNDS):
        s = a * s + b * s**3 + c * s**5
    return u @ torch.diag(s) @ vh


@pytest.mark.parametrize("shape", SHAPES)
def test_newton_schulz_is_the_polynomial_on_the_singular_values(shape, generator):
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    expected = torch.stack([by_svd(matrix) for matrix in x])
    torch.testing.assert_close(orthogonalize(x), expected, rtol=1e-4, atol=1e-5)  # eps is added to the norm
    torch.testing.assert_close(orthogonalize(x.float()), expected.float(), rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("dtype, slack", [(torch.float32, 0.01), (torch.bfloat16, 0.05)])
def test_newton_schulz_comes_near_to_the_orthogonal_factor(dtype, slack, generator):
    """Singular values from 1 down to 1/100 of the largest end near 1, in the directions of U V^T."""
    rows, columns = 24, 16
    u = torch.linalg.qr(torch.randn(rows, columns, generator=generator)).Q
    v = torch.linalg.qr(torch.randn(columns, columns, generator=generator)).Q
    s = torch.logspace(0, -2, columns)
    out = orthogonalize((u @ torch.diag(s) @ v.T).to(dtype)[None])[0].float()
    inner = u.T @ out @ v  # diagonal, if the directions are right
    assert inner.diagonal().min() > 0.68 - slack and inner.diagonal().max() < 1.21 + slack
    assert (inner - torch.diag(inner.diagonal())).abs().max() < 0.02 + slack


def test_the_range_that_five_rounds_lead_to():
    s = torch.logspace(math.log10(1 / 500), 0, 10_000, dtype=torch.float64)
    a, b, c = QUINTIC
    for _ in range(ROUNDS):
        s = a * s + b * s**3 + c * s**5
    assert 0.68 < s.min() < 0.69 and 1.2 < s.max() < 1.21


def test_a_zero_matrix_stays_and_a_fading_one_comes_to_rest(generator):
    x = torch.randn(3, 5, 4, generator=generator)
    x[1] = 0
    x[2] *= 1e-30
    out = orthogonalize(x)
    assert out[0].abs().max() > 0.1
    assert out[1:].abs().max() < 1e-6


@pytest.mark.parametrize("name", ["v3", "no query latent, 2 shared experts, D=2"])
def test_embedding_head_router_and_norms_are_adamws(name, generator):
    model = random_model(VARIANTS[name], generator)
    hidden = {name for name, p in model.named_parameters() if is_hidden_matrix(name, p)}
    rest = {name for name, _ in model.named_parameters()} - hidden
    for name in rest:
        assert name in ("embed_tokens.weight", "lm_head.weight") or "router" in name or "norm" in name, name
    assert {"embed_tokens.weight", "lm_head.weight", "layers.1.mlp.router.weight", "norm.weight"} <= rest
    assert {"mtp.0.eh_proj.weight", "layers.1.mlp.experts.down_proj", "layers.0.self_attn.o_proj.weight"} <= hidden
    optimizer = MasterMuon(model)
    model(random_tokens(model.config, (2, 8), generator)).logits.sum().backward()
    optimizer.step(1e-3, 1.0)
    kinds = {key.split(".", 1)[1]: key.split(".", 1)[0] for key in optimizer.state()}
    assert all((kinds[name] == "momentum") == (name in hidden) for name in kinds)
    assert kinds.keys() >= {"layers.0.self_attn.o_proj.weight", "layers.1.mlp.router.weight", "norm.weight"}


def test_a_parameters_matrices_are_those_of_the_released_format(generator):
    E, F, D = 3, 4, 5
    gate, up = (torch.randn(E, F, D, generator=generator) for _ in range(2))
    stacked = matrices("layers.1.mlp.experts.gate_up_proj", torch.cat((gate, up), dim=1))
    assert torch.equal(stacked, torch.stack((gate, up), dim=1).flatten(0, 1))
    assert torch.equal(
        matrices("layers.0.mlp.gate_up_proj.weight", torch.cat((gate[0], up[0]))), torch.stack((gate[0], up[0]))
    )
    assert torch.equal(matrices("layers.1.mlp.experts.down_proj", gate), gate)
    assert torch.equal(matrices("layers.0.self_attn.o_proj.weight", gate[0]), gate[:1])


class Toy(nn.Module):
    """A stack of fused SwiGLU inputs, a plain matrix, a norm and an embedding, under the model's names."""

    def __init__(self, generator: torch.Generator) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(2, 6, 5, generator=generator))
        self.o_proj = nn.Parameter(torch.randn(4, 9, generator=generator))
        self.norm = nn.Parameter(torch.rand(5, generator=generator) + 0.5)
        self.embed_tokens = nn.Embedding(7, 5, _weight=torch.randn(7, 5, generator=generator))


def test_muon_follows_its_equations_one_matrix_at_a_time(generator):
    mu, decay, rate = 0.9, 0.1, 0.02
    model = Toy(generator)
    optimizer = MasterMuon(model, momentum=mu, weight_decay=decay)
    adamw_twin = copy.deepcopy(model)
    adamw = MasterAdamW(adamw_twin, weight_decay=decay)
    # gate and up of both experts, and o_proj: five matrices, each for itself.
    views = {"gate_up_proj": [(e, slice(a, a + 3)) for e in range(2) for a in (0, 3)], "o_proj": [slice(None)]}
    expected = {name: getattr(model, name).detach().double().clone() for name in views}
    momentum = {name: torch.zeros_like(value) for name, value in expected.items()}
    for _ in range(4):
        for (name, p), q in zip(model.named_parameters(), adamw_twin.parameters(), strict=True):
            p.grad = torch.randn(p.shape, generator=generator)
            q.grad = p.grad.clone()
            if name not in views:
                continue
            momentum[name] = mu * momentum[name] + p.grad.double()
            nesterov = p.grad.double() + mu * momentum[name]
            expected[name] *= 1 - rate * decay
            for view in views[name]:
                direction = by_svd(nesterov[view])
                expected[name][view] -= rate * 0.2 * math.sqrt(max(direction.shape)) * direction
        optimizer.step(rate, clip=1e9)
        adamw.step(rate, clip=1e9)
        for name, value in expected.items():
            torch.testing.assert_close(getattr(model, name).detach().double(), value, rtol=1e-3, atol=1e-4)
        for name in ("norm", "embed_tokens.weight"):
            torch.testing.assert_close(model.get_parameter(name), adamw_twin.get_parameter(name))


@pytest.mark.parametrize("shape", [(64, 64), (96, 32), (32, 96)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_updates_have_the_root_mean_square_of_adamws(shape, dtype, generator):
    layer = nn.Linear(shape[1], shape[0], bias=False).to(dtype)
    optimizer = MasterMuon(layer, weight_decay=0.0)
    before = optimizer.masters()["weight"].clone()
    layer.weight.grad = None
    x = torch.randn(4 * max(shape), shape[1], generator=generator).to(dtype)
    y = torch.randn(4 * max(shape), shape[0], generator=generator).to(dtype)
    (layer(x) * y).sum().backward()  # a gradient of full rank
    optimizer.step(1.0, clip=1.0)
    rms = (optimizer.masters()["weight"] - before).square().mean().sqrt()
    assert 0.2 * 0.7 < rms < 0.2 * 1.15


def test_the_scale_of_a_gradient_does_not_matter(generator):
    steps = []
    gradient = torch.randn(6, 8, generator=generator)
    for scale in (1.0, 100.0):
        layer = nn.Linear(8, 6, bias=False)
        optimizer = MasterMuon(layer, weight_decay=0.0)
        before = layer.weight.detach().clone()
        layer.weight.grad = scale * gradient
        optimizer.step(1.0, clip=1e9)
        steps.append(layer.weight.detach() - before)
    torch.testing.assert_close(*steps, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_run_continues_from_its_saved_state_as_if_nothing_had_been(dtype, generator):
    models = [random_model(BASE, generator, dtype), random_model(BASE, generator, dtype)]
    ours, resumed = (MasterMuon(model, moments=torch.bfloat16) for model in models)
    tokens = random_tokens(BASE, (4, 2, 12), generator)

    def step(model, optimizer, batch):
        torch.nn.functional.cross_entropy(
            model(batch[:, :-1]).logits.flatten(0, 1).float(), batch[:, 1:].flatten()
        ).backward()
        optimizer.step(1e-3, 1.0)

    for batch in tokens[:2]:
        step(models[0], ours, batch)
    resumed.load_masters({name: value.clone() for name, value in ours.masters().items()})
    resumed.load_state({name: value.clone() for name, value in ours.state().items()})
    models[1].load_state_dict(models[0].state_dict())
    for batch in tokens[2:]:
        step(models[0], ours, batch)
        step(models[1], resumed, batch)
    for name, value in ours.masters().items():
        assert torch.equal(resumed.masters()[name], value), name
    for name, value in ours.state().items():
        assert torch.equal(resumed.state()[name], value), name
