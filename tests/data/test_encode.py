import itertools
import unicodedata

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

from dsv3.data import encode
from dsv3.data.draws import digest
from dsv3.data.encode import DocumentEncoder, cut_between_tokens, punctuation_and_newline
from dsv3.data.split import Part
from dsv3.data.tokenizer import FIM_BEGIN, FIM_END, FIM_HOLE, Tokenizer


def part(text: str, seed: int, side: str = "train") -> Part:
    return Part(text, "x", side, digest(text, seed))


@pytest.fixture
def parts(write_text, seed) -> list[Part]:
    return [part(write_text(1 + number % 4), seed) for number in range(2000)]


@pytest.fixture(scope="module")
def coder() -> Tokenizer:
    """A tokenizer that has merged punctuation with line ends."""
    code = "def f(a, b):\n    return {'x': (a),}\n\nclass C {\n  int a[] = {1};\r\n};\n\nSaid \"x!\"\n\n中文。\n"
    return Tokenizer.train([code] * 50, 500)


def marks(tokenizer: Tokenizer) -> list[int]:
    return [tokenizer.special_id(token) for token in (FIM_BEGIN, FIM_HOLE, FIM_END)]


def test_without_fim_and_splitting_a_document_is_its_text_and_eos(tokenizer, parts):
    encoded = DocumentEncoder(tokenizer, 0, 0).encode(parts[:50])
    assert [ids.tolist() for ids in encoded] == [tokenizer.encode(part.text, eos=True) for part in parts[:50]]


def test_a_tokenizer_that_asks_for_bos_gets_it(tokenizer, parts, tmp_path):
    asking = Tokenizer(tokenizer._backend, add_bos_token=True)
    for rate in (0, 1):
        for ids in DocumentEncoder(asking, rate, 0).encode(parts[:20]):
            assert ids[0] == tokenizer.bos_id and (ids == tokenizer.bos_id).sum() == 1 and ids[-1] == tokenizer.eos_id


def test_a_large_vocabulary_takes_four_bytes_an_id(tokenizer, parts, monkeypatch):
    monkeypatch.setattr(tokenizer, "vocab_size", 65537)
    assert DocumentEncoder(tokenizer, 0, 0).encode(parts[:1])[0].dtype == np.uint32
    monkeypatch.setattr(tokenizer, "vocab_size", 65536)
    assert DocumentEncoder(tokenizer, 0, 0).encode(parts[:1])[0].dtype == np.uint16


def test_fim_is_prefix_suffix_middle_at_the_rate(tokenizer, parts):
    begin, hole, end = marks(tokenizer)
    eos = tokenizer.eos_id
    cuts = []
    for part_, ids in zip(parts, DocumentEncoder(tokenizer, 0.1, 0).encode(parts), strict=True):
        row = ids.tolist()
        if begin not in row:
            assert row == tokenizer.encode(part_.text, eos=True)
            continue
        assert row[0] == begin and row[-1] == eos and [row.count(mark) for mark in (begin, hole, end, eos)] == [1] * 4
        at_hole, at_end = row.index(hole), row.index(end)
        pieces = [row[1:at_hole], row[at_hole + 1 : at_end], row[at_end + 1 : -1]]
        prefix, suffix, middle = map(tokenizer.decode, pieces)
        assert prefix + middle + suffix == part_.text
        assert pieces == [tokenizer.encode(text) for text in (prefix, suffix, middle)]
        cuts += [(len(prefix) + 0.5) / (len(part_.text) + 1), (len(prefix + middle) + 0.5) / (len(part_.text) + 1)]
    assert 140 < len(cuts) / 2 < 260  # 200 of 2000 expected, standard deviation 13
    assert abs(np.mean(cuts) - 0.5) < 0.06 and min(cuts) < 0.1 and max(cuts) > 0.9  # uniform: anywhere in the text
    assert np.mean(cuts[::2]) == pytest.approx(1 / 3, abs=0.08)


@pytest.mark.parametrize(("rate", "share"), [(0, 0), (1, 1)])
def test_fim_rates_of_none_and_all(tokenizer, parts, rate, share):
    encoded = DocumentEncoder(tokenizer, rate, 0).encode(parts[:300])
    assert sum(marks(tokenizer)[0] in ids for ids in encoded) == share * 300


def test_held_out_text_is_left_as_it_is(coder, write_text, seed):
    parts = [part(write_text(2) + "};\n\n", seed, "held_out") for _ in range(20)]
    assert any(token in punctuation_and_newline(coder) for token in coder.encode(parts[0].text))
    encoded = DocumentEncoder(coder, 1, 1).encode(parts)
    assert [ids.tolist() for ids in encoded] == [coder.encode(part.text, eos=True) for part in parts]


def test_choices_follow_from_text_and_seed_alone(tokenizer, parts, rng, seed):
    encoder = DocumentEncoder(tokenizer, 0.3, 0.3)
    whole = [ids.tolist() for ids in encoder.encode(parts[:200])]
    order = rng.sample(range(200), 200)
    assert [ids.tolist() for ids in encoder.encode([parts[i] for i in order])] == [whole[i] for i in order]
    other = encoder.encode([part(part_.text, seed + 1) for part_ in parts[:200]])
    assert [ids.tolist() for ids in other] != whole


def test_tokens_of_punctuation_and_newline_are_found(coder):
    found = punctuation_and_newline(coder)
    texts = {coder.decode([token]): [coder.decode([half]) for half in halves] for token, halves in found.items()}
    assert texts["};\n\n"] == ["};", "\n\n"] and texts[" {\n"] == [" {", "\n"]
    assert texts["};\r\n"] == ["};", "\r\n"] and texts["),}\n\n"] == ["),", "}", "\n\n"]
    assert texts["。\n"][-1] == "\n"
    for token in range(coder.vocab_size):
        text = coder.decode_bytes([token]).decode(errors="surrogateescape")  # parts of a character are no punctuation
        body = text.rstrip("\r\n").removeprefix(" ")
        merged = body and body != text.removeprefix(" ") and all(unicodedata.category(c)[0] in "PS" for c in body)
        assert (token in found) == bool(merged), repr(text)
    for token, halves in found.items():
        assert coder.decode_bytes(halves) == coder.decode_bytes([token])


@pytest.mark.parametrize("rate", [0.0, 0.25, 1.0])
def test_a_share_of_them_is_split_and_the_text_stays(coder, rng, seed, rate):
    pieces = ["def f(a):\n", "};\n\n", "x = {1};\r\n", "中文。\n", "said\n", "ok\n\n", " {\n"]
    texts = ["".join(rng.choices(pieces, k=40)) for _ in range(200)]
    whole = [coder.encode(text, eos=True) for text in texts]
    halves = punctuation_and_newline(coder)
    splittable = split = 0
    for text, before, ids in zip(
        texts, whole, DocumentEncoder(coder, 0, rate).encode([part(text, seed) for text in texts]), strict=True
    ):
        after = ids.tolist()
        assert coder.decode(after) == text
        while before:  # walk both: each token is as it was, or in its halves
            token = before.pop(0)
            if after[0] == token:
                after.pop(0)
            else:
                assert after[: len(halves[token])] == halves[token]
                del after[: len(halves[token])]
                split += 1
            splittable += token in halves
        assert not after
    assert splittable > 3000
    assert split / splittable == pytest.approx(rate, abs=0.04 if 0 < rate < 1 else 0)


def test_fim_and_splitting_go_together(coder, rng, seed):
    text = "};\n\n" * 30
    ids = DocumentEncoder(coder, 1, 1).encode([part(text, seed)])[0].tolist()
    assert marks(coder)[0] == ids[0] and not set(ids) & set(punctuation_and_newline(coder))
    _, hole, end = marks(coder)
    prefix, suffix = ids[: ids.index(hole)], ids[ids.index(hole) : ids.index(end)]
    assert coder.decode(prefix) + coder.decode(ids[ids.index(end) :]) + coder.decode(suffix) == text


awkward = st.lists(
    st.one_of(
        st.text(max_size=8),
        st.sampled_from(
            ["\n", "\n\n", " \n", "\r\n", "a", "é", "中", "1234", "_x", ".join", "  ", "\u2028", "\x1c", "\u0301"]
        ),
    ),
    max_size=30,
).map("".join)


@hypothesis.settings(suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture])
@given(text=awkward, size=st.integers(0, 6))
def test_text_is_cut_only_between_tokens(tokenizer, text, size):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encode, "_STRETCH_CHARACTERS", size)
        stretches = list(cut_between_tokens(text))
    assert "".join(stretches) == text
    assert list(itertools.chain(*tokenizer.encode_batch(stretches))) == tokenizer.encode(text)


def test_text_is_cut_between_tokens_of_the_released_tokenizer_too(released, write_text, monkeypatch):
    monkeypatch.setattr(encode, "_STRETCH_CHARACTERS", 20)
    tokenizer = Tokenizer.load(released)
    text = write_text(300) + "".join(f"x = {{\r\n\n{i}}};\n\n{i}\n_a\n\tb\n中\n" for i in range(100))
    stretches = list(cut_between_tokens(text))
    assert len(stretches) > 150
    assert list(itertools.chain(*tokenizer.encode_batch(stretches))) == tokenizer.encode(text)


def test_a_long_document_is_cut_to_be_encoded_on_all_cores(tokenizer, write_text, monkeypatch, seed):
    monkeypatch.setattr(encode, "_STRETCH_CHARACTERS", 500)
    text = write_text(200)
    assert len(list(cut_between_tokens(text))) > 10
    for rate in (0, 1):
        ids = DocumentEncoder(tokenizer, rate, 0).encode([part(text, seed)])[0]
        assert tokenizer.token_bytes[ids].sum() == len(text.encode())
