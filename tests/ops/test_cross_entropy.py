"""The chunked cross-entropy against its reference, the reference against the formula."""

from __future__ import annotations

import pytest
import torch

from dsv3.ops import cross_entropy
from dsv3.ops.cross_entropy import IGNORE, linear_cross_entropy, reference_linear_cross_entropy
from tests.poison import poisoned_memory

T, D, V = 11, 6, 13
LABELS = {
    "all count": lambda labels: labels,
    "some ignored": lambda labels: labels.masked_fill(torch.arange(len(labels)) % 3 == 1, IGNORE),
    "all ignored": lambda labels: torch.full_like(labels, IGNORE),
    "a single token": lambda labels: labels[:1],
    "no token": lambda labels: labels[:0],
}
each_labelling = pytest.mark.parametrize("label", LABELS.values(), ids=LABELS.keys())
each_chunk = pytest.mark.parametrize("rows", [1, 4, 11, 1000])


def random_problem(label, generator, dtype=torch.float64):
    labels = label(torch.randint(V, (T,), generator=generator))
    x = torch.randn(len(labels), D, dtype=torch.float64, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(V, D, dtype=torch.float64, generator=generator).to(dtype).requires_grad_()
    return x, weight, labels


@pytest.fixture
def chunks_of(monkeypatch):
    """Takes the number of tokens that are to be in a chunk."""
    return lambda rows: monkeypatch.setattr(cross_entropy, "_CHUNK_BYTES", 4 * V * rows)


@each_labelling
def test_the_reference_is_the_formula(label, generator):
    x, weight, labels = random_problem(label, generator)
    expected = torch.zeros((), dtype=torch.float64)
    for x_D, target in zip(x, labels.tolist(), strict=True):
        if target != IGNORE:
            logits = weight @ x_D
            expected = expected - (logits[target] - torch.log(torch.exp(logits).sum()))
    torch.testing.assert_close(reference_linear_cross_entropy(x, weight, labels), expected)


@each_labelling
@each_chunk
def test_chunks_are_the_reference(label, rows, generator, chunks_of):
    chunks_of(rows)
    x, weight, labels = random_problem(label, generator)
    with poisoned_memory():
        loss = linear_cross_entropy(x, weight, labels)
        gradients = torch.autograd.grad(-2.5 * loss, (x, weight))
    expected = reference_linear_cross_entropy(x, weight, labels)
    torch.testing.assert_close(loss, expected)
    for ours, theirs in zip(gradients, torch.autograd.grad(-2.5 * expected, (x, weight)), strict=True):
        torch.testing.assert_close(ours, theirs)


@each_chunk
def test_gradcheck(rows, generator, chunks_of):
    chunks_of(rows)
    x, weight, labels = random_problem(LABELS["some ignored"], generator)
    assert torch.autograd.gradcheck(lambda x, w: linear_cross_entropy(x, w, labels), (x, weight))


@pytest.mark.parametrize("frozen", ["x", "weight", "both"])
def test_only_what_needs_a_gradient_gets_one(frozen, generator, chunks_of):
    chunks_of(4)
    x, weight, labels = random_problem(LABELS["some ignored"], generator)
    expected = torch.autograd.grad(reference_linear_cross_entropy(x, weight, labels), (x, weight))
    x.requires_grad_(frozen == "weight")
    weight.requires_grad_(frozen == "x")
    loss = linear_cross_entropy(x, weight, labels)
    torch.testing.assert_close(loss.detach(), reference_linear_cross_entropy(x, weight, labels).detach())
    assert loss.requires_grad == (frozen != "both")
    if frozen != "both":
        loss.backward()
    assert (x.grad is None) == (frozen != "weight") and (weight.grad is None) == (frozen != "x")
    for tensor, gradient in zip((x, weight), expected, strict=True):
        if tensor.grad is not None:
            torch.testing.assert_close(tensor.grad, gradient)


@pytest.mark.parametrize("rows", [4, 1000])
def test_bfloat16_is_summed_in_float32(rows, generator, chunks_of):
    chunks_of(rows)
    x, weight, labels = random_problem(LABELS["some ignored"], generator, torch.bfloat16)
    loss = linear_cross_entropy(x, weight, labels)
    assert loss.dtype == torch.float32
    exact_x, exact_weight = x.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    exact = reference_linear_cross_entropy(exact_x, exact_weight, labels)
    assert loss.item() == pytest.approx(exact.item(), rel=0.01)
    loss.backward()
    exact.backward()
    assert x.grad.dtype == weight.grad.dtype == torch.bfloat16
    torch.testing.assert_close(x.grad.double(), exact_x.grad, atol=0.05, rtol=0.05)
    torch.testing.assert_close(weight.grad.double(), exact_weight.grad, atol=0.05, rtol=0.05)


def test_large_logits_do_not_overflow(generator, chunks_of):
    chunks_of(4)
    x, weight, labels = random_problem(LABELS["all count"], generator, torch.float32)
    loss = linear_cross_entropy(1e4 * x, weight, labels)
    assert loss.isfinite()
    torch.testing.assert_close(loss, reference_linear_cross_entropy(1e4 * x, weight, labels))
    loss.backward()
    assert x.grad.isfinite().all() and weight.grad.isfinite().all()
