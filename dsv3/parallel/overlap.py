"""Two chunks at once: what one has sent travels while the other computes.

A forward chunk and a backward chunk, of different micro-batches, each stop wherever they have started a transfer. So
one rank can take turns: while the dispatch of one is under way the other runs its attention or its experts, and the
reverse. Nothing but the order in which one thread issues its work does this; the transfers themselves are
asynchronous collectives (on a GPU they have a stream of their own).

All ranks of an expert group take the same turns, because the turns depend on the cuts alone: so they start their
collectives in the same order.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from dsv3.model.block import Block
from dsv3.model.context import Context
from dsv3.model.experts import DeepSeekMoE
from dsv3.model.router import Routing
from dsv3.parallel.expert import CutDispatcher
from dsv3.parallel.pieces import Chunk, Transfers
from dsv3.parallel.tape import Tape


def interleave(chunks: Sequence[Chunk[Any]]) -> list[Any]:
    """Run chunks in turns; each goes on until it has started a transfer. Returns their results.

    The last one begins: of an overlapped pair that is the backward, which communicates almost at once.
    """
    results: list[Any] = [None] * len(chunks)
    turns: deque[tuple[int, Transfers | None]] = deque((i, None) for i in reversed(range(len(chunks))))
    while turns:
        i, transfers = turns.popleft()
        if transfers is not None:
            transfers.wait()
        try:
            turns.append((i, next(chunks[i])))
        except StopIteration as done:
            results[i] = done.value
    return results


def block_on(
    tape: Tape, block: Block, h_BSD: Tensor, context: Context, *, in_stages: bool
) -> Chunk[tuple[Tensor, Routing | None]]:
    """`Block.forward` on a tape: whole, or `in_stages`, cut where it communicates."""
    dispatcher = block.mlp.dispatcher if isinstance(block.mlp, DeepSeekMoE) else None
    if not in_stages or not isinstance(dispatcher, CutDispatcher):
        return tape.run_block(block, h_BSD, context, uses=[block])
    before_mlp = [block.input_layernorm, block.self_attn, block.post_attention_layernorm]
    attended = tape.run_block(block.attend_and_route, h_BSD, context, uses=before_mlp)
    assert attended.routing is not None
    x_TD = tape.run(Tensor.flatten, attended.x_BSD, 0, 1)
    dispatched = yield from dispatcher.dispatch_on(tape, x_TD, attended.routing)
    rows_ND, local_BSD = tape.run_block(block.run_experts, attended, dispatched, uses=[block.mlp])
    assert rows_ND is not None
    routed_TD = yield from dispatcher.combine_on(tape, rows_ND, dispatched)
    return tape.run(block.aggregate, attended, local_BSD, routed_TD), attended.routing
