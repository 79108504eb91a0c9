import itertools
import random

import hypothesis.strategies as st
import pytest
from hypothesis import given

from dsv3.data.draws import digest
from dsv3.data.formats import Document
from dsv3.data.split import Part, Split, cut_at_lines, plan_split
from dsv3.errors import UserError


def numbered(write_text, count: int) -> list[Document]:
    return [Document(write_text(2), str(number)) for number in range(count)]


def plan(documents: list[Document], fraction: float, seed: int, **others: list[Document]) -> Split:
    sources = {"main": documents, **others}
    return plan_split({name: lambda name=name: iter(sources[name]) for name in sources}, fraction, seed)


def divide(documents: list[Document], split: Split) -> tuple[list[str], list[str]]:
    """The texts of the training and of the held-out side."""
    parts = [part for document in documents for part in split.parts(document)]
    return tuple([part.text for part in parts if part.side == side] for side in ("train", "held_out"))


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
    split = plan(documents, fraction, seed)
    sides = [split.parts(document) for document in documents]
    for document, parts in zip(documents, sides, strict=True):
        side = parts[0].side
        assert parts == [Part(document.text, document.origin, side, digest(document.text, seed))]
    held_out = sum(parts[0].side == "held_out" for parts in sides)
    assert held_out / 600 == pytest.approx(fraction, abs=0.1 if fraction > 0.1 else 0.04)


def test_copies_share_a_side_in_whatever_order(write_text, rng, seed):
    documents = numbered(write_text, 60)
    copies = [Document(document.text, f"copy {document.origin}") for document in documents]
    train, held_out = divide(documents + copies, plan(documents + copies, 0.3, seed))
    assert not set(train) & set(held_out)
    shuffled = rng.sample(documents, len(documents))
    assert set(divide(shuffled, plan(shuffled, 0.3, seed))[1]) == set(held_out)


def test_a_growing_corpus_moves_no_document(write_text, seed):
    documents = numbered(write_text, 200)
    before = divide(documents[:100], plan(documents[:100], 0.3, seed))
    after = divide(documents[:100], plan(documents, 0.3, seed))
    assert before == after


def test_another_seed_holds_out_other_documents(write_text, seed):
    documents = numbered(write_text, 100)
    assert divide(documents, plan(documents, 0.3, seed)) != divide(documents, plan(documents, 0.3, seed + 1))


@pytest.mark.parametrize("count", [20, 21, 40])
def test_neither_side_is_ever_empty(write_text, count):
    documents = numbered(write_text, count)
    for seed in range(20):
        for fraction in (0.05, 0.9999):
            train, held_out = divide(documents, plan(documents, fraction, seed))
            assert train and held_out


@pytest.mark.parametrize("lines", [20, 100, 2000])
def test_one_text_is_cut_at_lines_and_nothing_is_lost_or_shared(write_text, seed, lines):
    text = "".join(f"{number} {line}\n" for number, line in enumerate(write_text(lines).splitlines()))
    book = [Document(text, "book")]
    split = plan(book, 0.05, seed)
    train, held_out = divide(book, split)
    assert all(text.count(run) == 1 and run.endswith("\n") for run in train + held_out)
    assert "".join(part.text for part in split.parts(book[0])) == text
    assert 0 < sum(map(len, held_out)) / len(text) < 0.4
    assert all(part.digest == digest(part.text, seed) for part in split.parts(book[0]))
    # Neighbouring pieces are joined: the sides of the runs alternate.
    sides = [part.side for part in split.parts(book[0])]
    assert all(one != other for one, other in itertools.pairwise(sides))


def test_few_large_documents_are_cut_too(write_text, seed):
    documents = [Document(write_text(400), str(number)) for number in range(3)]
    _, held_out = divide(documents, plan(documents, 0.05, seed))
    assert sum(map(len, held_out)) < 0.3 * sum(len(document.text) for document in documents)


def test_text_without_lines_is_cut_at_spaces(seed):
    words = [Document(" ".join(str(random.Random(seed + i).random()) for i in range(1000)), "one line")]
    train, held_out = divide(words, plan(words, 0.05, seed))
    assert train and held_out
    assert sum(map(len, train + held_out)) == len(words[0].text)


def test_no_text_is_on_different_sides_of_two_sources(write_text, seed):
    """A book on its own is cut; whole in another source, among many, it must be cut in the same way."""
    book = Document(write_text(300), "book")
    library = [*numbered(write_text, 50), Document(book.text, "book again")]
    split = plan(library, 0.1, seed, small=[book], other=numbered(write_text, 30))
    assert len(split.parts(book)) > 1
    sides = [[(part.text, part.side) for part in split.parts(document)] for document in (book, library[-1])]
    assert sides[0] == sides[1]
    for documents in (library, [book]):
        assert all(divide(documents, split))


def test_a_text_that_changed_sides_for_one_source_did_so_for_all(write_text):
    """The one document that a source of 25 holds out because chance held out none."""
    for seed in range(40):
        first, second = numbered(write_text, 25), numbered(write_text, 300)
        split = plan(second, 0.04, seed, first=first)
        if split.flipped:
            moved = [document for document in first if digest(document.text, seed) in split.flipped]
            assert len(moved) == len(split.flipped) == 1 and divide(moved, split) == ([], [moved[0].text])
            break
    else:
        pytest.fail("chance never held out nothing in 40 attempts")


def test_a_large_source_is_not_read_to_its_end_and_only_once(write_text, seed):
    read = []

    def documents():
        for number in range(5000):
            read.append(number)
            yield Document(f"{number} {seed}", "x")

    split = plan_split({"large": documents}, 0.1, seed)
    assert not split.flipped and not split.cut and len(read) < 400


def test_a_split_survives_json(write_text, seed):
    documents = [Document(write_text(100), str(number)) for number in range(3)]
    split = plan(documents, 0.01, seed)
    again = Split.from_json(split.to_json())
    assert again == split and split.cut
    assert [again.parts(document) for document in documents] == [split.parts(document) for document in documents]


@pytest.mark.parametrize("text", ["too short", "\n" * 100])
def test_too_little_text_is_an_error(text, seed):
    with pytest.raises(UserError, match=r"source 'main' has .* give at least 512"):
        plan([Document(text, "x")], 0.05, seed)
