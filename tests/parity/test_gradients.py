"""The loss of a training step and the gradient of every parameter, against autograd through transformers.

Shapes: B batch, S tokens, D model, V vocabulary.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsv3.checkpoint.names import canonical_tensors
from dsv3.config import ModelConfig
from dsv3.model.balance import LoadBalancer
from dsv3.train.step import backward_step
from tests.parity.configs import CASES
from tests.parity.twin import Twin, assert_close, clear_tokens, make_twin, their_tensor

MTP_WEIGHT = 0.3


def their_losses(twin: Twin, tokens_BS1: Tensor) -> tuple[Tensor, list[Tensor], nn.Module]:
    """The main loss and that of each MTP depth, and the MTP modules: all made of transformers' own parts."""
    theirs, mtp = twin.theirs, nn.ModuleList()
    out = theirs(tokens_BS1, labels=tokens_BS1, output_hidden_states=True)
    losses: list[Tensor] = []
    if twin.config.num_nextn_predict_layers:
        mtp = twin.their_mtp()
        hidden_BSD, tokens_BS = out.hidden_states[-1], tokens_BS1[:, :-1]
        for k in range(1, twin.config.num_nextn_predict_layers + 1):
            S = tokens_BS.shape[1] - k
            positions = torch.arange(k, k + S).unsqueeze(0)
            hidden_BSD = mtp.forward_layer(k - 1, hidden_BSD[:, :S], positions, None, input_ids=tokens_BS[:, k:])
            logits_BSV = theirs.lm_head(hidden_BSD)
            losses.append(F.cross_entropy(logits_BSV.flatten(0, 1), tokens_BS1[:, k + 1 :].flatten()))
    return out.loss, losses, mtp


def their_gradients(twin: Twin, mtp: nn.Module) -> dict[str, Tensor]:
    """By the names that a checkpoint has for the parameters, but for experts, which stay stacked and fused."""
    L = twin.config.num_hidden_layers
    parameters = dict(twin.theirs.named_parameters())
    for name, parameter in mtp.named_parameters():
        if match := re.fullmatch(r"layers\.(\d+)\.(?:mtp_block\.)?(.+)", name):
            within = match[2].replace("post_norm", "shared_head.norm")
            parameters[f"model.layers.{L + int(match[1])}.{within}"] = parameter
    assert all(parameter.grad is not None for parameter in parameters.values())
    return {name: parameter.grad for name, parameter in parameters.items()}


@pytest.mark.parametrize(
    "config",
    [
        pytest.param(CASES["v3"].replace(num_nextn_predict_layers=1), id="v3, one MTP module"),
        pytest.param(CASES["yarn, no q_lora"].replace(num_nextn_predict_layers=2), id="yarn, two MTP modules"),
        pytest.param(CASES["no normalisation"], id="no normalisation"),
        pytest.param(CASES["moonlight"], id="moonlight"),
        pytest.param(CASES["v2 greedy"], id="v2 greedy"),
        pytest.param(CASES["v2 group_limited_greedy"], id="v2 group_limited_greedy"),
    ],
)
def test_loss_and_gradients(config: ModelConfig, generator: torch.Generator, tmp_path: Path) -> None:
    # The sequence-wise balance loss is DeepSeek's, not transformers': without it both minimise the same.
    twin = make_twin(config.replace(aux_loss_alpha=0.0), tmp_path, generator)
    tokens_BS1 = clear_tokens(twin.ours, 3, 25, generator)
    ours = backward_step(
        twin.ours,
        LoadBalancer(twin.ours),
        tokens_BS1,
        micro_batch_size=1,
        mtp_weight=MTP_WEIGHT,
        eos_token_id=None,
    )
    main, mtp_losses, mtp = their_losses(twin, tokens_BS1)
    (main + sum(MTP_WEIGHT / len(mtp_losses) * loss for loss in mtp_losses)).backward()

    losses = torch.stack([main, *mtp_losses]).detach()
    assert_close("loss", torch.tensor([ours.main, *ours.mtp]), losses, atol=1e-5)
    gradients = {name: parameter.grad for name, parameter in twin.ours.named_parameters()}
    expected = their_gradients(twin, mtp)
    compared = 0
    for tensor in canonical_tensors(config):
        if tensor.copy_of is not None or tensor.kind == "bias":
            continue
        reference = their_tensor(expected, tensor.name)
        # Relative to the largest entry: most gradients are far below 1e-4 altogether.
        scale = float(reference.abs().max().clamp_min(1e-6))
        assert_close(f"gradient of {tensor.name}", tensor.view(gradients) / scale, reference / scale, atol=1e-4)
        compared += reference.numel()
    assert compared == sum(gradient.numel() for gradient in expected.values())
    assert compared == sum(gradient.numel() for gradient in gradients.values())
