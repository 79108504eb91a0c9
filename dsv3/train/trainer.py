"""The training loop on one device: `train` makes or resumes a run, `Trainer` takes one optimizer step after another."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch

from dsv3.checkpoint.hf_config import config_to_hf, load_config, save_config
from dsv3.config import PRESETS, ModelConfig
from dsv3.data.batches import BatchSampler
from dsv3.data.prepare import PreparedData, load_prepared, prepare
from dsv3.errors import UserError
from dsv3.files import make_folder
from dsv3.model.balance import LoadBalancer, max_violation
from dsv3.model.transformer import Transformer
from dsv3.train.checkpoint import read_checkpoint, write_checkpoint
from dsv3.train.config import TrainConfig
from dsv3.train.device import pick_device, pick_dtype
from dsv3.train.evaluate import bits_per_byte
from dsv3.train.optim import MasterAdamW
from dsv3.train.run import Run
from dsv3.train.schedule import learning_rate
from dsv3.train.step import backward_step


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
        self.sampler = BatchSampler(data.train.ids, config.batch_size, config.seq_len, config.seed)
        self.step = 0

    def train_step(self) -> dict[str, Any]:
        """One optimizer step; returns its record. Raises `UserError` if the loss or the gradient is not finite."""
        config = self.config
        started = time.perf_counter()
        tokens_BS1 = self.sampler.batch(self.step).to(self.device)
        losses = backward_step(
            self.model,
            self.balancer,
            tokens_BS1,
            micro_batch_size=config.micro_batch_size or config.batch_size,
            mtp_weight=config.mtp_weight,
            eos_token_id=self.eos_token_id,
        )
        rate = learning_rate(self.step, config)
        norm = self.optimizer.step(rate, config.clip)
        loads = self.balancer.update(config.bias_update_speed)
        self.step += 1
        record: dict[str, Any] = {"step": self.step, "loss": losses.main}
        if losses.mtp:
            record["mtp_loss"] = sum(losses.mtp) / len(losses.mtp)
        record |= {"balance_loss": losses.balance, "lr": rate, "grad_norm": norm}
        counted = {name: counts for name, counts in loads.items() if counts.any()}
        if counted:
            record["max_vio"] = sum(map(max_violation, counted.values())) / len(counted)
        seconds = time.perf_counter() - started
        record |= {
            "tokens": self.step * config.batch_size * config.seq_len,
            "seconds": seconds,
            "tokens_per_second": config.batch_size * config.seq_len / seconds,
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
            batch_size=config.micro_batch_size or config.batch_size,
            max_tokens=config.eval_tokens,
            eos_token_id=self.eos_token_id,
        )

    def save(self) -> Path:
        """A checkpoint of this step."""
        return self.run.save_checkpoint(
            self.step,
            lambda folder: write_checkpoint(
                folder, self.model, self.optimizer, self.step, self.run.data / "tokenizer"
            ),
            self.config.keep,
        )

    def restore(self, checkpoint: Path) -> None:
        """Continue from a checkpoint of this run."""
        self.step = read_checkpoint(checkpoint, self.model, self.optimizer)

    def fit(self, display: Display) -> None:
        """Steps until the last, with evaluations and checkpoints on the way; Ctrl-C saves and stops."""
        config = self.config
        try:
            if self.step == 0:
                self._log_evaluation(display)
            while self.step < config.steps:
                record = self.train_step()
                self.run.log(record)
                display.update(self.step, record)
                last = self.step == config.steps
                if last or self.step % config.eval_every == 0:
                    self._log_evaluation(display)
                if last or self.step % config.save_every == 0:
                    self.save()
        except KeyboardInterrupt:
            # A step that was cut off leaves half a gradient; weights and step count are those of the last whole one.
            self.optimizer.zero_grad()
            self.balancer.reset()
            self.save()
            display.log(f"stopped and saved at step {self.step}; continue: dsv3 train --resume {self.run.path}")
            raise

    def _log_evaluation(self, display: Display) -> None:
        value = self.evaluate()
        self.run.log({"step": self.step, "bits_per_byte": value})
        display.log(f"step {self.step}: held-out bits per byte {value:.4f}")


def start_run(config: TrainConfig, display: Display) -> Trainer:
    """Prepare the data and the folder of a new run; nothing is trained yet."""
    model_config = resolve_model(config.model)
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
            progress=display.log,
        )
    model_config = model_config.replace(
        bos_token_id=data.tokenizer.bos_id, eos_token_id=data.tokenizer.eos_id
    )
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
        trainer.restore(run.latest_checkpoint())
    return trainer


def resolve_model(name: str) -> ModelConfig:
    """A preset's config, or that of a config.json (or a folder with one). Raises `UserError` if it is neither."""
    if name in PRESETS:
        return PRESETS[name]
    path = Path(name)
    if path.exists():
        return load_config(path)
    raise UserError(f"'{name}' is neither a preset ({', '.join(PRESETS)}) nor a config.json that exists")
