"""MTP modules and speculative decoding against transformers' `MtpLayer` and `generate(use_mtp=True)`.

Shapes: B batch, S tokens.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.parity.configs import CASES
from tests.parity.twin import (
    TheirMatches,
    assert_close,
    assert_same_speculation,
    clear_tokens,
    make_twin,
    random_tokens,
)


@pytest.mark.parametrize("modules", [1, 3])
@pytest.mark.parametrize("case", ["v3", "no q_lora", "yarn", "moonlight"])
def test_logits(case: str, modules: int, generator: torch.Generator, tmp_path: Path) -> None:
    config = CASES[case].replace(num_nextn_predict_layers=modules)
    twin = make_twin(config, tmp_path, generator)
    tokens_BS = clear_tokens(twin.ours, 2, 72, generator)
    mtp = twin.their_mtp()
    with torch.no_grad():
        ours = twin.ours(tokens_BS)
        # Their hidden state after the last layer is the one after the final norm.
        hidden_BSD = twin.theirs(tokens_BS, output_hidden_states=True).hidden_states[-1]
        for k in range(1, modules + 1):
            S = tokens_BS.shape[1] - k
            # Their positions count the tokens that are read, ours the hidden states: RoPE sees differences only.
            positions = torch.arange(k, k + S).unsqueeze(0)
            hidden_BSD = mtp.forward_layer(k - 1, hidden_BSD[:, :S], positions, None, input_ids=tokens_BS[:, k:])
            assert_close(f"logits of depth {k}", ours.mtp_logits[k - 1], twin.theirs.lm_head(hidden_BSD))


@pytest.mark.parametrize("modules", [1, 2, 3])
@pytest.mark.parametrize("case", ["v3", "yarn"])
def test_speculative_decoding(
    case: str, modules: int, generator: torch.Generator, tmp_path: Path, their_matches: TheirMatches
) -> None:
    # So few words that random drafts are right now and then.
    config = CASES[case].replace(num_nextn_predict_layers=modules, vocab_size=5)
    twin = make_twin(config, tmp_path, generator)
    for prompt in random_tokens(config, 4, 9, generator):
        assert_same_speculation(twin, prompt, 14, their_matches)
