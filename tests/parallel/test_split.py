"""The two halves of a split backward are the whole one, and the tape's pieces are the uncut graph."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from dsv3.model.block import Block
from dsv3.model.context import make_context, whole_sequences
from dsv3.model.router import Router
from dsv3.parallel.layout import parse_layout
from dsv3.parallel.pieces import drain
from dsv3.parallel.split import backward_input
from dsv3.parallel.stages import RankModel, Stage
from dsv3.parallel.tape import Tape, slot_of
from tests.variants import BASE, random_model, random_tokens


def gradients(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("layer", [0, 1], ids=["dense", "moe"])
def test_halves_of_a_block_are_the_whole(generator: torch.Generator, recompute: str, layer: int) -> None:
    model = random_model(BASE, generator, torch.float64)
    block = model.layers[layer]
    context = make_context(BASE, whole_sequences(7), torch.device("cpu"), aux_loss_scale=0.1)
    h = torch.randn(2, 7, BASE.hidden_size, generator=generator, dtype=torch.float64)
    g = torch.randn(2, 7, BASE.hidden_size, generator=generator, dtype=torch.float64)

    plain = h.clone().requires_grad_()
    block(plain, context)[0].backward(g)
    expected = gradients(block)
    block.zero_grad()

    tape = Tape(recompute)
    x = tape.enter(h)
    out, _ = tape.run_block(block, x, context)
    slot_of(out).add(g)
    drain(tape.backward(split=True))
    torch.testing.assert_close(slot_of(x).grad, plain.grad)
    early = gradients(block)
    put_off = {name for name in expected if name not in early}
    linears = {f"{n}.weight" for n, m in block.named_modules() if isinstance(m, nn.Linear)}
    assert linears <= put_off, "the weights of linear layers can wait"
    tape.backward_weights()
    torch.testing.assert_close(gradients(block), expected)


def test_a_weight_gradient_that_is_put_off_is_not_computed_before(generator: torch.Generator) -> None:
    """What the first half runs is the path: of a linear layer one product, not two."""
    linear = nn.Linear(4, 3, bias=False, dtype=torch.float64)
    ran: list[str] = []
    x = torch.randn(5, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    y = linear(x)
    y.grad_fn.next_functions[1][0].register_prehook(lambda _: ran.append("weight"))
    _, finish = backward_input([get_gradient_edge(y)], [torch.ones_like(y)], [get_gradient_edge(x)])
    assert ran == [] and linear.weight.grad is None
    finish()
    assert ran == ["weight"]
    torch.testing.assert_close(linear.weight.grad, torch.ones(3, 5, dtype=torch.float64) @ x)


def test_one_weight_used_twice_and_one_output_that_needs_no_input(generator: torch.Generator) -> None:
    w = torch.randn(4, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    x = torch.randn(5, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    outputs = [(x @ w).tanh() @ w, w.square().sum()]
    seeds = [torch.ones(5, 4, dtype=torch.float64), torch.tensor(2.0, dtype=torch.float64)]
    expected = torch.autograd.grad(outputs, [x, w], seeds, retain_graph=True)
    (x_grad,), finish = backward_input([get_gradient_edge(y) for y in outputs], seeds, [get_gradient_edge(x)])
    finish()
    torch.testing.assert_close((x_grad, w.grad), expected)


def test_hooks_see_accumulated_gradients(generator: torch.Generator) -> None:
    """The optimizer takes gradients where autograd accumulates them: both halves have to pass there."""
    w = torch.randn(4, 4, generator=generator, requires_grad=True)
    seen: list[int] = []
    w.register_post_accumulate_grad_hook(lambda p: seen.append(1))
    x = torch.randn(5, 4, generator=generator, requires_grad=True)
    y = x @ w
    _, finish = backward_input([get_gradient_edge(y)], [torch.ones_like(y)], [get_gradient_edge(x)])
    finish()
    assert seen == [1]


@dataclass(frozen=True)
class Pair:
    a: Tensor
    b: tuple[Tensor, int]


@pytest.mark.parametrize("split", [False, True])
def test_a_leaf_that_several_pieces_use_gathers_their_gradients(generator: torch.Generator, split: bool) -> None:
    w = torch.randn(3, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    x = torch.randn(2, 3, generator=generator, dtype=torch.float64, requires_grad=True)

    def first(x: Tensor) -> Pair:
        return Pair(x @ w, (x.sin(), 3))

    def second(pair: Pair) -> Tensor:
        return pair.a * pair.b[0] * pair.b[1]

    def third(pair: Pair, y: Tensor) -> Tensor:
        return (y @ w) * pair.a

    pair = first(x)
    expected = torch.autograd.grad(third(pair, second(pair)).sum(), [x, w])
    tape = Tape()
    entered = tape.enter(x)
    pair = tape.run(first, entered)
    out = tape.run(third, pair, tape.run(second, pair))
    slot_of(out).add(torch.ones_like(out))
    drain(tape.backward(split=split))
    tape.backward_weights()
    torch.testing.assert_close((slot_of(entered).grad, w.grad), expected)


def test_the_balance_loss_reaches_the_router_through_the_tape(generator: torch.Generator) -> None:
    model = random_model(BASE, generator, torch.float64)
    tokens = random_tokens(BASE, (2, 8), generator)
    (part,) = parse_layout("EttmL", BASE)
    stage = Stage(RankModel(model, [part]), part)

    def grads(scale: float) -> dict[str, Tensor]:
        tape = Tape("full")
        done = drain(
            stage.forward(
                tape,
                None,
                tokens,
                make_context(BASE, whole_sequences(tokens.shape[1]), tokens.device, aux_loss_scale=scale),
                lambda hiddens, _: sum(h.sum() for h in hiddens),
                mtp=True,
                in_stages=False,
            )
        )
        assert set(done.routings) == {"layers.1", "mtp.0"}
        slot_of(done.output).add(torch.ones_like(done.output))
        drain(tape.backward())
        return {n: m.weight.grad.clone() for n, m in model.named_modules() if isinstance(m, Router)}

    without = grads(0.0)
    model.zero_grad()
    for name, gradient in grads(1.0).items():
        assert not torch.allclose(gradient, without[name])


def test_a_block_here_is_the_models(generator: torch.Generator) -> None:
    model = random_model(BASE, generator)
    rank_model = RankModel(model, parse_layout("Et|tmL", BASE)[1:])
    names = dict(model.named_parameters())
    for name, parameter in rank_model.named_parameters():
        assert parameter is names[name]
    assert isinstance(rank_model.layers["1"], Block)
    assert set(names) - set(dict(rank_model.named_parameters())) == {n for n in names if n.startswith("layers.0.")}
