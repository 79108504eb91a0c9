"""Recipes instead of tensors: the same gradients, less memory, nothing computed twice that need not be."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from benchmarks.bench_memory import MemoryWatch
from dsv3.ops.recompute import recomputed, selective_recomputation


class Counted:
    """A function that knows how often it ran."""

    def __init__(self, function):
        self.function, self.runs = function, 0

    def __call__(self, *inputs):
        self.runs += 1
        return self.function(*inputs)


@pytest.fixture
def draw(generator):
    def draw(*shape, grad=True):
        return torch.randn(shape, dtype=torch.float64, generator=generator).requires_grad_(grad)

    return draw


@pytest.fixture
def no_collector():
    """Whatever is freed in the test is freed by its last reference, not by chance."""
    with MemoryWatch(), selective_recomputation():  # on first use torch imports more of itself, from whose frames
        torch.ones(1, requires_grad=True).exp()  # only the collector frees what was being computed
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def test_one_run_serves_all_who_saved_the_result(draw):
    x, w1, w2 = draw(5, 4), draw(4, 3), draw(4, 2)
    tanh = Counted(torch.tanh)
    expected = torch.autograd.grad((x.tanh() @ w1).sum() + (x.tanh() @ w2).square().sum(), (x, w1, w2))
    with selective_recomputation():
        y = recomputed(tanh, x)
        loss = (y @ w1).sum() + (y @ w2).square().sum()
    assert tanh.runs == 1
    got = torch.autograd.grad(loss, (x, w1, w2))
    assert tanh.runs == 2
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_nothing_is_made_again_outside_or_without_need(draw):
    x, w = draw(5, 4), draw(4, 3)
    outside, unneeded = Counted(torch.exp), Counted(torch.sin)
    (recomputed(outside, x) @ w).sum().backward()
    assert outside.runs == 1
    with selective_recomputation():
        loss = recomputed(unneeded, x).sum()  # a sum needs no values for its gradient
    loss.backward()
    assert unneeded.runs == 1


def test_views_of_a_result_are_views_of_what_is_made_again(draw):
    x, a, b = draw(4, 6), draw(4, 3), draw(3, 8)

    def loss(call):
        y = call(lambda x: x.sin() * 2, x)
        left, right = y.split(3, dim=1)  # an offset
        return (left * a).sum() + (right.T @ a).square().sum() + (y.view(8, 3) @ b).square().sum()

    expected = torch.autograd.grad(loss(lambda f, *xs: f(*xs)), (x, a, b))
    with selective_recomputation():
        marked = loss(recomputed)
    for got, want in zip(torch.autograd.grad(marked, (x, a, b)), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=0)


def test_a_result_that_is_itself_a_view(draw):
    x, w = draw(4, 6), draw(4, 5)

    def right_half(x):
        return x.sin().T[3:]

    expected = torch.autograd.grad((right_half(x) @ w).square().sum(), (x, w))
    half = Counted(right_half)
    with selective_recomputation():
        marked = (recomputed(half, x) @ w).square().sum()
    got = torch.autograd.grad(marked, (x, w))
    assert half.runs == 2
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_recipes_of_recipes_keep_only_where_they_begin(draw, no_collector):
    x, weights = draw(50, 40), [draw(40, 40) for _ in range(2)]
    first, second = Counted(torch.tanh), Counted(lambda y, w: y @ w)
    for watched in (True, False):
        with MemoryWatch() as watch, selective_recomputation():
            z = recomputed(second, recomputed(first, x), weights[0])
            loss = (z @ weights[1]).sum()
            del z
        # tanh saves its own output for itself; the products' inputs are recipes.
        assert watch.alive == 8 * (50 * 40 + 1)
        runs = first.runs, second.runs
        if watched:
            loss.backward()
            assert (first.runs, second.runs) == (runs[0] + 1, runs[1] + 1)
        del loss


def test_what_was_made_again_goes_with_the_last_who_needed_it(draw, no_collector):
    x, w = draw(64, 32), draw(32, 16)
    made = []

    def sine(x):
        out = x.sin()
        made.append(weakref.ref(out.untyped_storage()))
        return out

    seen = []
    with selective_recomputation():
        y = recomputed(sine, x)
        y.register_hook(lambda _: seen.append([ref() is not None for ref in made]))
        loss = (y @ w).sum()
        del y
    assert [ref() is not None for ref in made] == [False]
    loss.backward()
    assert seen == [[False, False]]  # gone before the gradient of y reaches whatever made y
    assert len(made) == 2


def test_steps_towards_a_result_are_not_kept_beside_it(draw, no_collector):
    x, steps, alive = draw(6, 5), [], []

    def double(y):
        out = y * 2  # its gradient needs no values
        steps.append(weakref.ref(out.untyped_storage()))
        return out

    class Consumer(torch.autograd.Function):
        @staticmethod
        def forward(ctx, y):
            ctx.save_for_backward(y)
            return y * 3

        @staticmethod
        def backward(ctx, grad):
            assert torch.equal(ctx.saved_tensors[0], 8 * x)
            alive.extend(ref() is not None for ref in steps)
            return grad * 3

    with selective_recomputation():
        loss = Consumer.apply(recomputed(double, recomputed(double, recomputed(double, x)))).sum()
    loss.backward()
    assert alive == [False, False, False, False, False, True]
    assert not any(ref() is not None for ref in steps)


def test_nothing_outlives_a_dropped_graph(draw, no_collector):
    x, w = draw(20, 30), draw(30, 30)
    with MemoryWatch() as watch:
        for _ in range(3):
            with selective_recomputation():
                y = recomputed(torch.tanh, x)
                same = recomputed(lambda t: t, y * 1)  # its result is its input
                cast = recomputed(torch.Tensor.to, same, torch.float64)  # likewise
                loss = (recomputed(torch.matmul, cast, w).exp() @ w).sum() + y.softmax(-1).square().sum()
            del y, same, cast, loss
        assert watch.alive == 0


def test_marking_alone_keeps_nothing(draw, no_collector):
    x = draw(20, 30)
    with torch.no_grad():
        y = x * 2
        seen = weakref.ref(y.untyped_storage())
        z = recomputed(torch.exp, y)
        del y
    assert seen() is None and z.shape == (20, 30)
    # With gradients, but nobody told autograd to save memory: once the result is gone, so is its recipe.
    y = x * 2
    seen = weakref.ref(y.untyped_storage())
    z = recomputed(torch.sin, y).sum()
    kept_by_sine = seen() is not None
    del y, z
    assert kept_by_sine and seen() is None


def test_gradients_and_their_gradients_against_differences(draw):
    x, w = draw(3, 4), draw(4, 3)

    def loss(x, w):
        with selective_recomputation():
            y = recomputed(lambda x: x.tanh() * x, x)
            return (recomputed(torch.matmul, y, w).sigmoid() * y[:, :3]).sum()

    assert torch.autograd.gradcheck(loss, (x, w))
    assert torch.autograd.gradgradcheck(loss, (x, w))


def test_making_again_records_no_graph(draw):
    x, w, recording = draw(5, 4), draw(4, 3), []

    def product(x, w):
        recording.append(torch.is_grad_enabled())
        return x @ w

    with selective_recomputation():
        loss = recomputed(product, x, w).square().sum()
    torch.autograd.grad(loss, x, create_graph=True)  # this backward pass does record
    assert recording == [True, False]


def test_a_graph_that_is_retained_gives_the_same_gradient_again(draw):
    x, w = draw(5, 4), draw(4, 3)
    tanh = Counted(torch.tanh)
    with selective_recomputation():
        loss = (recomputed(tanh, x) @ w).square().sum()
    first = torch.autograd.grad(loss, (x, w), retain_graph=True)
    second = torch.autograd.grad(loss, (x, w))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True)) and tanh.runs == 2


@pytest.mark.parametrize("what", ["input", "parameter", "kept tensor"])
def test_a_change_in_place_before_the_backward_pass_is_found(what, draw):
    x, w = draw(5, 4), draw(4, 3, grad=False)
    linear = nn.Linear(4, 4, bias=False, dtype=torch.float64)
    y = x * 1
    with selective_recomputation():
        z = recomputed(linear, y)
        loss = (z * z @ w).sum()
        loss = loss + (y * y).sum() if what == "kept tensor" else loss
    with torch.no_grad():
        {"input": y, "parameter": linear.weight, "kept tensor": y}[what].mul_(2)
    with pytest.raises(RuntimeError, match="changed in place after the forward pass"):
        loss.backward()


def test_a_frozen_parameter_of_a_recipe_is_watched_too(draw):
    x, w = draw(5, 4, grad=False), draw(4, 3)
    linear = nn.Linear(4, 4, bias=False, dtype=torch.float64).requires_grad_(False)
    with selective_recomputation():
        loss = (recomputed(linear, x) @ w).sum()
    with torch.no_grad():
        linear.weight.add_(1)
    with pytest.raises(RuntimeError, match=r"shape \(4, 4\).*changed in place"):
        loss.backward()


def test_a_result_changed_before_it_is_saved_is_kept(draw):
    x, w = draw(5, 4), draw(4, 3)
    expected = torch.autograd.grad(((x.sin() + 1) @ w).square().sum(), (x, w))
    sine = Counted(torch.sin)
    with selective_recomputation():
        y = recomputed(sine, x).add_(1)  # no longer what the recipe makes
        loss = (y @ w).square().sum()
    for got, want in zip(torch.autograd.grad(loss, (x, w)), expected, strict=True):
        torch.testing.assert_close(got, want)
    assert sine.runs == 1


def test_a_result_seen_as_another_dtype_is_kept(draw):
    x, w = draw(5, 4), draw(2, 3)

    def loss(call):
        y = call(lambda x: torch.complex(x, x.sin()), x)
        return (torch.view_as_real(y) @ w).square().sum()

    expected = torch.autograd.grad(loss(lambda f, *xs: f(*xs)), (x, w))
    with selective_recomputation():
        marked = loss(recomputed)
    for got, want in zip(torch.autograd.grad(marked, (x, w)), expected, strict=True):
        torch.testing.assert_close(got, want)


def test_autocast_keeps_everything(generator):
    x = torch.randn(8, 16, generator=generator, requires_grad=True)
    w = torch.randn(16, 16, generator=generator, requires_grad=True)
    product = Counted(torch.matmul)
    gradients = []
    for call in (recomputed, lambda f, *xs: f(*xs)):
        with torch.autocast("cpu", dtype=torch.bfloat16), selective_recomputation():
            loss = (call(product, x, w) @ w).float().square().sum()
        gradients.append(torch.autograd.grad(loss, (x, w)))  # outside autocast a recipe would multiply in FP32
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True)) and product.runs == 2


def test_a_compiler_sees_a_plain_call(draw):
    x, w = draw(5, 4), draw(4, 3)

    def loss(x, w):
        return (recomputed(torch.tanh, x) @ w).square().sum()

    compiled = torch.compile(loss, backend="eager", fullgraph=True)  # refuses whatever it cannot trace
    expected = torch.autograd.grad(loss(x, w), (x, w))
    for got, want in zip(torch.autograd.grad(compiled(x, w), (x, w)), expected, strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("outer", ["checkpoint", "selective"])
def test_beside_checkpointing(outer, draw):
    x, w = draw(6, 4), draw(4, 4)

    def block(x):
        return recomputed(torch.matmul, recomputed(torch.tanh, x), w).sigmoid()

    def selective(x):
        with selective_recomputation():
            return block(x)

    def loss():
        if outer == "checkpoint":
            return checkpoint(selective, x, use_reentrant=False).square().sum()
        with selective_recomputation():
            return (checkpoint(block, recomputed(torch.sin, x), use_reentrant=False) @ w).square().sum()

    plain = block(x).square().sum() if outer == "checkpoint" else (block(x.sin()) @ w).square().sum()
    expected = torch.autograd.grad(plain, (x, w))
    for got, want in zip(torch.autograd.grad(loss(), (x, w)), expected, strict=True):
        torch.testing.assert_close(got, want)
