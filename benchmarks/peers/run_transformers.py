"""transformers' `generate`, to be measured: one batch, padded to nothing since all prompts are of one length."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from protocol import Emit, Generate, Prompts, Setup, run
from torch import Tensor
from transformers import DeepseekV3ForCausalLM, StoppingCriteria, StoppingCriteriaList


class Watch(StoppingCriteria):
    """Is asked after every token whether to stop, and passes on that it was there."""

    def __init__(self, emit: Emit) -> None:
        self._emit = emit

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        for index, token in enumerate(input_ids[:, -1].tolist()):
            self._emit(index, [token])
        return torch.zeros(len(input_ids), dtype=torch.bool)


def load(setup: Setup) -> tuple[Generate, dict[str, Any]]:
    """The fastest of its CPU paths for this model: grouped_mm for the experts, SDPA, dynamic cache."""
    torch.set_num_threads(setup.threads)
    how = {"dtype": "bfloat16", "experts_implementation": "grouped_mm", "attn_implementation": "sdpa"}
    model = DeepseekV3ForCausalLM.from_pretrained(setup.model, **how).eval()

    def generate(prompts: Prompts, new: int, emit: Emit) -> None:
        prompts_BS = torch.tensor(prompts)
        with torch.inference_mode():
            model.generate(
                prompts_BS,
                attention_mask=torch.ones_like(prompts_BS),
                do_sample=False,
                min_new_tokens=new,
                max_new_tokens=new,
                pad_token_id=0,
                stopping_criteria=StoppingCriteriaList([Watch(emit)]),
            )

    return generate, {"version": f"{transformers.__version__}, torch {torch.__version__}", "settings": how}


if __name__ == "__main__":
    run(load)
