"""Documents as one long array of token ids, the form in which training reads them.

V3 packs documents into its sequences without a mask between them (section 4.1 of the report). Each document is
its text followed by EOS; no BOS, since the EOS of the document before marks the beginning as well.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dsv3.data.corpus import Document
from dsv3.data.tokenizer import Tokenizer
from dsv3.errors import UserError
from dsv3.files import atomic_writer

_BATCH_CHARACTERS = 1 << 22  # how much text is encoded at once: enough to keep every core busy


@dataclass(frozen=True)
class TokenData:
    """Packed documents: `ids` [N] (uint16 or uint32), how many documents, and how many bytes of UTF-8 text."""

    ids: np.ndarray
    documents: int
    text_bytes: int


def pack(tokenizer: Tokenizer, documents: Iterable[Document]) -> TokenData:
    """Encode `documents`, each followed by EOS; uint16 where the vocabulary allows it, else uint32."""
    dtype = np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32
    parts = [np.empty(0, dtype)]
    count = text_bytes = 0
    for texts in _batches(documents):
        count += len(texts)
        text_bytes += sum(len(text.encode()) for text in texts)
        parts += [np.array([*ids, tokenizer.eos_id], dtype) for ids in tokenizer.encode_batch(texts)]
    return TokenData(np.concatenate(parts), count, text_bytes)


def _batches(documents: Iterable[Document]) -> Iterator[list[str]]:
    batch: list[str] = []
    characters = 0
    for document in documents:
        batch.append(document.text)
        characters += len(document.text)
        if characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def save_tokens(path: Path, ids: np.ndarray) -> None:
    """Write `ids` [N] as a `.npy` file, atomically."""
    with atomic_writer(path) as file:
        np.save(file, ids, allow_pickle=False)


def load_tokens(path: Path) -> np.ndarray:
    """The ids [N] of a `.npy` file, uint16 or uint32, mapped read-only rather than read.

    Raises `UserError` if the file is missing, damaged, or holds anything but a row of such ids.
    """
    try:
        ids = np.lib.format.open_memmap(path, mode="r")  # unlike np.load it opens .npy alone, and never a pickle
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"'{path}' is not a readable .npy file of token ids: {error}") from error
    if ids.ndim != 1 or ids.dtype not in (np.uint16, np.uint32):
        raise UserError(f"'{path}' holds {ids.dtype} of shape {ids.shape}, expected one row of uint16 or uint32 ids")
    return ids
