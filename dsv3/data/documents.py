"""Which document each token of a packed sequence belongs to as a target, and attention that stays inside documents.

The report trains without such a mask (section 4.1); it is a setting. Positions are not counted anew in each
document: RoPE makes scores depend on distances alone.
"""

from __future__ import annotations

from torch import Tensor


def document_ids(tokens_BS: Tensor, eos_token_id: int) -> Tensor:
    """How many documents of its sequence have ended before each token, int64 [B, S]; an EOS belongs to what it ends."""
    is_end_BS = (tokens_BS == eos_token_id).long()
    return is_end_BS.cumsum(1) - is_end_BS


def document_mask(tokens_BS: Tensor, start_id: int) -> Tensor:
    """bool [B, 1, S, S], True where query i may look at key j: j <= i in the same document, `start_id` its first token.

    start_id: `Tokenizer.document_start_id`. Where that is EOS, the one that ends a document is seen from within the
    next: every document then begins with the token that generation puts in front of a text.
    """
    document_BS = (tokens_BS == start_id).cumsum(1)
    return (document_BS[:, None, :, None] == document_BS[:, None, None, :]).tril()
