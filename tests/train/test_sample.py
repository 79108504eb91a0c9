"""Samples show what the model would write, and leave no trace in training."""

from fractions import Fraction
from pathlib import Path

import pytest
import torch

from dsv3.config import ModelConfig
from dsv3.data.encode import DocumentEncoder
from dsv3.data.prepared import PreparedData, PreparedSource
from dsv3.data.shards import Shard
from dsv3.data.split import Part
from dsv3.data.tokenizer import Tokenizer
from dsv3.model.transformer import Transformer
from dsv3.train.config import TrainConfig
from dsv3.train.sample import Sample, continuation, draw_sample


@pytest.fixture
def lines() -> str:
    return "\n".join(f"the {i}th line says {i * i}" for i in range(100))


def prepared(text: str, add_bos_token: bool) -> PreparedData:
    """One document, prepared with a tokenizer that begins it with BOS, or not."""
    trained = Tokenizer.train([text], 300)
    tokenizer = Tokenizer(trained._backend, add_bos_token=add_bos_token)
    (ids,) = DocumentEncoder(tokenizer, 0.0, 0.0).encode([Part(text, "lines", "held_out", 0)])
    return PreparedData(
        Path("unused"), tokenizer, (PreparedSource("lines", Fraction(1), (), (Shard(Path("unused"), ids),)),)
    )


@pytest.fixture
def data(lines) -> PreparedData:
    return prepared(lines, add_bos_token=False)


@pytest.fixture
def model(generator) -> Transformer:
    model = Transformer(ModelConfig.preset("micro"))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model


def test_every_token_has_a_chance_that_the_whole_text_gives_it(model, generator):
    """Each new token is the draw that a generator with the same seed makes from a pass over all tokens before it."""
    prompt = torch.randint(4, 300, (9,), generator=generator).tolist()
    new = continuation(model, prompt, 12, eos_token_id=-1, dtype=model.dtype)
    assert len(new) == 12
    draws = torch.Generator().manual_seed(0)
    for i, token in enumerate(new):
        with torch.no_grad():
            logits = model(torch.tensor([prompt + new[:i]])).logits[0, -1]
        assert int(torch.multinomial((logits / 0.8).softmax(-1), 1, generator=draws)) == token


def test_a_document_that_ends_ends_the_sample(model):
    new = continuation(model, [5, 6, 7], 12, eos_token_id=-1, dtype=model.dtype)
    end = next(i for i in range(1, 12) if new[i] not in new[:i])
    assert continuation(model, [5, 6, 7], 12, eos_token_id=new[end], dtype=model.dtype) == new[:end]


def test_broken_weights_end_a_sample(model):
    with torch.no_grad():
        model.layers[1].self_attn.o_proj.weight[0, 0] = float("nan")
    assert continuation(model, [5, 6, 7], 12, eos_token_id=-1, dtype=model.dtype) == []


def test_a_sample_draws_no_random_numbers_and_repeats(model, data):
    config = TrainConfig(seq_len=64, sample_tokens=8)
    before = torch.get_rng_state()
    first = draw_sample(model, data, config)
    assert torch.equal(torch.get_rng_state(), before)
    assert draw_sample(model, data, config) == first
    with torch.no_grad():
        model.lm_head.weight.neg_()
    assert draw_sample(model, data, config).text != first.text


@pytest.mark.parametrize(("seq_len", "prompt", "new"), [(1, 1, 0), (6, 3, 2), (200, 32, 50)])
@pytest.mark.parametrize("add_bos_token", [False, True])
def test_a_sample_begins_a_document_within_the_length_trained_on(
    seq_len, prompt, new, add_bos_token, model, lines, monkeypatch
):
    """One token begins it: BOS, which the data has, or the EOS of a document before."""
    data, seen = prepared(lines, add_bos_token), []

    def record(model, tokens, max_new_tokens, eos_token_id, dtype):
        seen.append((tokens, max_new_tokens))
        return []

    monkeypatch.setattr("dsv3.train.sample.continuation", record)
    draw_sample(model, data, TrainConfig(seq_len=seq_len, sample_tokens=50))
    ((tokens, max_new_tokens),) = seen
    text = data.tokenizer.encode(lines)
    start = data.tokenizer.bos_id if add_bos_token else data.tokenizer.eos_id
    assert tokens == [start, *text[: prompt - add_bos_token]][:seq_len]
    assert len(tokens) + max_new_tokens <= seq_len and max_new_tokens >= new


def test_a_line_has_no_line_end_in_it():
    line = Sample("def f(x):\r\n    return x\n", "import os\n" * 100).one_line()
    assert "\n" not in line and "\r" not in line and len(line) < 250 and "⏎" in line
