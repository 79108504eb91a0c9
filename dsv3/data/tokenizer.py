"""Text to token ids and back: byte-level BPE (section 4.1 of the V3 report) with V3's special tokens.

The 256 bytes are tokens themselves, so every text can be encoded and comes back unchanged; nothing is ever
unknown. Training and encoding are the `tokenizers` library's. Decoding is a table of bytes kept here, because
generation has to stop at the edge of a character (`StreamDecoder`) and evaluation has to know how many bytes
of text a token stands for (`Tokenizer.token_bytes`).
"""

from __future__ import annotations

import codecs
import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers

from dsv3.errors import UserError
from dsv3.files import atomic_writer, make_folder

BOS = "<｜begin▁of▁sentence｜>"
EOS = "<｜end▁of▁sentence｜>"
PAD = "<｜▁pad▁｜>"
FIM_HOLE = "<｜fim▁hole｜>"
FIM_BEGIN = "<｜fim▁begin｜>"
FIM_END = "<｜fim▁end｜>"
USER = "<｜User｜>"
ASSISTANT = "<｜Assistant｜>"
# Their ids are their places. The first three are as in the release; the others, which the release puts at the
# end of its 128K vocabulary, follow at once so that they do not move with the size of a small one.
SPECIAL_TOKENS = (BOS, EOS, PAD, FIM_HOLE, FIM_BEGIN, FIM_END, USER, ASSISTANT)
MIN_VOCAB_SIZE = 256 + len(SPECIAL_TOKENS)

TOKENIZER_FILE = "tokenizer.json"

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}".encode()

# Where merges may not reach across, applied one after the other, as in the released tokenizer.
_DIGITS = r"\p{N}{1,3}"
_HAN_AND_KANA = r"[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+"
_WORDS = "|".join(
    (
        r"[!-/:-@\[-`{-~][A-Za-z]+",  # one ASCII punctuation mark with the word behind it: .join, _name
        r"[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+",  # a word with the space before it
        r" ?[\p{P}\p{S}]+[\r\n]*",  # punctuation, with the line end that it closes
        r"\s*[\r\n]+",  # blank lines
        r"\s+(?!\S)",  # indentation but for its last space, which goes with the word
        r"\s+",
    )
)


class Tokenizer:
    """A byte-level BPE tokenizer that has V3's special tokens.

    `vocab_size` counts ids, special tokens included; a model's vocabulary may be larger, never smaller.
    `added_tokens` are all ids that no text gives, by their names: special tokens and markup such as `<think>`.
    `document_start_id` is what a model wants to see before a text that begins. For ours that is what stood there in
    training, the EOS of the document before; for a tokenizer that says `add_bos_token`, BOS.
    `fingerprint` says what each id stands for: tokenizers that share it understand each other's ids.
    `token_bytes` [vocab_size] int64 holds how many bytes of UTF-8 text each id stands for, 0 for special
    tokens; the loss in bits per byte over targets t is `sum(nats_t) / ln 2 / sum(token_bytes[t])`.
    """

    def __init__(self, backend: tokenizers.Tokenizer, *, add_bos_token: bool = False) -> None:
        """Wrap a `tokenizers.Tokenizer`; `UserError` if it is not byte-level or lacks a special token of V3."""
        self._backend = backend
        # Encoding goes through a copy that has never heard of special tokens: then no text can spell one.
        plain = json.loads(backend.to_str()) | {"added_tokens": [], "truncation": None, "padding": None}
        self._encoder = tokenizers.Tokenizer.from_str(json.dumps(plain))

        vocab = backend.get_vocab(with_added_tokens=True)
        missing = [token for token in SPECIAL_TOKENS if token not in vocab]
        if missing:
            raise UserError(f"the tokenizer lacks DeepSeek-V3's special tokens {', '.join(missing)}")
        self._ids = {token: vocab[token] for token in SPECIAL_TOKENS}
        self.bos_id, self.eos_id, self.pad_id = (self._ids[token] for token in (BOS, EOS, PAD))
        self.document_start_id = self.bos_id if add_bos_token else self.eos_id
        self.vocab_size: int = max(vocab.values()) + 1

        added = backend.get_added_tokens_decoder()
        self.added_tokens = {token.content: index for index, token in added.items()}
        byte_of = _byte_of_character()
        self._pieces = [_REPLACEMENT] * self.vocab_size
        try:
            for token, index in vocab.items():
                self._pieces[index] = token.encode() if index in added else bytes(byte_of[c] for c in token)
        except KeyError as error:
            raise UserError(f"the tokenizer is not a byte-level one: {error} stands for no byte") from error
        self._text_pieces = list(self._pieces)
        for index, added_token in added.items():
            if added_token.special:
                self._text_pieces[index] = b""
        self.token_bytes = np.array([len(piece) for piece in self._text_pieces], dtype=np.int64)
        spelled = json.dumps([piece.hex() for piece in self._pieces])
        self.fingerprint = hashlib.sha256(spelled.encode()).hexdigest()[:16]

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> Tokenizer:
        """Learn merges from `texts`, the most frequent pair first, until there are `vocab_size` tokens.

        The same texts in the same order give the same tokenizer. Texts that are too small to give so many
        pairs seen at least twice give a smaller tokenizer. Raises `UserError` below `MIN_VOCAB_SIZE`.
        """
        if vocab_size < MIN_VOCAB_SIZE:
            raise UserError(
                f"vocab_size is {vocab_size}, expected at least {MIN_VOCAB_SIZE}: "
                f"256 bytes and {len(SPECIAL_TOKENS)} special tokens"
            )
        backend = tokenizers.Tokenizer(models.BPE())
        splits = [pre_tokenizers.Split(Regex(rule), "isolated") for rule in (_DIGITS, _HAN_AND_KANA, _WORDS)]
        to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        backend.pre_tokenizer = pre_tokenizers.Sequence([*splits, to_bytes])
        backend.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            min_frequency=2,
            special_tokens=list(SPECIAL_TOKENS),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        backend.train_from_iterator(texts, trainer)
        return cls(backend)

    def encode(self, text: str, *, bos: bool = False, eos: bool = False) -> list[int]:
        """The ids of `text`, between BOS and EOS if asked for. What looks like a special token is mere text.

        Raises `UserError` for a lone surrogate, the one thing in a Python string that is not Unicode text.
        """
        return [self.bos_id] * bos + self.encode_batch([text])[0] + [self.eos_id] * eos

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text, without BOS and EOS, encoded in parallel. Raises `UserError` as `encode`."""
        try:
            encodings = self._encoder.encode_batch_fast(texts, add_special_tokens=False)
        except TypeError as error:
            raise UserError("the text to encode is not valid Unicode: remove its lone surrogates") from error
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: Iterable[int], *, skip_special: bool = True) -> str:
        """The text of `ids`. Bytes that do not form a character, and ids past the vocabulary, become U+FFFD."""
        return self.decode_bytes(ids, skip_special=skip_special).decode(errors="replace")

    def decode_bytes(self, ids: Iterable[int], *, skip_special: bool = True) -> bytes:
        """The bytes of `ids`: UTF-8 if they are whole text, else possibly cut inside a character."""
        pieces = self._text_pieces if skip_special else self._pieces
        return b"".join(pieces[index] if 0 <= index < self.vocab_size else _REPLACEMENT for index in ids)

    def special_id(self, token: str) -> int:
        """The id of one of `SPECIAL_TOKENS`."""
        if token not in self._ids:
            raise UserError(f"'{token}' is no special token; choose one of {', '.join(self._ids)}")
        return self._ids[token]

    def save(self, folder: Path) -> None:
        """Write `tokenizer.json` and `tokenizer_config.json`, from which `AutoTokenizer` loads the same one."""
        settings = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "add_bos_token": self.document_start_id == self.bos_id,
            "bos_token": BOS,
            "eos_token": EOS,
            "pad_token": PAD,
            "unk_token": None,
            "clean_up_tokenization_spaces": False,
        }
        make_folder(folder)
        with atomic_writer(folder / TOKENIZER_FILE) as file:
            file.write(self._backend.to_str(pretty=True).encode())
        with atomic_writer(folder / "tokenizer_config.json") as file:
            file.write(json.dumps(settings, indent=2, ensure_ascii=False).encode())

    @classmethod
    def load(cls, folder: Path) -> Tokenizer:
        """The tokenizer of `folder`, ours or DeepSeek-V3's own.

        Raises `UserError` if `tokenizer.json` is missing, damaged, or not a byte-level BPE with V3's tokens, or if
        `tokenizer_config.json`, which may be missing, is damaged.
        """
        add_bos_token = bool(tokenizer_settings(folder).get("add_bos_token"))
        path = folder / TOKENIZER_FILE
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"cannot read the tokenizer '{path}': {error}") from error
        try:
            backend = tokenizers.Tokenizer.from_str(text)
        except Exception as error:  # the library raises nothing more precise
            raise UserError(f"'{path}' is not a tokenizer: {error}") from error
        try:
            return cls(backend, add_bos_token=add_bos_token)
        except UserError as error:
            raise UserError(f"cannot use '{path}': {error}") from error


def tokenizer_settings(folder: Path) -> dict[str, Any]:
    """The fields of the folder's `tokenizer_config.json`, none if it has no such file; `UserError` if it is damaged."""
    path = folder / "tokenizer_config.json"
    if not path.exists():
        return {}
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read '{path}': {error}") from error
    if not isinstance(settings, dict):
        raise UserError(f"'{path}' holds a JSON {type(settings).__name__}, expected an object")
    return settings


class StreamDecoder:
    """Decodes a growing sequence of ids into text that can be shown at once.

    A character may be spread over several tokens; its bytes are held back until the last has come.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, ids: Iterable[int]) -> str:
        """The characters that are complete once `ids` have come; possibly none."""
        return self._utf8.decode(self._tokenizer.decode_bytes(ids, skip_special=self._skip_special))

    def flush(self) -> str:
        """Ends the sequence: U+FFFD if it stopped inside a character, else nothing. Ready for another."""
        return self._utf8.decode(b"", final=True)


def _byte_of_character() -> dict[str, int]:
    """How byte-level BPE writes bytes as letters (GPT-2): a printable byte as itself, the n-th other as 256 + n."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}
