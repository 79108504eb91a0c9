"""Small models of every shape of the family, and ways to damage a folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dsv3.config import ModelConfig, RopeScaling
from dsv3.model.transformer import Transformer

MICRO = ModelConfig.preset("micro")
SOFTMAX = {"scoring_func": "softmax", "norm_topk_prob": False, "num_nextn_predict_layers": 0}

CONFIGS = {
    "v3": MICRO,
    "v3-yarn-2mtp": MICRO.replace(
        num_nextn_predict_layers=2, rope_scaling=RopeScaling(factor=4, original_max_position_embeddings=128)
    ),
    # Sides beyond 128 and no multiples of it: several FP8 blocks, the last ones partial.
    "v3-blocks": MICRO.replace(hidden_size=160, intermediate_size=200, moe_intermediate_size=136),
    "v3-sparse-layers": MICRO.replace(num_hidden_layers=4, moe_layer_freq=2, n_shared_experts=2),
    "v2": MICRO.replace(**SOFTMAX, topk_method="group_limited_greedy", routed_scaling_factor=16.0),
    "v2-lite": MICRO.replace(
        **SOFTMAX, topk_method="greedy", routed_scaling_factor=1.0, q_lora_rank=None, n_group=1, topk_group=1
    ),
    "moonlight": MICRO.replace(q_lora_rank=None, n_group=1, topk_group=1, num_nextn_predict_layers=0),
    "no-shared-experts": MICRO.replace(n_shared_experts=0),
}


def random_model(config: ModelConfig, seed: int, dtype: torch.dtype = torch.float32) -> Transformer:
    """A model whose every tensor is random: norms and routing biases too, so that none can be mixed up."""
    torch.manual_seed(seed)
    model = Transformer(config)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if "norm" in name:
                tensor.uniform_(0.5, 1.5)
            elif name.endswith("e_score_correction_bias"):
                tensor.uniform_(-0.1, 0.1)
    return model.to(dtype).eval()


def read_folder(path: Path) -> dict[str, Tensor]:
    """All tensors of a folder, by the reference implementation of the format."""
    return {name: tensor for file in sorted(path.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def edit_shard(path: Path, change: Callable[[dict[str, Tensor]], None], shard: int = 0) -> None:
    """Rewrite one shard with its tensors changed in place."""
    file = sorted(path.glob("*.safetensors"))[shard]
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def same(a: Tensor, b: Tensor) -> bool:
    """Equal dtype, shape and bits."""
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.view(torch.uint8), b.view(torch.uint8))
