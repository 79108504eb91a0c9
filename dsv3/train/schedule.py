"""The learning rate as a function of the step: warm-up, constant, cosine (the shape of the report's, section 4.2)."""

from __future__ import annotations

import math

from dsv3.train.config import TrainConfig


def learning_rate(step: int, config: TrainConfig) -> float:
    """Rate of optimizer step `step` (0-based). The warm-up's first step is above 0, the last step is the final rate."""
    decay_steps = config.decay_share * config.steps
    into_decay = step + 1 - (config.steps - decay_steps)
    rate = config.learning_rate
    if into_decay > 0:
        cosine = 0.5 * (1 + math.cos(math.pi * min(into_decay / decay_steps, 1.0)))
        rate = config.final_learning_rate + (rate - config.final_learning_rate) * cosine
    warmup = min((step + 1) / config.warmup_steps, 1.0) if config.warmup_steps else 1.0
    return rate * warmup
