"""Models and data small enough to train inside a test."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llmcore.config import ModelConfig, TrainConfig
from llmcore.dataset import IGNORED
from llmcore.model import Transformer

torch.set_num_threads(1)


def tiny_config(**changes: Any) -> ModelConfig:
    shape: dict[str, Any] = {"vocab_size": 37, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48}
    return ModelConfig(**{**shape, "max_seq_len": 24, **changes})


def tiny_model(seed: int = 0, std: float | None = None, **changes: Any) -> Transformer:
    """A model with its own initial weights, or normal ones of a larger std, so that logits differ clearly."""
    torch.manual_seed(seed)
    model = Transformer(tiny_config(**changes))
    if std is not None:
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, mean=float(parameter.dim() == 1), std=std)
    return model


def random_ids(*shape: int, seed: int = 0, vocab_size: int = 37) -> Tensor:
    return torch.randint(vocab_size, shape, generator=torch.Generator().manual_seed(seed))


class Batches:
    """Windows that are a pure function of their number and the seed, a few of whose targets are left out."""

    bytes_per_token = 2.5

    def __init__(self, time: int = 12, windows: int = 10, vocab_size: int = 37, fingerprint: str = "this") -> None:
        self.time, self.windows, self.vocab_size, self.fingerprint = time, windows, vocab_size, fingerprint

    def window(self, number: int, seed: int) -> tuple[Tensor, Tensor]:
        generator = np.random.default_rng((seed, number))
        ids = torch.from_numpy(generator.integers(self.vocab_size // 2, size=self.time + 1))
        y = ids[1:].clone()
        y[: generator.integers(self.time // 2)] = IGNORED
        return ids[:-1], y

    def batch(self, step: int, batch_size: int, seed: int = 0) -> tuple[Tensor, Tensor]:
        rows = [self.window(number, seed) for number in range(step * batch_size, (step + 1) * batch_size)]
        return torch.stack([x for x, _ in rows]), torch.stack([y for _, y in rows])

    def sequential(self, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        rows = [self.window(number, 10**6) for number in range(self.windows)]
        for first in range(0, len(rows), batch_size):
            part = rows[first : first + batch_size]
            yield torch.stack([x for x, _ in part]), torch.stack([y for _, y in part])


def quick(**changes: Any) -> TrainConfig:
    """A training configuration of a few small steps, with nothing done on the side."""
    few: dict[str, Any] = {"max_steps": 6, "batch_size": 4, "warmup_steps": 2, "learning_rate": 1e-2}
    still = {"eval_interval": 0, "checkpoint_interval": 0, "compile": "off", "precision": "fp32"}
    return TrainConfig(**{**few, **still, **changes})
