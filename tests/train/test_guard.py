"""The guard's verdicts on made-up runs, and where in a real model it finds what broke."""

from __future__ import annotations

import dataclasses
import json
import math
import random
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3.errors import UserError
from dsv3.train.guard import Guard, Verdict, first_nonfinite, first_nonfinite_gradient
from dsv3.train.optim import MasterAdamW
from tests.variants import BASE, random_model, random_tokens

pytestmark = pytest.mark.usefixtures("one_thread")

BAD = [math.nan, math.inf, -math.inf]


@pytest.fixture
def rng(seed: int) -> random.Random:
    return random.Random(seed)


def good_losses(rng: random.Random, count: int) -> list[float]:
    """A curve that falls and is noisy."""
    return [2 + 6 * math.exp(-step / 60) + rng.gauss(0, 0.05) for step in range(count)]


def trained(rng: random.Random, steps: int = 200, **settings: float) -> Guard:
    guard = Guard(**settings)
    for step, loss in enumerate(good_losses(rng, steps), start=1):
        assert guard.judge(step, loss, 1.0) == Verdict("ok")
    return guard


@pytest.mark.parametrize("bad", BAD)
def test_what_is_not_finite_is_skipped_from_the_first_step_on(bad, rng):
    for loss, norm in ((bad, 1.0), (2.0, bad)):
        verdict = Guard().judge(1, loss, norm)
        assert verdict.action == "skip"
        assert str(bad) in verdict.reason and "step 1 " in verdict.reason
        assert trained(rng).judge(201, loss, norm).action == "skip"


@pytest.mark.parametrize("bad", BAD)
def test_a_run_of_bad_steps_ends_it_and_a_good_one_starts_the_count_anew(bad):
    guard = Guard(give_up_after=3)
    actions = [guard.judge(step, bad, 1.0).action for step in (1, 2)]
    actions.append(guard.judge(3, 5.0, 1.0).action)
    actions += [guard.judge(step, 5.0, bad).action for step in (4, 5, 6)]
    assert actions == ["skip", "skip", "ok", "skip", "skip", "give_up"]
    assert Guard(give_up_after=1).judge(1, bad, 1.0).action == "give_up"


def test_a_spike_rolls_back_and_a_drop_does_not(rng):
    guard = trained(rng)
    assert guard.judge(201, 0.5, 1.0).action == "ok"
    assert guard.judge(202, 2.4, 1.0).action == "ok"  # noise of 0.05 around 2.2
    verdict = guard.judge(203, 6.0, 1.0)
    assert verdict.action == "rollback"
    assert "step 203" in verdict.reason and "loss 6" in verdict.reason
    assert guard.passes_over(203) and not guard.passes_over(202)
    assert guard.judge(204, 2.3, 1.0).action == "ok"  # the spike itself is not among the losses compared with


def test_the_threshold_counts_robust_deviations():
    """Losses 1, 2, ..., 16: median 8.5, median absolute deviation 4, so one standard deviation is 4 / 0.6745."""
    limit = 8.5 + 3 * 4 / 0.6745
    for loss, action in ((limit - 0.01, "ok"), (limit + 0.01, "rollback")):
        guard = Guard(window=16, threshold=3)
        guard.load_state({**guard.state(), "losses": [float(i) for i in range(1, 17)]})
        assert guard.judge(17, loss, 1.0).action == action


def test_outliers_in_the_window_do_not_blunt_it(rng):
    """A third of the window is far out: a mean and standard deviation would call 4.5 normal."""
    losses = [2 + rng.gauss(0, 0.02) for _ in range(40)] + [4.0] * 20
    rng.shuffle(losses)
    guard = Guard(window=60)
    guard.load_state({**guard.state(), "losses": losses})
    assert guard.judge(61, 4.5, 1.0).action == "rollback"


def test_nothing_is_a_spike_before_a_window_is_known():
    guard = Guard(window=16)
    for step in range(1, 16):
        assert guard.judge(step, 2.0, 1.0).action == "ok"
    assert guard.judge(16, 50.0, 1.0).action == "ok"
    assert guard.judge(17, 50.0, 1.0).action == "rollback"


def test_a_curve_without_noise_may_move_a_little():
    guard = Guard(window=16)
    for step in range(1, 17):
        guard.judge(step, 2.0, 1.0)
    assert guard.judge(17, 2.0 * 1.005, 1.0).action == "ok"
    assert guard.judge(18, 2.0 * 1.05, 1.0).action == "rollback"


@settings(max_examples=30)
@given(st.integers(0, 2**32), st.integers(16, 100))
def test_sound_curves_are_left_alone(seed, window):
    rng = random.Random(seed)
    guard = Guard(window=window, threshold=25)
    assert all(guard.judge(step, loss, 1.0).action == "ok" for step, loss in enumerate(good_losses(rng, 300), 1))


def simulate(guard: Guard, losses: Callable[[int, frozenset[int]], float], steps: int, every: int) -> list[str]:
    """A trainer without a model: what it does, step by step. losses(step, steps passed over) -> loss."""
    log: list[str] = []
    saved, step = (0, json.dumps(guard.state())), 0
    passed: set[int] = set()
    while step < steps:
        step += 1
        if guard.passes_over(step):
            passed.add(step)
            log.append(f"pass {step}")
        else:
            verdict = guard.judge(step, losses(step, frozenset(passed)), 1.0)
            log.append(f"{verdict.action} {step}")
            if verdict.action == "give_up":
                break
            if verdict.action == "rollback":
                step = saved[0]
                guard.rewind(json.loads(saved[1]))
                continue
        if step % every == 0:
            saved = (step, json.dumps(guard.state()))
    return log


def test_a_run_goes_back_passes_over_the_batch_and_goes_on(rng):
    curve = good_losses(rng, 100)
    log = simulate(Guard(window=16), lambda step, passed: 50.0 if step == 45 else curve[step - 1], 60, every=20)
    expected = [f"ok {step}" for step in range(1, 45)] + ["rollback 45"]
    expected += [f"ok {step}" for step in range(41, 45)] + ["pass 45"] + [f"ok {step}" for step in range(46, 61)]
    assert log == expected


def test_a_run_that_does_not_recover_is_given_up_though_steps_before_the_spike_are_good_again(rng):
    curve = good_losses(rng, 100)
    guard = Guard(window=16, give_up_after=3)
    log = simulate(guard, lambda step, passed: 50.0 if step >= 45 else curve[step - 1], 100, every=20)
    assert [entry for entry in log if entry.startswith(("rollback", "give_up"))] == [
        "rollback 45",
        "rollback 46",
        "give_up 47",
    ]
    assert log.count("ok 44") == 3 and log.count("pass 45") == 2


def test_a_skipped_step_is_not_judged_again_after_a_rollback(rng):
    curve = good_losses(rng, 100)
    bad = {42: math.nan, 45: 50.0}
    log = simulate(Guard(window=16, give_up_after=3), lambda s, passed: bad.get(s, curve[s - 1]), 60, every=20)
    assert log.count("skip 42") == 1 and log.count("pass 42") == 1 and log[-1] == "ok 60"


def test_a_resumed_guard_judges_as_if_it_had_not_stopped(rng):
    guard = trained(rng, 50, window=16)
    guard.judge(51, math.nan, 1.0)
    resumed = Guard(window=16)
    resumed.load_state(json.loads(json.dumps(guard.state())))
    for step in range(52, 120):
        loss = rng.choice([2.5, 3.0, 3.5, 9.0, math.nan])
        assert guard.judge(step, loss, 1.0) == resumed.judge(step, loss, 1.0)
    assert guard.state() == resumed.state()
    assert resumed.passes_over(51)


def test_bad_input():
    for settings_, name in (
        ({"window": 15}, "window"),
        ({"threshold": 0.5}, "threshold"),
        ({"give_up_after": 0}, "give_up_after"),
    ):
        with pytest.raises(UserError, match=name):
            Guard(**settings_)
    with pytest.raises(UserError, match="threshold"):
        Guard(threshold=math.nan)
    with pytest.raises(UserError, match="lacks bad_steps, losses"):
        Guard().load_state({"furthest": 3, "troubles": 0})


# A module of every kind, in forward order.
PLACES = [
    "embed_tokens",
    "layers.0.input_layernorm",
    "layers.0.self_attn.kv_a_proj_with_mqa",
    "layers.0.mlp.down_proj",
    "layers.1.mlp.router",
    "layers.1.mlp.shared_experts.gate_up_proj",
    "layers.1.mlp.experts",
    "norm",
    "mtp.0.eh_proj",
    "mtp.0.block.self_attn.o_proj",
]


def poison(value: object, bad: float) -> object:
    """A module's output with one entry of each of its tensors made bad."""
    if isinstance(value, torch.Tensor) and value.is_floating_point():
        return value.index_fill(0, torch.zeros((), dtype=torch.long), bad)
    if dataclasses.is_dataclass(value):
        return dataclasses.replace(value, weights_TK=poison(value.weights_TK, bad))
    return value


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("place", PLACES)
def test_the_first_module_that_breaks_is_found(place, bad, generator):
    model = random_model(BASE, generator)
    tokens = random_tokens(BASE, (2, 12), generator)
    for later in PLACES[PLACES.index(place) :]:
        model.get_submodule(later).register_forward_hook(lambda module, args, out: poison(out, bad))
    assert first_nonfinite(model, lambda: model.hidden_states(tokens)) == f"output of {place}"


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["embed_tokens.weight", "layers.1.mlp.experts.down_proj", "lm_head.weight"])
def test_a_broken_weight_is_found_though_no_token_may_meet_it(name, bad, generator):
    model = random_model(BASE, generator)
    with torch.no_grad():
        model.get_parameter(name).view(-1)[-1] = bad
    assert first_nonfinite(model, lambda: pytest.fail("there is nothing to run")) == f"weight {name}"


def test_what_a_modules_own_code_makes_is_found_at_the_next_modules_input(generator):
    """An infinite value breaks the softmax, which is no module: o_proj is the first that sees it."""
    model = random_model(BASE, generator)
    with torch.no_grad():
        model.layers[1].self_attn.kv_b_proj.weight.fill_(3e38)
        model.layers[1].self_attn.kv_a_layernorm.weight.fill_(1e-30)
    tokens = random_tokens(BASE, (2, 12), generator)
    found = first_nonfinite(model, lambda: model.hidden_states(tokens))
    assert found is None
    with torch.no_grad():
        model.layers[1].self_attn.q_b_proj.weight.fill_(1e25)  # finite queries, finite keys, infinite products
        model.layers[1].self_attn.kv_a_layernorm.weight.fill_(1e-12)
    assert first_nonfinite(model, lambda: model.hidden_states(tokens)) == "input of layers.1.self_attn.o_proj"


def test_a_sound_model_has_nothing_to_find_and_keeps_no_hooks(generator):
    model = random_model(BASE, generator)
    tokens = random_tokens(BASE, (2, 12), generator)
    calls = []

    def forward() -> object:
        calls.append(torch.is_grad_enabled())
        return model.hidden_states(tokens)

    assert first_nonfinite(model, forward) is None
    assert calls == [False]
    with pytest.raises(ZeroDivisionError):
        first_nonfinite(model, lambda: 1 / 0)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("place", ["lm_head", "layers.1.mlp.shared_experts.down_proj", "layers.0.self_attn.o_proj"])
def test_the_backward_pass_is_walked_from_its_start(place, dtype, generator):
    """A gradient that turns NaN behind `place` spoils its weight's gradient and all that come later."""
    model = random_model(BASE.replace(num_nextn_predict_layers=0), generator, dtype)
    optimizer = MasterAdamW(model)
    handle = model.get_submodule(place).register_full_backward_pre_hook(lambda module, grads: (grads[0] * math.nan,))
    model(random_tokens(BASE, (2, 12), generator)).logits.float().square().mean().backward()
    assert first_nonfinite_gradient(optimizer.gradients()) == f"{place}.weight"
    optimizer.zero_grad()
    handle.remove()
    model(random_tokens(BASE, (2, 12), generator)).logits.float().square().mean().backward()
    assert first_nonfinite_gradient(optimizer.gradients()) is None
    assert first_nonfinite_gradient({}) is None
