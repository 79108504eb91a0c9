"""Tokens to text that can be shown: whole characters only, and never a part of what may become a stop string.

What is held back is the longest end of the text that a stop string begins with. Tokens go out with their text: one
whose text is held back, or cut off by a stop string, does not show in the output either.
"""

from __future__ import annotations

import codecs
from collections import deque

from dsv3.data.tokenizer import Tokenizer
from dsv3.serve.outputs import Token


class TextStream:
    """One continuation's text as it grows. Offsets count characters from its beginning."""

    def __init__(self, tokenizer: Tokenizer | None, stop: tuple[str, ...], *, skip_special: bool = True) -> None:
        self._tokenizer, self._skip_special = tokenizer, skip_special
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._stop = stop
        self._longest = max(map(len, stop), default=0)
        self._held = ""  # text behind what is out
        self._out = 0  # where the held text begins
        self._tokens: deque[tuple[int, int, Token]] = deque()  # (start, end, token), not out yet
        self._cut: int | None = None

    def add(self, token: Token, *, ends: bool = False, may_stop: bool = True) -> str | None:
        """Take the next token; the stop string that it completes, if any. A token that `ends` the text has none.

        Until `may_stop`, stop strings do not count.
        """
        start = self._out + len(self._held)
        piece = ""
        if self._tokenizer is not None and not ends:
            piece = self._utf8.decode(self._tokenizer.decode_bytes([token.id], skip_special=self._skip_special))
        self._held += piece
        broken = bool(self._utf8.getstate()[0])  # it reaches into a character that is not complete yet
        self._tokens.append((start, start + len(piece) + broken, token))
        return self._find(len(piece)) if piece and may_stop else None

    def _find(self, num_new: int) -> str | None:
        """The stop string that begins first among those that end in the newest characters."""
        old = len(self._held) - num_new
        places = []
        for stop in self._stop:
            place = self._held.find(stop, max(old - len(stop) + 1, 0))
            if place >= 0:
                places.append((place, stop))
        if not places:
            return None
        place, stop = min(places)
        self._cut = self._out + place
        return stop

    def take(self) -> tuple[str, tuple[Token, ...]]:
        """The text and the tokens that can go out now."""
        return self._take(len(self._held) - self._uncertain())

    def _uncertain(self) -> int:
        """Characters at the end that may yet turn out to be the beginning of a stop string."""
        for length in range(min(self._longest - 1, len(self._held)), 0, -1):
            end = self._held[-length:]
            if any(len(stop) > length and stop.startswith(end) for stop in self._stop):
                return length
        return 0

    def finish(self) -> tuple[str, tuple[Token, ...]]:
        """All the rest, up to the stop string if one was found."""
        if self._cut is None:
            self._held += self._utf8.decode(b"", final=True)
            return self._take(len(self._held), everything=True)
        # One without text right before the stop string stays: it may have gone out before the string was there.
        while self._tokens and self._tokens[-1][0] >= self._cut and self._tokens[-1][1] > self._cut:
            self._tokens.pop()
        return self._take(self._cut - self._out, everything=True)

    def _take(self, num_characters: int, *, everything: bool = False) -> tuple[str, tuple[Token, ...]]:
        text, self._held = self._held[:num_characters], self._held[num_characters:]
        self._out += num_characters
        tokens = []
        while self._tokens and (everything or self._tokens[0][1] <= self._out):
            tokens.append(self._tokens.popleft()[2])
        return text, tuple(tokens)
