"""The recipe of a training run. Imports no tensor library: the command line reads its help from here."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from dsv3.data.config import DataConfig
from dsv3.errors import UserError
from dsv3.train.schedule import Schedule, parse_schedule, parse_tokens

Device = Literal["auto", "cpu", "cuda", "mps"]
DType = Literal["auto", "float32", "bfloat16"]
Optimizer = Literal["adamw", "muon"]
Recompute = Literal["none", "selective", "full"]
PipelineSchedule = Literal["1F1B", "Interleaved1F1B", "ZB1P", "ZBV", "DualPipeV", "DualPipe"]


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
    model: str | None = None
    """A preset (nano, micro, bench, ...) or the path of a config.json; None: the shape of `init`, or else nano."""
    init: str | None = None
    """A checkpoint, or a run (its newest one), whose weights and tokenizer to start from: what it learned is kept,
    step, optimizer and schedules begin anew."""
    data: str = "stdlib"
    """'stdlib' (the source of Python's standard library on this machine), a text file, folder, .jsonl, .parquet,
    pattern or 'hf:NAME'; several as 'WEIGHT:NAME WEIGHT:NAME ...'; or a folder that `dsv3 data prepare` made."""
    held_out: float | None = None
    """Share of the text kept out of training, for bits per byte (None: 0.05). This and the next two are settings of
    the preparation: with data that is prepared already they are what it was prepared with, or refused."""
    fim_rate: float | None = None
    """Share of the training documents rearranged to fill in the middle (None: 0.1)."""
    split_rate: float | None = None
    """Share of the tokens of punctuation and line end that are split in two (None: 0.1)."""
    isolate: bool = False
    """Attend inside documents only; the report lets attention cross their ends."""
    eval_data: tuple[str, ...] = ()
    """Further text to measure bits per byte on, never to train on: each file, folder or source is a domain."""
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
    """Held-out tokens that one evaluation reads, and as many of `eval_data`."""
    sample_tokens: int = 64
    """Tokens of a continuation of held-out text that each evaluation shows and records; 0: none."""
    save_every: int = 100
    """Steps between checkpoints (also after the last)."""
    keep: int = 2
    """Checkpoints to keep."""
    milestone_every: int | None = None
    """Besides, keep those whose step is a multiple of this."""
    router_every: int = 0
    """Steps between records of the experts that each token of the batch visited, in the run's `router/`; 0: none."""
    dp_replicate: int | None = None
    """Processes that keep whole parameters and share the optimizer's state (ZeRO-1); None: all that torchrun starts
    and the next settings leave. This and the settings down to `timeline_steps` say how a run is spread, and may change
    when it is resumed."""
    dp_shard: int = 1
    """Processes that share the parameters too, each block gathered while it computes (FSDP2, or as it does)."""
    ep: int = 1
    """Neighbouring processes that share the routed experts (expert parallelism); inside the two above."""
    pp: int = 1
    """Processes that the layers are spread over, stage after stage (pipeline parallelism)."""
    layout: str | None = None
    """Of a pipeline, what each stage holds: E embedding, t layer, m MTP module, L loss, as in 'Ett|ttt|tmL'; None: as
    even as can be."""
    schedule: PipelineSchedule = "DualPipe"
    """Of a pipeline, the order of its forward and backward passes; `dsv3 plan pipeline` compares them."""
    overlap: bool = False
    """Of DualPipe and DualPipeV: while tokens of one micro-batch travel to their experts (`ep`), another computes."""
    timeline_steps: tuple[int, ...] = ()
    """Steps of a pipeline whose operations are timed, for `dsv3 plot --timeline`."""
    comm_timeout: float = 600.0
    """Seconds that a process waits for another before the run is given up."""
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
        for name in ("dp_replicate", "dp_shard", "ep", "pp", "comm_timeout"):
            value = getattr(self, name)
            _require(value is None or value >= 1, name, value, "at least 1")
        self._check_pipeline()
        DataConfig(**self.preparation)  # raises if one of them is out of range
        for name in ("sample_tokens", "router_every"):
            _require(getattr(self, name) >= 0, name, getattr(self, name), "at least 0")
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

    @property
    def preparation(self) -> dict[str, Any]:
        """Those settings of the data's preparation that are given, as `DataConfig` names them."""
        names = ("held_out", "fim_rate", "split_rate")
        return {name: value for name in names if (value := getattr(self, name)) is not None}

    @property
    def spread(self) -> dict[str, Any]:
        """Those settings that say over which processes a run is spread, and nothing of what it computes."""
        names = "dp_replicate dp_shard ep pp layout schedule overlap timeline_steps comm_timeout".split()
        return {name: getattr(self, name) for name in names}

    def to_json(self) -> dict[str, Any]:
        """Plain values only."""
        return {**dataclasses.asdict(self), "out": str(self.out)}

    @classmethod
    def from_json(cls, values: dict[str, Any], out: Path) -> TrainConfig:
        """The settings of a saved run that now lies in `out`."""
        try:
            tuples = {name: tuple(values.get(name, ())) for name in ("loggers", "eval_data", "timeline_steps")}
            return cls(**{**values, **tuples, "out": out})
        except TypeError as error:
            raise UserError(f"the run in {out} has settings this version does not know: {error}") from None

    def _check_pipeline(self) -> None:
        if self.pp == 1:
            for name in ("layout", "overlap", "timeline_steps"):
                value = getattr(self, name)
                _require(not value, name, value, "nothing without a pipeline: set pp to 2 or more")
            return
        paired = self.schedule in ("DualPipe", "DualPipeV")
        _require(
            paired or not self.overlap, "overlap", self.overlap, f"False with {self.schedule}, which pairs no passes"
        )
        _require(min(self.timeline_steps, default=1) >= 1, "timeline_steps", self.timeline_steps, "steps from 1 on")


def _require(ok: bool, name: str, value: object, expected: str) -> None:
    if not ok:
        raise UserError(f"setting '{name}' is {value!r}, expected {expected}")
