"""Text as it comes: whole characters, and never a part of what may become a stop string."""

from __future__ import annotations

import random

import pytest

from dsv3.serve.detokenize import TextStream
from dsv3.serve.outputs import Token


def expected_cut(tokenizer, ids: list[int], stops: tuple[str, ...]) -> tuple[int, str] | None:
    """Where the text ends and by which stop string, reading token by token as the stream has to."""
    for count in range(1, len(ids) + 1):
        text = tokenizer.decode_bytes(ids[:count]).decode(errors="ignore")
        places = [(text.find(stop), stop) for stop in stops if stop in text]
        if places:
            return min(places)
    return None


def run(tokenizer, ids: list[int], stops: tuple[str, ...]) -> tuple[str, list[int], str | None, list[str]]:
    stream = TextStream(tokenizer, stops)
    shown, out, found = "", [], None
    texts = []
    for index in ids:
        found = stream.add(Token(index))
        if found is not None:
            break
        text, tokens = stream.take()
        shown += text
        out += tokens
        texts.append(shown)
    text, tokens = stream.finish()
    return shown + text, [token.id for token in [*out, *tokens]], found, texts


@pytest.mark.parametrize("text", ["the value of the number", "日本語 the 🎈🎈 value", "aaaabaaab", "{[[[\n\n]]]}"])
def test_no_stop_string_leaks_at_any_moment(text, tokenizer, seed):
    rng = random.Random(seed)
    whole = tokenizer.encode(text)
    pieces = [tokenizer.encode(character) for character in text]
    for ids in (whole, [index for piece in pieces for index in piece]):
        for _ in range(60):
            stops = []
            for _ in range(rng.randrange(1, 4)):
                start = rng.randrange(len(text))
                stop = text[start : start + rng.randrange(1, 7)]
                stops.append(stop if rng.random() < 0.6 else stop + rng.choice("xe🎈"))
            cut = expected_cut(tokenizer, ids, tuple(stops))
            shown, tokens, found, moments = run(tokenizer, ids, tuple(stops))
            assert shown == (text if cut is None else text[: cut[0]]) and found == (cut[1] if cut else None)
            assert all(shown.startswith(moment) for moment in moments)
            # The tokens are those of the text that is out: the last one may reach into the stop string.
            assert tokens == ids[: len(tokens)] and tokenizer.decode(tokens).startswith(shown[:-1])
            if cut is None:
                assert tokens == ids
            elif tokens:
                assert len(tokenizer.decode_bytes(tokens[:-1]).decode(errors="ignore")) < max(cut[0], 1)


@pytest.mark.parametrize("taken_between", [False, True])
def test_a_token_without_text_shows_whenever_it_was_taken(taken_between, tokenizer):
    """Before a stop string it shows and inside one it does not, however many tokens come in a step."""
    a, b, c = (tokenizer.encode(letter)[0] for letter in "abc")
    stream = TextStream(tokenizer, ("bc",))
    out = []
    for index in (a, tokenizer.eos_id, b, tokenizer.eos_id, c):
        found = stream.add(Token(index))
        if taken_between and found is None:
            out += stream.take()[1]
    assert found == "bc"
    out += stream.finish()[1]
    assert [token.id for token in out] == [a, tokenizer.eos_id]


def test_text_that_cannot_become_a_stop_string_is_out_at_once(tokenizer):
    stream = TextStream(tokenizer, ("ab!", "b?"))
    shown = []
    for character in "xaabxab":
        (index,) = tokenizer.encode(character)
        assert stream.add(Token(index)) is None
        shown.append(stream.take()[0])
    assert shown == ["x", "", "a", "", "abx", "", ""]
    assert stream.finish() == ("ab", tuple(Token(tokenizer.encode(c)[0]) for c in "ab"))


def test_characters_are_whole_and_broken_ones_are_replaced_at_the_end(tokenizer):
    ids = tokenizer.encode("日é")
    stream = TextStream(tokenizer, ())
    shown = ""
    for index in ids[:-1]:
        stream.add(Token(index))
        shown += stream.take()[0]
    assert "\N{REPLACEMENT CHARACTER}" not in shown
    assert (shown + stream.finish()[0]).endswith("\N{REPLACEMENT CHARACTER}")


def test_stop_strings_do_not_count_before_they_may(tokenizer):
    stream = TextStream(tokenizer, ("a", "bc"))
    found = []
    for count, character in enumerate("abcabc"):
        found.append(stream.add(Token(tokenizer.encode(character)[0]), may_stop=count >= 4))
    assert found[:5] == [None] * 5 and found[5] == "bc"
    assert stream.finish()[0] == "abca"


def test_an_end_token_has_no_text_and_comes_last(tokenizer):
    stream = TextStream(tokenizer, ())
    (letter,) = tokenizer.encode("x")
    stream.add(Token(letter))
    stream.add(Token(letter), ends=True)
    assert stream.finish() == ("x", (Token(letter), Token(letter)))


def test_special_tokens_have_text_only_if_asked_for(tokenizer):
    for skip, text in ((True, ""), (False, "<｜User｜>")):
        stream = TextStream(tokenizer, (), skip_special=skip)
        stream.add(Token(tokenizer.special_id("<｜User｜>")))
        assert stream.finish()[0] == text


def test_without_a_tokenizer_tokens_pass_at_once():
    stream = TextStream(None, ())
    stream.add(Token(3))
    assert stream.take() == ("", (Token(3),))
