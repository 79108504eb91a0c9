import json
import pathlib

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import tokenizers
from hypothesis import given
from tokenizers.processors import TemplateProcessing

from dsv3.data.tokenizer import BOS, MIN_VOCAB_SIZE, SPECIAL_TOKENS, StreamDecoder, Tokenizer
from dsv3.errors import UserError

# Text that is likely to trip a tokenizer: special tokens and parts of them, whitespace, digits, many scripts.
awkward_text = st.lists(
    st.one_of(
        st.text(max_size=20),
        st.sampled_from([*SPECIAL_TOKENS, "<｜", "｜>", "▁", "\r\n", " \n  ", "12345678", "中文かな", ".join", "\0"]),
    ),
    max_size=12,
).map("".join)

# The tokenizer of a test does not change between the examples that hypothesis tries.
same_tokenizer = hypothesis.settings(suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture])


@same_tokenizer
@given(text=awkward_text)
def test_decoding_undoes_encoding_for_every_text(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.token_bytes[ids].sum() == len(text.encode())
    assert min(ids, default=len(SPECIAL_TOKENS)) >= len(SPECIAL_TOKENS), "text was read as a special token"


@same_tokenizer
@given(texts=st.lists(awkward_text, max_size=5))
def test_a_batch_is_its_texts_one_by_one(tokenizer, texts):
    assert tokenizer.encode_batch(texts) == [tokenizer.encode(text) for text in texts]


def test_bos_and_eos_are_added_on_request_and_skipped_on_request(tokenizer, write_text):
    text = write_text(1)
    plain = tokenizer.encode(text)
    marked = tokenizer.encode(text, bos=True, eos=True)
    assert marked == [tokenizer.bos_id, *plain, tokenizer.eos_id]
    assert tokenizer.decode(marked) == text
    assert tokenizer.decode(marked, skip_special=False) == f"{SPECIAL_TOKENS[0]}{text}{SPECIAL_TOKENS[1]}"


def test_special_tokens_have_v3s_ids_and_no_bytes(tokenizer):
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (0, 1, 2)
    assert tokenizer.document_start_id == tokenizer.eos_id
    assert [tokenizer.special_id(token) for token in SPECIAL_TOKENS] == list(range(8))
    assert tokenizer.added_tokens == dict(zip(SPECIAL_TOKENS, range(8), strict=True))
    assert not tokenizer.token_bytes[:8].any() and tokenizer.token_bytes[8:].all()
    with pytest.raises(UserError, match="no special token"):
        tokenizer.special_id("<think>")


def test_ids_outside_the_vocabulary_decode_to_the_replacement_character(tokenizer):
    a, b = tokenizer.encode("a"), tokenizer.encode("b")
    assert tokenizer.decode([*a, tokenizer.vocab_size, -1, *b]) == "a\ufffd\ufffdb"


def test_a_lone_surrogate_is_an_error(tokenizer):
    with pytest.raises(UserError, match="surrogate"):
        tokenizer.encode("a\ud800")
    with pytest.raises(UserError, match="surrogate"):
        tokenizer.encode_batch(["fine", "a\udfff"])


def test_training_learns_frequent_words_and_the_same_ones_each_time(write_text):
    texts = ["the gradient of the loss\n" * 50, write_text(100)]
    first = Tokenizer.train(iter(texts), 420)
    assert first.vocab_size == 420
    assert len(first.encode(" gradient")) == 1
    again = Tokenizer.train(texts, 420)
    assert again.encode(texts[1]) == first.encode(texts[1])
    assert (again.token_bytes == first.token_bytes).all()


def test_numbers_are_cut_into_groups_of_three():
    tokenizer = Tokenizer.train(["1234567 1234567 123456"] * 9, 400)
    assert [tokenizer.decode([token]) for token in tokenizer.encode("1234567")] == ["123", "456", "7"]


def test_too_small_a_corpus_gives_fewer_tokens():
    tokenizer = Tokenizer.train(["tiny tiny"], 4096)
    assert MIN_VOCAB_SIZE < tokenizer.vocab_size < MIN_VOCAB_SIZE + 10
    assert tokenizer.decode(tokenizer.encode("anything é")) == "anything é"


def test_the_smallest_vocabulary_is_bytes_and_special_tokens(write_text):
    text = write_text(5)
    tokenizer = Tokenizer.train([text], MIN_VOCAB_SIZE)
    assert len(tokenizer.encode(text)) == len(text.encode())
    with pytest.raises(UserError, match=f"expected at least {MIN_VOCAB_SIZE}"):
        Tokenizer.train([text], MIN_VOCAB_SIZE - 1)


@same_tokenizer
@given(data=st.data())
def test_streaming_says_what_decoding_at_once_says(tokenizer, data):
    ids = st.integers(0, tokenizer.vocab_size)  # any ids at all: most of them do not form characters
    chunks = data.draw(st.lists(st.lists(ids, max_size=4), max_size=10))
    skip_special = data.draw(st.booleans())
    stream = StreamDecoder(tokenizer, skip_special=skip_special)
    said = "".join(stream.feed(chunk) for chunk in chunks) + stream.flush()
    assert said == tokenizer.decode([token for chunk in chunks for token in chunk], skip_special=skip_special)


def test_streaming_holds_a_character_back_until_it_is_whole():
    tokenizer = Tokenizer.train([], MIN_VOCAB_SIZE)  # bytes only
    stream = StreamDecoder(tokenizer)
    assert [stream.feed([token]) for token in tokenizer.encode("aé😀")] == ["a", "", "é", "", "", "", "😀"]
    assert stream.flush() == ""
    assert stream.feed(tokenizer.encode("😀")[:3]) == ""
    assert (stream.flush(), stream.flush()) == ("\ufffd", "")


def test_saving_and_loading_keeps_everything(tokenizer, tmp_path, write_text):
    tokenizer.save(tmp_path / "new" / "folder")
    loaded = Tokenizer.load(tmp_path / "new" / "folder")
    text = write_text(20) + "".join(SPECIAL_TOKENS)
    assert loaded.encode(text) == tokenizer.encode(text)
    assert loaded.vocab_size == tokenizer.vocab_size
    assert (loaded.token_bytes == tokenizer.token_bytes).all()


def test_transformers_loads_the_same_tokenizer(tokenizer, tmp_path, write_text):
    transformers = pytest.importorskip("transformers")
    tokenizer.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    text = write_text(50) + "x = [1, 22, 333]  \n\n\tif 汉字:"
    assert theirs.encode(text) == tokenizer.encode(text)
    assert theirs.decode(tokenizer.encode(text, bos=True, eos=True), skip_special_tokens=True) == text
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (0, 1, 2)
    assert theirs.convert_tokens_to_ids(list(SPECIAL_TOKENS)) == list(range(8))
    assert len(theirs) == tokenizer.vocab_size


@pytest.fixture(scope="module")
def released_backend(released: pathlib.Path) -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_file(str(released / "tokenizer.json"))


@same_tokenizer
@given(text=awkward_text)
def test_text_is_divided_as_in_the_released_tokenizer(tokenizer, released_backend, text):
    ours = tokenizer._backend.pre_tokenizer.pre_tokenize_str(text)
    assert ours == released_backend.pre_tokenizer.pre_tokenize_str(text)


def test_the_released_tokenizer_loads(released, released_backend, write_text):
    loaded = Tokenizer.load(released)
    text = write_text(5)
    assert loaded.vocab_size == 128815
    assert loaded.encode(text) == released_backend.encode(text).ids
    assert loaded.decode(loaded.encode(text, bos=True)) == text
    assert [loaded.special_id(token) for token in SPECIAL_TOKENS] == [0, 1, 2, *range(128800, 128805)]
    spelled = loaded.encode("".join(SPECIAL_TOKENS) + "<think>")
    assert not {*range(3), *range(128798, 128815)} & set(spelled)


@pytest.mark.parametrize("add_bos_token", [True, False, None])
def test_a_document_starts_with_bos_if_the_settings_say_so(tokenizer, released, tmp_path, add_bos_token):
    """The release's settings on Hugging Face say true; the copy of them that we have says false."""
    settings = json.loads((released / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert settings.pop("add_bos_token") is False
    if add_bos_token is not None:
        settings["add_bos_token"] = add_bos_token
    tokenizer.save(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    loaded = Tokenizer.load(tmp_path)
    assert loaded.document_start_id == (loaded.bos_id if add_bos_token else loaded.eos_id)
    loaded.save(tmp_path / "again")
    assert Tokenizer.load(tmp_path / "again").document_start_id == loaded.document_start_id


def test_a_tokenizer_that_adds_bos_by_itself_adds_none_here(tokenizer, write_text):
    """Its own rule for that would put a second one behind the one that begins a document."""
    backend = tokenizers.Tokenizer.from_str(tokenizer._backend.to_str())
    backend.post_processor = TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, tokenizer.bos_id)])
    text = write_text(3)
    assert backend.encode(text).ids[0] == tokenizer.bos_id
    adding = Tokenizer(backend, add_bos_token=True)
    assert adding.encode(text) == tokenizer.encode(text) and adding.document_start_id == tokenizer.bos_id
    assert adding.encode(text, bos=True) == [tokenizer.bos_id, *tokenizer.encode(text)]


@pytest.mark.parametrize(
    ("content", "complaint"), [(b"{", "cannot read"), (b"[]", "a JSON list"), (b"\xff", "cannot read")]
)
def test_broken_settings_are_an_error(tokenizer, tmp_path, content, complaint):
    tokenizer.save(tmp_path)
    (tmp_path / "tokenizer_config.json").write_bytes(content)
    with pytest.raises(UserError, match=complaint) as error:
        Tokenizer.load(tmp_path)
    assert str(tmp_path / "tokenizer_config.json") in str(error.value)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (None, "cannot read the tokenizer"),
        (b"\xff\xfe", "cannot read the tokenizer"),
        (b'{"version": "1.0", "model"', "is not a tokenizer"),
        (b'{"version": "1.0"}', "is not a tokenizer"),
    ],
)
def test_a_missing_or_broken_tokenizer_is_an_error(tmp_path, content, complaint):
    if content is not None:
        (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(UserError, match=complaint):
        Tokenizer.load(tmp_path)


def test_a_foreign_tokenizer_is_an_error(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    path = tmp_path / "tokenizer.json"
    good = json.loads(path.read_text(encoding="utf-8"))

    foreign = tokenizers.Tokenizer(tokenizers.models.WordLevel({"word": 0}))
    path.write_text(foreign.to_str(), encoding="utf-8")
    with pytest.raises(
        UserError, match=r"cannot use '.*tokenizer\.json': the tokenizer lacks DeepSeek-V3's special tokens"
    ):
        Tokenizer.load(tmp_path)

    good["model"]["vocab"]["▁word"] = max(good["model"]["vocab"].values()) + 1
    path.write_text(json.dumps(good), encoding="utf-8")
    with pytest.raises(UserError, match="not a byte-level one: '▁' stands for no byte"):
        Tokenizer.load(tmp_path)


def test_each_byte_has_the_letter_that_the_library_gives_it():
    tokenizer = Tokenizer.train([], MIN_VOCAB_SIZE)
    assert sorted(tokenizer._pieces[8:]) == [bytes([byte]) for byte in range(256)]
    every_character = "".join(map(chr, [*range(0xD800), *range(0xE000, 0x3000 + 0xE000)]))
    assert tokenizer.decode(tokenizer.encode(every_character)) == every_character
    assert tokenizer.token_bytes.dtype == np.int64
