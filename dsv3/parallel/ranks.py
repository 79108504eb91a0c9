"""What a training loop asks about the other processes; one process alone gets the trivial answers.

The loop does not know how many processes there are: it asks which rows of a batch are its own, sums what is counted,
and lets the first process do what only one may do. `Ranks()` is a process that is alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from dsv3.errors import UserError
from dsv3.parallel.mesh import Mesh
from dsv3.parallel.watch import Watch


class Ranks:
    """This process among the others of `mesh`.

    watch: told of every `heartbeat`; reports what this process is doing if the next one is late.
    """

    def __init__(self, mesh: Mesh | None = None, watch: Watch | None = None) -> None:
        self.mesh = Mesh() if mesh is None else mesh
        self._watch = watch

    def heartbeat(self, doing: Callable[[], str]) -> None:
        """Say that things go on; `doing` as in `Watch.beat`."""
        if self._watch is not None:
            self._watch.beat(doing)

    @property
    def is_first(self) -> bool:
        """Whether this process speaks for all."""
        return self.mesh.is_first

    @property
    def count(self) -> int:
        """Processes in all."""
        return self.mesh.world.size

    def share(self, rows: int) -> tuple[int, int]:
        """Which of a step's `rows` this process takes: the first, and how many. They differ by one at most."""
        data = self.mesh.data
        begin, end = (rows * place // data.size for place in (data.index, data.index + 1))
        return begin, end - begin

    def gather(self, *values: int) -> Tensor:
        """Whole numbers from all data ranks, [ranks, values] int64 on the CPU."""
        data = self.mesh.data
        table = torch.zeros(data.size, len(values), dtype=torch.int64, device=self.mesh.device)
        table[data.index] = torch.tensor(values)
        return data.sum_(table).cpu()

    def sum_(self, tensor: Tensor) -> Tensor:
        """A CPU tensor summed over the data ranks, in place."""
        if self.mesh.data.group is None:
            return tensor
        return tensor.copy_(self.mesh.data.sum_(tensor.to(self.mesh.device)))

    def sum_counts(self, counts_LE: Tensor) -> Tensor:
        """Load counts of the layers, summed over the data ranks."""
        return self.mesh.data.sum_(counts_LE)

    def any(self, flag: bool) -> bool:
        """Whether it is so on any process."""
        if self.mesh.host.group is None:
            return flag
        return bool(self.mesh.host.sum_(torch.tensor(int(flag))))

    def first_found(self, text: str | None) -> str | None:
        """What the lowest rank that has something to say says, with its number; None if nobody has."""
        texts = self.gather_texts(text or "")
        for rank, said in enumerate(texts):
            if said:
                return f"{said} on rank {rank}" if self.count > 1 else said
        return None

    def together(self, function: Callable[[], object]) -> None:
        """Run `function` on every process and wait for all; one's `UserError` is everybody's."""
        error: UserError | None = None
        try:
            function()
        except UserError as raised:
            error = raised
        messages = [text for text in self.gather_texts("" if error is None else str(error)) if text]
        if messages:
            raise error or UserError(messages[0])

    def first_alone(self, function: Callable[[], object]) -> None:
        """Run `function` on the first process only, while the others wait; its `UserError` is everybody's."""
        self.together(function if self.is_first else lambda: None)

    def wait(self) -> None:
        """Until every process is here."""
        self.any(False)

    def in_background(self) -> Ranks:
        """The same processes, for use by one background thread of each."""
        return Ranks(dataclasses.replace(self.mesh, host=self.mesh.background))

    def gather_texts(self, text: str) -> list[str]:
        """Every process's text, by rank."""
        host = self.mesh.host
        if host.group is None:
            return [text]
        data = torch.tensor(list(text.encode()), dtype=torch.uint8)
        lengths = torch.zeros(host.size, dtype=torch.int64)
        lengths[host.index] = len(data)
        table = torch.zeros(host.size, int(host.sum_(lengths).max()), dtype=torch.uint8)
        table[host.index, : len(data)] = data
        return [bytes(row[:n].tolist()).decode() for row, n in zip(host.sum_(table), lengths.tolist(), strict=True)]
