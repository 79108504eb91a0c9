"""Everything that a request may ask for, in random combinations under drafts: each answer is that of the request alone.

Grammars, stop strings, limits, penalties, log probabilities and cancellation each have their own tests; they share a
step's drafts and rollbacks, and there they meet. Here requests of all kinds run side by side in a small cache that
preempts, drafts being right, wrong or the modules' own at random, drafting going off and on; the other side is each
request by itself, plainly decoded.
"""

from __future__ import annotations

import dataclasses
import random
from collections import defaultdict

import pytest

from dsv3.serve.draft import Drafter, DraftJob
from dsv3.serve.engine import Engine
from dsv3.serve.engine_config import EngineConfig
from dsv3.serve.outputs import Completion, Output, collect
from dsv3.serve.params import Grammar, SamplingParams

GRAMMARS = (
    Grammar("regex", "[a-f]{3,12}"),
    Grammar("regex", "(the |name|日本|\\n)*"),
    Grammar("json_schema", {"type": "object", "properties": {"name": {"type": "string"}}, "required": ["name"]}),
    Grammar("lark", 'start: "<" /[a-z0-9 ]{2,9}/ ">" start?'),
)
STEM = "the value of the name, 日本語 12.5 true"


def random_params(rng: random.Random, eos: int, vocabulary: int) -> SamplingParams:
    """All but stop strings, which are cut from what the request says without them."""

    def maybe(value, otherwise, chance=0.3):
        return value if rng.random() < chance else otherwise

    max_tokens = maybe(rng.randrange(1, 5), rng.randrange(9, 26))
    bias = {rng.randrange(vocabulary): rng.choice((-100.0, 3.0)) for _ in range(5)} | maybe({eos: 5.0}, {}, 0.5)
    return SamplingParams(
        temperature=rng.choice((0.0, 0.0, 0.8, 1.3)),
        top_p=maybe(0.9, 1.0),
        top_k=maybe(7, 0),
        min_p=maybe(0.05, 0.0),
        seed=rng.randrange(-5, 2**63),
        repetition_penalty=maybe(1.3, 1.0),
        presence_penalty=maybe(0.7, 0.0),
        frequency_penalty=maybe(-0.4, 0.0),
        logit_bias=maybe(bias, {}),
        n=maybe(rng.randrange(2, 4), 1),
        max_tokens=max_tokens,
        min_tokens=maybe(rng.randrange(max_tokens + 1), 0),
        ignore_eos=maybe(True, False),
        stop_token_ids=maybe(tuple(rng.sample(range(vocabulary), 20)), ()),
        logprobs=maybe(rng.randrange(4), None, 0.5),
        grammar=maybe(rng.choice(GRAMMARS), None, 0.4),
        routing=maybe(True, False, 0.2),
        skip_special=maybe(False, True),
    )


def cut_stops(rng: random.Random, text: str) -> tuple[str, ...]:
    """Up to three strings, most of which are in `text`, and one that nearly is."""
    stops = [text[start : start + rng.randrange(1, 6)] for start in rng.sample(range(len(text)), min(len(text), 2))]
    stops += [stop + "\0" for stop in stops[:1]]
    return tuple(rng.sample(stops, rng.randrange(len(stops) + 1)))


class Guesses:
    """Takes the place of `Drafter.run`: of the modules' drafts some become what will be said, some anything at all."""

    def __init__(self, rng: random.Random, texts: dict[tuple[str, int], list[int]], vocabulary: int) -> None:
        self.rng, self.texts, self.vocabulary, self.real = rng, texts, vocabulary, Drafter.run

    def __call__(self, drafter: Drafter, jobs: list[DraftJob]) -> None:
        self.real(drafter, jobs)
        for job in jobs:
            sequence = job.row.__self__
            right = self.texts[sequence.request.id, sequence.index][sequence.num_output :]
            kind = self.rng.choice(("right", "right", "mixed", "own"))
            if kind == "right":
                job.drafts = right[: job.wanted]
            elif kind == "mixed":
                choices = [
                    (token, draft, self.rng.randrange(self.vocabulary))
                    for token, draft in zip(right, job.drafts, strict=False)
                ]
                job.drafts = [self.rng.choice(each) for each in choices]


def check(completion: Completion, alone: Completion, exact: bool) -> None:
    """exact: bit for bit."""
    for field in dataclasses.fields(Completion):
        if field.name not in ("request_id", "tokens", "num_cached_tokens"):
            assert getattr(completion, field.name) == getattr(alone, field.name), field.name
    assert completion.token_ids == alone.token_ids
    for ours, theirs in zip(completion.tokens, alone.tokens, strict=True):
        if exact:
            assert dataclasses.replace(ours, proposed=False) == theirs
            continue
        assert ours.logprob == (None if theirs.logprob is None else pytest.approx(theirs.logprob, abs=1e-4))
        assert [value for _, value in ours.top_logprobs] == pytest.approx(
            [value for _, value in theirs.top_logprobs], abs=1e-4
        )
        assert (ours.experts is None) == (theirs.experts is None)


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("round_", [*range(2), *(pytest.param(n, marks=pytest.mark.slow) for n in range(2, 60))])
def test_each_answer_is_that_of_the_request_alone(round_, exact, text_model, tokenizer, seed, monkeypatch):
    rng, vocabulary = random.Random(seed), tokenizer.vocab_size
    plain = EngineConfig(draft_tokens=0, batch_invariant=exact)
    asked: dict[str, tuple[str, SamplingParams]] = {}
    said, alone = {}, {}
    engine = Engine(text_model, tokenizer, plain)
    for name in map(str, range(12)):
        prompt = STEM[: rng.randrange(30)] + "".join(rng.choices("name 12", k=rng.randrange(4)))
        params = random_params(rng, tokenizer.eos_id, vocabulary)
        (whole,) = engine.generate([prompt], params)
        said |= {(name, completion.index): completion.token_ids for completion in whole}
        text = rng.choice(whole).text.replace("\N{REPLACEMENT CHARACTER}", "")
        params = dataclasses.replace(params, stop=cut_stops(rng, text) if rng.random() < 0.6 else ())
        asked[name] = prompt, params
        (alone[name],) = engine.generate([prompt], params)

    guesses = Guesses(rng, said, vocabulary)
    monkeypatch.setattr(Drafter, "run", lambda *args: guesses(*args))
    engine = Engine(
        text_model,
        tokenizer,
        EngineConfig(
            block_size=rng.choice((3, 4, 8)),
            cache_tokens=72,
            max_prefill_tokens=rng.choice((3, 11, 64)),
            max_running=rng.choice((4, 16)),
            prefix_caching=rng.random() < 0.7,
            draft_tokens=rng.choice((1, 2, 2)),
            batch_invariant=exact,
            debug=True,
        ),
    )
    monkeypatch.setattr(engine._gate, "decide", lambda _: rng.random() < 0.8)
    monkeypatch.setattr("dsv3.serve.engine._MAX_PENDING", rng.choice((2, 256)))
    outputs: dict[str, list[Output]] = defaultdict(list)

    def step() -> None:
        for output in engine.step():
            outputs[output.request_id].append(output)
        if rng.random() < 0.03:
            victim = rng.choice(list(asked))
            outputs[victim] += engine.cancel(victim)
            engine.check_integrity()

    for name, (prompt, params) in asked.items():
        engine.add(prompt, params, request_id=name, cache_salt=rng.choice(("", "", "mine")))
        if rng.random() < 0.5:
            step()
    while engine.has_work():
        step()
    assert engine.metrics.cache_blocks_used == 0
    for name, expected in alone.items():
        completions = collect(outputs[name])
        assert [completion.index for completion in completions] == [completion.index for completion in expected]
        for completion, whole in zip(completions, expected, strict=True):
            ends = [output.finish_reason for output in outputs[name] if output.index == completion.index]
            assert ends[-1] is not None and not any(ends[:-1])
            if completion.finish_reason == "cancelled":
                assert completion.token_ids == whole.token_ids[: len(completion.tokens)]
                assert whole.text.startswith(completion.text.rstrip("\N{REPLACEMENT CHARACTER}"))
            else:
                check(completion, whole, exact)
