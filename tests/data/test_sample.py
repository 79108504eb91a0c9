import pytest

from dsv3.data.sample import TextSample


def sample(texts: list[str], characters: int, seed: int) -> list[str]:
    kept = TextSample(characters, seed)
    for text in texts:
        kept.add(text)
    return kept.texts()


def test_what_fits_is_kept_whole_and_in_order(write_text, seed):
    texts = [write_text(lines) for lines in (3, 400, 20)]
    assert "".join(sample(texts, sum(map(len, texts)), seed)) == "".join(texts)


def test_a_large_stream_is_sampled_evenly(write_text, seed):
    texts = [f"{number}\n" * 30 for number in range(4000)]
    total = sum(map(len, texts))
    kept = sample(texts, total // 4, seed)
    assert set(kept) <= set(texts) and [int(text.split()[0]) for text in kept] == sorted(
        int(text.split()[0]) for text in kept
    )
    assert total // 4 - 500 < sum(map(len, kept)) <= total // 4
    kept_numbers = [int(text.split()[0]) for text in kept]
    for start in range(0, 4000, 1000):  # 250 expected of each quarter, standard deviation 14
        assert 180 < sum(start <= number < start + 1000 for number in kept_numbers) < 320


def test_a_long_text_is_sampled_in_pieces(write_text, seed):
    text = write_text(4000)
    kept = sample([text], len(text) // 3, seed)
    assert len(kept) > 3 and all(piece in text and len(piece) <= 8193 for piece in kept)
    assert sum(map(len, kept)) == pytest.approx(len(text) / 3, abs=8193)


def test_the_sample_depends_on_the_stream_and_the_seed_alone(write_text, seed):
    texts = [write_text(5) for _ in range(200)]
    size = sum(map(len, texts)) // 5
    assert sample(texts, size, seed) == sample(texts, size, seed)
    # Which texts are the last to fit depends on the order, no more.
    assert len(set(sample(texts[::-1], size, seed)) ^ set(sample(texts, size, seed))) < 8
    assert set(sample(texts, size, seed + 1)) != set(sample(texts, size, seed))
