from collections import Counter

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given

from dsv3.data.batches import SequenceSampler, held_out_windows, shuffled
from dsv3.errors import UserError


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


@pytest.mark.parametrize(("batch_size", "seq_len"), [(4, 16), (7, 5), (64, 10)])
def test_an_epoch_shows_every_window_once(seed, batch_size, seq_len):
    tokens = np.random.default_rng(seed).permutation(1003).astype(np.uint16)  # all different: a token is a place
    place = np.argsort(tokens)
    sampler = SequenceSampler(tokens, seq_len, seed)
    count = sampler.num_windows
    assert count == 1002 // seq_len
    rows = torch.cat([sampler.sequences(first, batch_size) for first in range(0, 3 * count, batch_size)]).numpy()
    starts = place[rows[:, 0]]
    assert (place[rows] == starts[:, None] + np.arange(seq_len + 1)).all()
    orders = []
    for epoch in range(3):  # at times a batch ends one epoch and begins the next
        order = starts[epoch * count : (epoch + 1) * count]
        assert sorted(order) == [seq_len * window for window in range(count)]
        orders.append(order.tolist())
    assert orders[0] != orders[1] != orders[2]


def test_a_batch_larger_than_the_data_holds_several_epochs(seed):
    tokens = np.arange(31, dtype=np.uint16)  # 3 windows of 10
    batch = SequenceSampler(tokens, 10, seed).sequences(0, 9)
    for epoch in range(3):
        assert sorted(batch[3 * epoch : 3 * epoch + 3, 0].tolist()) == [0, 10, 20]


def test_a_sequence_follows_from_seed_and_number_alone(seed, rng):
    tokens = np.random.default_rng(seed).integers(0, 60000, 5000).astype(np.uint16)
    ahead = SequenceSampler(tokens, 32, seed).sequences(0, 400)
    assert ahead.dtype == torch.int64 and ahead.shape == (400, 33)
    again = SequenceSampler(tokens, 32, seed)
    for _ in range(20):  # whatever was asked before, and however the order is cut into batches
        first, count = rng.randrange(390), rng.randint(1, 10)
        assert torch.equal(again.sequences(first, count), ahead[first : first + count])
    assert not torch.equal(SequenceSampler(tokens, 32, seed + 1).sequences(0, 400), ahead)
    assert again.sequences(10**15, 8).shape == (8, 33)


def test_the_order_never_changes_between_versions():
    # A run begun under one version of dsv3 or numpy must be resumed under the next with the same batches.
    assert whole_order(10, 0, 1234) == [6, 7, 9, 0, 4, 1, 5, 8, 2, 3]


@pytest.mark.parametrize("batch_size", [1, 3, 50])
def test_held_out_windows_cover_the_text_in_order(seed, batch_size):
    tokens = np.random.default_rng(seed).integers(0, 60000, 108).astype(np.uint16)
    batches = list(held_out_windows(tokens, 10, batch_size))
    rows = torch.cat(batches)
    assert rows.dtype == torch.int64 and rows.shape == (10, 11)
    assert rows[:, :-1].flatten().tolist() == tokens[:100].tolist()
    assert rows[:, 1:].flatten().tolist() == tokens[1:101].tolist()
    assert [len(batch) for batch in batches[:-1]] == [batch_size] * (len(batches) - 1)
    assert torch.equal(torch.cat(list(held_out_windows(tokens, 10, batch_size, 2))), rows[: 2 * batch_size])


@pytest.mark.parametrize("count", [11, 20])  # a second window would need 21
def test_data_of_one_window_is_enough(seed, count):
    tokens = np.arange(count, dtype=np.uint32)
    assert SequenceSampler(tokens, 10, seed).sequences(5, 1).tolist() == [list(range(11))]
    assert [batch.tolist() for batch in held_out_windows(tokens, 10, 4)] == [[list(range(11))]]


def test_too_little_data_and_senseless_sizes_are_errors(seed):
    tokens = np.arange(10, dtype=np.uint16)
    for use in (lambda seq_len: SequenceSampler(tokens, seq_len, seed), lambda s: next(held_out_windows(tokens, s, 2))):
        with pytest.raises(UserError, match=r"has 10 tokens, fewer than one window of seq_len \+ 1 = 11"):
            use(10)
        for seq_len in (0, -1):
            with pytest.raises(UserError, match=f"seq_len is {seq_len}"):
                use(seq_len)
