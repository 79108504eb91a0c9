"""One optimizer step: its losses and gradients against the definition, whatever the size of the micro-batches."""

from __future__ import annotations

import pytest
import torch

from dsv3.config import ModelConfig
from dsv3.model.balance import LoadBalancer
from dsv3.model.transformer import Transformer
from dsv3.ops.cross_entropy import IGNORE
from dsv3.train.step import Losses, MicroBatch, backward_step, labels_at, pass_input
from tests import reference
from tests.variants import BASE, VARIANTS, random_model, random_tokens

EOS = 1


def documents(config: ModelConfig, rows: int, length: int, generator: torch.Generator) -> torch.Tensor:
    """Tokens with ends of documents here and there: none in the first row, ever more in the later ones."""
    tokens = random_tokens(config, (rows, length), generator)
    tokens[tokens == EOS] = EOS + 1
    ends = torch.rand(rows, length, generator=generator) < torch.linspace(0, 0.5, rows)[:, None]
    return tokens.masked_fill(ends, EOS)


def run(model: Transformer, tokens: torch.Tensor, *, micro: int, mtp_weight: float = 0.3, eos: int | None = EOS):
    """(losses, gradients by name, counts by layer) of one step."""
    balancer = LoadBalancer(model)
    model.zero_grad()
    losses = backward_step(model, balancer, tokens, micro_batch_size=micro, mtp_weight=mtp_weight, eos_token_id=eos)
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return losses, gradients, {name: counts.tolist() for name, counts in balancer.update(0.0).items()}


def test_labels_by_hand():
    tokens = torch.tensor([[5, 6, EOS, 7, 8, 9], [EOS, EOS, 5, 6, 7, EOS]])
    nothing = IGNORE
    assert labels_at(tokens, 0, EOS).tolist() == [[6, EOS, nothing, 8, 9], [nothing, nothing, 6, 7, EOS]]
    assert labels_at(tokens, 1, EOS).tolist() == [[EOS, nothing, nothing, 9], [nothing, nothing, 7, EOS]]
    assert labels_at(tokens, 2, EOS).tolist() == [[nothing] * 3, [nothing, nothing, EOS]]
    assert labels_at(tokens, 1, None).tolist() == [[EOS, 7, 8, 9], [5, 6, 7, EOS]]


@pytest.mark.parametrize("depth", range(9))
def test_labels_are_the_references(depth, generator):
    tokens = documents(BASE, 6, 7, generator)
    labels = labels_at(tokens, depth, EOS)
    expected = [[IGNORE if t is None else t for t in reference.targets(row, depth, EOS)] for row in tokens.tolist()]
    assert labels.dtype == torch.int64 and labels.tolist() == expected


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS.keys())
def test_losses_gradients_and_counts_are_the_references(config, generator):
    config = config.replace(aux_loss_alpha=0.2)  # large enough to be seen beside the other losses
    model = random_model(config, generator, torch.float64)
    tokens = documents(config, 2, 7, generator)
    losses, gradients, counts = run(model, tokens, micro=2)
    W = reference.weights_of(model, grad=True)
    expected = reference.step(config, W, tokens.tolist(), EOS, mtp_weight=0.3)
    expected.total.backward()
    assert losses.main == pytest.approx(expected.main.item(), rel=1e-5)
    assert losses.mtp == pytest.approx([loss.item() for loss in expected.mtp], rel=1e-5)
    assert losses.balance == pytest.approx(expected.balance.item(), rel=1e-5)
    assert counts == expected.counts
    assert gradients.keys() == {name for name, _ in model.named_parameters()}
    for name, gradient in gradients.items():
        theirs = W[name].grad
        if theirs is None:  # the reference never touched it: an expert's stack always is, so nothing is
            theirs = torch.zeros_like(gradient)
        size = theirs.abs().max().item()
        assert size > 1e-5, name  # a weight that nothing depends on would prove nothing
        torch.testing.assert_close(gradient, theirs, atol=2e-5 * size, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("name", ["v3", "yarn, no shared experts, D=3", "every second layer MoE, D=2"])
@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_one_batch_or_four_micro_batches(name, recompute, generator):
    config = VARIANTS[name].replace(aux_loss_alpha=0.2)
    model = random_model(config, generator, torch.float64)
    tokens = documents(config, 4, 10, generator)
    valid = [(labels_at(row[None], 0, EOS) != IGNORE).sum().item() for row in tokens]
    assert len(set(valid)) > 1  # a mean of the micro-batches' means would be wrong
    losses, gradients, counts = run(model, tokens, micro=4)
    model.recompute = recompute
    for micro in (1, 2, 4):
        other_losses, other_gradients, other_counts = run(model, tokens, micro=micro)
        assert other_counts == counts
        assert other_losses.main == pytest.approx(losses.main, rel=1e-12)
        assert other_losses.mtp == pytest.approx(losses.mtp, rel=1e-12)
        assert other_losses.balance == pytest.approx(losses.balance, rel=1e-12)
        assert other_gradients.keys() == gradients.keys()
        for name, gradient in gradients.items():
            torch.testing.assert_close(other_gradients[name], gradient, atol=1e-12, rtol=1e-9)


@pytest.mark.parametrize("micro", [1, 3])
@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_every_token_is_counted_once_per_layer(micro, recompute, generator):
    model = random_model(BASE.replace(num_nextn_predict_layers=2), generator, torch.float64)
    model.recompute = recompute
    _, _, counts = run(model, documents(BASE, 3, 9, generator), micro=micro)
    K = BASE.num_experts_per_tok
    # Nine tokens, the last of them only a target: eight positions, and one less for each depth.
    assert {name: sum(c) for name, c in counts.items()} == {
        "layers.1": 3 * 8 * K,
        "mtp.0": 3 * 7 * K,
        "mtp.1": 3 * 6 * K,
    }


def test_the_auxiliary_loss_reaches_the_router_and_nothing_without_alpha(generator):
    tokens = documents(BASE, 2, 8, generator)
    gradients = []
    for alpha in (0.0, 0.1, 0.2):
        model = random_model(BASE.replace(aux_loss_alpha=alpha), torch.Generator().manual_seed(1), torch.float64)
        losses, by_name, _ = run(model, tokens, micro=1)
        gradients.append(by_name["layers.1.mlp.router.weight"])
        assert (losses.balance > 0.5) == (alpha > 0)
    assert (gradients[1] - gradients[0]).abs().max() > 1e-5
    torch.testing.assert_close(gradients[2] - gradients[0], 2 * (gradients[1] - gradients[0]))


def test_the_mtp_loss_is_lambda_over_d_times_the_sum(generator):
    tokens = documents(BASE, 2, 8, generator)
    model = random_model(BASE.replace(num_nextn_predict_layers=3, aux_loss_alpha=0), generator, torch.float64)
    gradients = {w: run(model, tokens, micro=2, mtp_weight=w)[1]["lm_head.weight"] for w in (0.0, 0.3, 0.6)}
    torch.testing.assert_close(gradients[0.6] - gradients[0.0], 2 * (gradients[0.3] - gradients[0.0]))
    assert (gradients[0.3] - gradients[0.0]).abs().max() > 1e-5


def test_mtp_that_weighs_nothing_is_not_run(generator):
    model = random_model(BASE.replace(aux_loss_alpha=0), generator, torch.float64)
    tokens = documents(BASE, 2, 8, generator)
    losses, gradients, counts = run(model, tokens, micro=1, mtp_weight=0.0)
    assert not [name for name in gradients if name.startswith("mtp.")]
    assert sum(counts["mtp.0"]) == 0 and sum(counts["layers.1"]) > 0
    without = random_model(BASE.replace(aux_loss_alpha=0, num_nextn_predict_layers=0), generator, torch.float64)
    without.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith("mtp.")})
    expected_losses, expected, _ = run(without, tokens, micro=2, mtp_weight=0.0)
    assert losses.main == pytest.approx(expected_losses.main, rel=1e-12)
    for name, gradient in expected.items():
        torch.testing.assert_close(gradients[name], gradient)


def test_a_batch_of_nothing_but_ends_loses_nothing(generator):
    model = random_model(BASE.replace(aux_loss_alpha=0), generator, torch.float64)
    losses, gradients, _ = run(model, torch.full((2, 6), EOS), micro=1)
    assert losses == Losses(0.0, (0.0,), 0.0)
    assert all((gradient == 0).all() for gradient in gradients.values())


def test_sequences_too_short_for_a_depth(generator):
    model = random_model(BASE.replace(num_nextn_predict_layers=3), generator, torch.float64)
    losses, gradients, counts = run(model, documents(BASE, 2, 3, generator), micro=2, eos=None)
    assert losses.main > 0 and losses.mtp[0] > 0 and losses.mtp[1:] == (0.0, 0.0)
    assert all(gradient.isfinite().all() for gradient in gradients.values())
    assert sum(counts["mtp.0"]) == 2 * BASE.num_experts_per_tok and sum(counts["mtp.1"]) == 0


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_isolated_documents_are_what_they_would_be_alone(recompute, generator):
    """The losses of packed documents are sums over the documents, each run by itself behind what begins it."""
    config = BASE.replace(aux_loss_alpha=0, num_nextn_predict_layers=2)
    model = random_model(config, generator, torch.float64)
    model.recompute = recompute
    texts = [random_tokens(config, (length,), generator).clamp_min(EOS + 1) for length in (5, 1, 9, 4)]
    alone = [torch.cat((torch.tensor([EOS]), text, torch.tensor([EOS])))[None] for text in texts]
    packed = torch.cat([alone[0], *(document[:, 1:] for document in alone[1:])], dim=1)

    def loss_sums(tokens: torch.Tensor, isolate: bool) -> list[float]:
        balancer, isolate_at = LoadBalancer(model), EOS if isolate else None
        losses = backward_step(
            model, balancer, tokens, micro_batch_size=1, mtp_weight=0.3, eos_token_id=EOS, isolate_at=isolate_at
        )
        values = (losses.main, *losses.mtp)
        counts = [(labels_at(tokens, depth, EOS) != IGNORE).sum().item() for depth in range(len(values))]
        return [value * count for value, count in zip(values, counts, strict=True)]

    expected = [sum(sums) for sums in zip(*(loss_sums(tokens, False) for tokens in alone), strict=True)]
    assert loss_sums(packed, True) == pytest.approx(expected, rel=1e-6)
    assert loss_sums(packed, False) != pytest.approx(expected, rel=1e-3)


def test_isolation_lets_no_gradient_cross(generator):
    """What a document's words are changes nothing for those behind it."""
    model = random_model(BASE.replace(aux_loss_alpha=0), generator, torch.float64)
    tokens = random_tokens(BASE, (1, 16), generator).clamp_min(EOS + 1)
    tokens[0, 7] = EOS
    other = tokens.clone()
    other[0, :7] = random_tokens(BASE, (7,), generator).clamp_min(EOS + 1)
    for isolate in (False, True):
        inputs = [pass_input(MicroBatch(row), EOS if isolate else None) for row in (tokens, other)]
        hidden = [model.hidden_states(each.tokens_BS, mask=each.mask).main_BSD[:, 8:] for each in inputs]
        same = torch.allclose(*hidden, rtol=1e-6, atol=1e-9)
        assert same == isolate


def test_learning_one_batch_by_heart(generator):
    """The gradients lead down: a few dozen steps on one batch, and the model knows it."""
    model = random_model(BASE, generator)
    tokens = documents(BASE, 4, 12, generator)
    balancer = LoadBalancer(model)
    adam = torch.optim.Adam(model.parameters(), lr=0.01)
    history = []
    for _ in range(40):
        adam.zero_grad()
        history.append(backward_step(model, balancer, tokens, micro_batch_size=2, mtp_weight=0.3, eos_token_id=EOS))
        adam.step()
        balancer.update(0.001)
    assert history[-1].main < 0.1 * history[0].main
    assert history[-1].mtp[0] < 0.1 * history[0].mtp[0]


def test_the_figures_of_micro_batches_that_do_not_divide_the_batch(generator):
    config = BASE.replace(aux_loss_alpha=0.2)
    model = random_model(config, generator, torch.float64)
    tokens = documents(config, 4, 10, generator)
    losses, gradients, counts = run(model, tokens, micro=4)
    other_losses, other_gradients, other_counts = run(model, tokens, micro=3)
    assert other_counts == counts
    for name, gradient in gradients.items():
        torch.testing.assert_close(other_gradients[name], gradient, atol=1e-12, rtol=1e-9)
    assert other_losses.main == pytest.approx(losses.main, rel=1e-12)
    assert other_losses.balance == pytest.approx(losses.balance, rel=1e-12)
