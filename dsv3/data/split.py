"""Which text is never trained on.

A held-out set is only worth something if none of it was seen, so the side of a text follows from the text alone:
copies of a document fall on the same side wherever they lie, in whatever source, and neither the order of the
files nor a new file moves an old one. Near copies (a changed comment) are not found.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from dsv3.data.draws import digest
from dsv3.data.formats import Document
from dsv3.errors import UserError

Side = Literal["train", "held_out"]
SIDES: tuple[Side, ...] = ("train", "held_out")

_PIECE_CHARACTERS = 8192
_LEAST_PIECE_CHARACTERS = 256


@dataclass(frozen=True)
class Part:
    """A document, or a stretch of one that had to be cut: all of it is on one side. `digest` is that of `text`."""

    text: str
    origin: str
    side: Side
    digest: int


@dataclass(frozen=True)
class Split:
    """The side of every text: held out if its digest is in the lowest `fraction` of all; `flipped` are exceptions.

    `cut` holds the digests of documents that are first cut at line ends into pieces of so many characters.
    """

    fraction: float
    seed: int
    flipped: frozenset[int] = frozenset()
    cut: Mapping[int, int] = dataclasses.field(default_factory=dict)

    def parts(self, document: Document) -> list[Part]:
        """`document` in one part; if it is cut, in several, neighbouring pieces of the same side being joined."""
        text, origin = document.text, document.origin
        key = digest(text, self.seed)
        if key not in self.cut:
            return [Part(text, origin, self.side(key), key)]
        pieces = itertools.groupby(cut_at_lines(text, self.cut[key]), lambda piece: self.side(digest(piece, self.seed)))
        runs = [(side, "".join(run)) for side, run in pieces]
        return [Part(run, origin, side, digest(run, self.seed)) for side, run in runs]

    def side(self, key: int) -> Side:
        """The side of the text (or piece) whose digest is `key`."""
        return "held_out" if (key < self.fraction * 2**64) != (key in self.flipped) else "train"

    def to_json(self) -> dict[str, Any]:
        """Plain values; digests as hexadecimal, since they are larger than the integers every JSON reader keeps."""
        return {
            "fraction": self.fraction,
            "seed": self.seed,
            "flipped": [f"{key:016x}" for key in sorted(self.flipped)],
            "cut": {f"{key:016x}": size for key, size in sorted(self.cut.items())},
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Split:
        """What `to_json` gave."""
        flipped = frozenset(int(key, 16) for key in values["flipped"])
        cut = {int(key, 16): int(size) for key, size in values["cut"].items()}
        return cls(float(values["fraction"]), int(values["seed"]), flipped, cut)


def plan_split(sources: Mapping[str, Callable[[], Iterable[Document]]], fraction: float, seed: int) -> Split:
    """A split that gives each source both sides, with about `fraction` of its distinct documents held out.

    A source with fewer than `1 / fraction` distinct documents (one book, say) cannot spare a whole one: its
    documents are cut into pieces of at most 8,192 characters. Should chance put all documents or pieces of a source
    on one side, the nearest one changes sides. `sources` opens each source by its name, perhaps twice; a large one
    is not read further than it takes to see that it needs nothing of the kind.

    Raises `UserError`, naming the source, if it is too short or too uniform to divide.
    """
    split = Split(fraction, seed)
    for name, read in sources.items():
        split = _divide(name, read, split)
    return split


def _divide(name: str, read: Callable[[], Iterable[Document]], split: Split) -> Split:
    """`split` with what it takes to divide one more source."""
    keys: set[int] = set()
    sides: set[Side] = set()
    characters = 0
    for document in read():
        keys.add(digest(document.text, split.seed))
        sides |= {part.side for part in split.parts(document)}
        characters += len(document.text)
        if len(sides) == 2 and len(keys) * split.fraction >= 1:
            return split
    if len(keys) * split.fraction < 1:
        size = min(_PIECE_CHARACTERS, max(_LEAST_PIECE_CHARACTERS, math.ceil(characters * split.fraction)))
        split = dataclasses.replace(split, cut={**dict.fromkeys(keys, size), **split.cut})
        pieces = (cut_at_lines(document.text, split.cut[digest(document.text, split.seed)]) for document in read())
        keys = {digest(piece, split.seed) for piece in itertools.chain.from_iterable(pieces)}
    if len(keys) < 2:
        raise UserError(
            f"source '{name}' has {characters} characters of text, too little to hold any out; "
            f"give at least {2 * _LEAST_PIECE_CHARACTERS}, not all alike"
        )
    sides = {split.side(key) for key in keys}
    if len(sides) == 2:
        return split
    nearest = max(keys) if "held_out" in sides else min(keys)
    return dataclasses.replace(split, flipped=split.flipped | {nearest})


def cut_at_lines(text: str, size: int) -> list[str]:
    """`text` in consecutive pieces of at most `size + 1` characters, each as long as its last line end allows.

    Where no line ends within reach the cut falls after white space, else anywhere. Joined, they are `text`.
    """
    return re.findall(rf"(?s).{{1,{size}}}(?:\n|\Z)|.{{1,{size}}}\s|.{{1,{size}}}", text)
