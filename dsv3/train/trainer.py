"""The training loop: a run is begun (`start_run`) or gone on with, `Trainer` takes one optimizer step after another."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from dsv3.checkpoint.hf_config import config_to_hf, load_config, save_config
from dsv3.checkpoint.locate import find_checkpoint, resolve_config
from dsv3.config import ModelConfig
from dsv3.data.batches import SequenceSampler
from dsv3.data.domains import load_domains, prepare_domains
from dsv3.data.manifest import is_prepared, tokenizer_folder
from dsv3.data.prepared import PreparedData, PreparedSource, load_prepared
from dsv3.data.tokenizer import Tokenizer
from dsv3.device import pick_device, pick_dtype
from dsv3.errors import UserError
from dsv3.model.balance import LoadBalancer, max_violation
from dsv3.model.transformer import Transformer
from dsv3.parallel.mesh import Mesh
from dsv3.parallel.ranks import Ranks
from dsv3.parallel.shard import Sharding
from dsv3.train.beginning import begin_weights
from dsv3.train.checkpoint import read_checkpoint, read_extra, write_snapshot
from dsv3.train.config import TrainConfig
from dsv3.train.corpus import check_prepared, open_data
from dsv3.train.ema import Ema
from dsv3.train.evaluate import bits_per_byte
from dsv3.train.execution import make_execution
from dsv3.train.guard import Guard, Verdict
from dsv3.train.loggers import MetricLogger, make_loggers, numbers
from dsv3.train.muon import MasterMuon
from dsv3.train.optim import MasterAdamW, MasterOptimizer
from dsv3.train.pipelined import planned_stages
from dsv3.train.router_record import RouterRecorder
from dsv3.train.run import Run
from dsv3.train.signals import StopSignals
from dsv3.train.snapshot import CheckpointSaver, Snapshot
from dsv3.train.throughput import Throughput, measure_gemm_rate
from dsv3.train.timetable import Step, timetable


class Display(Protocol):
    """Where progress is shown."""

    def update(self, step: int, metrics: Mapping[str, float]) -> None: ...

    def log(self, message: str) -> None: ...


class Trainer:
    """Model, optimizer, balancer and data of one run, and how many optimizer steps it has done."""

    def __init__(
        self,
        run: Run,
        config: TrainConfig,
        model_config: ModelConfig,
        data: PreparedData,
        *,
        checkpoint: Path | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        """`checkpoint`, one of this run's own, is what it goes on from; None is its beginning.

        ranks: the processes that train together, all of which make the same calls; None is this one alone.
        """
        self.run, self.config, self.data = run, config, data
        self.ranks = Ranks(Mesh(device=pick_device(config.device))) if ranks is None else ranks
        self.device = self.ranks.mesh.device
        self.dtype = pick_dtype(config.dtype, self.device)
        with torch.device("meta"):
            whole = Transformer(model_config)
        self.execution = make_execution(whole, config, self.ranks, data.tokenizer, self.dtype)
        self.model, self.sharding = self.execution.model, self.execution.sharding
        self.optimizer = _make_optimizer(self.model, config, self.sharding)
        if checkpoint is None:  # one of the run's own has all that is needed, so `init` may be gone by then
            init = None if config.init is None else Path(config.init)
            begin_weights(self.model, self.optimizer, seed=config.seed, init=init)
        self.ema = None if config.ema_decay is None else Ema(self.optimizer.masters(), config.ema_decay)
        self.balancer = LoadBalancer(self.model, self.execution.sum_counts)
        self.guard = Guard(threshold=config.spike_threshold, give_up_after=config.give_up_after)
        self.sampler = SequenceSampler(data.sources, config.seq_len, config.seed)
        self.domains = load_domains(run.domains) if config.eval_data else ()
        self.loggers: list[MetricLogger] = []
        tokenizer, background = tokenizer_folder(data.folder), self.ranks.in_background()
        self.saver = CheckpointSaver(
            run.path,
            lambda folder, snapshot: write_snapshot(folder, snapshot, tokenizer, background),
            keep=config.keep,
            milestone_every=config.milestone_every,
            ranks=self.ranks,
        )
        self.timetable = list(timetable(config))
        self.step = 0  # optimizer steps done: with the timetable, all there is to know of where the run is
        if checkpoint is not None:
            self.restore(checkpoint)

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return len(self.timetable)

    def train_step(self) -> dict[str, Any]:
        """One step of the timetable; returns its record.

        A step whose loss or gradient is not finite, or whose batch made trouble before, changes nothing; its record
        says why under `skipped`. A loss that spikes takes the run back to its last checkpoint. Raises `UserError`
        when such steps do not end.
        """
        config, plan = self.config, self.timetable[self.step]
        if self.guard.passes_over(plan.number):
            self.step += 1
            return {"step": self.step, "tokens": plan.tokens, "skipped": "this batch made trouble before"}
        started = time.perf_counter()
        first, count = self.ranks.share(plan.sequences)
        tokens_BS1 = self.sampler.sequences(plan.first_sequence + first, count).to(self.device)
        recorded = config.router_every and plan.number % config.router_every == 0
        recorder = RouterRecorder(self.model.config, config, plan, tokens_BS1, first) if recorded else None
        observe = recorder.observe if recorder is not None else None
        losses = self.execution.backward_step(self.balancer, tokens_BS1, plan, observe)
        norm = self.optimizer.grad_norm()
        verdict = self.guard.judge(plan.number, losses.main, norm)
        if verdict.action != "ok":
            return self._handle_trouble(verdict, tokens_BS1, plan)
        if self.ema is not None:
            self.ema.wait_copied()
        self.optimizer.step(plan.learning_rate, config.clip, norm)
        if self.ema is not None:
            self.ema.update(self.optimizer.masters())
        loads = self.execution.all_loads(self.balancer.update(plan.bias_update_speed))
        if recorder is not None:
            recorder.save(self.run.path, plan.number, self.ranks)
        self.step += 1
        seconds = time.perf_counter() - started
        return {
            "step": self.step,
            "loss": losses.main,
            **({"mtp_loss": sum(losses.mtp) / len(losses.mtp)} if losses.mtp else {}),
            "balance_loss": losses.balance,
            "lr": plan.learning_rate,
            "grad_norm": norm,
            **_load_metrics(loads),
            "tokens": plan.tokens,
            "seconds": seconds,
            "tokens_per_second": plan.sequences * config.seq_len / seconds,
        }

    def _handle_trouble(self, verdict: Verdict, tokens_BS1: Tensor, plan: Step) -> dict[str, Any]:
        """Throw the step away, say where the trouble began, and go on, go back or give up."""
        reason = verdict.reason
        if verdict.action != "rollback":
            where = self.execution.nonfinite(self.optimizer.masters(), self.optimizer.gradients(), tokens_BS1, plan)
            reason += f" (first in {where})" if where else ""
        self.optimizer.zero_grad()
        self.balancer.reset()
        if verdict.action == "give_up":
            raise UserError(reason)
        if verdict.action == "skip":
            self.step += 1
            return {"step": self.step, "skipped": reason}
        step = self.step + 1
        self.saver.wait()
        checkpoints = self.run.checkpoints()
        if checkpoints:
            self.guard.rewind(read_extra(checkpoints[-1])["guard"])
            self.step = read_checkpoint(checkpoints[-1], self.model, self.optimizer, self.ema)
            reason += f"; back to step {self.step}"
        return {"step": step, "skipped": reason}

    def evaluate(self, sources: Sequence[PreparedSource]) -> dict[str, float]:
        """Bits per byte on the held-out text of each source."""
        config = self.config
        return {
            source.name: bits_per_byte(
                self.execution.nats,
                source,
                self.data.tokenizer.token_bytes,
                seq_len=config.seq_len,
                batch_size=config.micro_batch_size or self.timetable[0].sequences,
                max_tokens=config.eval_tokens // len(sources),
                eos_token_id=self.execution.eos_token_id,
                isolate_at=self.execution.isolate_at,
                ranks=self.ranks,
            )
            for source in sources
        }

    def save(self) -> None:
        """Begin a checkpoint of this step; it is written while training goes on. Raises what the one before met."""
        extra = {"guard": self.guard.state()}
        self.saver.save(Snapshot.of(self.model, self.optimizer, self.step, ema=self.ema, extra=extra))

    def restore(self, checkpoint: Path) -> None:
        """Continue from a checkpoint of this run."""
        self.step = read_checkpoint(checkpoint, self.model, self.optimizer, self.ema)
        if guard := read_extra(checkpoint).get("guard"):
            self.guard.load_state(guard)

    def fit(self, display: Display) -> None:
        """Steps until the last, with evaluations and checkpoints on the way; Ctrl-C or SIGTERM saves and stops."""
        config = self.config
        throughput = Throughput(self.model.config, measure_gemm_rate(self.device, self.dtype) * self.ranks.count)
        with contextlib.ExitStack() as closing, self.saver, StopSignals() as stop:
            if self.ranks.is_first:
                self.loggers = make_loggers(
                    config.loggers, self.run.path, config=config.to_json(), start_step=self.step
                )
            for logger in self.loggers:
                closing.callback(logger.close)
            if config.sample_tokens and not self.execution.can_sample:
                display.log("no samples are drawn: a pipeline does not generate (dsv3 generate reads its checkpoints)")
            if self.step == 0:
                self._log_evaluation(display)
            stopping = self.ranks.any(stop.asked)
            while self.step < self.total_steps and not stopping:
                self.ranks.heartbeat(self._doing)
                plan = self.timetable[self.step]
                record = self.train_step()
                if "skipped" in record:
                    display.log(f"step left out: {record['skipped']}")
                else:
                    record |= throughput.metrics(
                        plan.sequences, config.seq_len, record["seconds"], mtp=plan.mtp_weight > 0
                    )
                    display.update(self.step, record)
                self._record(record)
                last = self.step == self.total_steps
                stopping = self.ranks.any(stop.asked)
                if last or self.step % config.eval_every == 0:
                    self._log_evaluation(display)
                if last or stopping or self.step % config.save_every == 0:
                    self.save()
        if self.step < self.total_steps:
            display.log(f"stopped and saved at step {self.step}; continue: dsv3 train --resume {self.run.path}")

    def _doing(self) -> str:
        """How far this process has come, in words."""
        at = self.execution.activity()
        return f"after {self.step} steps of {self.total_steps}" + (f", at {at}" if at else "")

    def _log_evaluation(self, display: Display) -> None:
        self.ranks.heartbeat(self._doing)
        values = self.evaluate(self.data.sources)
        record: dict[str, Any] = {"step": self.step, "bits_per_byte": self._mean(values)}
        message = f"step {self.step}: held-out bits per byte {record['bits_per_byte']:.4f}"
        if len(values) > 1:
            record["bits_per_byte_by_source"] = values
            message += f" ({', '.join(f'{name} {value:.4f}' for name, value in values.items())})"
        if self.ema is not None and self.step:
            with self.ema.applied_to(self.model, self.sharding):
                record["ema_bits_per_byte"] = self._mean(self.evaluate(self.data.sources))
            message += f", of the averaged weights {record['ema_bits_per_byte']:.4f}"
        if self.domains:
            record["bits_per_byte_by_domain"] = by_domain = self.evaluate(self.domains)
            message += f"; by domain {', '.join(f'{name} {value:.4f}' for name, value in by_domain.items())}"
        if self.config.sample_tokens and (sample := self.execution.sample(self.data)) is not None:
            record["sample"] = dataclasses.asdict(sample)
            message += f"\n  sample: {sample.one_line()}"
        self._record(record)
        display.log(message)

    def _record(self, record: Mapping[str, Any]) -> None:
        if self.ranks.is_first:
            self.run.log(record)
        for logger in self.loggers:
            logger.log(record["step"], numbers(record))

    def _mean(self, values: Mapping[str, float]) -> float:
        """Over sources, by their share of the training text."""
        return sum(float(source.share) * values[source.name] for source in self.data.sources)


def check_settings(config: TrainConfig, ranks: Ranks | None = None) -> ModelConfig:
    """The model that `config` names, after all that can be found wrong with a run before its text is read.

    ranks: the processes that are to run it, if they are there already. Writes nothing. Raises `UserError` if the
    model, the device, the processes, prepared data or the folder does not suit.
    """
    init = None if config.init is None else str(find_checkpoint(Path(config.init)))
    model_config = resolve_config(config.model or init or "nano")
    pick_dtype(config.dtype, pick_device(config.device))
    if config.seq_len > model_config.max_position_embeddings:
        raise UserError(
            f"seq_len is {config.seq_len}, more than the model's max_position_embeddings "
            f"({model_config.max_position_embeddings})"
        )
    if config.pp > 1:
        data_ranks = (config.dp_replicate or 1) * config.dp_shard if ranks is None else ranks.mesh.data.size
        planned_stages(config, model_config, pp=config.pp, data_ranks=data_ranks)
    if is_prepared(Path(config.data)):
        check_prepared(config, model_config.vocab_size)
    Run.check_free(config.out)
    return model_config


def start_run(config: TrainConfig, report: Callable[[str], None], ranks: Ranks | None = None) -> Trainer:
    """Prepare the data and the folder of a new run, telling `report` of each stage; nothing is trained yet.

    ranks: the processes that call this together; the first one prepares.
    """
    ranks = Ranks(Mesh(device=pick_device(config.device))) if ranks is None else ranks
    model_config = check_settings(config, ranks)
    run = Run(config.out)
    init = None if config.init is None else find_checkpoint(Path(config.init)).absolute()

    def prepare_run() -> None:
        Run.create(config)
        tokenizer = model_config.vocab_size if init is None else Tokenizer.load(init)
        data = open_data(config, run.data, tokenizer, report)
        if config.eval_data:
            prepare_domains(
                config.eval_data, run.domains, data.tokenizer, seq_len=config.seq_len, max_tokens=config.eval_tokens
            )

    ranks.first_alone(prepare_run)
    data = load_prepared(Path(config.data) if is_prepared(Path(config.data)) else run.data)
    device = ranks.mesh.device
    dtype = pick_dtype(config.dtype, device)
    model_config = model_config.replace(bos_token_id=data.tokenizer.bos_id, eos_token_id=data.tokenizer.eos_id)
    # Resolved, so that a resumed run computes as it began, whatever the machine's default is by then.
    config = dataclasses.replace(
        config,
        device=device.type,  # type: ignore[arg-type]
        dtype=str(dtype).removeprefix("torch."),  # type: ignore[arg-type]
        data=str(data.folder.absolute()) if is_prepared(Path(config.data)) else config.data,
        init=None if init is None else str(init),
    )
    ranks.first_alone(lambda: save_config(run.path, config_to_hf(model_config, dtype=torch.float32)))
    trainer = Trainer(run, config, model_config, data, ranks=ranks)
    ranks.first_alone(lambda: run.save_settings(config))
    return trainer


def resume_run(path: Path, ranks: Ranks | None = None, spread: Mapping[str, Any] | None = None) -> Trainer:
    """The run in `path`, at its newest checkpoint, or at its beginning if it has none yet.

    ranks: the processes that go on with it together, not necessarily as many as before. spread: how they divide it
    (`TrainConfig.spread`); None: as the run was begun.
    """
    run = Run.open(path)
    config = dataclasses.replace(run.settings(), **({} if spread is None else spread))
    ranks = Ranks(Mesh(device=pick_device(config.device))) if ranks is None else ranks
    data = load_prepared(run.data if is_prepared(run.data) else Path(config.data))
    model_config, checkpoints = load_config(run.path), run.checkpoints()
    ranks.wait()  # until all have looked: the next step tidies up among the checkpoints
    checkpoint = checkpoints[-1] if checkpoints else None
    return Trainer(run, config, model_config, data, checkpoint=checkpoint, ranks=ranks)


def _make_optimizer(model: nn.Module, config: TrainConfig, sharding: Sharding) -> MasterOptimizer:
    moments = torch.bfloat16 if config.moments == "bfloat16" else None
    make = MasterMuon if config.optimizer == "muon" else MasterAdamW
    return make(
        model,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        weight_decay=config.weight_decay,
        moments=moments,
        sharding=sharding,
    )


def _load_metrics(loads: Mapping[str, Tensor]) -> dict[str, Any]:
    """MaxVio averaged over layers, and every expert's load as a multiple of its layer's mean."""
    counted = {name: counts.double() for name, counts in loads.items() if counts.any()}
    if not counted:
        return {}
    return {
        "max_vio": sum(map(max_violation, counted.values())) / len(counted),
        "load": {name: [round(x, 4) for x in (c / c.mean()).tolist()] for name, c in counted.items()},
    }
