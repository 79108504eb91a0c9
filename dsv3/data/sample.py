"""An even sample of a stream of text that may be larger than memory, for a tokenizer to be trained on."""

from __future__ import annotations

import heapq

from dsv3.data.draws import digest
from dsv3.data.split import cut_at_lines

_PIECE_CHARACTERS = 8192


class TextSample:
    """Keeps about `characters` characters of what it is given, in pieces of at most 8,192: those of lowest digest.

    So each piece is as likely as any other to be kept, and the same stream and seed give the same sample.
    """

    def __init__(self, characters: int, seed: int) -> None:
        self._most = characters
        self._seed = seed
        self._characters = 0
        self._pieces: list[tuple[int, int, str]] = []  # a heap, highest digest first: (-digest, place, text)
        self._seen = 0

    def add(self, text: str) -> None:
        """More of the stream."""
        for piece in cut_at_lines(text, _PIECE_CHARACTERS):
            heapq.heappush(self._pieces, (-digest(piece, self._seed), self._seen, piece))
            self._seen += 1
            self._characters += len(piece)
            while self._characters > self._most:
                self._characters -= len(heapq.heappop(self._pieces)[2])

    def texts(self) -> list[str]:
        """What is kept, in the order of the stream."""
        return [text for _, _, text in sorted(self._pieces, key=lambda piece: piece[1])]
