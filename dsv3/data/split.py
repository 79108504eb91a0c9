"""Which text is never trained on.

A held-out set is only worth something if none of it was seen, so a document's side follows from its content:
copies of a document fall on the same side wherever they lie, and neither the order of the files nor a new
file moves an old one. Near copies (a changed comment) are not found.
"""

from __future__ import annotations

import hashlib
import itertools
import re
from bisect import bisect_left
from collections.abc import Iterable

from dsv3.data.corpus import Document
from dsv3.errors import UserError

PIECE_CHARACTERS = 8192
_LEAST_PIECE_CHARACTERS = 256


def split_held_out(
    documents: Iterable[Document], fraction: float = 0.05, *, seed: int
) -> tuple[list[Document], list[Document]]:
    """`(train, held_out)`, both non-empty, with about `fraction` of the distinct documents held out.

    A document is held out if the hash of its text and `seed` falls into the lowest `fraction` of all hashes;
    should none or all of them do so, the nearest one changes sides. A corpus with fewer than `1 / fraction`
    distinct documents (one book, say) cannot spare a whole one: its documents are first cut at line ends into
    pieces of at most `PIECE_CHARACTERS`, and neighbouring pieces of the same side are joined again.

    Raises `UserError` if `fraction` is not between 0 and 1, or if the text is too short to divide.
    """
    if not 0 < fraction < 1:
        raise UserError(f"the held-out fraction is {fraction}, expected a number between 0 and 1")
    documents = list(documents)
    total = sum(len(document.text) for document in documents)
    pieces = [[document.text] for document in documents]
    if len({document.text for document in documents}) * fraction < 1:
        size = min(PIECE_CHARACTERS, max(_LEAST_PIECE_CHARACTERS, int(total * fraction)))
        pieces = [cut_at_lines(document.text, size) for document in documents]

    digests = sorted({_digest(piece, seed) for piece in itertools.chain.from_iterable(pieces)})
    if len(digests) < 2:
        raise UserError(
            f"the corpus has {total} characters of text, too little to hold any out; "
            f"give at least {2 * _LEAST_PIECE_CHARACTERS}, not all alike"
        )
    below = bisect_left(digests, int(fraction * 2**64))
    held_out_digests = set(digests[: min(max(below, 1), len(digests) - 1)])

    train: list[Document] = []
    held_out: list[Document] = []
    for document, texts in zip(documents, pieces, strict=True):
        for is_held_out, run in itertools.groupby(texts, lambda text: _digest(text, seed) in held_out_digests):
            (held_out if is_held_out else train).append(Document("".join(run), document.source))
    return train, held_out


def cut_at_lines(text: str, size: int) -> list[str]:
    """`text` in consecutive pieces of at most `size + 1` characters, each as long as its last line end allows.

    Where no line ends within reach the cut falls after white space, else anywhere. Joined, they are `text`.
    """
    return re.findall(rf"(?s).{{1,{size}}}(?:\n|\Z)|.{{1,{size}}}\s|.{{1,{size}}}", text)


def _digest(text: str, seed: int) -> int:
    """A uniform 64-bit number that depends on all of `text` and on `seed`, the same on every machine."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8, key=str(seed).encode()).digest())
