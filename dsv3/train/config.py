"""The recipe of a training run. Imports no tensor library: the command line reads its help from here."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from dsv3.errors import UserError

Device = Literal["auto", "cpu", "cuda", "mps"]
DType = Literal["auto", "float32", "bfloat16"]


@dataclass(frozen=True)
class TrainConfig:
    """Settings of a run; defaults suit `nano` on two CPU cores, betas, decay and clipping are the report's.

    Raises `UserError`, naming the setting, if a value is out of range or contradicts another.
    """

    out: Path
    """Folder of the run: config, tokenizer, data, metrics.jsonl, checkpoints, figures."""
    model: str = "nano"
    """A preset (nano, micro, bench, ...) or the path of a config.json."""
    data: str = "stdlib"
    """'stdlib' (the source of Python's standard library on this machine), or a text file, folder, .jsonl, .parquet."""
    held_out: float = 0.05
    """Share of the text kept out of training, for bits per byte."""
    steps: int = 400
    """Optimizer steps."""
    batch_size: int = 16
    """Sequences per optimizer step."""
    micro_batch_size: int | None = None
    """Sequences per forward pass; the step is the same whatever it is. None: the whole batch at once."""
    seq_len: int = 256
    """Tokens per sequence."""
    learning_rate: float = 3e-3
    """Peak, reached after `warmup_steps`."""
    final_learning_rate: float = 3e-4
    """At the last step, reached by a cosine over the last `decay_share` of the steps."""
    warmup_steps: int = 20
    """Steps of linear warm-up from 0."""
    decay_share: float = 0.8
    """Share of the steps, at the end, in which the learning rate falls; before it is constant."""
    weight_decay: float = 0.1
    """AdamW's decay, of matrices only (norms are left alone)."""
    beta1: float = 0.9
    """AdamW."""
    beta2: float = 0.95
    """AdamW."""
    eps: float = 1e-8
    """AdamW (the report states none)."""
    clip: float = 1.0
    """Largest norm of the gradient."""
    mtp_weight: float = 0.3
    """Lambda of the MTP loss (eq. 25)."""
    bias_update_speed: float = 0.001
    """Gamma: how far each expert's selection bias moves per step."""
    seed: int = 0
    """Of weights and of the order of the data."""
    device: Device = "auto"
    """Where to run; auto takes cuda, then mps, then cpu."""
    dtype: DType = "auto"
    """Of the computation, master weights are FP32; auto takes bfloat16 where the hardware multiplies it faster."""
    recompute: bool = False
    """Keep only the inputs of blocks and run each block again in the backward pass: less memory, more time."""
    eval_every: int = 100
    """Steps between evaluations on held-out text (also before the first and after the last)."""
    eval_tokens: int = 65536
    """Held-out tokens that one evaluation reads."""
    save_every: int = 100
    """Steps between checkpoints (also after the last)."""
    keep: int = 2
    """Checkpoints to keep."""

    def __post_init__(self) -> None:
        positive = "steps batch_size seq_len learning_rate clip eval_every eval_tokens save_every keep eps"
        for name in positive.split():
            _require(getattr(self, name) > 0, name, getattr(self, name), "above 0")
        for name in "final_learning_rate warmup_steps weight_decay mtp_weight bias_update_speed".split():
            _require(getattr(self, name) >= 0, name, getattr(self, name), "at least 0")
        for name in ("beta1", "beta2"):
            _require(0 <= getattr(self, name) < 1, name, getattr(self, name), "in [0, 1)")
        _require(0 < self.held_out < 1, "held_out", self.held_out, "in (0, 1)")
        _require(0 <= self.decay_share <= 1, "decay_share", self.decay_share, "in [0, 1]")
        micro = self.micro_batch_size
        _require(
            micro is None or (micro > 0 and self.batch_size % micro == 0),
            "micro_batch_size",
            micro,
            f"a divisor of batch_size ({self.batch_size})",
        )

    def to_json(self) -> dict[str, Any]:
        """Plain values only."""
        return {**dataclasses.asdict(self), "out": str(self.out)}

    @classmethod
    def from_json(cls, values: dict[str, Any], out: Path) -> TrainConfig:
        """The settings of a saved run that now lies in `out`."""
        try:
            return cls(**{**values, "out": out})
        except TypeError as error:
            raise UserError(f"the run in {out} has settings this version does not know: {error}") from None


def _require(ok: bool, name: str, value: object, expected: str) -> None:
    if not ok:
        raise UserError(f"setting '{name}' is {value!r}, expected {expected}")
