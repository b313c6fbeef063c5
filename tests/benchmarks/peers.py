"""What the benchmarks compare with, and how: the same work, in turns, in one process."""

from __future__ import annotations

import multiprocessing
import statistics
import time
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from llmcore.config import ModelConfig
from llmcore.device import pick_precision
from llmcore.measure.planner import RandomTokens

PEERS = ("transformers Llama", "GPT-2 reference")
FAST = pick_precision("auto", torch.device("cpu"))  # fp32 where bf16 would be emulated, hundreds of times slower


def transformers_llama(shape: ModelConfig) -> LlamaForCausalLM:
    """Hugging Face's Llama of the same shape, with its own default attention (PyTorch's fused kernels)."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=shape.vocab_size,
            hidden_size=shape.dim,
            intermediate_size=shape.hidden_dim,
            num_hidden_layers=shape.n_layers,
            num_attention_heads=shape.n_heads,
            num_key_value_heads=shape.n_kv_heads,
            head_dim=shape.head_dim,
            max_position_embeddings=shape.max_seq_len,
            rms_norm_eps=shape.norm_eps,
            tie_word_embeddings=shape.tie_embeddings,
        )
    )


class GPTBlock(nn.Module):
    """Pre-norm attention and a GELU feed-forward, with biases."""

    def __init__(self, dim: int, hidden_dim: int, n_heads: int) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.up, self.down = nn.Linear(dim, hidden_dim), nn.Linear(hidden_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, time, dim) -> the same shape."""
        q, k, v = (
            part.unflatten(-1, (self.n_heads, -1)).transpose(1, 2) for part in self.qkv(self.norm1(x)).chunk(3, -1)
        )
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(-2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class GPT(nn.Module):
    """A plain GPT-2-like reference: learnt positions, LayerNorm, GELU, tied embeddings.

    Its two feed-forward matrices are half as wide again as SwiGLU's three, so that both multiply as much.
    """

    def __init__(self, shape: ModelConfig) -> None:
        super().__init__()
        self.tokens = nn.Embedding(shape.vocab_size, shape.dim)
        self.positions = nn.Embedding(shape.max_seq_len, shape.dim)
        width = 3 * shape.hidden_dim // 2
        self.blocks = nn.ModuleList(GPTBlock(shape.dim, width, shape.n_heads) for _ in range(shape.n_layers))
        self.norm = nn.LayerNorm(shape.dim)
        self.output = nn.Linear(shape.dim, shape.vocab_size, bias=False)
        self.output.weight = self.tokens.weight
        nn.init.normal_(self.tokens.weight, std=0.02)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy of (batch, time) ids."""
        x = self.tokens(tokens) + self.positions.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        return F.cross_entropy(self.output(self.norm(x)).flatten(0, 1), targets.flatten())


def peer_step(
    peer: str,
    shape: ModelConfig,
    batch_size: int,
    compiled: bool,
    bf16: bool,
    device: str = "cpu",
    checkpointing: bool = False,
) -> Callable[[], object]:
    """A plain training step of a peer: what its users would write.

    Args:
        peer: one of `PEERS`.
        shape: of the model.
        batch_size: windows.
        compiled: by torch.compile.
        bf16: multiply in it.
        device: "cpu" or "cuda".
        checkpointing: transformers' own gradient checkpointing.
    """
    model: nn.Module = transformers_llama(shape) if peer == PEERS[0] else GPT(shape)
    if checkpointing:
        model.gradient_checkpointing_enable()
    model = model.to(device).train()
    data, step = RandomTokens(shape), iter(range(10**9))
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4, fused=True)
    run = torch.compile(model) if compiled else model

    def take() -> None:
        x, y = (ids.to(device) for ids in data.batch(next(step), batch_size))
        with torch.autocast(device, torch.bfloat16, enabled=bf16):
            # Hugging Face shifts the labels itself
            loss = run(input_ids=x, labels=x, use_cache=False).loss if peer == PEERS[0] else run(x, y)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return take


def _serve(pipe: Connection, make: Callable[..., Callable[[], object]], arguments: tuple[Any, ...]) -> None:
    run = make(*arguments)
    for _ in range(2):
        run()
    pipe.send(None)
    while pipe.recv():
        started = time.perf_counter()
        said = run()
        pipe.send(said if isinstance(said, float) else time.perf_counter() - started)


def take_turns(
    contestants: Mapping[str, tuple[Callable[..., Callable[[], object]], *tuple[Any, ...]]], rounds: int
) -> dict[str, list[float]]:
    """Seconds of every call, each contestant once a round, so that all meet the same noise.

    Each has a process of its own, which makes what is to be called: none works in memory that another has left.

    Args:
        contestants: name -> what makes the function to time, and its arguments. If the function returns a float,
            these are its seconds.
        rounds: calls of each, after two that do not count.
    """
    spawn = multiprocessing.get_context("spawn")
    pipes: dict[str, Connection] = {}
    processes = []
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for name, (make, *arguments) in contestants.items():
        pipes[name], theirs = spawn.Pipe()
        processes.append(spawn.Process(target=_serve, args=(theirs, make, tuple(arguments)), daemon=True))
        processes[-1].start()
        theirs.close()
        pipes[name].recv()
    for _ in range(rounds):
        for name, pipe in pipes.items():
            pipe.send(True)
            seconds[name].append(pipe.recv())
    for pipe in pipes.values():
        pipe.send(False)
    for process in processes:
        process.join()  # what is measured next must not meet their end
    return seconds


def ratio(seconds: Mapping[str, list[float]], fast: str, slow: str) -> float:
    """How many times faster: the median over rounds of the two times within one round."""
    return statistics.median(b / a for a, b in zip(seconds[fast], seconds[slow], strict=True))


def machine() -> str:
    """The machine a table was made on, in words."""
    model = next(
        (line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")), "unknown CPU"
    )
    return f"{model}, {torch.get_num_threads()} threads, torch {torch.__version__}"
