"""The training loop on one device: `train` makes or resumes a run, `Trainer` takes one optimizer step after another."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch

from dsv3.checkpoint.hf_config import config_to_hf, load_config, save_config
from dsv3.checkpoint.locate import resolve_config
from dsv3.config import ModelConfig
from dsv3.data.batches import SequenceSampler
from dsv3.data.prepare import PreparedData, load_prepared, prepare
from dsv3.errors import UserError
from dsv3.files import make_folder
from dsv3.model.balance import LoadBalancer, max_violation
from dsv3.model.transformer import Transformer
from dsv3.train.checkpoint import read_checkpoint, write_checkpoint
from dsv3.train.config import TrainConfig
from dsv3.device import pick_device, pick_dtype
from dsv3.train.evaluate import bits_per_byte
from dsv3.train.optim import MasterAdamW
from dsv3.train.run import Run
from dsv3.train.signals import StopSignals
from dsv3.train.step import backward_step
from dsv3.train.timetable import timetable


class Display(Protocol):
    """Where progress is shown."""

    def update(self, step: int, metrics: Mapping[str, float]) -> None: ...

    def log(self, message: str) -> None: ...


class Trainer:
    """Model, optimizer, balancer and data of one run, and how many optimizer steps it has done."""

    def __init__(self, run: Run, config: TrainConfig, model_config: ModelConfig, data: PreparedData) -> None:
        self.run, self.config, self.data = run, config, data
        self.device = pick_device(config.device)
        self.eos_token_id = data.tokenizer.eos_id
        torch.manual_seed(config.seed)
        self.model = Transformer(model_config).to(self.device)
        # Masters are made from FP32 weights, so that a BF16 run starts from the same model as an FP32 one.
        weights = {name: parameter.detach().clone() for name, parameter in self.model.named_parameters()}
        self.model.to(pick_dtype(config.dtype, self.device))
        self.model.recompute = config.recompute
        self.optimizer = MasterAdamW(
            self.model, betas=(config.beta1, config.beta2), eps=config.eps, weight_decay=config.weight_decay
        )
        self.optimizer.load_masters(weights)
        self.balancer = LoadBalancer(self.model)
        self.sampler = SequenceSampler(data.train.ids, config.seq_len, config.seed)
        self.timetable = list(timetable(config))
        self.step = 0  # optimizer steps done: with the timetable, all there is to know of where the run is

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return len(self.timetable)

    def train_step(self) -> dict[str, Any]:
        """One optimizer step; returns its record. Raises `UserError` if the loss or the gradient is not finite."""
        config, plan = self.config, self.timetable[self.step]
        started = time.perf_counter()
        losses = backward_step(
            self.model,
            self.balancer,
            self.sampler.sequences(plan.first_sequence, plan.sequences).to(self.device),
            micro_batch_size=config.micro_batch_size or plan.sequences,
            mtp_weight=plan.mtp_weight,
            eos_token_id=self.eos_token_id,
        )
        norm = self.optimizer.step(plan.learning_rate, config.clip)
        loads = self.balancer.update(plan.bias_update_speed)
        self.step += 1
        record: dict[str, Any] = {"step": self.step, "loss": losses.main}
        if losses.mtp:
            record["mtp_loss"] = sum(losses.mtp) / len(losses.mtp)
        record |= {"balance_loss": losses.balance, "lr": plan.learning_rate, "grad_norm": norm}
        counted = {name: counts for name, counts in loads.items() if counts.any()}
        if counted:
            record["max_vio"] = sum(map(max_violation, counted.values())) / len(counted)
        seconds = time.perf_counter() - started
        record |= {
            "tokens": plan.tokens,
            "seconds": seconds,
            "tokens_per_second": plan.sequences * config.seq_len / seconds,
            "load": {
                name: [round(share, 4) for share in (counts / counts.double().mean()).tolist()]
                for name, counts in counted.items()
            },
        }
        if not (losses.main < float("inf") and norm < float("inf")):
            raise UserError(
                f"step {self.step} has loss {losses.main} and gradient norm {norm}: lower --learning-rate and resume "
                f"from the last checkpoint, or start anew"
            )
        return record

    def evaluate(self) -> float:
        """Bits per byte on the held-out text."""
        config = self.config
        return bits_per_byte(
            self.model,
            self.data.held_out.ids,
            self.data.tokenizer.token_bytes,
            seq_len=config.seq_len,
            batch_size=config.micro_batch_size or self.timetable[0].sequences,
            max_tokens=config.eval_tokens,
            eos_token_id=self.eos_token_id,
        )

    def save(self) -> Path:
        """A checkpoint of this step."""
        return self.run.save_checkpoint(
            self.step,
            lambda folder: write_checkpoint(folder, self.model, self.optimizer, self.step, self.run.data / "tokenizer"),
            self.config.keep,
        )

    def restore(self, checkpoint: Path) -> None:
        """Continue from a checkpoint of this run."""
        self.step = read_checkpoint(checkpoint, self.model, self.optimizer)

    def fit(self, display: Display) -> None:
        """Steps until the last, with evaluations and checkpoints on the way; Ctrl-C or SIGTERM saves and stops."""
        config = self.config
        if self.step == 0:
            self._log_evaluation(display)
        with StopSignals() as stop:
            while self.step < self.total_steps and not stop.asked:
                record = self.train_step()
                self.run.log(record)
                display.update(self.step, record)
                last = self.step == self.total_steps
                if last or self.step % config.eval_every == 0:
                    self._log_evaluation(display)
                if last or stop.asked or self.step % config.save_every == 0:
                    self.save()
        if self.step < self.total_steps:
            display.log(f"stopped and saved at step {self.step}; continue: dsv3 train --resume {self.run.path}")

    def _log_evaluation(self, display: Display) -> None:
        value = self.evaluate()
        self.run.log({"step": self.step, "bits_per_byte": value})
        display.log(f"step {self.step}: held-out bits per byte {value:.4f}")


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
    if (run.data / "data.json").exists():
        data = load_prepared(run.data)  # an earlier start came this far and no further
    else:
        data = prepare(
            config.data,
            model_config.vocab_size,
            run.data,
            seed=config.seed,
            held_out=config.held_out,
            progress=report,
        )
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
    trainer = Trainer(run, run.settings(), load_config(run.path), load_prepared(run.data))
    if run.checkpoints():
        trainer.restore(run.checkpoints()[-1])
    return trainer
