"""One step on the model: all scheduled tokens in one packed pass, the tokens they choose, the drafts for the next.

Shapes: T packed tokens, R rows that choose a token, D model, V vocabulary, n tokens of one sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from dsv3.model.router import Routing
from dsv3.model.transformer import Transformer
from dsv3.serve.draft import Drafter, DraftJob, DraftState
from dsv3.serve.invariant import FixedShapes, pass_kind
from dsv3.serve.outputs import Token
from dsv3.serve.paged_cache import Chunk, PagedCache, PagedPass, Pass, grouped_order
from dsv3.serve.request import Continuation
from dsv3.serve.sampler import NOT_A_NUMBER, Row, choose, with_logprobs


@dataclass(frozen=True)
class Result:
    """What a step brought one sequence: its next tokens, none inside the prompt."""

    sequence: Continuation
    tokens: list[Token]  # the drafts that stand and the token that follows them
    hidden_nD: Tensor  # the main model's at the positions of known tokens
    num_drafts: int

    @property
    def num_standing(self) -> int:
        return sum(token.proposed for token in self.tokens)


class Runner:
    """The only part of the engine, besides the cache, that touches the model."""

    def __init__(self, model: Transformer, cache: PagedCache, draft_depth: int, *, batch_invariant: bool) -> None:
        self.model, self.cache, self.draft_depth = model, cache, draft_depth
        kind = pass_kind(model) if batch_invariant else PagedPass
        self._pass_over: Callable[[Sequence[Chunk]], Pass] = partial(kind, cache)
        self._numerics = FixedShapes if batch_invariant else nullcontext
        self._drafter = Drafter(model, draft_depth, self._pass_over)
        self.expert_load: dict[str, Tensor] = {}  # tokens per expert since the start, drafts that fell included

    @torch.inference_mode()
    def run(self, sequences: Sequence[Continuation]) -> list[Result]:
        """Compute what is scheduled; every sequence whose last known token is among it gets at least one token."""
        work = sorted(((_chunk(sequence), sequence) for sequence in sequences), key=lambda item: grouped_order(item[0]))
        tokens = [token for chunk, sequence in work for token in _text(sequence)[chunk.start : chunk.end]]
        device = self.model.device
        routings: dict[str, Routing] = {}
        passed = self._pass_over([chunk for chunk, _ in work])
        with self._numerics():
            tokens_1R = passed.scatter(torch.tensor(tokens, device=device))
            hidden_TD = passed.gather(self.model.extend(tokens_1R, passed, routings)[0])
        self._count(passed, routings)
        experts: dict[str, Tensor] = {}
        if any(sequence.params.routing for sequence in sequences):
            experts = {name: passed.gather(routing.expert_ids_TK) for name, routing in routings.items()}

        rows: list[Row] = []
        places: list[int] = []  # of the rows in the pass
        end = 0
        for chunk, sequence in work:
            end += chunk.num_tokens
            if sequence.samples:
                of_sequence = sequence.rows()
                rows += of_sequence
                places += range(end - len(of_sequence), end)
        with self._numerics():
            logits_RV = self.model.lm_head(hidden_TD[places])
        chosen = choose(logits_RV, rows) if rows else []

        results: list[Result] = []
        end = row = 0
        for chunk, sequence in work:
            start, end = end, end + chunk.num_tokens
            new: list[Token] = []
            if sequence.samples:
                for index, draft in enumerate([*sequence.drafts, None]):
                    new.append(self._token(sequence, chosen[row + index], draft, places[row + index], experts))
                    new[-1] = with_logprobs(new[-1], logits_RV[row + index], sequence.params)
                    if not new[-1].proposed:
                        break
                row += 1 + len(sequence.drafts)
            num_known = chunk.num_tokens - len(sequence.drafts) + sum(token.proposed for token in new)
            results.append(Result(sequence, new, hidden_TD[start : start + num_known], len(sequence.drafts)))
        return results

    def _token(
        self, sequence: Continuation, token: int, draft: int | None, place: int, experts: dict[str, Tensor]
    ) -> Token:
        of_token = None
        if sequence.params.routing:
            of_token = {name: tuple(ids_TK[place].tolist()) for name, ids_TK in experts.items()}
        return Token(token, proposed=token == draft and token != NOT_A_NUMBER, experts=of_token)

    def _count(self, passed: Pass, routings: dict[str, Routing]) -> None:
        for name, routing in routings.items():
            counts_E = passed.counts(routing)
            self.expert_load[name] = self.expert_load[name] + counts_E if name in self.expert_load else counts_E

    @torch.inference_mode()
    def draft(self, sequences: Sequence[Continuation], *, wanted: bool) -> None:
        """Let the MTP modules catch up, and set the drafts of those that choose a token next, if they are wanted."""
        jobs = []
        for sequence in sequences:
            assert sequence.draft_state is not None
            room = sequence.max_length - len(sequence.tokens) - 1
            num = min(self.draft_depth, room) if wanted and sequence.num_left == 1 else 0
            jobs.append(DraftJob(sequence.draft_state, sequence.tokens, sequence.blocks, num, sequence.draft_row))
        with self._numerics():
            self._drafter.run(jobs)
        for sequence, job in zip(sequences, jobs, strict=True):
            sequence.drafts = job.drafts
            sequence.end_drafting()

    def begin(self, sequence: Continuation) -> None:
        """A sequence was admitted: its modules start where its cached prefix ends."""
        if sequence.lookahead and sequence.draft_state is None and not sequence.drafts_no_more:
            sequence.draft_state = DraftState(self.draft_depth, sequence.num_computed)


def _chunk(sequence: Continuation) -> Chunk:
    return Chunk(sequence.blocks, sequence.num_computed, sequence.num_scheduled)


def _text(sequence: Continuation) -> list[int]:
    return [*sequence.tokens, *sequence.drafts] if sequence.drafts else sequence.tokens
