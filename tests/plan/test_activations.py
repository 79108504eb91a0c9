"""What the planner says a block keeps for its backward pass, against what autograd keeps."""

import pytest
import torch
from torch import Tensor, nn

import dsv3.model.experts
from dsv3.config import ModelConfig
from dsv3.errors import UserError
from dsv3.model.block import Block
from dsv3.model.context import Context
from dsv3.model.mtp import MTPModule
from dsv3.model.norm import RMSNorm
from dsv3.ops.cross_entropy import linear_cross_entropy
from dsv3.ops.experts import _grouped_mm_swiglu
from dsv3.plan.activations import head_activations, head_gradient_bytes, saved_activations
from tests.variants import BASE, VARIANTS

S = 32


def in_the_family(config: ModelConfig) -> ModelConfig:
    """With a latent so large that training expands it, and values that a fused kernel takes."""
    return config.replace(kv_lora_rank=32, v_head_dim=min(config.v_head_dim, config.qk_head_dim))


class _FusedNorm(torch.autograd.Function):
    """Saves what the GPU's fused kernel saves, the input and 1 / rms; the CPU's composition saves more."""

    @staticmethod
    def forward(ctx, x, weight, eps):  # type: ignore[no-untyped-def]
        rms = torch.rsqrt(x.float().square().mean(-1, keepdim=True) + eps)
        ctx.save_for_backward(x, weight, rms)
        return (x * rms * weight).to(x.dtype)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        raise NotImplementedError


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RMSNorm, "forward", lambda self, x: _FusedNorm.apply(x, self.weight, self.eps))
    monkeypatch.setattr(dsv3.model.experts, "grouped_swiglu", _grouped_mm_swiglu)


def saved_bytes(module: nn.Module, inputs: int, config: ModelConfig, dtype: torch.dtype, g: torch.Generator) -> int:
    """Bytes of the distinct storages that autograd holds after a forward pass, weights and cos, sin aside."""
    for parameter in module.parameters():
        parameter.data.normal_(std=0.1, generator=g)
    module.to(dtype)
    angles = torch.rand(1, S, config.qk_rope_head_dim // 2, generator=g)
    context = Context(cos=angles.cos(), sin=angles.sin())
    known = {t.untyped_storage().data_ptr() for t in (*module.parameters(), context.cos, context.sin)}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    leaves = [torch.randn(1, S, config.hidden_size, generator=g).to(dtype).requires_grad_() for _ in range(inputs)]
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = module(*(leaf * 1.0 for leaf in leaves), context)[0]
    assert out.requires_grad
    return sum(tensor.untyped_storage().nbytes() for pointer, tensor in kept.items() if pointer not in known)


@pytest.mark.usefixtures("as_on_a_gpu")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", VARIANTS)
def test_what_a_block_keeps_is_what_autograd_saves(name: str, precision: str, generator: torch.Generator) -> None:
    config = in_the_family(VARIANTS[name])
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    for layer in range(config.num_hidden_layers):
        expected = S * sum(saved_activations(config, layer, precision=precision).values())
        if config.is_moe_layer(layer):
            expected += 4 * config.n_routed_experts  # where each expert's rows end: per expert, not per token
        assert saved_bytes(Block(config, layer), 1, config, dtype, generator) == expected, layer


@pytest.mark.usefixtures("as_on_a_gpu")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", [name for name, config in VARIANTS.items() if config.num_nextn_predict_layers])
def test_what_an_mtp_module_keeps_is_what_autograd_saves(name: str, precision: str, generator: torch.Generator) -> None:
    config = in_the_family(VARIANTS[name])
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    layer = config.num_hidden_layers
    # The module's last norm belongs to the head; the other half of `head_activations` is the cross-entropy's.
    norm = head_activations(config, precision=precision) - dtype.itemsize * config.hidden_size
    expected = S * (sum(saved_activations(config, layer, precision=precision).values()) + norm)
    if config.is_moe_layer(layer):
        expected += 4 * config.n_routed_experts
    assert saved_bytes(MTPModule(config, 1), 2, config, dtype, generator) == expected


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_what_the_cross_entropy_keeps_is_what_autograd_saves(precision: str, generator: torch.Generator) -> None:
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    x, weight = (
        torch.randn(rows, BASE.hidden_size, generator=generator).to(dtype).requires_grad_()
        for rows in (S, BASE.vocab_size)
    )
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        linear_cross_entropy(x, weight, torch.randint(BASE.vocab_size, (S,), generator=generator))
    norm = dtype.itemsize * BASE.hidden_size + 4
    expected = S * (head_activations(BASE, precision=precision) - norm) + head_gradient_bytes(BASE)
    assert sum(tensor.nbytes for tensor in kept) == expected


@pytest.mark.parametrize("name", VARIANTS)
def test_recomputing_more_and_storing_fp8_keep_less(name: str) -> None:
    config = VARIANTS[name]
    for layer in range(config.num_layers_with_mtp):
        kept = {
            (precision, recompute): sum(
                saved_activations(config, layer, precision=precision, recompute=recompute).values()
            )
            for precision in ("fp32", "bf16", "fp8")
            for recompute in ("none", "selective", "full")
        }
        for precision in ("fp32", "bf16", "fp8"):
            assert kept[precision, "none"] > kept[precision, "selective"] > kept[precision, "full"]
        for recompute in ("none", "selective"):
            assert kept["fp32", recompute] > kept["bf16", recompute] > kept["fp8", recompute]
        inputs = 2 if layer >= config.num_hidden_layers else 1
        assert kept["bf16", "full"] == 2 * inputs * config.hidden_size


def test_v3_under_the_reports_choice() -> None:
    """Section 3.3.3 by hand: two norm inputs, the latents, the attention output in E5M6, FP8 rows and SwiGLU inputs."""
    saved = saved_activations(ModelConfig.preset("v3-671b"), 10, precision="fp8", recompute="selective")
    tile = 1 + 4 / 128
    assert saved["stream"] == 2 * 2 * 7168
    assert saved["latent"] == 2 * (1536 + 576)
    assert saved["attention output"] == 128 * 128 * (1.5 + 4 / 128)
    assert saved["rows"] == 8 * 7168 * tile
    assert saved["SwiGLU input"] == 9 * 2 * 2048 * tile
    assert set(saved) == {"stream", "latent", "attention output", "rows", "SwiGLU input", "statistics"}


def test_unknown_choices_are_refused() -> None:
    with pytest.raises(UserError, match="precision is 'int8', expected one of fp32, bf16, fp8"):
        saved_activations(BASE, 0, precision="int8")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="recompute is 'some', expected one of none, selective, full"):
        saved_activations(BASE, 0, recompute="some")  # type: ignore[arg-type]
