from collections import Counter
from fractions import Fraction
from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given

from dsv3.data.batches import SequenceSampler, held_out_windows
from dsv3.data.prepared import PreparedSource
from dsv3.data.shards import Shard
from dsv3.errors import UserError


def source(*shards: np.ndarray, name: str = "a", share: Fraction | int = 1) -> PreparedSource:
    """One whose sides are the same: windows of the one are tested like windows of the other."""
    both = tuple(Shard(Path(f"{name}-{number}"), ids) for number, ids in enumerate(shards))
    return PreparedSource(name, Fraction(share), both, both)


def random_ids(seed: int, size: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 60000, size).astype(np.uint16)


@pytest.mark.parametrize(("batch_size", "seq_len"), [(4, 16), (7, 5), (64, 10)])
def test_an_epoch_shows_every_window_once(seed, batch_size, seq_len):
    tokens = np.random.default_rng(seed).permutation(1003).astype(np.uint16)  # all different: a token is a place
    place = np.argsort(tokens)
    sampler = SequenceSampler([source(tokens)], seq_len, seed)
    count = sampler.windows["a"]
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


def test_windows_of_all_shards_are_shuffled_together_and_none_reaches_into_the_next(seed):
    sizes = [95, 10, 1, 200, 11, 31]  # windows of 10 + 1: 9, 0, 0, 19, 1, 3
    tokens = np.random.default_rng(seed).permutation(sum(sizes)).astype(np.uint16)
    shards = np.split(tokens, np.cumsum(sizes)[:-1])
    sampler = SequenceSampler([source(*shards)], 10, seed)
    assert sampler.windows == {"a": 32}
    rows = [tuple(row) for row in sampler.sequences(0, 32).tolist()]
    expected = {tuple(shard[start : start + 11]) for shard in shards for start in range(0, len(shard) - 10, 10)}
    assert len(expected) == 32 and set(rows) == expected
    of_shard = [next(n for n, shard in enumerate(shards) if row[0] in shard) for row in rows]
    assert of_shard != sorted(of_shard)


def test_the_order_never_changes_between_versions():
    # A run begun under one version of dsv3 or numpy must be resumed under the next with the same batches.
    sources = [
        source(np.arange(31), name="a", share=Fraction(2, 3)),
        source(np.arange(100, 141), name="b", share=Fraction(1, 3)),
    ]
    assert SequenceSampler(sources, 10, 1234).sequences(0, 9)[:, 0].tolist() == [10, 100, 20, 0, 120, 20, 10, 130, 0]


def test_a_batch_larger_than_the_data_holds_several_epochs(seed):
    batch = SequenceSampler([source(np.arange(31, dtype=np.uint16))], 10, seed).sequences(0, 9)
    for epoch in range(3):
        assert sorted(batch[3 * epoch : 3 * epoch + 3, 0].tolist()) == [0, 10, 20]


@pytest.fixture
def mixed(seed) -> list[PreparedSource]:
    shares = (Fraction(1, 2), Fraction(3, 10), Fraction(1, 5))
    sizes = [(5000,), (700, 900), (400,)]
    return [
        source(*(random_ids(seed + size, size) for size in of_source), name=name, share=share)
        for name, of_source, share in zip("abc", sizes, shares, strict=True)
    ]


@pytest.mark.parametrize("number_of_sources", [1, 3])
def test_a_sequence_follows_from_seed_and_number_alone(seed, rng, mixed, number_of_sources):
    sources = mixed if number_of_sources == 3 else [source(random_ids(seed, 5000))]
    ahead = SequenceSampler(sources, 32, seed).sequences(0, 400)
    assert ahead.dtype == torch.int64 and ahead.shape == (400, 33)
    again = SequenceSampler(sources, 32, seed)
    for _ in range(20):  # whatever was asked before, and however the order is cut into batches
        first, count = rng.randrange(390), rng.randint(1, 10)
        assert torch.equal(again.sequences(first, count), ahead[first : first + count])
    assert not torch.equal(SequenceSampler(sources, 32, seed + 1).sequences(0, 400), ahead)
    assert again.sequences(10**12, 8).shape == (8, 33)


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_the_order_does_not_depend_on_the_number_of_ranks(seed, mixed, ranks):
    batch, steps = 24, 5
    own = batch // ranks
    seen = [
        torch.cat([sampler.sequences(step * batch + rank * own, own) for rank, sampler in enumerate(samplers)])
        for samplers in [[SequenceSampler(mixed, 16, seed) for _ in range(ranks)]]
        for step in range(steps)
    ]
    assert torch.equal(torch.cat(seen), SequenceSampler(mixed, 16, seed).sequences(0, steps * batch))


@hypothesis.settings(max_examples=40)
@given(
    weights=st.lists(st.integers(1, 40), min_size=1, max_size=5),
    stretch=st.tuples(st.integers(0, 500), st.integers(1, 500)),
)
def test_sources_take_turns_in_their_shares_over_any_stretch(weights, stretch):
    sources = [
        source(np.full(40, number, np.uint16), name=str(number), share=Fraction(weight, sum(weights)))
        for number, weight in enumerate(weights)
    ]
    first, count = stretch
    sampler = SequenceSampler(sources, 4, 0)
    rows = sampler.sequences(first, count)
    assert (rows == rows[:, :1]).all()
    seen = Counter(rows[:, 0].tolist())
    for number, weight in enumerate(weights):
        assert abs(seen[number] - count * weight / sum(weights)) <= len(weights)
    cycle = Counter(sampler.sequences(first, 3 * sum(weights))[:, 0].tolist())
    assert cycle == {number: 3 * weight for number, weight in enumerate(weights)}


def test_each_source_goes_through_its_own_epochs(seed, mixed):
    sampler = SequenceSampler(mixed, 10, seed)
    rows = sampler.sequences(0, 6000).tolist()
    places = [sampler.place(number) for number in range(5999, 0, -7)][::-1]
    for each in mixed:
        windows = [
            tuple(shard.ids[start : start + 11].tolist())
            for shard in each.train
            for start in range(0, len(shard.ids) - 10, 10)
        ]
        own = [tuple(row) for row in rows if tuple(row) in set(windows)]
        assert len(own) == 6000 * each.share and sampler.windows[each.name] == len(windows)
        for epoch in range(len(own) // len(windows)):
            assert sorted(own[epoch * len(windows) : (epoch + 1) * len(windows)]) == sorted(windows)
        epochs = [place.epoch for place in places if place.source == each.name]
        assert epochs == sorted(epochs) and epochs[-1] == (len(own) - 1) // len(windows)


def test_a_place_is_where_the_sequence_lies(seed, mixed):
    sampler = SequenceSampler(mixed, 24, seed)
    rows = sampler.sequences(1000, 50)
    for number, row in enumerate(rows, start=1000):
        place = sampler.place(number)
        assert place.shard in next(each for each in mixed if each.name == place.source).train
        assert place.offset % 24 == 0 and place.shard.ids[place.offset : place.offset + 25].tolist() == row.tolist()


@pytest.mark.parametrize("batch_size", [1, 3, 50])
def test_held_out_windows_cover_the_text_in_order(seed, batch_size):
    first, second = random_ids(seed, 108), random_ids(seed + 1, 41)
    both = source(first, second[:5], second)
    batches = list(held_out_windows(both, 10, batch_size))
    rows = torch.cat(batches)
    assert rows.dtype == torch.int64 and rows.shape == (14, 11)
    assert rows[:, :-1].flatten().tolist() == [*first[:100], *second[:40]]
    assert rows[:, 1:].flatten().tolist() == [*first[1:101], *second[1:41]]
    assert [len(batch) for batch in batches[:-1]] == [batch_size] * (len(batches) - 1)
    assert torch.equal(torch.cat(list(held_out_windows(both, 10, batch_size, 2))), rows[: 2 * batch_size])


@pytest.mark.parametrize("count", [11, 20])  # a second window would need 21
def test_data_of_one_window_is_enough(seed, count):
    tiny = source(np.arange(count, dtype=np.uint32))
    assert SequenceSampler([tiny], 10, seed).sequences(5, 1).tolist() == [list(range(11))]
    assert [batch.tolist() for batch in held_out_windows(tiny, 10, 4)] == [[list(range(11))]]


@pytest.mark.parametrize("shards", [[10], [], [3, 10, 1]])
def test_too_little_data_and_senseless_sizes_are_errors(seed, shards):
    little = source(*(np.arange(size, dtype=np.uint16) for size in shards), name="few")
    enough = source(np.arange(100, dtype=np.uint16))
    uses = (lambda s: SequenceSampler([enough, little], s, seed), lambda s: next(held_out_windows(little, s, 2)))
    for use in uses:
        says = rf"longest shard of source 'few' has {max(shards, default=0)} tokens, .* seq_len \+ 1 = 11"
        with pytest.raises(UserError, match=says):
            use(10)
        for seq_len in (0, -1):
            with pytest.raises(UserError, match=f"seq_len is {seq_len}"):
                use(seq_len)


def test_shares_of_too_many_digits_are_an_error(seed):
    shares = [Fraction("0.12345678"), 1 - Fraction("0.12345678")]
    sources = [source(np.arange(100), name=name, share=share) for name, share in zip("ab", shares, strict=True)]
    with pytest.raises(UserError, match="give fewer digits"):
        SequenceSampler(sources, 10, seed)
