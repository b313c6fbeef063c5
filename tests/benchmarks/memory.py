"""Peak memory of training, beside transformers and beside the planner: `python -m tests.benchmarks.memory [part ...]`.

Parts: `peers` and `117M`, and on request `wide` and `batch`. Each configuration takes two steps in a fresh process;
what counts is its resident memory at most, less what it held before it built the model, and without gaps between
tensors (`planner.RETURN_FREED_MEMORY`).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator

from llmcore import config
from llmcore.config import ModelConfig, TrainConfig
from llmcore.files import PROJECT_ROOT
from llmcore.measure.memory import predict_memory
from llmcore.measure.planner import RETURN_FREED_MEMORY, measure_memory, resident_bytes
from tests.benchmarks.peers import FAST, PEERS, machine, peer_step

PRESET = config.preset("scifi-117M")[0]
SMALL = ModelConfig(vocab_size=16_000, dim=320, n_layers=6, n_heads=5, hidden_dim=864, max_seq_len=1024)
WIDE = PRESET.replace(n_layers=4)
EAGER = TrainConfig(compile="off", precision="fp32", batch_size=8)


def serve_peer() -> None:
    """In a fresh process: read what to measure, take two steps, print the peak."""
    request = json.loads(sys.stdin.read())
    shape = ModelConfig.from_dict(request.pop("shape"))
    tiny = shape.replace(dim=64, n_layers=1, n_heads=2, n_kv_heads=2, head_dim=32, hidden_dim=64)
    peer_step(PEERS[0], tiny, **{**request, "batch_size": 1})()  # loads the code of torch and its libraries
    base = resident_bytes()[0]
    step = peer_step(PEERS[0], shape, **request)
    step()
    started = time.perf_counter()
    step()
    seconds = time.perf_counter() - started
    print(json.dumps({"peak_bytes": resident_bytes()[1] - base, "base_bytes": base, "seconds": seconds}))


def measure_peer(shape: ModelConfig, train: TrainConfig) -> dict[str, float]:
    """transformers' memory for the same work as `measure_memory`."""
    request = {"shape": shape.to_dict(), "batch_size": train.batch_size, "compiled": False}
    request |= {"bf16": train.precision == "bf16", "checkpointing": train.activation_checkpointing == "full"}
    code = "from tests.benchmarks.memory import serve_peer; serve_peer()"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        input=json.dumps(request),
        stdout=subprocess.PIPE,
        text=True,
        cwd=PROJECT_ROOT,
        env={**os.environ, **RETURN_FREED_MEMORY},
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


def row(name: str, who: str, train: TrainConfig, found: dict[str, float], predicted: float | None) -> str:
    """One row of the table, in MB."""
    error = f"{predicted / 1e6:,.0f} | {predicted / found['peak_bytes'] - 1:+.0%}" if predicted else " | "
    return (
        f"| {name} | {who} | {train.precision} | {train.activation_checkpointing} | {train.batch_size} "
        f"| {found['peak_bytes'] / 1e6:,.0f} | {found['base_bytes'] / 1e6:,.0f} | {error} | {found['seconds']:.2f} |"
    )


def ours(name: str, shape: ModelConfig, train: TrainConfig) -> tuple[str, float]:
    """A row of the table for llmcore, and its peak in bytes."""
    found = measure_memory(shape, train, "cpu")
    who = "llmcore, compiled" if train.compile == "on" else "llmcore"
    return row(name, who, train, found, predict_memory(shape, train)["total"]), found["peak_bytes"]


def beside_transformers(name: str, shape: ModelConfig, ways: list[tuple[str, str]]) -> Iterator[str]:
    """The same shape, precision and policy, by llmcore and by transformers."""
    for precision, policy in ways:
        train = EAGER.replace(precision=precision, activation_checkpointing=policy)
        line, peak = ours(name, shape, train)
        yield line
        theirs = measure_peer(shape, train)
        yield row(name, "transformers", train, theirs, None)
        said.append(f"{name}, {precision}, {policy}: {peak / theirs['peak_bytes']:.2f} of transformers' (target 0.6)")


def peers() -> Iterator[str]:
    """A vocabulary that is large for its model."""
    ways = dict.fromkeys([("fp32", "none"), (FAST, "none"), (FAST, "full")])  # without the second where it is the first
    yield from beside_transformers("18M, vocabulary 16000", SMALL, list(ways))


def wide() -> Iterator[str]:
    """Blocks that are large for their vocabulary."""
    yield from beside_transformers("117M with 4 layers", WIDE, [(FAST, "none"), (FAST, "full")])


def whole_preset() -> Iterator[str]:
    """scifi-117M at batch 4 and context 1024 with full checkpointing, float32 master weights."""
    train = EAGER.replace(precision=FAST, batch_size=4, activation_checkpointing="full")
    line, peak = ours("scifi-117M", PRESET, train)
    yield line
    said.append(f"scifi-117M, batch 4: {peak / 1e9:.2f} GB (target 4)")


def batches() -> Iterator[str]:
    """Memory against batch size, by policy, eager and compiled."""
    shape, how = config.preset("scifi-mini")
    for compiled in ("off", "on"):
        for policy in ("none", "selective", "full"):
            for batch_size in (8, 32):
                changes = {"compile": compiled, "activation_checkpointing": policy, "batch_size": batch_size}
                yield ours("scifi-mini", shape, how.replace(**changes))[0]


PARTS = {"peers": peers, "117M": whole_preset, "wide": wide, "batch": batches}
said: list[str] = []  # the targets, in words


def main() -> None:
    """Print the table and the targets."""
    print(f"Peak memory of two training steps in MB, on {machine()}\n")
    print("| work | who | precision | checkpointing | batch | peak | held before | predicted | error | s/step |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for part in sys.argv[1:] or ("peers", "117M"):
        for line in PARTS[part]():
            print(line, flush=True)
    print("\n" + "\n".join(f"- {line}" for line in said))


if __name__ == "__main__":
    main()
