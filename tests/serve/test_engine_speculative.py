"""Drafts inside the batch: whatever is drafted, text, samples and log probabilities are those of plain decoding."""

from __future__ import annotations

import dataclasses
import itertools
import random

import pytest
import torch

from dsv3.model.transformer import Transformer
from dsv3.serve.draft import Drafter
from dsv3.serve.engine import Engine
from dsv3.serve.engine_config import EngineConfig
from dsv3.serve.generate import generate
from dsv3.serve.outputs import Completion, collect
from dsv3.serve.params import SamplingParams
from tests.serve.exact import check_three_tokens, small_model
from tests.variants import BASE, YARN, random_model, random_tokens

DRAFTING = EngineConfig(block_size=4, adaptive_drafting=False, debug=True)
PLAIN = dataclasses.replace(DRAFTING, draft_tokens=0)


def model_of_depth(depth: int, generator: torch.Generator, **changes) -> Transformer:
    return random_model(BASE.replace(num_nextn_predict_layers=depth, **changes), generator)


class Forced:
    """Takes the place of `Drafter.run`: checks the real drafts against the modules' full forward pass, then proposes
    right and wrong ones by `pattern`, right ones when it is at its end."""

    def __init__(
        self, model: Transformer, texts: dict[tuple[int, ...], list[int]], patterns: list[list[tuple]]
    ) -> None:
        self.model, self.texts = model, texts
        self.patterns = dict(zip(texts, patterns, strict=True))
        self.real = Drafter.run
        self.rounds = 0

    @torch.no_grad()
    def __call__(self, drafter: Drafter, jobs) -> None:
        self.real(drafter, jobs)
        for job in jobs:
            if not job.wanted:
                continue
            (key,) = [key for key, text in self.texts.items() if text[: len(job.tokens)] == job.tokens]
            assert len(job.drafts) == job.wanted == min(len(self.model.mtp), len(self.texts[key]) - len(job.tokens) - 1)
            for k, draft in enumerate(job.drafts):
                logits = self.model(torch.tensor([[*job.tokens, *job.drafts[:k]]])).mtp_logits[k][0, -1]
                assert draft == int(logits.argmax()) or logits.max() - logits[draft] < 1e-4
            right = self.texts[key][len(job.tokens) :][: len(job.drafts)]
            bits = self.patterns[key].pop(0) if self.patterns[key] else (True,) * len(right)
            job.drafts = [t if bit else (t + 1) % 48 for t, bit in zip(right, bits, strict=False)]
            self.rounds += 1


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_every_pattern_of_right_and_wrong_drafts(depth, generator, seed, monkeypatch):
    """Several sequences at once, each with its own pattern; what one round leaves behind, the next one meets."""
    model = model_of_depth(depth, generator, max_position_embeddings=96, rope_scaling=YARN)
    rng = random.Random(seed)
    prompts = random_tokens(BASE, (4, 7), generator).tolist()
    prompts = [prompt[: 1 + 2 * index] for index, prompt in enumerate(prompts)]
    steps = 30
    texts = {tuple(p): generate(model, p, max_new_tokens=steps).tolist() for p in prompts}
    patterns = []
    for _ in prompts:
        pattern = [bits for bits in itertools.product((False, True), repeat=depth) for _ in range(5 - depth)]
        rng.shuffle(pattern)
        patterns.append(pattern)
    forced = Forced(model, texts, patterns)
    monkeypatch.setattr(Drafter, "run", lambda *args: forced(*args))
    for settings in ({"max_prefill_tokens": 3}, {"cache_tokens": 88}):
        engine = Engine(model, None, dataclasses.replace(DRAFTING, **settings))
        for (completion,), text in zip(
            engine.generate(prompts, SamplingParams(max_tokens=steps, ignore_eos=True)), texts.values(), strict=True
        ):
            assert completion.token_ids == text[-steps:]
    assert engine.metrics.preemptions and forced.rounds > 4 * 7
    assert 0 < engine.metrics.acceptance <= 1 and not any(patterns)


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_unforced_drafts_change_nothing_and_some_stand(depth, generator):
    model = model_of_depth(depth, generator)
    with torch.no_grad():
        model.lm_head.weight[:4] *= 6  # a few loud tokens: model and modules often agree, and often not
    prompts = random_tokens(BASE, (6, 9), generator).tolist()
    kinds = [
        {},
        {"temperature": 0.7, "seed": 1, "top_k": 5},
        {"temperature": 1.0, "seed": 2, "top_p": 0.9, "min_p": 0.01},
        {"repetition_penalty": 1.3, "presence_penalty": 0.4, "frequency_penalty": 0.3},
        {"temperature": 1.2, "seed": 4, "logit_bias": {3: 2.0, 1: -100.0}, "frequency_penalty": 1.0},
        {"min_tokens": 10, "stop_token_ids": (0, 2)},
    ]
    params = [SamplingParams(max_tokens=24, logprobs=2, **kind) for kind in kinds]
    drafting, plain = Engine(model, None, DRAFTING), Engine(model, None, PLAIN)
    ours, expected = drafting.generate(prompts, params), plain.generate(prompts, params)
    for (a,), (b,) in zip(ours, expected, strict=True):
        assert a.token_ids == b.token_ids and (a.finish_reason, a.stop_reason) == (b.finish_reason, b.stop_reason)
        assert [t.logprob for t in a.tokens] == pytest.approx([t.logprob for t in b.tokens], abs=1e-4)
    metrics = drafting.metrics
    assert 0 < metrics.acceptance < 1
    assert sum(t.proposed for (c,) in ours for t in c.tokens) <= sum(metrics.accepted)


@pytest.mark.parametrize("depth", [1, 3])
def test_samples_have_the_models_exact_distribution(depth, generator):
    model = small_model(depth, generator)
    prompt = random_tokens(model.config, (1, 2), generator)
    params = SamplingParams(temperature=1.0, max_tokens=4, ignore_eos=True, n=128)
    engine = Engine(model, None, dataclasses.replace(DRAFTING, debug=False))
    samples = []
    for round_ in range(6):
        (completions,) = engine.generate(prompt.tolist(), dataclasses.replace(params, seed=128 * (round_ + 10 * depth)))
        samples += [list(completion.token_ids) for completion in completions]
    check_three_tokens(model, prompt, params, samples)
    assert 0.05 < engine.metrics.acceptance < 0.95  # both outcomes had their say


def finished(engine: Engine, request: str) -> Completion:
    outputs = []
    while engine.is_running(request):
        outputs += engine.step()
    (completion,) = collect(output for output in outputs if output.request_id == request)
    return completion


def test_modules_that_fell_behind_catch_up_or_are_given_up(generator, monkeypatch):
    """Drafting goes off and on while a sequence decodes; too long off, and the sequence decodes plainly."""
    model = model_of_depth(2, generator, max_position_embeddings=256)
    prompt = random_tokens(BASE, (5,), generator).tolist()
    text = generate(model, prompt, max_new_tokens=60).tolist()[5:]
    params = SamplingParams(max_tokens=60, ignore_eos=True)
    for limit, on in ((256, lambda step: step % 7 < 3), (9, lambda step: step < 4 or step > 30)):
        monkeypatch.setattr("dsv3.serve.engine._MAX_PENDING", limit)
        engine = Engine(model, None, DRAFTING)
        decisions = iter(range(1000))
        monkeypatch.setattr(engine._gate, "decide", lambda _, on=on, decisions=decisions: on(next(decisions)))
        assert finished(engine, engine.add(prompt, params)).token_ids == text
        drafted = engine.metrics.drafted[0]
        assert 0 < drafted < 60
        again = finished(engine, engine.add(prompt + text[:40], dataclasses.replace(params, max_tokens=20)))
        assert again.token_ids == text[40:]  # what was cached meanwhile was worth it


def test_the_gate_follows_what_is_measured():
    from dsv3.serve.draft_gate import DraftGate

    def share(gate: DraftGate, num: int, rates: dict[bool, float], steps: int = 500) -> float:
        made = 0
        for _ in range(steps):
            drafts = gate.decide(num)
            gate.observe(num, drafts, rates[drafts], 1)
            made += drafts
        return made / steps

    gate = DraftGate()
    assert share(gate, 1, {True: 1.0, False: 1.7}) > 0.95
    assert share(gate, 8, {True: 2.0, False: 1.7}) < 0.1
    assert share(gate, 1, {True: 1.0, False: 1.7}) > 0.95  # another size of batch, another answer
    share(gate, 8, {True: 0.5, False: 1.7}, steps=2000)
    assert share(gate, 8, {True: 0.5, False: 1.7}) > 0.95  # it tries again now and then
    assert share(DraftGate(adaptive=False), 8, {True: 9.0, False: 1.0}) == 1


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_modules_find_nothing_of_another_text_in_shared_blocks(depth, generator, monkeypatch):
    """Texts that part at the edge of a block, one after the other: an MTP layer's latents before it differ already."""
    model = model_of_depth(depth, generator, max_position_embeddings=96)
    stem = random_tokens(BASE, (16,), generator).tolist()
    prompts = [stem + [(stem[0] + step) % 48] * 3 for step in (0, 1, 2)]
    texts = {tuple(prompt): generate(model, prompt, max_new_tokens=8).tolist() for prompt in prompts}
    forced = Forced(model, texts, [[]] * 3)
    monkeypatch.setattr(Drafter, "run", lambda *args: forced(*args))
    engine = Engine(model, None, DRAFTING)
    cached = []
    for prompt in prompts:
        ((completion,),) = engine.generate([prompt], SamplingParams(max_tokens=8, ignore_eos=True))
        assert completion.token_ids == texts[tuple(prompt)][19:]
        cached.append(completion.num_cached_tokens)
    assert cached == [0, 12, 12]  # the fourth block holds what came behind it
