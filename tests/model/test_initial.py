"""What a model begins with does not depend on how it is divided."""

import itertools

import pytest
import torch

from dsv3.model.initial import fill_normal
from dsv3.model.transformer import Transformer
from tests.variants import BASE

# Rows shorter than a generator's block, of its size and longer, and of several dimensions.
SHAPES = [(5, 7), (1500, 100), (9, 2**15 + 1), (3, 2**16), (4, 300, 230), (10, 3, 5)]


@pytest.mark.parametrize("shape", SHAPES)
def test_rows_are_the_same_drawn_alone_or_with_all_others(shape, seed):
    whole = torch.full(shape, float("nan"))
    fill_normal(whole, "w", seed=seed, std=0.5)
    cuts = sorted({0, 1, shape[0] // 3, shape[0] // 2, shape[0] - 1, shape[0]})
    for first, end in [*itertools.pairwise(cuts), (1, shape[0]), (2, 2)]:
        part = torch.full((end - first, *shape[1:]), float("nan"), dtype=torch.float64)
        fill_normal(part, "w", seed=seed, std=0.5, first=first)
        assert torch.equal(part.float(), whole[first:end])


def test_names_and_seeds_and_blocks_have_numbers_of_their_own(seed):
    draws = []
    for name, other in (("a", 0), ("b", 0), ("a", 1)):
        x = torch.empty(40, 2**14)
        fill_normal(x, name, seed=seed + other, std=2.0)
        draws += x.split(4)  # the rows of one generator
    stacked = torch.stack(draws).flatten(1)
    assert stacked.std(1).sub(2).abs().max() < 0.05 and stacked.mean(1).abs().max() < 0.05
    correlation = torch.corrcoef(stacked).fill_diagonal_(0)
    assert correlation.abs().max() < 0.03


def test_a_seed_says_all_there_is_to_the_weights(seed):
    models = [Transformer(BASE) for _ in range(2)]
    for model in models:
        model.init_weights(seed)
    assert all(torch.equal(a, b) for a, b in zip(*(m.state_dict().values() for m in models), strict=True))
