"""The same random weights in two implementations: ours, and that of `transformers`, which is the oracle here.

Weights travel through a checkpoint folder, written by dsv3 and read by transformers, so every comparison also
holds the file format to its word. They are drawn so that nothing is trivial: norm weights away from 1, selection
biases large and negative, activations and logits of the order of 1.

Shapes: B batch, S tokens, D model, V vocabulary.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.modeling_layers import MtpModel

from dsv3.checkpoint.pretrained import save_pretrained
from dsv3.config import ModelConfig
from dsv3.model.router import Router
from dsv3.model.transformer import Transformer
from dsv3.serve.generate import GenerationStats, generate

# Gives how many drafts stood in each verification that transformers made since it was last called.
TheirMatches = Callable[[], list[int]]


@dataclass(frozen=True)
class Twin:
    """One model twice."""

    ours: Transformer
    theirs: PreTrainedModel
    folder: Path  # where both have their weights from

    @property
    def config(self) -> ModelConfig:
        return self.ours.config

    def their_mtp(self) -> MtpModel:
        """Their MTP modules, which no model of theirs holds: `generate(use_mtp=True)` loads them like this."""
        return MtpModel.from_pretrained(self.theirs)


def make_twin(config: ModelConfig, folder: Path, generator: torch.Generator, **save: Any) -> Twin:
    """A model of `config` with random weights, written to `folder` by dsv3 (options `save`), read by transformers."""
    ours = Transformer(config).eval()
    randomize(ours, generator)
    save_pretrained(ours, folder, **save)
    return Twin(ours, load_theirs(folder, config), folder)


def load_theirs(folder: Path, config: ModelConfig) -> PreTrainedModel:
    """The folder as transformers reads it, in FP32, computed by the plainest of its code paths."""
    theirs, report = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=torch.float32,
        attn_implementation="eager",
        experts_implementation="eager",
        output_loading_info=True,
    )
    mtp_layers = range(config.num_hidden_layers, config.num_layers_with_mtp)
    assert not report["missing_keys"] and not report["mismatched_keys"] and not report["error_msgs"], report
    assert {int(key.split(".")[2]) for key in report["unexpected_keys"]} == set(mtp_layers)
    # Transformers finds MTP weights by the patterns of names that loading the main model passes over, and those know
    # the release's layer 61 only.
    theirs._keys_to_ignore_on_load_unexpected = [rf"model\.layers\.{layer}\." for layer in mtp_layers]
    return theirs.eval()


@torch.no_grad()
def randomize(model: nn.Module, generator: torch.Generator) -> None:
    """Draw every weight anew, so that variances are kept from layer to layer and logits are of the order of 1."""
    for name, tensor in model.state_dict().items():
        if name.endswith("e_score_correction_bias"):
            # All selection scores fall below 0: whoever masks dropped groups with 0 picks experts from them.
            tensor.uniform_(-5.4, -4.6, generator=generator)
        elif tensor.dim() == 1:
            tensor.uniform_(0.5, 1.5, generator=generator)
        elif name == "embed_tokens.weight":
            tensor.normal_(generator=generator)
        else:
            # What is added to the residual stream is half as large as it, or the stream would grow with every layer.
            gain = 0.5 if "o_proj" in name or "down_proj" in name else 1.0
            tensor.normal_(std=gain / math.sqrt(tensor.shape[-1]), generator=generator)


def random_tokens(config: ModelConfig, batch: int, length: int, generator: torch.Generator) -> Tensor:
    """[B, S] int64."""
    return torch.randint(0, config.vocab_size, (batch, length), generator=generator)


def clear_tokens(model: Transformer, batch: int, length: int, generator: torch.Generator) -> Tensor:
    """Random tokens [B, S] that every router decides about by more than rounding could undo.

    Two implementations that differ by 1e-6 rightly choose different experts where two scores are closer than that.
    """
    for _ in range(50):
        tokens_BS = random_tokens(model.config, batch, length, generator)
        with torch.no_grad():
            routings = model(tokens_BS).routings
        routers = {name: module for name, module in model.named_modules() if isinstance(module, Router)}
        margins = [
            selection_margin(routing.scores_TE, router.e_score_correction_bias, model.config)
            for routing, router in zip(routings.values(), routers.values(), strict=True)
        ]
        if min(margins, default=1.0) > 4e-6:
            return tokens_BS
    raise AssertionError("no clear tokens in 50 draws: are all scores the same?")


def selection_margin(scores_TE: Tensor, bias_E: Tensor | None, config: ModelConfig) -> float:
    """By how much the last group and the last expert taken beat the first ones that were not, at its smallest."""
    selection_TE = scores_TE if bias_E is None else scores_TE + bias_E
    margins = [1.0]
    if config.topk_method != "greedy" and config.topk_group < config.n_group:
        selection_TGe = selection_TE.unflatten(1, (config.n_group, -1))
        best = 2 if config.topk_method == "noaux_tc" else 1
        group_TG = selection_TGe.topk(best).values.sum(-1)
        ordered = group_TG.sort(descending=True)
        margins.append(float((ordered.values[:, config.topk_group - 1] - ordered.values[:, config.topk_group]).min()))
        kept = ordered.indices[:, : config.topk_group, None].expand(-1, -1, selection_TGe.shape[2])
        selection_TE = selection_TGe.gather(1, kept).flatten(1)
    K = config.num_experts_per_tok
    if selection_TE.shape[1] > K:
        ordered_TE = selection_TE.sort(descending=True).values
        margins.append(float((ordered_TE[:, K - 1] - ordered_TE[:, K]).min()))
    return min(margins)


@torch.no_grad()
def watch(model: nn.Module, tokens_BS: Tensor) -> dict[str, Any]:
    """Run `model`; what each of its modules answered, by name, and under `<name>.input` what it was given first."""
    seen: dict[str, Any] = {}

    def note(name: str) -> Any:
        def hook(module: nn.Module, given: tuple[Any, ...], answer: Any) -> None:
            seen[name] = answer
            if given:
                seen[f"{name}.input"] = given[0]

        return hook

    hooks = [module.register_forward_hook(note(name)) for name, module in model.named_modules()]
    try:
        model(tokens_BS)
    finally:
        for hook in hooks:
            hook.remove()
    return seen


def assert_close(what: str, ours: Tensor, theirs: Tensor, atol: float = 1e-5) -> None:
    """Fail, with `what` and the largest difference, unless both are the same everywhere within `atol`."""
    assert ours.shape == theirs.shape, f"{what}: {tuple(ours.shape)} against {tuple(theirs.shape)}"
    worst = float((ours - theirs).abs().max())
    assert worst <= atol, f"{what} differs by {worst:.3g}, expected at most {atol:g}"


def their_tensor(state: dict[str, Tensor], name: str) -> Tensor:
    """The tensor with canonical (file) name `name` in a state of theirs, where experts lie stacked and fused."""
    match = re.fullmatch(r"(.*\.experts)\.(\d+)\.(gate|up|down)_proj\.weight", name)
    if match is None:
        return state[name]
    experts, index, part = match.groups()
    if part == "down":
        return state[f"{experts}.down_proj"][int(index)]
    gate, up = state[f"{experts}.gate_up_proj"][int(index)].chunk(2)
    return gate if part == "gate" else up


def assert_same_speculation(
    twin: Twin, prompt: Tensor, new_tokens: int, their_matches: TheirMatches, eos_token_id: int | None = None
) -> GenerationStats:
    """Both decode greedily with drafts: the same tokens, in as many passes, with as many drafts accepted per depth."""
    plain = generate(twin.ours, prompt, max_new_tokens=new_tokens, eos_token_id=eos_token_id)
    stats = GenerationStats()
    ours = generate(
        twin.ours, prompt, max_new_tokens=new_tokens, eos_token_id=eos_token_id, speculative=True, stats=stats
    )
    theirs = twin.theirs.generate(
        prompt.unsqueeze(0),
        attention_mask=torch.ones_like(prompt).unsqueeze(0),
        use_mtp=True,
        do_sample=False,
        max_new_tokens=new_tokens,
        eos_token_id=eos_token_id,
    )
    matches = their_matches()
    assert ours.tolist() == plain.tolist() == theirs[0].tolist()
    assert stats.decode_steps == len(matches)
    # Ours stops counting at the deepest draft that was judged.
    assert stats.accepted == [sum(n > depth for n in matches) for depth in range(len(stats.accepted))]
    assert max(matches) <= len(stats.accepted)
    return stats
