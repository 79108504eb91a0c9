import random

import hypothesis.strategies as st
import pytest
from hypothesis import given

from dsv3.data.corpus import Document
from dsv3.data.split import cut_at_lines, split_held_out
from dsv3.errors import UserError


def texts(documents: list[Document]) -> list[str]:
    return [document.text for document in documents]


def numbered(write_text, count: int) -> list[Document]:
    return [Document(write_text(2), str(number)) for number in range(count)]


@given(text=st.text(alphabet="ab \n\r\u2028é", max_size=200), size=st.integers(1, 30))
def test_pieces_join_to_the_text_and_keep_to_the_size(text, size):
    pieces = cut_at_lines(text, size)
    assert "".join(pieces) == text
    assert all(1 <= len(piece) <= size + 1 for piece in pieces)


def test_pieces_end_at_lines_then_at_spaces(write_text):
    text = write_text(100)
    assert all(piece.endswith("\n") for piece in cut_at_lines(text, 200))
    assert all(piece.endswith(" ") for piece in cut_at_lines("word " * 100, 33))


@pytest.mark.parametrize("fraction", [0.05, 0.3, 0.9])
def test_every_document_is_on_one_side_in_about_the_fraction(write_text, seed, fraction):
    documents = numbered(write_text, 600)
    train, held_out = split_held_out(documents, fraction, seed=seed)
    assert sorted(train + held_out, key=lambda d: int(d.source)) == documents
    assert len(held_out) / 600 == pytest.approx(fraction, abs=0.1 if fraction > 0.1 else 0.04)


def test_copies_share_a_side_and_order_does_not_matter(write_text, rng, seed):
    documents = numbered(write_text, 60)
    copies = [Document(document.text, f"copy {document.source}") for document in documents]
    train, held_out = split_held_out(documents + copies, 0.3, seed=seed)
    assert not set(texts(train)) & set(texts(held_out))
    shuffled = rng.sample(documents, len(documents))
    assert set(texts(split_held_out(shuffled, 0.3, seed=seed)[1])) == set(texts(held_out))


def test_a_growing_corpus_moves_no_document(write_text, seed):
    documents = numbered(write_text, 200)
    _, before = split_held_out(documents[:100], 0.3, seed=seed)
    _, after = split_held_out(documents, 0.3, seed=seed)
    assert [document for document in after if int(document.source) < 100] == before


def test_another_seed_holds_out_other_documents(write_text, seed):
    documents = numbered(write_text, 100)
    assert split_held_out(documents, 0.3, seed=seed) != split_held_out(documents, 0.3, seed=seed + 1)


@pytest.mark.parametrize("count", [20, 21, 40])
def test_neither_side_is_ever_empty(write_text, count):
    documents = numbered(write_text, count)
    for seed in range(20):
        for fraction in (0.05, 0.9999):
            train, held_out = split_held_out(documents, fraction, seed=seed)
            assert train and held_out


@pytest.mark.parametrize("lines", [20, 100, 2000])
def test_one_text_is_cut_at_lines_and_nothing_is_lost_or_shared(write_text, seed, lines):
    text = "".join(f"{number} {line}\n" for number, line in enumerate(write_text(lines).splitlines()))
    train, held_out = split_held_out([Document(text, "book")], seed=seed)
    runs = texts(train) + texts(held_out)
    assert all(text.count(run) == 1 and run.endswith("\n") for run in runs)
    assert sorted("".join(runs).splitlines()) == sorted(text.splitlines())
    share = sum(map(len, texts(held_out))) / len(text)
    assert 0 < share < 0.4
    # Neighbouring pieces are joined: two runs of one side never touch.
    assert all(
        first + second not in text for side in (train, held_out) for first in texts(side) for second in texts(side)
    )


def test_few_large_documents_are_cut_too(write_text, seed):
    documents = [Document(write_text(400), str(number)) for number in range(3)]
    _, held_out = split_held_out(documents, seed=seed)
    assert sum(map(len, texts(held_out))) < 0.3 * sum(map(len, texts(documents)))


def test_text_without_lines_is_cut_at_spaces(seed):
    words = " ".join(str(random.Random(seed).random()) for _ in range(1000))
    train, held_out = split_held_out([Document(words, "one line")], seed=seed)
    assert train and held_out
    assert sum(map(len, texts(train + held_out))) == len(words)


@pytest.mark.parametrize("text", ["too short", "\n" * 100])
def test_too_little_text_is_an_error(text, seed):
    with pytest.raises(UserError, match="give at least 512"):
        split_held_out([Document(text, "x")], seed=seed)


@pytest.mark.parametrize("fraction", [0, 1, -0.1, 5, float("nan")])
def test_a_fraction_outside_0_and_1_is_an_error(fraction, seed):
    with pytest.raises(UserError, match="between 0 and 1"):
        split_held_out([Document("x\n" * 1000, "x")], fraction, seed=seed)
