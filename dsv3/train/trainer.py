"""The training loop on one device: `train` makes or resumes a run, `Trainer` takes one optimizer step after another."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from dsv3.checkpoint.hf_config import config_to_hf, load_config, save_config
from dsv3.checkpoint.locate import resolve_config
from dsv3.config import ModelConfig
from dsv3.data.batches import SequenceSampler
from dsv3.data.config import DataConfig
from dsv3.data.manifest import is_prepared, tokenizer_folder
from dsv3.data.prepare import prepare
from dsv3.data.prepared import PreparedData, load_prepared
from dsv3.device import pick_device, pick_dtype
from dsv3.errors import UserError
from dsv3.files import make_folder
from dsv3.model.balance import LoadBalancer, max_violation
from dsv3.model.transformer import Transformer
from dsv3.train.checkpoint import read_checkpoint, read_extra, write_snapshot
from dsv3.train.config import TrainConfig
from dsv3.train.ema import Ema
from dsv3.train.evaluate import bits_per_byte
from dsv3.train.guard import Guard, Verdict, first_nonfinite, first_nonfinite_gradient
from dsv3.train.loggers import make_loggers
from dsv3.train.muon import MasterMuon
from dsv3.train.optim import MasterAdamW, MasterOptimizer
from dsv3.train.run import Run
from dsv3.train.signals import StopSignals
from dsv3.train.snapshot import CheckpointSaver, Snapshot
from dsv3.train.step import backward_step
from dsv3.train.throughput import Throughput, measure_gemm_rate
from dsv3.train.timetable import timetable


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
        model: Transformer | None = None,
    ) -> None:
        """`model`, of `model_config` and in FP32, is what the run starts from; None draws its weights."""
        self.run, self.config, self.data = run, config, data
        self.device = pick_device(config.device)
        self.eos_token_id = data.tokenizer.eos_id
        torch.manual_seed(config.seed)
        self.model = (Transformer(model_config) if model is None else model).to(self.device)
        # Masters are made from FP32 weights, so that a BF16 run starts from the same model as an FP32 one.
        weights = {name: parameter.detach().clone() for name, parameter in self.model.named_parameters()}
        self.model.to(pick_dtype(config.dtype, self.device))
        self.model.recompute = config.recompute
        self.optimizer = _make_optimizer(self.model, config)
        self.optimizer.load_masters(weights)
        self.ema = None if config.ema_decay is None else Ema(self.optimizer.masters(), config.ema_decay)
        self.balancer = LoadBalancer(self.model)
        self.guard = Guard(threshold=config.spike_threshold, give_up_after=config.give_up_after)
        self.sampler = SequenceSampler(data.sources, config.seq_len, config.seed)
        self.saver = CheckpointSaver(
            run.path,
            lambda folder, snapshot: write_snapshot(folder, snapshot, tokenizer_folder(data.folder)),
            keep=config.keep,
            milestone_every=config.milestone_every,
        )
        self.timetable = list(timetable(config))
        self.step = 0  # optimizer steps done: with the timetable, all there is to know of where the run is

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
        tokens_BS1 = self.sampler.sequences(plan.first_sequence, plan.sequences).to(self.device)
        micro_batch_size = config.micro_batch_size or plan.sequences
        losses = backward_step(
            self.model,
            self.balancer,
            tokens_BS1,
            micro_batch_size=micro_batch_size,
            mtp_weight=plan.mtp_weight,
            eos_token_id=self.eos_token_id,
        )
        norm = self.optimizer.grad_norm()
        verdict = self.guard.judge(plan.number, losses.main, norm)
        if verdict.action != "ok":
            return self._handle_trouble(verdict, tokens_BS1, micro_batch_size)
        if self.ema is not None:
            self.ema.wait_copied()
        self.optimizer.step(plan.learning_rate, config.clip, norm)
        if self.ema is not None:
            self.ema.update(self.optimizer.masters())
        loads = self.balancer.update(plan.bias_update_speed)
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

    def _handle_trouble(self, verdict: Verdict, tokens_BS1: Tensor, micro_batch_size: int) -> dict[str, Any]:
        """Throw the step away, say where the trouble began, and go on, go back or give up."""
        reason = verdict.reason
        if verdict.action != "rollback":
            place = first_nonfinite_gradient(self.optimizer.gradients())
            parts = tokens_BS1[:, :-1].split(micro_batch_size)
            began = first_nonfinite(self.model, lambda: [self.model.hidden_states(part) for part in parts])
            where = began or (place and f"the gradient of {place}")
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

    def evaluate(self) -> dict[str, float]:
        """Bits per byte on the held-out text of each source."""
        config, sources = self.config, self.data.sources
        return {
            source.name: bits_per_byte(
                self.model,
                source,
                self.data.tokenizer.token_bytes,
                seq_len=config.seq_len,
                batch_size=config.micro_batch_size or self.timetable[0].sequences,
                max_tokens=config.eval_tokens // len(sources),
                eos_token_id=self.eos_token_id,
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
        if self.step == 0:
            self._log_evaluation(display)
        dtype = next(self.model.parameters()).dtype
        throughput = Throughput(self.model.config, measure_gemm_rate(self.device, dtype))
        loggers = make_loggers(config.loggers, self.run.path, config=config.to_json(), start_step=self.step)
        with contextlib.ExitStack() as closing, self.saver, StopSignals() as stop:
            for logger in loggers:
                closing.callback(logger.close)
            while self.step < self.total_steps and not stop.asked:
                plan = self.timetable[self.step]
                record = self.train_step()
                if "skipped" in record:
                    display.log(f"step left out: {record['skipped']}")
                else:
                    record |= throughput.metrics(
                        plan.sequences, config.seq_len, record["seconds"], mtp=plan.mtp_weight > 0
                    )
                    display.update(self.step, record)
                self.run.log(record)
                for logger in loggers:
                    logger.log(record["step"], {k: v for k, v in record.items() if isinstance(v, (int, float))})
                last = self.step == self.total_steps
                if last or self.step % config.eval_every == 0:
                    self._log_evaluation(display)
                if last or stop.asked or self.step % config.save_every == 0:
                    self.save()
        if self.step < self.total_steps:
            display.log(f"stopped and saved at step {self.step}; continue: dsv3 train --resume {self.run.path}")

    def _log_evaluation(self, display: Display) -> None:
        values = self.evaluate()
        record: dict[str, Any] = {"step": self.step, "bits_per_byte": self._mean(values)}
        message = f"step {self.step}: held-out bits per byte {record['bits_per_byte']:.4f}"
        if len(values) > 1:
            record["bits_per_byte_by_source"] = values
            message += f" ({', '.join(f'{name} {value:.4f}' for name, value in values.items())})"
        if self.ema is not None and self.step:
            with self.ema.applied_to(self.model):
                record["ema_bits_per_byte"] = self._mean(self.evaluate())
            message += f", of the averaged weights {record['ema_bits_per_byte']:.4f}"
        self.run.log(record)
        display.log(message)

    def _mean(self, values: Mapping[str, float]) -> float:
        """Over sources, by their share of the training text."""
        return sum(float(source.share) * values[source.name] for source in self.data.sources)


def start_run(config: TrainConfig, report: Callable[[str], None]) -> Trainer:
    """Prepare the data and the folder of a new run, telling `report` of each stage; nothing is trained yet."""
    model_config = resolve_config(config.model)
    device = pick_device(config.device)
    dtype = pick_dtype(config.dtype, device)
    if config.seq_len > model_config.max_position_embeddings:
        raise UserError(
            f"seq_len is {config.seq_len}, more than the model's max_position_embeddings "
            f"({model_config.max_position_embeddings})"
        )
    run = Run.create(config)
    if is_prepared(Path(config.data)):
        config = dataclasses.replace(config, data=str(Path(config.data).absolute()))
        data = load_prepared(Path(config.data))
        if data.tokenizer.vocab_size > model_config.vocab_size:
            raise UserError(
                f"the data in '{config.data}' has a vocabulary of {data.tokenizer.vocab_size}, more than the model's "
                f"vocab_size ({model_config.vocab_size}): choose another model or prepare the data for this one"
            )
    else:
        data_config = DataConfig(held_out=config.held_out, seed=config.seed)
        data = prepare(config.data, run.data, model_config.vocab_size, data_config, report=report)
    model_config = model_config.replace(bos_token_id=data.tokenizer.bos_id, eos_token_id=data.tokenizer.eos_id)
    # Resolved, so that a resumed run computes as it began, whatever the machine's default is by then.
    config = dataclasses.replace(config, device=device.type, dtype=str(dtype).removeprefix("torch."))  # type: ignore[arg-type]
    make_folder(run.path)
    save_config(run.path, config_to_hf(model_config, dtype=torch.float32))
    trainer = Trainer(run, config, model_config, data)
    run.save_settings(config)
    return trainer


def resume_run(path: Path) -> Trainer:
    """The run in `path`, at its newest checkpoint, or at its beginning if it has none yet."""
    run = Run.open(path)
    config = run.settings()
    data = load_prepared(run.data if is_prepared(run.data) else Path(config.data))
    trainer = Trainer(run, config, load_config(run.path), data)
    if run.checkpoints():
        trainer.restore(run.checkpoints()[-1])
    return trainer


def _make_optimizer(model: Transformer, config: TrainConfig) -> MasterOptimizer:
    moments = torch.bfloat16 if config.moments == "bfloat16" else None
    make = MasterMuon if config.optimizer == "muon" else MasterAdamW
    return make(
        model,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        weight_decay=config.weight_decay,
        moments=moments,
    )


def _load_metrics(loads: Mapping[str, Tensor]) -> dict[str, Any]:
    """MaxVio averaged over layers, and every expert's load as a multiple of its layer's mean."""
    counted = {name: counts.cpu().double() for name, counts in loads.items() if counts.any()}
    if not counted:
        return {}
    return {
        "max_vio": sum(map(max_violation, counted.values())) / len(counted),
        "load": {name: [round(x, 4) for x in (c / c.mean()).tolist()] for name, c in counted.items()},
    }
