from collections import Counter

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

from dsv3.data.draws import digest, shuffled, uniform


def whole_order(count: int, epoch: int, seed: int) -> list[int]:
    positions = np.arange(count, dtype=np.uint64)
    return shuffled(positions, np.full_like(positions, epoch), count, seed).tolist()


@given(count=st.integers(1, 700), epoch=st.integers(0, 2**40), seed=st.integers(-(2**70), 2**70))
def test_shuffled_is_a_permutation(count, epoch, seed):
    assert sorted(whole_order(count, epoch, seed)) == list(range(count))


@pytest.mark.parametrize("count", [64, 65, 4096, 4097, 50_000])
def test_shuffled_is_a_permutation_at_and_past_powers_of_two(count, seed):
    assert sorted(whole_order(count, 0, seed)) == list(range(count))


def test_each_position_depends_on_itself_alone(seed):
    order = whole_order(1000, 3, seed)
    for position in (0, 17, 999):
        one = shuffled(np.array([position], np.uint64), np.array([3], np.uint64), 1000, seed)
        assert one.tolist() == [order[position]]


def test_every_order_of_four_is_about_equally_likely(seed):
    epochs, positions = np.meshgrid(np.arange(4800, dtype=np.uint64), np.arange(4, dtype=np.uint64), indexing="ij")
    orders = Counter(map(tuple, shuffled(positions, epochs, 4, seed).tolist()))
    assert len(orders) == 24
    assert all(120 < times < 290 for times in orders.values()), orders  # 200 expected, standard deviation 14


def test_orders_of_epochs_and_seeds_are_unrelated(seed):
    first = np.array(whole_order(5000, 0, seed), float)
    for other in (whole_order(5000, 1, seed), whole_order(5000, 0, seed + 1), range(5000)):
        assert abs(np.corrcoef(first, np.array(other, float))[0, 1]) < 0.1
    assert abs(np.corrcoef(first[1:], first[:-1])[0, 1]) < 0.1


def test_draws_never_change_between_versions():
    # A run or a preparation begun under one version of dsv3, numpy or Python must go on under the next as it began.
    assert whole_order(10, 0, 1234) == [6, 7, 9, 0, 4, 1, 5, 8, 2, 3]
    assert digest("Straße 中文\n", 5) == 0xB0176B23D86E4587
    assert uniform(77, np.arange(3, dtype=np.uint64)).tolist() == [
        0.855470261620553,
        0.6114801638399083,
        0.0026236267209615027,
    ]


def test_uniform_numbers_are_uniform_and_unrelated_to_those_of_other_keys(seed):
    index = np.arange(20_000, dtype=np.uint64)
    first, second = uniform(seed, index), uniform(seed + 1, index)
    assert first.min() >= 0 and first.max() < 1
    for draws in (first, second):
        counts = np.histogram(draws, bins=20, range=(0, 1))[0]
        assert abs(counts - 1000).max() < 160  # standard deviation 31
    for one, other in ((first, second), (first[1:], first[:-1])):
        assert abs(np.corrcoef(one, other)[0, 1]) < 0.04
    assert uniform(seed, index[500:501])[0] == first[500], "a draw depends on the draws around it"


def test_digests_depend_on_text_and_seed(seed):
    texts = ["", "a", "a ", "A", "b" * 10_000]
    digests = {digest(text, key) for text in texts for key in (seed, seed + 1)}
    assert len(digests) == 10 and all(0 <= value < 2**64 for value in digests)
