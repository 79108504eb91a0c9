"""Master weights, FP32 sums of gradients, and AdamW beside torch's own."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from dsv3.train.optim import MasterAdamW
from tests.variants import BASE, random_model

BETAS, EPS, DECAY, RATE = (0.8, 0.95), 1e-6, 0.1, 0.01


class Toy(nn.Module):
    """A matrix, a stack of matrices and a norm."""

    def __init__(self, generator: torch.Generator) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(5, 4, generator=generator))
        self.stack = nn.Parameter(torch.randn(2, 3, 4, generator=generator))
        self.norm = nn.Parameter(torch.rand(4, generator=generator) + 0.5)

    def loss(self, x: torch.Tensor) -> torch.Tensor:
        y = (x * self.norm) @ self.matrix.T
        return (y**2).mean() + ((x @ self.stack[0].T) * (x @ self.stack[1].T)).mean()


def make(model: nn.Module) -> MasterAdamW:
    return MasterAdamW(model, betas=BETAS, eps=EPS, weight_decay=DECAY)


def reference_optimizer(model: nn.Module) -> torch.optim.AdamW:
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": DECAY},
        {"params": [p for p in parameters if p.dim() == 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=RATE, betas=BETAS, eps=EPS)


def batches(generator: torch.Generator, count: int) -> list[torch.Tensor]:
    return [torch.randn(6, 4, generator=generator) for _ in range(count)]


@pytest.mark.parametrize("clip", [0.05, 1e9])
def test_float32_is_torchs_adamw(clip, generator):
    model = Toy(generator)
    twin = copy.deepcopy(model)
    ours, theirs = make(model), reference_optimizer(twin)
    for x in batches(generator, 6):
        model.loss(x).backward()
        twin.loss(x).backward()
        expected = torch.sqrt(sum((p.grad**2).sum() for p in twin.parameters())).item()
        assert (expected > clip) == (clip == 0.05)
        nn.utils.clip_grad_norm_(twin.parameters(), clip)
        theirs.step()
        theirs.zero_grad()
        assert ours.step(RATE, clip) == pytest.approx(expected, rel=1e-5)
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(p, q)
            assert p.grad is None


def test_the_rate_is_that_of_the_step(generator):
    model = Toy(generator)
    ours = make(model)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    model.loss(batches(generator, 1)[0]).backward()
    ours.step(0.0, 1.0)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    model.loss(batches(generator, 1)[0]).backward()
    ours.step(0.5, 1.0)
    assert not any(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_matrices_decay_and_norms_do_not(generator):
    model = Toy(generator)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    ours = make(model)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    ours.step(RATE, 1.0)
    for name, p in model.named_parameters():
        kept = 1.0 if name == "norm" else 1 - RATE * DECAY
        torch.testing.assert_close(p.detach(), before[name] * kept)


def test_a_bfloat16_model_is_trained_through_float32_masters(generator):
    """The twin is FP32 and gets the gradients that the BF16 model computed: masters must go where it goes."""
    model = Toy(generator).bfloat16()
    twin = copy.deepcopy(model).float()
    ours, theirs = make(model), reference_optimizer(twin)
    for step in range(5):
        for p in twin.parameters():
            p.grad = torch.zeros_like(p)
        for x in batches(generator, 3):  # micro-batches
            probe = copy.deepcopy(model)
            probe.loss(x.bfloat16()).backward()
            for p, q in zip(twin.parameters(), probe.parameters(), strict=True):
                p.grad += q.grad.float()
            model.loss(x.bfloat16()).backward()
            assert all(p.grad is None for p in model.parameters())
        nn.utils.clip_grad_norm_(twin.parameters(), 1.0)
        theirs.step()
        ours.step(RATE, 1.0)
        for (name, master), p, q in zip(ours.masters().items(), model.parameters(), twin.parameters(), strict=True):
            assert master.dtype == torch.float32 and p.dtype == torch.bfloat16
            torch.testing.assert_close(master, q.detach(), msg=lambda m, n=name, s=step: f"{n}, step {s}: {m}")
            assert torch.equal(p, master.bfloat16())


def test_many_small_gradients_and_small_steps_are_not_lost():
    model = nn.Linear(1, 1, bias=False).bfloat16()
    with torch.no_grad():
        model.weight.fill_(1.0)
    ours = MasterAdamW(model, betas=(0.0, 0.0), eps=1.0, weight_decay=0.0)
    ones = torch.ones(1, 1, dtype=torch.bfloat16)
    (model(ones) * 1.0).sum().backward()
    for _ in range(256):
        (model(ones) * 2**-9).sum().backward()  # one by one, each is lost in a BF16 sum of 1
    assert ours.step(0.0, 1e9) == pytest.approx(1.5)
    for _ in range(200):
        (model(ones) * 1.0).sum().backward()
        ours.step(2**-10, 1e9)  # half of it is the step (eps is 1): far below BF16's 1/256 at 1
    moved = 1 - 200 * 2**-11
    assert ours.masters()["weight"].item() == pytest.approx(moved, rel=1e-5)
    assert model.weight.item() == pytest.approx(moved, rel=2**-8)


def test_the_router_is_its_own_master(generator):
    model = random_model(BASE, generator).bfloat16()
    masters = make(model).masters()
    assert masters.keys() == dict(model.named_parameters()).keys()
    for name, parameter in model.named_parameters():
        same = masters[name].data_ptr() == parameter.data_ptr()
        assert same == name.endswith("router.weight"), name
        assert masters[name].dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_run_continues_from_its_saved_state_as_if_nothing_had_been(dtype, generator):
    model = Toy(generator).to(dtype)
    ours, data = make(model), [x.to(dtype) for x in batches(generator, 6)]
    for x in data[:3]:
        model.loss(x).backward()
        ours.step(RATE, 1.0)
    weights = {name: master.clone() for name, master in ours.masters().items()}
    state = {name: value.clone() for name, value in ours.state().items()}
    names = [name for name, _ in model.named_parameters()]
    assert set(state) == {f"{key}.{name}" for key in ("exp_avg", "exp_avg_sq", "step") for name in names}
    other = Toy(torch.Generator().manual_seed(0)).to(dtype)
    resumed = make(other)
    resumed.load_masters(weights)
    resumed.load_state(state)
    for x in data[3:]:
        for m, o in ((model, ours), (other, resumed)):
            m.loss(x).backward()
            o.step(RATE, 1.0)
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)
    for name, value in ours.state().items():
        assert torch.equal(resumed.state()[name], value), name
    assert not torch.equal(state["exp_avg.matrix"], ours.state()["exp_avg.matrix"])  # the loaded copy is not shared


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_run_continues_on_cuda(dtype, generator):
    model = Toy(generator).to("cuda", dtype)
    ours, data = make(model), [x.to("cuda", dtype) for x in batches(generator, 4)]
    for x in data[:2]:
        model.loss(x).backward()
        ours.step(RATE, 1.0)
    other = Toy(torch.Generator().manual_seed(0)).to("cuda", dtype)
    resumed = make(other)
    resumed.load_masters({name: master.cpu() for name, master in ours.masters().items()})
    resumed.load_state({name: value.cpu() for name, value in ours.state().items()})
    for x in data[2:]:
        for m, o in ((model, ours), (other, resumed)):
            m.loss(x).backward()
            o.step(RATE, 1.0)
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q)


def test_before_the_first_step_there_is_no_state(generator):
    ours = make(Toy(generator))
    assert ours.state() == {}
    ours.load_state({})
    assert ours.state() == {}


def test_a_gradient_can_be_forgotten(generator):
    for dtype in (torch.float32, torch.bfloat16):
        model = Toy(generator).to(dtype)
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        ours = MasterAdamW(model, weight_decay=0.0)
        model.loss(batches(generator, 1)[0].to(dtype)).backward()
        ours.zero_grad()
        assert ours.step(RATE, 1.0) == 0
        assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_masters_are_rounded_into_the_model_when_loaded(generator):
    model = Toy(generator).bfloat16()
    ours = make(model)
    weights = {name: torch.randn(p.shape, generator=generator) for name, p in model.named_parameters()}
    ours.load_masters(weights)
    for name, p in model.named_parameters():
        assert torch.equal(ours.masters()[name], weights[name])
        assert torch.equal(p, weights[name].bfloat16())
