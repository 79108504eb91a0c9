"""The recipe of a training run. Imports no tensor library: the command line reads its help from here."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from dsv3.errors import UserError
from dsv3.train.schedule import Schedule, parse_schedule, parse_tokens

Device = Literal["auto", "cpu", "cuda", "mps"]
DType = Literal["auto", "float32", "bfloat16"]
Optimizer = Literal["adamw", "muon"]
Recompute = Literal["none", "selective", "full"]


@dataclass(frozen=True)
class Schedules:
    """Settings that change over a run, as functions of the tokens seen."""

    total_tokens: int
    batch_size: Schedule
    learning_rate: Schedule
    mtp_weight: Schedule
    bias_update_speed: Schedule


@dataclass(frozen=True)
class TrainConfig:
    """Settings of a run; defaults suit `nano` on two CPU cores, betas, decay and clipping are the report's.

    Raises `UserError`, naming the setting, if a value is out of range or contradicts another.
    """

    out: Path = Path("out/run")
    """Folder of the run: config, tokenizer, data, metrics.jsonl, checkpoints, figures."""
    model: str = "nano"
    """A preset (nano, micro, bench, ...) or the path of a config.json."""
    data: str = "stdlib"
    """'stdlib' (the source of Python's standard library on this machine), or a text file, folder, .jsonl, .parquet."""
    held_out: float = 0.05
    """Share of the text kept out of training, for bits per byte."""
    tokens: str = "1.6M"
    """Length of the run: tokens to train on (K, M, B, T for powers of a thousand)."""
    seq_len: int = 256
    """Tokens per sequence."""
    batch_size: str = "16"
    """Sequences per optimizer step; like the next three a number or a schedule, e.g. '16, linear 64 30%'."""
    learning_rate: str = "0, linear 3e-3 5%, cosine 3e-4 95%"
    """Schedule: a start value, then 'linear VALUE LENGTH', 'cosine VALUE LENGTH', 'hold LENGTH', 'set VALUE'; a length
    is in tokens (25B) or a share of the run (5%). `runs/pretrain_small.sh` shows the report's shape."""
    mtp_weight: str = "0.3"
    """Schedule of lambda, the weight of the MTP loss (eq. 25)."""
    bias_update_speed: str = "0.001"
    """Schedule of gamma: how far each expert's selection bias moves per step."""
    micro_batch_size: int | None = None
    """Sequences per forward pass; the step is the same whatever it is. None: the whole batch at once."""
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
    optimizer: Optimizer = "adamw"
    """AdamW for everything, or Muon for hidden matrices and AdamW for the rest."""
    moments: Literal["float32", "bfloat16"] = "float32"
    """How AdamW's two moments are kept; the report keeps BF16."""
    ema_decay: float | None = None
    """Keep a moving average of the weights in CPU memory, evaluated and saved beside them; e.g. 0.999."""
    spike_threshold: float = 10.0
    """A loss so many robust deviations above the last 64 goes back to the last checkpoint and passes the batch over."""
    give_up_after: int = 5
    """End the run after so many steps in a row that were not finite or spiked."""
    seed: int = 0
    """Of weights and of the order of the data."""
    device: Device = "auto"
    """Where to run; auto takes cuda, then mps, then cpu."""
    dtype: DType = "auto"
    """Of the computation, master weights are FP32; auto takes bfloat16 where the hardware multiplies it faster."""
    recompute: Recompute = "none"
    """What the backward pass computes again instead of storing it: selective takes norms, up-projections and SwiGLU
    outputs (the report's way, nearly free), full whole blocks (least memory, a third more time)."""
    eval_every: int = 100
    """Steps between evaluations on held-out text (also before the first and after the last)."""
    eval_tokens: int = 65536
    """Held-out tokens that one evaluation reads."""
    save_every: int = 100
    """Steps between checkpoints (also after the last)."""
    keep: int = 2
    """Checkpoints to keep."""
    milestone_every: int | None = None
    """Besides, keep those whose step is a multiple of this."""
    loggers: tuple[Literal["tensorboard", "wandb"], ...] = ()
    """Further places for the metrics (extra 'log'); metrics.jsonl is always written."""

    def __post_init__(self) -> None:
        for name in "seq_len clip eval_every eval_tokens save_every keep eps".split():
            _require(getattr(self, name) > 0, name, getattr(self, name), "above 0")
        _require(self.weight_decay >= 0, "weight_decay", self.weight_decay, "at least 0")
        _require(self.spike_threshold >= 1, "spike_threshold", self.spike_threshold, "at least 1")
        _require(self.give_up_after >= 1, "give_up_after", self.give_up_after, "at least 1")
        milestone = self.milestone_every
        _require(milestone is None or milestone >= 1, "milestone_every", milestone, "at least 1")
        _require(self.ema_decay is None or 0 <= self.ema_decay < 1, "ema_decay", self.ema_decay, "in [0, 1)")
        for name in ("beta1", "beta2"):
            _require(0 <= getattr(self, name) < 1, name, getattr(self, name), "in [0, 1)")
        _require(0 < self.held_out < 1, "held_out", self.held_out, "in (0, 1)")
        _require(
            self.micro_batch_size is None or self.micro_batch_size > 0,
            "micro_batch_size",
            self.micro_batch_size,
            "above 0",
        )
        batch_size = self.schedules.batch_size
        smallest = min(batch_size.initial, *(segment.end for segment in batch_size.segments), batch_size.initial)
        _require(smallest >= 1, "batch_size", self.batch_size, "at least 1 sequence everywhere")

    @property
    def schedules(self) -> Schedules:
        """The scheduled settings, read."""
        total = parse_tokens(self.tokens, "tokens")
        names = ("batch_size", "learning_rate", "mtp_weight", "bias_update_speed")
        return Schedules(total, *(parse_schedule(getattr(self, name), total, name) for name in names))

    def to_json(self) -> dict[str, Any]:
        """Plain values only."""
        return {**dataclasses.asdict(self), "out": str(self.out)}

    @classmethod
    def from_json(cls, values: dict[str, Any], out: Path) -> TrainConfig:
        """The settings of a saved run that now lies in `out`."""
        try:
            return cls(**{**values, "out": out, "loggers": tuple(values.get("loggers", ()))})
        except TypeError as error:
            raise UserError(f"the run in {out} has settings this version does not know: {error}") from None


def _require(ok: bool, name: str, value: object, expected: str) -> None:
    if not ok:
        raise UserError(f"setting '{name}' is {value!r}, expected {expected}")
