"""Speculative decoding: the text of plain decoding for every pattern of accepted and rejected drafts; drafts that
are what the full forward pass of the MTP modules says; samples with the model's exact distribution."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from torch import Tensor

from dsv3.model.transformer import Transformer
from dsv3.serve.generate import Drafter, GenerationStats, generate
from dsv3.serve.sampling import SamplingParams, distribution
from tests.serve.exact import check_three_tokens, small_model
from tests.variants import BASE, VARIANTS, YARN, random_model, random_tokens


def check_drafts(model: Transformer, known: list[int], drafts: list[int], probs_KV: Tensor, params: SamplingParams):
    """Every draft against the full forward pass over the known tokens and the drafts before it."""
    assert len(drafts) == len(probs_KV)
    for k, draft in enumerate(drafts):
        logits = model(torch.tensor([[*known, *drafts[:k]]])).mtp_logits[k][0, -1]
        torch.testing.assert_close(probs_KV[k], distribution(logits, params), atol=1e-5, rtol=1e-4)
        assert probs_KV[k, draft] > 0
        if params.temperature == 0:
            assert draft == int(logits.argmax())


class Forced:
    """Takes the place of `Drafter.draft`: checks what the real one drafts, then proposes right and wrong tokens.

    `text` is what plain decoding says; `pattern` says round by round which drafts shall be right, behind its end all
    are. As in real use, the drafter learns from the next call how many tokens stood.
    """

    def __init__(self, model: Transformer, text: list[int], pattern: list[tuple[bool, ...]]) -> None:
        self.model, self.text, self.pattern = model, text, list(pattern)
        self.real = Drafter.draft
        self.asked: list[int] = []

    def __call__(self, drafter: Drafter, known: list[int], hidden_1SD: Tensor, limit: int) -> tuple[list[int], Tensor]:
        assert known == self.text[: len(known)]
        drafts, probs_KV = self.real(drafter, known, hidden_1SD, limit)
        assert len(drafts) == min(limit, len(self.model.mtp))
        check_drafts(self.model, known, drafts, probs_KV, SamplingParams())
        right = self.text[len(known) : len(known) + len(drafts)]
        bits = self.pattern.pop(0) if self.pattern else (True,) * len(drafts)
        vocabulary = self.model.config.vocab_size
        forced = [t if bit else (t + 1) % vocabulary for t, bit in zip(right, bits, strict=False)]
        self.asked.append(len(forced))
        return forced, F.one_hot(torch.tensor(forced, dtype=torch.int64), vocabulary).float()


@contextmanager
def forced_drafts(model: Transformer, text: list[int], pattern: list[tuple[bool, ...]] = ()) -> Iterator[Forced]:
    forced = Forced(model, text, pattern)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Drafter, "draft", lambda *args, **settings: forced(*args, **settings))
        yield forced


def model_of_depth(depth: int, generator: torch.Generator, **changes) -> Transformer:
    return random_model(BASE.replace(num_nextn_predict_layers=depth, **changes), generator)


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("prompt_length", [1, 2, 3, 6])
def test_every_pattern_of_right_and_wrong_drafts(depth, prompt_length, generator):
    model = model_of_depth(depth, generator, max_position_embeddings=96, q_lora_rank=None if depth == 2 else 24)
    prompt = random_tokens(BASE, (prompt_length,), generator)
    # What one round leaves behind, the next one meets: every number of standing drafts comes behind every other.
    stands = [n for i in range(depth + 1) for n in (i, *(n for j in range(i + 1, depth + 1) for n in (i, j)))] + [0]
    assert len(set(itertools.pairwise(stands))) == (depth + 1) ** 2
    sequence = [(True,) * n + (False,) * (depth - n) for n in stands]
    sequence += itertools.product((False, True), repeat=depth)
    steps = 1 + sum((*bits, False).index(False) + 1 for bits in sequence) + depth
    text = generate(model, prompt, max_new_tokens=steps).tolist()
    stats = GenerationStats()
    with forced_drafts(model, text, sequence) as forced:
        out = generate(model, prompt, max_new_tokens=steps, speculative=True, stats=stats)
    assert out.tolist() == text
    assert not forced.pattern
    # As many tokens a round as drafts were right, and one.
    expected_drafted, expected_accepted, known, rounds = [0] * depth, [0] * depth, prompt_length + 1, 0
    while known < len(text):
        made = min(depth, len(text) - known - 1)
        bits = sequence[rounds][:made] if rounds < len(sequence) else (True,) * made
        stood = next((k for k, bit in enumerate(bits) if not bit), made)
        for k in range(min(stood + 1, made)):
            expected_drafted[k] += 1
            expected_accepted[k] += k < stood
        assert forced.asked[rounds] == made
        known += stood + 1
        rounds += 1
    assert stats.decode_steps == rounds == len(forced.asked)
    assert (stats.drafted, stats.accepted, stats.new_tokens) == (expected_drafted, expected_accepted, steps)
    assert stats.acceptance == sum(expected_accepted) / sum(expected_drafted)


@pytest.mark.parametrize("name", [name for name, config in VARIANTS.items() if config.num_nextn_predict_layers])
def test_any_pattern_with_every_variant(name, generator):
    model = random_model(VARIANTS[name], generator)
    prompt = random_tokens(model.config, (4,), generator)
    text = generate(model, prompt, max_new_tokens=16).tolist()

    @settings(max_examples=5)
    @given(st.lists(st.tuples(*[st.booleans()] * len(model.mtp)), max_size=12), st.integers(0, 16))
    def check(pattern, steps):
        with forced_drafts(model, text, pattern):
            out = generate(model, prompt, max_new_tokens=steps, speculative=True)
        assert out.tolist() == text[: 4 + steps]

    check()


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_unforced_greedy_is_plain_greedy(depth, generator):
    model = model_of_depth(depth, generator, rope_scaling=YARN)
    prompts = random_tokens(BASE, (6, 5), generator)
    with torch.no_grad():
        model.lm_head.weight[:4] *= 3  # a few loud tokens: model and modules often agree, and often not
    stats = GenerationStats()
    plain = generate(model, prompts, max_new_tokens=20)
    assert torch.equal(generate(model, prompts, max_new_tokens=20, speculative=True, stats=stats), plain)
    assert 0 < stats.acceptance < 1


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_sampled_drafts_come_from_the_modules_distribution(depth, generator, monkeypatch):
    model = model_of_depth(depth, generator)
    options = {"temperature": 1.3, "top_p": 0.8, "seed": 5}
    real, outcomes = Drafter.draft, []

    def checked(drafter, known, hidden_1SD, limit):
        drafts, probs_KV = real(drafter, known, hidden_1SD, limit)
        check_drafts(model, known, drafts, probs_KV, SamplingParams(**options))
        outcomes.append(len(known))
        return drafts, probs_KV

    monkeypatch.setattr(Drafter, "draft", checked)
    generate(model, random_tokens(BASE, (3,), generator), max_new_tokens=16, speculative=True, **options)
    assert len(outcomes) >= 4


@pytest.mark.parametrize(("depth", "settings"), [(1, {}), (2, {"top_p": 0.7}), (3, {"temperature": 0.7})])
def test_samples_have_the_models_exact_distribution(depth, settings, generator):
    model = small_model(depth, generator)
    prompt, samples = random_tokens(model.config, (1, 2), generator), 500
    options = {"temperature": 1.0, "top_p": 1.0, **settings}
    stats = GenerationStats()
    out = generate(
        model, prompt.repeat(samples, 1), max_new_tokens=4, speculative=True, stats=stats, seed=depth, **options
    )
    check_three_tokens(model, prompt, SamplingParams(**options), out[:, 2:].tolist())
    assert 0.1 < stats.acceptance < 0.95  # both outcomes had their say


def test_an_end_token_among_the_drafts_ends_the_text_there(generator):
    model = model_of_depth(3, generator)
    prompt = random_tokens(BASE, (4,), generator)
    text = generate(model, prompt, max_new_tokens=12).tolist()
    for eos in set(text[4:9]):
        expected = text[: text.index(eos, 4) + 1]
        for pattern in ([], [(True, True, False)] * 9, [(True, False, False)] * 9, [(False,) * 3] * 12):
            stats = GenerationStats()
            with forced_drafts(model, text, pattern):
                out = generate(model, prompt, max_new_tokens=12, speculative=True, eos_token_id=eos, stats=stats)
            assert out.tolist() == expected
            assert stats.new_tokens == len(expected) - 4


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("steps", range(6))
def test_no_more_is_drafted_than_there_is_room_for(depth, steps, generator):
    config = BASE.replace(num_nextn_predict_layers=depth, max_position_embeddings=4 + steps)
    model = random_model(config, generator)
    prompt = random_tokens(config, (4,), generator)
    text = generate(model, prompt, max_new_tokens=steps).tolist()
    with forced_drafts(model, text) as forced:
        assert generate(model, prompt, max_new_tokens=steps, speculative=True).tolist() == text
    assert len(text) == 4 + steps
    assert sum(forced.asked) + len(forced.asked) == max(steps - 1, 0)  # every draft stood and had its place
