"""The engine against the plain reference: one matrix of ways to compute the same text, on caches full of poison."""

from __future__ import annotations

import dataclasses
import random

import pytest
import torch

from dsv3.errors import UserError
from dsv3.model import mla
from dsv3.model.transformer import Transformer
from dsv3.serve.engine import Engine
from dsv3.serve.engine_config import EngineConfig, EngineFull
from dsv3.serve.generate import generate
from dsv3.serve.outputs import collect
from dsv3.serve.params import SamplingParams
from tests.variants import BASE, VARIANTS, random_model, random_tokens

PLAIN = EngineConfig(draft_tokens=0, block_size=4, debug=True)
GREEDY = SamplingParams(max_tokens=9, ignore_eos=True, logprobs=3)

WAYS: dict[str, dict[str, object]] = {
    "whole": {},
    "one by one": {"max_prefill_tokens": 1},
    "chunks of 3": {"max_prefill_tokens": 3},
    "chunks of 4, one at a time": {"max_prefill_tokens": 4, "max_running": 1},
    "chunks of 7, blocks of 3": {"max_prefill_tokens": 7, "block_size": 3},
    "no prefix cache": {"max_prefill_tokens": 11, "prefix_caching": False},
    "preempted": {"cache_tokens": 40, "max_prefill_tokens": 9},
    "preempted, no prefix cache": {"cache_tokens": 40, "prefix_caching": False},
    "drafts": {"draft_tokens": None, "adaptive_drafting": False},
    "drafts, preempted, chunks of 5": {
        "draft_tokens": None,
        "adaptive_drafting": False,
        "cache_tokens": 40,
        "max_prefill_tokens": 5,
    },
}


@pytest.fixture
def model(generator) -> Transformer:
    return random_model(BASE, generator)


def prompts_of(config, generator) -> list[list[int]]:
    """Short and long, some sharing beginnings that end inside a block and at its edge; one twice."""
    stem = random_tokens(config, (28,), generator).tolist()
    ends = random_tokens(config, (3, 5), generator).tolist()
    return [stem[:1], stem[:16], stem[:13] + ends[0], stem[:20] + ends[1], ends[2], stem, stem]


@torch.no_grad()
def expected_logprobs(model: Transformer, prompt: list[int], new: list[int]) -> list[float]:
    logits = model(torch.tensor([prompt + new])).logits[0, len(prompt) - 1 : -1]
    return logits.log_softmax(-1)[range(len(new)), new].tolist()


@pytest.mark.parametrize("variant", ["v3", "yarn, no shared experts, D=3"])
def test_every_way_gives_the_same_text_and_logits(variant, generator):
    model = random_model(VARIANTS[variant], generator)
    prompts = prompts_of(model.config, generator)
    texts = [generate(model, prompt, max_new_tokens=9).tolist()[len(prompt) :] for prompt in prompts]
    logprobs = [expected_logprobs(model, prompt, text) for prompt, text in zip(prompts, texts, strict=True)]
    preempted = hits = 0
    for settings in WAYS.values():
        engine = Engine(model, None, dataclasses.replace(PLAIN, **settings))
        for _ in range(2):  # the second time, prompts are in the prefix cache
            completions = engine.generate(prompts, GREEDY)
            for (completion,), text, expected in zip(completions, texts, logprobs, strict=True):
                assert completion.token_ids == text and completion.finish_reason == "length"
                ours = [token.logprob for token in completion.tokens]
                assert ours == pytest.approx(expected, abs=1e-5)
        assert engine.metrics.cache_blocks_used == 0
        preempted += engine.metrics.preemptions > 0
        hits += engine.metrics.cached_prompt_tokens > 0
    assert preempted >= 2 and hits >= 7


@pytest.mark.parametrize("absorbed", [False, True], ids=["expanded", "absorbed"])
def test_a_long_context_in_parts_gives_the_same_text_and_logits(absorbed, model, generator, monkeypatch):
    prompts = prompts_of(model.config, generator)
    texts = [generate(model, prompt, max_new_tokens=9).tolist()[len(prompt) :] for prompt in prompts]
    logprobs = [expected_logprobs(model, prompt, text) for prompt, text in zip(prompts, texts, strict=True)]
    monkeypatch.setattr(mla, "absorbing_pays", lambda *_: absorbed)
    monkeypatch.setattr(mla, "values_at_a_time", lambda _: 5 * model.config.num_attention_heads * 40)
    engine = Engine(model, None, dataclasses.replace(PLAIN, max_prefill_tokens=11))
    for (completion,), text, expected in zip(engine.generate(prompts, GREEDY), texts, logprobs, strict=True):
        assert completion.token_ids == text
        assert [token.logprob for token in completion.tokens] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("variant", [name for name in VARIANTS if name != "v3"])
def test_every_variant(variant, generator):
    model = random_model(VARIANTS[variant], generator)
    prompts = prompts_of(model.config, generator)[2:5]
    texts = [generate(model, prompt, max_new_tokens=8).tolist()[len(prompt) :] for prompt in prompts]
    settings = {"draft_tokens": None, "adaptive_drafting": False, "max_prefill_tokens": 10}
    engine = Engine(model, None, dataclasses.replace(PLAIN, **settings))
    completions = engine.generate(prompts, SamplingParams(max_tokens=8, ignore_eos=True))
    assert [completion.token_ids for (completion,) in completions] == texts


def test_a_prefix_is_hit_at_block_edges_and_left_at_least_a_token(model, generator):
    prompt = random_tokens(BASE, (16,), generator).tolist()
    engine = Engine(model, None, PLAIN)
    cached = []
    for length in (16, 16, 15, 13, 12, 9, 4, 1):
        ((completion,),) = engine.generate([prompt[:length]], SamplingParams(max_tokens=1))
        cached.append(completion.num_cached_tokens)
    assert cached == [0, 12, 12, 12, 8, 8, 0, 0]


def test_salts_share_nothing(model, generator):
    prompt = random_tokens(BASE, (16,), generator).tolist()
    engine = Engine(model, None, PLAIN)
    hits = []
    for salt in ("", "a", "", "a", "b"):
        request = engine.add(prompt, SamplingParams(max_tokens=1), cache_salt=salt)
        outputs = []
        while engine.is_running(request):
            outputs += engine.step()
        hits.append(outputs[-1].num_cached_tokens)
    assert hits == [0, 0, 12, 12, 0]


def test_the_cache_takes_the_bytes_of_the_formula(model):
    engine = Engine(model, None, EngineConfig(cache_tokens=100, block_size=16))
    assert engine.metrics.cache_blocks == 7
    assert engine.metrics.cache_bytes == (2 + 1) * 7 * 16 * (BASE.kv_lora_rank + BASE.qk_rope_head_dim) * 4


def test_cancelled_at_every_step(model, generator):
    prompts = prompts_of(BASE, generator)[:5]
    settings = {"draft_tokens": None, "adaptive_drafting": False, "cache_tokens": 48, "max_prefill_tokens": 6}
    texts = [generate(model, prompt, max_new_tokens=10).tolist()[len(prompt) :] for prompt in prompts]
    for step in range(11):
        engine = Engine(model, None, dataclasses.replace(PLAIN, **settings))
        requests = [engine.add(prompt, SamplingParams(max_tokens=10, ignore_eos=True)) for prompt in prompts]
        outputs = {request: [] for request in requests}
        victim = requests[step % 5]
        for index in range(200):
            if index == step:
                gone = engine.cancel(victim)
                assert engine.cancel(victim) == [] and not engine.is_running(victim)
                outputs[victim] += gone
                engine.check_integrity()
            for output in engine.step():
                assert output.request_id != victim or index < step
                outputs[output.request_id].append(output)
            if not engine.has_work():
                break
        assert engine.metrics.cache_blocks_used == 0
        for request, text in zip(requests, texts, strict=True):
            (completion,) = collect(outputs[request])
            if completion.finish_reason == "cancelled":
                assert request == victim and completion.token_ids == text[: len(completion.token_ids)]
            else:
                assert completion.token_ids == text and completion.finish_reason == "length"
        assert engine.cancel("never seen") == []


def test_random_traffic_with_everything_at_once(model, seed):
    """Arrivals and cancellations at random, small cache, drafts, sampling: texts are those of each request alone."""
    rng = random.Random(seed)
    settings = {"draft_tokens": None, "cache_tokens": 96, "max_prefill_tokens": 7, "max_running": 5}
    config = dataclasses.replace(PLAIN, **settings)
    stem = [rng.randrange(48) for _ in range(30)]
    asked, outputs = {}, {}
    engine = Engine(model, None, config)
    for number in range(30):
        prompt = stem[: rng.randrange(1, 30)] + [rng.randrange(48) for _ in range(rng.randrange(3))]
        params = SamplingParams(
            temperature=rng.choice((0.0, 0.0, 1.0)),
            seed=number,
            max_tokens=rng.randrange(1, 20),
            n=rng.choice((1, 1, 3)),
        )
        request = engine.add(prompt, params)
        asked[request], outputs[request] = (prompt, params), []
        if rng.random() < 0.2:
            for output in engine.cancel(rng.choice(list(asked))):
                outputs[output.request_id].append(output)
        for _ in range(rng.randrange(4)):
            for output in engine.step():
                outputs[output.request_id].append(output)
    while engine.has_work():
        for output in engine.step():
            outputs[output.request_id].append(output)
    assert engine.metrics.cache_blocks_used == 0
    alone = Engine(model, None, dataclasses.replace(PLAIN, draft_tokens=0))
    for request, (prompt, params) in asked.items():
        completions = collect(outputs[request])
        if any(completion.finish_reason in (None, "cancelled") for completion in completions):
            continue
        assert [c.token_ids for c in completions] == [c.token_ids for c in alone.generate([prompt], params)[0]]


def test_a_model_that_breaks_ends_its_requests_with_an_error(model, generator):
    engine = Engine(model, None, PLAIN)
    with torch.no_grad():
        model.embed_tokens.weight[5] = float("nan")
    (bad,), (good,) = engine.generate([[1, 5], [1, 2]], [SamplingParams(max_tokens=4), SamplingParams(max_tokens=4)])
    assert bad.finish_reason == "error" and bad.error == "the model's output is not a number" and not bad.tokens
    assert good.finish_reason in ("length", "stop") and engine.metrics.cache_blocks_used == 0
    ((again,),) = engine.generate([[1, 5]], SamplingParams(max_tokens=4, temperature=1.0))
    assert again.finish_reason == "error"


def test_end_tokens_end_and_can_be_ignored(model, generator):
    prompt = random_tokens(BASE, (6,), generator).tolist()
    text = generate(model, prompt, max_new_tokens=12).tolist()[6:]
    engine = Engine(model, None, PLAIN)
    for stop in set(text):
        first = text.index(stop)
        ((completion,),) = engine.generate(
            [prompt], SamplingParams(max_tokens=12, ignore_eos=True, stop_token_ids=(stop,))
        )
        assert completion.token_ids == text[: first + 1] and completion.num_output_tokens == first + 1
        assert (completion.finish_reason, completion.stop_reason) == ("stop", stop)
        params = SamplingParams(max_tokens=12, ignore_eos=True, stop_token_ids=(stop,), min_tokens=min(first + 2, 12))
        ((later,),) = engine.generate([prompt], params)
        assert stop not in later.token_ids[: first + 1] and len(later.token_ids) >= min(first + 2, 12)


def test_n_continuations_share_their_prompt(model, generator):
    prompt = random_tokens(BASE, (20,), generator).tolist()
    engine = Engine(model, None, PLAIN)
    params = SamplingParams(temperature=1.0, seed=3, n=4, max_tokens=10)
    (completions,) = engine.generate([prompt], params)
    assert [c.index for c in completions] == [0, 1, 2, 3] and len({tuple(c.token_ids) for c in completions}) > 1
    assert [c.num_cached_tokens for c in completions] == [0, 16, 16, 16]
    for index, completion in enumerate(completions):
        ((alone,),) = engine.generate([prompt], SamplingParams(temperature=1.0, seed=3 + index, max_tokens=10))
        assert alone.token_ids == completion.token_ids
    request = engine.add(prompt, params)
    assert len(engine.cancel(request)) == 4 and not engine.has_work()


def test_what_is_told_of_a_token(model, generator):
    prompt = random_tokens(BASE, (9,), generator).tolist()
    engine = Engine(model, None, PLAIN)
    ((completion,),) = engine.generate(
        [prompt], SamplingParams(max_tokens=5, logprobs=2, routing=True, ignore_eos=True)
    )
    with torch.no_grad():
        out = model(torch.tensor([prompt + completion.token_ids]))
    for index, token in enumerate(completion.tokens):
        place = len(prompt) - 1 + index
        assert token.experts == {
            name: tuple(routing.expert_ids_TK[place].tolist())
            for name, routing in out.routings.items()
            if name.startswith("layers.")
        }
        top = out.logits[0, place].log_softmax(-1).topk(2)
        assert [i for i, _ in token.top_logprobs] == top.indices.tolist() and not token.proposed
        assert [p for _, p in token.top_logprobs] == pytest.approx(top.values.tolist(), abs=1e-5)
    load = engine.metrics.expert_load
    assert sum(load["layers.1"]) == (9 + 4) * BASE.num_experts_per_tok


def test_no_tokens_are_asked_for(model):
    ((completion,),) = Engine(model, None, PLAIN).generate([[1, 2]], SamplingParams(max_tokens=0))
    assert completion.tokens == [] and completion.finish_reason == "length"


def test_closing_a_stream_cancels(model):
    engine = Engine(model, None, PLAIN)
    stream = engine.stream([1, 2, 3], SamplingParams(max_tokens=20, ignore_eos=True))
    assert next(stream).tokens and engine.has_work()
    stream.close()
    assert not engine.has_work() and engine.metrics.cache_blocks_used == 0
    assert engine.metrics.requests_finished == {"cancelled": 1}


def test_a_full_queue_refuses(model):
    engine = Engine(model, None, dataclasses.replace(PLAIN, max_waiting=2, max_running=1))
    engine.add([1])
    engine.step()
    engine.add([1])
    engine.add([2])
    with pytest.raises(EngineFull, match="2 continuations are waiting"):
        engine.add([3])
    many = Engine(model, None, dataclasses.replace(PLAIN, max_waiting=1, max_running=1))
    assert len(many.generate([[i] for i in range(9)], SamplingParams(max_tokens=2))) == 9


@pytest.mark.parametrize(
    ("prompt", "params", "message"),
    [
        ([], {}, "the prompt is empty"),
        ([1, 48], {}, r"token ids from 1 to 48, expected \[0, 48\)"),
        ([-1], {}, r"token ids from -1 to -1"),
        ([1.5], {}, "neither a text nor a list of token ids"),
        ("text", {}, "no tokenizer"),
        ([1] * 60, {"max_tokens": 5}, r"60 prompt tokens and 5 new ones are more than the engine takes \(64"),
        ([1] * 64, {}, "64 prompt tokens and 1 new ones"),
        ([1], {"stop": ("x",)}, "need a tokenizer"),
        ([1], {"stop_token_ids": (48,)}, "stop_token_ids has the token id 48"),
        ([1], {"logit_bias": {50: 1.0}}, "logit_bias has the token id 50"),
        ([1] * 60, {"cache_tokens": 40, "max_tokens": 1}, r"more than the engine takes \(40"),
    ],
)
def test_bad_requests_are_refused_and_change_nothing(prompt, params, message, model):
    params = dict(params)
    settings = {"cache_tokens": params.pop("cache_tokens")} if "cache_tokens" in params else {}
    engine = Engine(model, None, dataclasses.replace(PLAIN, **settings))
    with pytest.raises(UserError, match=message):
        engine.add(prompt, SamplingParams(**params))
    assert not engine.has_work()


def test_an_id_is_used_once_at_a_time(model):
    engine = Engine(model, None, PLAIN)
    engine.add([1], request_id="a")
    with pytest.raises(UserError, match="'a' is already under way"):
        engine.add([1], request_id="a")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"block_size": 0}, "'block_size' is 0"),
        ({"max_running": 1.5}, "'max_running' is 1.5"),
        ({"prefix_caching": 1}, "'prefix_caching' is 1"),
        ({"draft_tokens": 2}, "'draft_tokens' is 2, expected at most 1"),
        ({"max_length": 65}, "'max_length' is 65"),
        ({"max_waiting": -1}, "'max_waiting' is -1"),
    ],
)
def test_senseless_engine_settings_are_errors(settings, message, model):
    with pytest.raises(UserError, match=message):
        Engine(model, None, EngineConfig(**settings))


def test_streams_and_requests_of_one_engine_do_not_take_each_others_outputs(model, generator):
    prompts = random_tokens(BASE, (4, 6), generator).tolist()
    params = SamplingParams(max_tokens=8, ignore_eos=True)
    engine = Engine(model, None, PLAIN)
    texts = [completion.token_ids for (completion,) in engine.generate(prompts, params)]
    added = engine.add(prompts[0], params)
    first, second = engine.stream(prompts[1], params), engine.stream(prompts[2], params)
    streamed = [[], []]
    for a, b in zip(first, second, strict=True):
        streamed[0].append(a)
        streamed[1].append(b)
    ((completion,),) = engine.generate([prompts[3]], params)
    outputs = engine.step()
    assert {output.request_id for output in outputs} == {added} and not engine.has_work()
    collected = [collect(outputs)[0], *(collect(part)[0] for part in streamed), completion]
    assert [completion.token_ids for completion in collected] == texts


def test_prefixes_are_forgotten_when_the_weights_change(model, generator):
    prompt = random_tokens(BASE, (20,), generator).tolist()
    engine = Engine(model, None, PLAIN)
    params = SamplingParams(max_tokens=4, ignore_eos=True)
    engine.generate([prompt], params)
    with torch.no_grad():
        model.layers[0].self_attn.kv_a_proj_with_mqa.weight *= -1
    engine.add([1, 2], params)
    with pytest.raises(UserError, match="1 requests are under way"):
        engine.forget_prefixes()
    while engine.has_work():
        engine.step()
    engine.forget_prefixes()
    ((completion,),) = engine.generate([prompt], params)
    assert completion.num_cached_tokens == 0
    assert completion.token_ids == generate(model, prompt, max_new_tokens=4).tolist()[20:]
