"""Models, data and runs small enough for a test, and how two runs are compared."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from llmcore.config import ModelConfig, TrainConfig
from llmcore.dataset import IGNORED, spread
from llmcore.model import Transformer
from llmcore.runs import read_metrics
from llmcore.train import Event, Trainer

from . import first_on_path

torch.set_num_threads(1)

ROOT = Path(__file__).parents[1]
FIND_TESTS = first_on_path(ROOT)  # for a process in another folder


def examples(number: int) -> int:
    """How many examples hypothesis tries: all of them in `make test`, a fifth in `make test-fast`."""
    return max(3, number // 5) if os.environ.get("FEW_EXAMPLES") else number


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

    def sequential(self, batch_size: int, most: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        rows = [self.window(number, 10**6) for number in range(self.windows)]
        for number in spread(-(-len(rows) // batch_size), most):
            part = rows[number * batch_size : (number + 1) * batch_size]
            yield torch.stack([x for x, _ in part]), torch.stack([y for _, y in part])


def quick(**changes: Any) -> TrainConfig:
    """A training configuration of a few small steps, with nothing done on the side."""
    few: dict[str, Any] = {"max_steps": 6, "batch_size": 4, "warmup_steps": 2, "learning_rate": 1e-2}
    still = {"eval_interval": 0, "eval_batches": 0, "checkpoint_interval": 0, "compile": "off", "precision": "fp32"}
    return TrainConfig(**{**few, **still, **changes})


def trainer(
    run: Path, config: TrainConfig, model: Transformer | None = None, val: bool = True, **options: Any
) -> Trainer:
    data = Batches()
    return Trainer(model or tiny_model(), data, data if val else None, config, run, device="cpu", **options)


def state(path: Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint, the optimizer's and the random state included."""
    return load_file(path / "model.safetensors") | load_file(path / "trainer_state.safetensors")


def numbers(run: Path) -> list[Event]:
    """The metrics, without what the clock says."""
    return [{k: v for k, v in e.items() if k not in ("seconds", "tokens_per_second")} for e in read_metrics(run)]


def assert_same_tensors(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


def weights(model: Transformer) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def start(script: str, *arguments: Path | int) -> subprocess.Popen[str]:
    """Run a script in a process of its own, its output in pipes."""
    return subprocess.Popen(
        [sys.executable, "-c", script, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def printed_by(script: str, *arguments: Path | int) -> str:
    """What a script prints in a process of its own, which must end well."""
    with start(script, *arguments) as process:
        output, errors = process.communicate()
    assert process.returncode == 0, errors
    return output


def read_until(process: subprocess.Popen[str], line: str) -> None:
    """Wait until a process prints a line."""
    assert process.stdout is not None
    assert line in map(str.strip, process.stdout), "it ended before"


def sign(path: Path) -> None:
    """Bring the manifest's hashes up to date, as only a forger would."""
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["sha256"] = {name: hashlib.sha256((path / name).read_bytes()).hexdigest() for name in manifest["sha256"]}
    (path / "manifest.json").write_text(json.dumps(manifest))
