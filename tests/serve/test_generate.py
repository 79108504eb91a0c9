"""Plain generation against the full forward pass, its ends, its inputs and its errors."""

from __future__ import annotations

import pytest
import torch

from dsv3.errors import UserError
from dsv3.model.transformer import Transformer
from dsv3.serve.generate import GenerationStats, generate
from tests.variants import BASE, VARIANTS, random_model, random_tokens


@pytest.fixture
def model(generator) -> Transformer:
    return random_model(BASE, generator)


@torch.no_grad()
def slow_greedy(model: Transformer, prompt: list[int], steps: int) -> list[int]:
    """Without a cache: the whole text again for every token."""
    tokens = list(prompt)
    for _ in range(steps):
        tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
    return tokens


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS.keys())
def test_greedy_is_the_argmax_of_the_full_forward(config, generator):
    model = random_model(config, generator)
    prompts = random_tokens(config, (2, 5), generator)
    expected = [slow_greedy(model, prompt, 12) for prompt in prompts.tolist()]
    assert generate(model, prompts, max_new_tokens=12).tolist() == expected


@pytest.mark.parametrize("speculative", [False, True])
@pytest.mark.parametrize("steps", [0, 1, 2, 7])
def test_every_form_of_input_gives_its_form_of_output(speculative, steps, model, generator):
    prompts = random_tokens(BASE, (3, 4), generator)
    settings = {"max_new_tokens": steps, "speculative": speculative}
    batch = generate(model, prompts, **settings)
    assert batch.dtype == torch.int64 and batch.shape == (3, 4 + steps)
    assert torch.equal(batch[:, :4], prompts)
    for row, prompt in enumerate(prompts):
        for form in (prompt, prompt.tolist(), tuple(prompt.tolist()), prompt.int()):
            assert torch.equal(generate(model, form, **settings), batch[row])
        assert torch.equal(generate(model, prompt[None], **settings), batch[row][None])


def cut(row: list[int], prompt_length: int, eos: int) -> list[int]:
    """Up to the first end token of the continuation."""
    new = row[prompt_length:]
    return row[:prompt_length] + (new[: new.index(eos) + 1] if eos in new else new)


@pytest.mark.parametrize("speculative", [False, True])
def test_rows_end_where_their_end_token_is(speculative, generator):
    model = random_model(BASE.replace(num_nextn_predict_layers=2), generator)
    prompts = random_tokens(BASE, (3, 3), generator)
    whole = generate(model, prompts, max_new_tokens=9).tolist()
    ends = {whole[0][3], whole[1][4], whole[2][7], whole[0][11]}
    lengths = set()
    for eos in ends:
        out = generate(model, prompts, max_new_tokens=9, eos_token_id=eos, speculative=speculative).tolist()
        expected = [cut(row, 3, eos) for row in whole]
        longest = max(map(len, expected))
        assert out == [row + [eos] * (longest - len(row)) for row in expected]
        lengths.add(tuple(map(len, expected)))
    assert any(len(set(of_rows)) > 1 for of_rows in lengths)  # some rows did end before others


def test_an_end_token_in_the_prompt_ends_nothing(model, generator):
    prompt = random_tokens(BASE, (5,), generator)
    whole = generate(model, prompt, max_new_tokens=6).tolist()
    for eos in set(prompt.tolist()):
        for speculative in (False, True):
            out = generate(model, prompt, max_new_tokens=6, eos_token_id=eos, speculative=speculative)
            assert out.tolist() == cut(whole, 5, eos)


@pytest.mark.parametrize("speculative", [False, True])
def test_sampling_repeats_with_its_seed_and_only_then(speculative, model, generator):
    prompts = random_tokens(BASE, (3, 4), generator)

    def sample(seed):
        return generate(model, prompts, max_new_tokens=10, temperature=1.0, seed=seed, speculative=speculative)

    assert torch.equal(sample(3), sample(3))
    assert not torch.equal(sample(3), sample(4))
    assert not torch.equal(sample(None), sample(None))
    state = torch.random.get_rng_state()
    sample(5)
    assert torch.equal(torch.random.get_rng_state(), state)  # the program's own randomness is left alone


def test_the_rows_of_a_batch_are_sampled_independently(model, generator):
    prompt = random_tokens(BASE, (1, 4), generator)
    for speculative in (False, True):
        out = generate(model, prompt.repeat(6, 1), max_new_tokens=8, temperature=1.0, seed=0, speculative=speculative)
        assert len({tuple(row) for row in out.tolist()}) > 1


def test_a_model_full_to_the_last_position(generator):
    config = BASE.replace(max_position_embeddings=12, num_nextn_predict_layers=3)
    model = random_model(config, generator)
    prompt = random_tokens(config, (5,), generator)
    plain = generate(model, prompt, max_new_tokens=7)
    assert len(plain) == 12
    assert torch.equal(generate(model, prompt, max_new_tokens=7, speculative=True), plain)


@pytest.mark.parametrize("speculative", [False, True])
@pytest.mark.parametrize(
    ("prompt", "settings", "message"),
    [
        ([], {}, "the prompt is empty"),
        (torch.zeros(2, 0, dtype=torch.int64), {}, "the prompt is empty"),
        ([1, 48], {}, r"token ids from 1 to 48, expected \[0, 48\)"),
        ([-1, 3], {}, r"token ids from -1 to 3, expected \[0, 48\)"),
        ([1, 2], {"max_new_tokens": -1}, "max_new_tokens is -1"),
        ([1] * 60, {"max_new_tokens": 5}, r"60 prompt tokens and 5 new ones are more than .* \(64\)"),
        ([1, 2], {"temperature": -1.0}, "temperature is -1.0"),
        ([1, 2], {"top_p": 0.0}, "top_p is 0.0"),
    ],
)
def test_bad_input_is_one_clear_error(speculative, prompt, settings, message, model):
    with pytest.raises(UserError, match=message):
        generate(model, prompt, **{"max_new_tokens": 3, "speculative": speculative, **settings})


FORMS = {
    "three dimensions": torch.zeros(1, 1, 3, dtype=torch.int64),
    "no dimension": torch.tensor(3),
    "no rows": torch.zeros(0, 3, dtype=torch.int64),
    "fractions": [1.5, 2.0],
    "a tensor of fractions": torch.tensor([1.5, 2.0]),
    "rows of different lengths": [[1, 2], [3]],
    "text": "hello",
}


@pytest.mark.parametrize("speculative", [False, True])
@pytest.mark.parametrize("prompt", FORMS.values(), ids=FORMS.keys())
def test_what_is_no_prompt_is_one_clear_error(speculative, prompt, model):
    with pytest.raises(UserError, match="prompt"):
        generate(model, prompt, max_new_tokens=3, speculative=speculative)


def test_drafting_needs_mtp_modules(generator):
    model = random_model(BASE.replace(num_nextn_predict_layers=0), generator)
    with pytest.raises(UserError, match="MTP modules and this model has none"):
        generate(model, [1, 2], max_new_tokens=3, speculative=True)


def test_what_is_counted_of_plain_decoding(model, generator):
    stats = GenerationStats()
    generate(model, random_tokens(BASE, (3, 4), generator), max_new_tokens=9, stats=stats)
    assert (stats.new_tokens, stats.decode_steps) == (27, 8)
    assert stats.drafted == stats.accepted == [] and stats.acceptance == 0


def test_generation_leaves_the_model_trainable(model, generator):
    prompt = random_tokens(BASE, (1, 4), generator)
    for speculative in (False, True):
        generate(model, prompt, max_new_tokens=4, speculative=speculative)
    model(prompt).logits.sum().backward()
    assert model.lm_head.weight.grad is not None
