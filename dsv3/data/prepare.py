"""From a corpus to a folder that training can start from, once.

    tokenizer/tokenizer.json, tokenizer_config.json
    train.npy, held_out.npy      packed token ids
    data.json                    what they are: source, sizes, hashes

`data.json` is written last: a folder that has one is complete, and is never written to again.
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsv3.data.corpus import Document, read_corpus
from dsv3.data.packed import TokenData, load_tokens, pack, save_tokens
from dsv3.data.split import PIECE_CHARACTERS, cut_at_lines, split_held_out
from dsv3.data.tokenizer import Tokenizer
from dsv3.errors import UserError
from dsv3.files import atomic_writer

_DESCRIPTION = "data.json"
_TOKENIZER = "tokenizer/tokenizer.json"
_REMEDY = "prepare the corpus again into another folder"
# Merges hardly change beyond this much text, while training time keeps growing.
_TOKENIZER_CHARACTERS = 20_000_000


@dataclass(frozen=True)
class PreparedData:
    """A prepared corpus: its tokenizer and both sides of it."""

    corpus: str
    tokenizer: Tokenizer
    train: TokenData
    held_out: TokenData


def prepare(
    corpus: str,
    vocab_size: int,
    folder: Path,
    *,
    seed: int,
    held_out: float = 0.05,
    max_bytes: int | None = None,
    progress: Callable[[str], None] | None = None,
) -> PreparedData:
    """Read `corpus` (see `read_corpus`), split it, train a tokenizer on the training side, encode, save.

    At most the first `max_bytes` bytes of text are used. The tokenizer sees at most 20 million characters,
    taken evenly. The whole corpus is held in memory meanwhile. `progress` is told of each stage. What an
    interrupted call left in `folder` is overwritten; prepared data is not: that is a `UserError`, as is
    anything wrong with the corpus, `vocab_size`, `held_out` or `max_bytes`.
    """
    if (folder / _DESCRIPTION).exists():
        raise UserError(f"'{folder}' already holds prepared data; load it, or choose another folder")
    if max_bytes is not None and max_bytes < 1:
        raise UserError(f"max_bytes is {max_bytes}, expected at least 1")
    report = progress or (lambda message: None)

    documents = _first_bytes(read_corpus(corpus, progress), max_bytes)
    train_documents, held_out_documents = split_held_out(documents, held_out, seed=seed)
    report(f"read '{corpus}': {len(train_documents)} documents to train on, {len(held_out_documents)} held out")
    tokenizer = Tokenizer.train(_even_sample(train_documents, _TOKENIZER_CHARACTERS), vocab_size)
    report(f"trained a tokenizer of {tokenizer.vocab_size} tokens")
    sides = {"train": pack(tokenizer, train_documents), "held_out": pack(tokenizer, held_out_documents)}

    tokenizer.save(folder / "tokenizer")
    description: dict[str, Any] = {
        "corpus": corpus,
        "python": platform.python_version(),  # the standard library is another text in each version
        "seed": seed,
        "held_out_fraction": held_out,
        "max_bytes": max_bytes,
        "tokenizer": {"vocab_size": tokenizer.vocab_size, "sha256": _sha256(folder / _TOKENIZER)},
    }
    for side, data in sides.items():
        save_tokens(folder / f"{side}.npy", data.ids)
        description[side] = {
            "documents": data.documents,
            "text_bytes": data.text_bytes,
            "tokens": len(data.ids),
            "sha256": _sha256(folder / f"{side}.npy"),
        }
        report(f"{side}: {data.text_bytes / 1e6:.2f} MB of text as {len(data.ids):,} tokens")
    with atomic_writer(folder / _DESCRIPTION) as file:
        file.write(json.dumps(description, indent=2).encode())
    return load_prepared(folder)


def load_prepared(folder: Path) -> PreparedData:
    """Open what `prepare` left in `folder`; the token ids are mapped, not read.

    Raises `UserError` if a file is missing or is not, to the byte, the one that was written.
    """
    path = folder / _DESCRIPTION
    if not path.is_file():
        raise UserError(f"'{folder}' holds no prepared data (no {_DESCRIPTION}); prepare a corpus into it first")
    try:
        description = json.loads(path.read_text(encoding="utf-8"))
        corpus = str(description["corpus"])
        hashes = {_TOKENIZER: description["tokenizer"]["sha256"]}
        sizes = {}
        for side in ("train", "held_out"):
            hashes[f"{side}.npy"] = description[side]["sha256"]
            sizes[side] = int(description[side]["documents"]), int(description[side]["text_bytes"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"'{path}' is damaged ({error!r}); {_REMEDY}") from error
    for name, expected in hashes.items():
        if not (folder / name).is_file():
            raise UserError(f"'{folder / name}' is missing; {_REMEDY}")
        if _sha256(folder / name) != expected:
            raise UserError(f"'{folder / name}' has changed since it was prepared (its SHA-256 differs); {_REMEDY}")
    train, held_out = (TokenData(load_tokens(folder / f"{side}.npy"), *size) for side, size in sizes.items())
    return PreparedData(corpus, Tokenizer.load(folder / "tokenizer"), train, held_out)


def _first_bytes(documents: Iterable[Document], max_bytes: int | None) -> Iterator[Document]:
    """The documents up to `max_bytes` bytes of text, the last one cut to fit."""
    left = max_bytes
    for document in documents:
        if left is None:
            yield document
            continue
        data = document.text.encode()[:left]
        left -= len(data)
        if text := data.decode(errors="ignore"):
            yield Document(text, document.source)
        if left == 0:
            return


def _even_sample(documents: list[Document], max_characters: int) -> Iterator[str]:
    """All texts, or pieces of them at even distances that come to about `max_characters` in all."""
    total = sum(len(document.text) for document in documents)
    if total <= max_characters:
        yield from (document.text for document in documents)
        return
    taken = seen = 0
    for document in documents:
        for piece in cut_at_lines(document.text, PIECE_CHARACTERS):
            seen += len(piece)
            if taken * total < seen * max_characters:
                taken += len(piece)
                yield piece


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
