"""Documents to token ids, as the report trains on them (section 4.1): FIM, split tokens, an EOS behind each document.

Packing puts documents one behind the other. The EOS of the one before marks the beginning of the next, so there is
a BOS only for a tokenizer that asks for it, as the release's does. FIM and splitting are done here, when data is
prepared, and not when it is loaded: both change the length of a document, and only where lengths are fixed can
training sequence n be found without reading all that comes before it. Which documents and tokens are changed
follows from the text and the seed. Held-out text is left as it is.
"""

from __future__ import annotations

import itertools
import re
import unicodedata
from collections.abc import Iterator, Sequence

import numpy as np

from dsv3.data.draws import uniform
from dsv3.data.split import Part
from dsv3.data.tokenizer import FIM_BEGIN, FIM_END, FIM_HOLE, Tokenizer

# What a document's draws are for.
_FIM, _FIM_CUTS, _SPLIT = 0, [1, 2], 3

_STRETCH_CHARACTERS = 1 << 16
# A newline before a word character always ends a token, so text may be cut there without a change of its ids.
_BETWEEN_TOKENS = re.compile(r"\n(?=\w)")


class DocumentEncoder:
    """Encodes documents with one tokenizer at given rates; `dtype` of the ids is uint16 where they fit, else uint32."""

    def __init__(self, tokenizer: Tokenizer, fim_rate: float, split_rate: float) -> None:
        self._tokenizer = tokenizer
        self._fim_rate = fim_rate
        self._split_rate = split_rate
        self._begins_with_bos = tokenizer.document_start_id == tokenizer.bos_id
        self._halves = punctuation_and_newline(tokenizer) if split_rate else {}
        self._has_halves_V = np.zeros(tokenizer.vocab_size, bool)
        self._has_halves_V[list(self._halves)] = True
        self.dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32)

    def encode(self, parts: Sequence[Part]) -> list[np.ndarray]:
        """The ids [n] of each part, EOS included; all of them are encoded in parallel."""
        layouts = [self._layout(part) for part in parts]
        texts = [item for layout in layouts for item in layout if isinstance(item, str)]
        encoded = iter(self._tokenizer.encode_batch(texts))
        return [self._assemble(part, layout, encoded) for part, layout in zip(parts, layouts, strict=True)]

    def _layout(self, part: Part) -> list[str | int]:
        """The stretches of text and the special ids of which the document is made."""
        special, text = self._tokenizer.special_id, part.text
        layout: list[str | int] = [self._tokenizer.bos_id] if self._begins_with_bos else []
        if part.side == "held_out" or _draw(part, [_FIM])[0] >= self._fim_rate:
            layout += cut_between_tokens(text)
        else:
            start, end = sorted((_draw(part, _FIM_CUTS) * (len(text) + 1)).astype(int).tolist())
            layout += [special(FIM_BEGIN), *cut_between_tokens(text[:start])]
            layout += [special(FIM_HOLE), *cut_between_tokens(text[end:])]
            layout += [special(FIM_END), *cut_between_tokens(text[start:end])]
        return [*layout, self._tokenizer.eos_id]

    def _assemble(self, part: Part, layout: list[str | int], encoded: Iterator[list[int]]) -> np.ndarray:
        pieces = [[item] if isinstance(item, int) else next(encoded) for item in layout]
        ids = np.fromiter(itertools.chain.from_iterable(pieces), self.dtype)
        return ids if part.side == "held_out" else self._split_some(ids, part)

    def _split_some(self, ids: np.ndarray, part: Part) -> np.ndarray:
        """`ids` with a share of the tokens of punctuation and newline in two halves each.

        A model that has only seen such tokens whole is at a loss when a prompt ends with the punctuation (token
        boundary bias); the report splits "a certain proportion" of them.
        """
        places = np.flatnonzero(self._has_halves_V[ids])
        places = places[_draw(part, places + _SPLIT) < self._split_rate]
        if not len(places):
            return ids
        halves = [np.array(self._halves[token], self.dtype) for token in ids[places].tolist()]
        stretches = [stretch[1:] if i else stretch for i, stretch in enumerate(np.split(ids, places))]
        woven = itertools.chain.from_iterable(itertools.zip_longest(stretches, halves, fillvalue=ids[:0]))
        return np.concatenate(list(woven))


def punctuation_and_newline(tokenizer: Tokenizer) -> dict[int, list[int]]:
    """The tokens that are punctuation and the newlines behind it, and the ids of these two encoded apart."""
    parts: dict[int, tuple[str, str]] = {}
    for token in range(tokenizer.vocab_size):
        text = tokenizer.decode([token])
        punctuation = text.rstrip("\r\n")
        is_text = "\N{REPLACEMENT CHARACTER}" not in text  # and not a part of a character
        if is_text and punctuation != text and _is_punctuation(punctuation.strip(" ")):
            parts[token] = punctuation, text[len(punctuation) :]
    encoded = iter(tokenizer.encode_batch(list(itertools.chain.from_iterable(parts.values()))))
    return {token: next(encoded) + next(encoded) for token in parts}


def cut_between_tokens(text: str) -> Iterator[str]:
    """`text` in stretches of about 64K characters, if it can be cut so that their ids together are those of `text`.

    One long document can then be encoded on all cores, and in little memory.
    """
    start = 0
    while cut := _BETWEEN_TOKENS.search(text, start + _STRETCH_CHARACTERS):
        yield text[start : cut.end()]
        start = cut.end()
    yield text[start:]


def _is_punctuation(text: str) -> bool:
    return text != "" and all(unicodedata.category(character)[0] in "PS" for character in text)


def _draw(part: Part, index: Sequence[int] | np.ndarray) -> np.ndarray:
    return uniform(part.digest, np.asarray(index, np.uint64))
