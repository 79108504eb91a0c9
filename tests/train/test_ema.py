"""The average beside its definition in FP64, and a model that wears it and takes it off again."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dsv3.errors import UserError
from dsv3.model.transformer import Transformer
from dsv3.train.ema import Ema
from tests.variants import BASE, random_model, random_tokens

pytestmark = pytest.mark.usefixtures("one_thread")


def random_weights(generator: torch.Generator, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    return {
        "a.weight": torch.randn(5, 3, generator=generator).to(dtype),
        "b.weight": torch.randn(4, generator=generator),
    }


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.9, 0.999])
def test_it_is_the_recurrence(decay, generator):
    start = random_weights(generator)
    ema = Ema(start, decay)
    expected = {name: value.double() for name, value in start.items()}
    for n in range(1, 30):
        weights = random_weights(generator)
        ema.update(weights)
        d = min(decay, n / (n + 9))
        expected = {name: d * expected[name] + (1 - d) * weights[name].double() for name in expected}
        for name, value in ema.weights().items():
            assert value.dtype == torch.float32 and value.device.type == "cpu"
            torch.testing.assert_close(value.double(), expected[name], rtol=1e-5, atol=1e-6)


def test_the_start_is_forgotten_before_the_first_thousand_steps(generator):
    """Without the warm-up of the decay, weights of 1e6 at the start would still be 9e5 after a hundred steps."""
    start = {name: torch.full_like(value, 1e6) for name, value in random_weights(generator).items()}
    ema = Ema(start, 0.999)
    for _ in range(100):
        ema.update({name: torch.ones_like(value) for name, value in start.items()})
    assert all(value.max() < 2 for value in ema.weights().values())


def test_it_holds_no_memory_of_the_model(generator):
    start = random_weights(generator)
    kept = {name: value.clone() for name, value in start.items()}
    ema = Ema(start)
    for value in start.values():
        value.fill_(torch.nan)
    assert same(ema.weights(), kept)
    weights = random_weights(generator)
    ema.update(weights)
    after = {name: value.clone() for name, value in ema.weights().items()}
    for value in weights.values():
        value.fill_(torch.nan)  # the next step changes the masters in place
    assert same(ema.weights(), after)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_wears_the_average_and_takes_it_off_bit_for_bit(dtype, generator):
    model, other = random_model(BASE, generator, dtype), random_model(BASE, generator)
    tokens = random_tokens(BASE, (2, 9), generator)
    ema = Ema({name: p.detach() for name, p in other.named_parameters()})
    before = {name: value.clone() for name, value in model.state_dict().items()}
    logits = model(tokens).logits
    with torch.no_grad(), ema.applied_to(model):
        inside = model(tokens).logits
        # Its own biases stay: they are no parameters, and fit the weights of now.
        assert all(torch.equal(value, before[name]) for name, value in model.named_buffers())
    reference = Transformer(BASE)
    reference.load_state_dict({**before, **ema.weights()})
    assert torch.equal(inside, reference.to(dtype)(tokens).logits)
    assert not torch.equal(inside, logits)
    assert same(model.state_dict(), before)
    assert torch.equal(model(tokens).logits, logits)
    with pytest.raises(ZeroDivisionError), ema.applied_to(model):
        raise ZeroDivisionError
    assert same(model.state_dict(), before)


def test_it_continues_from_its_saved_state(generator):
    ema = Ema(random_weights(generator), 0.9)
    for _ in range(7):
        ema.update(random_weights(generator))
    state = {name: value.clone() for name, value in ema.state().items()}
    resumed = Ema(random_weights(generator), 0.9)
    resumed.load_state(state)
    for _ in range(5):  # the warm-up goes on where it was
        weights = random_weights(generator)
        ema.update(weights)
        resumed.update(weights)
    assert same(ema.state(), resumed.state())
    assert not same(ema.state(), state)


def test_bad_input(generator):
    for decay in (-0.1, 1.0, 1.5, float("nan")):
        with pytest.raises(UserError, match="EMA decay"):
            Ema({}, decay)
    ema = Ema(random_weights(generator))
    before = {name: value.clone() for name, value in ema.weights().items()}
    good = Ema(random_weights(generator)).state()
    for bad, message in (
        ({name: value for name, value in good.items() if name != "b.weight"}, "b.weight is missing"),
        ({**good, "b.weight": torch.zeros(5)}, r"b.weight is of shape \[5\], expected \[4\]"),
        ({name: value for name, value in good.items() if name != "updates"}, "no 'updates'"),
    ):
        with pytest.raises(UserError, match=message):
            ema.load_state(bad)
        assert same(ema.weights(), before)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_cuda_it_is_what_it_is_on_the_cpu(generator):
    """Masters change in place right after `wait_copied`, as an optimizer changes them."""
    masters = {name: value.cuda() for name, value in random_weights(generator).items()}
    masters["big.weight"] = torch.randn(2048, 2048, generator=generator).cuda()
    ours = Ema(masters, 0.9)
    reference = Ema({name: value.cpu() for name, value in masters.items()}, 0.9)
    for _ in range(10):
        for value in masters.values():
            value.mul_(0.9).add_(0.1)
        reference.update({name: value.cpu() for name, value in masters.items()})
        ours.update(masters)
        ours.wait_copied()
        for value in masters.values():
            value.add_(1)
    assert same(ours.state(), reference.state())
