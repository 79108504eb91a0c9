"""The sequence-wise balance loss against loops, and the way it reaches the gradient."""

from __future__ import annotations

import pytest
import torch

from dsv3.model.aux_loss import inject_loss, sequence_balance_loss
from tests import reference


def random_scores(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    return torch.rand(shape, dtype=torch.float64, generator=generator).mul_(0.98).add_(0.01).requires_grad_()


@pytest.mark.parametrize(("E", "K", "S"), [(8, 2, 5), (6, 3, 1), (4, 4, 7), (16, 1, 3)])
def test_value_and_gradient_are_the_references(E, K, S, generator):
    scores = random_scores((3, S, E), generator)
    other = scores.detach().clone().requires_grad_()
    loss_B = sequence_balance_loss(scores, K)
    expected_B = torch.stack([reference.sequence_loss(list(rows), K) for rows in other])
    torch.testing.assert_close(loss_B, expected_B)
    direction = torch.randn(3, dtype=torch.float64, generator=generator)
    (loss_B * direction).sum().backward()
    (expected_B * direction).sum().backward()
    torch.testing.assert_close(scores.grad, other.grad)  # the reference's f is a float: it can have no gradient
    # With K = E, every f is 1 and the shares sum to 1: nothing to push.
    assert (scores.grad.abs().max() > 1e-3) == (K < E)


def test_gradcheck(generator):
    scores = random_scores((2, 4, 6), generator)
    valid = torch.tensor([[True, True, True, False], [True] * 4])
    assert torch.autograd.gradcheck(lambda s: sequence_balance_loss(s, 2), (scores,))
    assert torch.autograd.gradcheck(lambda s: sequence_balance_loss(s, 2, valid), (scores,))


@pytest.mark.parametrize(("E", "K"), [(8, 2), (6, 3), (5, 1)])
def test_perfect_balance_gives_exactly_one(E, K):
    # Token t prefers experts t, t+1, ... t+K-1 (mod E), and there are E tokens.
    scores = torch.full((1, E, E), 0.25, dtype=torch.float64)
    for t in range(E):
        for k in range(K):
            scores[0, t, (t + k) % E] = 0.75
    assert sequence_balance_loss(scores, K).item() == pytest.approx(1.0, abs=1e-14)


def test_equal_scores_give_one_whoever_wins_the_ties():
    loss = sequence_balance_loss(torch.full((2, 5, 8), 0.3), 2)
    torch.testing.assert_close(loss, torch.ones(2))


def test_collapse_gives_more_than_one():
    E, K, S = 8, 2, 5
    scores = torch.full((1, S, E), 0.1, dtype=torch.float64)
    scores[..., :K] = 0.9  # every token wants the same two: f = E/K for both, P = 0.9 / (2 x 0.9 + 6 x 0.1)
    assert sequence_balance_loss(scores, K).item() == pytest.approx(E / K * 2 * 0.9 / 2.4)


def test_padding_takes_no_part(generator):
    scores = random_scores((3, 6, 8), generator)
    lengths = [6, 2, 1]
    valid = torch.arange(6) < torch.tensor(lengths)[:, None]
    loss_B = sequence_balance_loss(scores, 2, valid)
    for row, length in enumerate(lengths):
        alone = sequence_balance_loss(scores[row : row + 1, :length], 2)
        torch.testing.assert_close(loss_B[row], alone[0])
    (gradient,) = torch.autograd.grad(loss_B.sum(), scores)
    assert (gradient[~valid] == 0).all() and (gradient[valid] != 0).any()


def test_a_row_of_nothing_but_padding_loses_nothing(generator):
    scores = random_scores((2, 4, 8), generator)
    valid = torch.tensor([[False] * 4, [True] * 4])
    loss_B = sequence_balance_loss(scores, 2, valid)
    assert loss_B[0] == 0 and loss_B[1] > 0
    (gradient,) = torch.autograd.grad(loss_B.sum(), scores)
    assert gradient.isfinite().all()


@pytest.mark.parametrize("upstream", [0.0, 1.0, -3.0])
def test_an_injected_loss_is_minimised_whatever_happens_to_the_value(upstream, generator):
    x = torch.randn(4, dtype=torch.float64, generator=generator, requires_grad=True)
    y = inject_loss(x, (x**3).sum())
    assert torch.equal(y, x)
    (upstream * y).sum().backward()
    torch.testing.assert_close(x.grad, upstream + 3 * x.detach() ** 2)
