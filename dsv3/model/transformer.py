"""The whole model: embedding, blocks, final norm, head, and the MTP modules behind it.

Shapes: B batch, S tokens of this pass, D model, V vocabulary, X latent width of the cache.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dsv3.config import ModelConfig
from dsv3.errors import UserError
from dsv3.model.block import Block
from dsv3.model.cache import Cache
from dsv3.model.context import Context, make_context, whole_sequences
from dsv3.model.initial import init_weights
from dsv3.model.mtp import MTPModule
from dsv3.model.norm import RMSNorm
from dsv3.model.router import Routing
from dsv3.ops.recompute import selective_recomputation

Recompute = Literal["none", "selective", "full"]


@dataclass(frozen=True)
class Hidden:
    """Hidden states ready for the head (after the final norm of their module)."""

    main_BSD: Tensor
    mtp: tuple[Tensor, ...]  # depth k = 1.. : [B, S-k, D]; position i predicts token i+k+1
    routings: dict[str, Routing]  # by layer name: "layers.3", "mtp.0"


@dataclass(frozen=True)
class ModelOutput:
    """What a model says of a batch of tokens."""

    logits: Tensor  # [B, S, V]; position i predicts token i+1
    mtp_logits: tuple[Tensor, ...]  # depth k = 1.. : [B, S-k, V]; position i predicts token i+k+1
    routings: dict[str, Routing]


def routed_layers(config: ModelConfig) -> list[str]:
    """The names of the layers that route, in order, as a pass's routings have them."""
    L = config.num_hidden_layers
    layers = filter(config.is_moe_layer, range(config.num_layers_with_mtp))
    return [f"layers.{i}" if i < L else f"mtp.{i - L}" for i in layers]


class Transformer(nn.Module):
    """DeepSeek-V3. `model(tokens_BS)` gives `.logits` and `.mtp_logits`.

    Weights are drawn from a normal of std `initializer_range` (norms 1, biases 0), from a seed that torch's global
    generator gives; on the meta device none are.
    `recompute` says what the backward pass makes again to save memory: "none" of it; "selective", what is cheap (norms,
    MLA's up-projections, SwiGLU outputs; see `ops.recompute`); "full", every block from its input.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.recompute = "none"
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.mtp = nn.ModuleList(MTPModule(config, k + 1) for k in range(config.num_nextn_predict_layers))
        if self.device.type != "meta":
            self.init_weights()

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.embed_tokens.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Of its weights (the router's are FP32 at least) and of its hidden states."""
        return self.embed_tokens.weight.dtype

    @property
    def recompute(self) -> Recompute:
        return self._recompute

    @recompute.setter
    def recompute(self, value: Recompute) -> None:
        if value not in get_args(Recompute):
            raise UserError(f"recompute is {value!r}, expected one of {', '.join(get_args(Recompute))}")
        self._recompute = value

    def init_weights(self, seed: int | None = None) -> None:
        """Draw all weights anew (`dsv3.model.initial`). seed: None takes one from torch's global generator."""
        seed = int(torch.randint(2**63 - 1, ())) if seed is None else seed
        init_weights(self, seed=seed, std=self.config.initializer_range)

    def forward(self, tokens_BS: Tensor) -> ModelOutput:
        """All logits at once, main and MTP. Training takes `hidden_states` and never makes them (ops.cross_entropy)."""
        hidden = self.hidden_states(tokens_BS)
        return ModelOutput(self.lm_head(hidden.main_BSD), tuple(self.lm_head(h) for h in hidden.mtp), hidden.routings)

    def hidden_states(
        self,
        tokens_BS: Tensor,
        *,
        mask: Tensor | None = None,
        valid_BS: Tensor | None = None,
        aux_loss_scale: float = 0.0,
        mtp: bool = True,
    ) -> Hidden:
        """Main and MTP hidden states of whole sequences. tokens_BS int64; `mask` and the rest as in `Context`."""
        S = tokens_BS.shape[1]
        context = make_context(
            self.config,
            whole_sequences(S),
            tokens_BS.device,
            mask=mask,
            valid_BS=valid_BS,
            aux_loss_scale=aux_loss_scale,
        )
        embedding_BSD = self.embed_tokens(tokens_BS)
        main_BSD, routings = self._run_blocks(embedding_BSD, context)
        hiddens: list[Tensor] = []
        previous = main_BSD
        for k, module in enumerate(self.mtp if mtp else (), start=1):
            if k >= S:
                hiddens.append(main_BSD[:, :0])  # too short for this depth
                continue
            # Position i of depth k reads token i+k, so k positions at the end have nothing to read.
            previous, routing = self._run(module, previous[:, : S - k], embedding_BSD[:, k:], context.behind(k))
            if routing is not None:
                routings[f"mtp.{k - 1}"] = routing
            hiddens.append(previous)
        return Hidden(main_BSD, tuple(hiddens), routings)

    def extend(self, tokens_BS: Tensor, cache: Cache, routings: dict[str, Routing] | None = None) -> Tensor:
        """Run S more tokens of the main model behind what `cache` holds; their hidden states [B, S, D].

        `routings`: filled with those of this pass, by layer name.
        """
        positions = cache.positions(0, tokens_BS.shape[1])
        context = make_context(self.config, positions, tokens_BS.device, cache=cache)
        hidden_BSD, of_pass = self._run_blocks(self.embed_tokens(tokens_BS), context)
        if routings is not None:
            routings.update(of_pass)
        return hidden_BSD

    def extend_mtp(self, depth: int, hidden_BSD: Tensor, tokens_BS: Tensor, cache: Cache) -> Tensor:
        """The same for MTP module `depth` (1-based): `hidden` of depth - 1 at S positions, and the tokens `depth`
        places on. Positions count from what the cache holds of this module. Returns its hidden states [B, S, D]."""
        positions = cache.positions(self.config.num_hidden_layers + depth - 1, tokens_BS.shape[1])
        context = make_context(self.config, positions, tokens_BS.device, cache=cache)
        out: Tensor = self.mtp[depth - 1](hidden_BSD, self.embed_tokens(tokens_BS), context)[0]
        return out

    def _run_blocks(self, h_BSD: Tensor, context: Context) -> tuple[Tensor, dict[str, Routing]]:
        routings: dict[str, Routing] = {}
        for i, block in enumerate(self.layers):
            h_BSD, routing = self._run(block, h_BSD, context)
            if routing is not None:
                routings[f"layers.{i}"] = routing
        return self.norm(h_BSD), routings

    def _run(self, module: nn.Module, *args: object) -> tuple[Tensor, Routing | None]:
        out: tuple[Tensor, Routing | None]
        if self.recompute == "full" and torch.is_grad_enabled():
            out = checkpoint(module, *args, use_reentrant=False, preserve_rng_state=False)
            return out
        with selective_recomputation() if self.recompute == "selective" else nullcontext():
            out = module(*args)
        return out
