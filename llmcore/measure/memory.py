"""How much memory a training step needs, counted before anything is allocated, and how much is free.

The count follows a step through the moments at which it holds most, tensor by tensor, for a model that is not compiled.
Tests compare it with PyTorch's allocator and with a process's memory. A compiled step holds somewhat less. Freed memory
that the C library keeps for the next tensors (`device.keep_freed_memory`) is not counted.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch

from llmcore.config import ModelConfig, TrainConfig
from llmcore.device import chunk_rows, has_bf16, pick_precision, ways_to_save_memory
from llmcore.model import CHUNK_ABOVE, LOSS_CHUNK, SHORT_CONTEXT, has_chunked_operator
from llmcore.runs import TrainingError

LIBRARIES = 12_000_000  # bytes that the libraries for a CPU allocate beside the tensors, for any model


def block_activations(model: ModelConfig, policy: str, context: int, size: int, fused: bool) -> int:
    """Bytes per token that a block keeps for its backward pass.

    Args:
        model: the shape.
        policy: of activation checkpointing: none, selective or full.
        context: tokens in a window.
        size: bytes of a number in matrix products: 4 in float32, 2 in bf16 or fp16.
        fused: whether RMSNorm is a single kernel, as on CUDA, which does not keep the normalised stream.
    """
    assert model.hidden_dim and model.head_dim and model.n_kv_heads
    dim, hidden = model.dim, model.hidden_dim
    queries, keys = model.n_heads * model.head_dim, model.n_kv_heads * model.head_dim
    if policy == "full":
        return 4 * dim  # the block's input

    short = not has_attention_kernel(model, context, size, fused)
    attention = size * queries + 4 * model.n_heads  # the result, and the logarithm of each softmax's sum
    if policy == "selective":  # the block's input, the results of seven matrices, and attention if it is a kernel
        return 4 * dim + size * (queries + 2 * keys + 2 * dim + 2 * hidden) + (0 if short else attention)
    if short:
        attention = size * queries + (4 + 2) * context * model.n_heads  # the pattern, in float32 and in bf16

    norm = 4 * dim + 4 + (0 if fused else 4 * dim)  # the stream in float32, 1 / rms, the normalised stream
    head_norms = 0  # of queries and keys, as `norm`
    if model.qk_norm:
        head_norms = (1 if fused else 2) * 4 * (queries + keys) + 4 * (model.n_heads + model.n_kv_heads)
    inputs = 4 * 2 * dim if size == 4 else 2 * (3 + 2) * dim  # of wq, wk, wv, w1 and w3; autocast makes a copy for each
    feed_forward = size * 4 * hidden  # gate, silu(gate), up and their product
    return 2 * norm + head_norms + inputs + size * (queries + 2 * keys) + attention + feed_forward


def has_attention_kernel(model: ModelConfig, context: int, size: int, fused: bool) -> bool:
    """Whether attention is one operation of torch, and not spelled out as `model.attend` does with short windows.

    The arguments are those of `block_activations`.
    """
    return size == 4 or context > SHORT_CONTEXT or fused or model.n_heads != model.n_kv_heads


def predict_memory(model: ModelConfig, train: TrainConfig, device: str = "cpu") -> dict[str, int]:
    """Bytes held at the moment of a training step that holds most, by what they are for.

    Args:
        model: the shape.
        train: batch, context, optimizer, precision and policy of activation checkpointing.
        device: "cpu", "cuda" or "mps".

    Returns:
        weights, optimizer, gradients, activations, workspace (what an operation or a block needs for a moment, such as
        the logits), libraries, and their total.
    """
    assert model.hidden_dim and model.head_dim and model.n_kv_heads
    policy, context = train.activation_checkpointing, train.context_size or model.max_seq_len
    tokens, fused = train.batch_size * context, device == "cuda"
    precision = pick_precision(train.precision, torch.device(device))
    size = 4 if precision == "fp32" else 2
    n_params, table = model.n_params(), model.vocab_size * model.dim
    norms = model.n_layers * (2 * model.dim + 2 * model.head_dim * model.qk_norm) + model.dim
    matrices = model.n_params(embeddings=False) - norms  # of all blocks together
    casts = 0 if size == 4 else 2 * matrices  # autocast's copies of them

    # what the forward pass keeps, and what the backward pass computes again
    kept = tokens * block_activations(model, policy, context, size, fused)
    recomputed = 0  # of one block
    if policy != "none":
        recomputed = tokens * block_activations(model, "none", context, size, fused) - kept + casts // model.n_layers
    if policy == "selective":
        recomputed += tokens * size * model.dim  # the result of w2, kept although nothing needs it
    backward = tokens * (4 * model.dim + 2 * size * model.hidden_dim)  # gradients of one block's activations
    activations = model.n_layers * kept + tokens * (8 * model.dim + 4 + size * model.dim)  # and around the last norm

    # gradients: those of earlier batches are held from the beginning of a step
    all_gradients = 4 * n_params
    earlier = all_gradients if train.grad_accum_steps > 1 else 0
    missing = 4 * (matrices // model.n_layers + (0 if model.tie_embeddings else table))  # first block's, embeddings'

    # the moments that may hold most: gradients, activations, workspace
    logits = _loss_workspace(model, tokens, precision, device)
    optimizer = _optimizer_workspace(model, train, matrices, device)
    casts_kept = casts if policy == "none" else 0
    moments = [
        (earlier, activations, logits + (casts if tokens * model.vocab_size > CHUNK_ABOVE else casts_kept)),  # the loss
        (earlier or 4 * table, model.n_layers * kept, casts_kept + recomputed + backward),  # the last block
        (earlier or all_gradients - missing, kept, recomputed + backward),  # the first block
        (all_gradients, 0, optimizer),  # the optimizer's update
    ]
    gradients, activations, workspace = max(moments, key=sum)
    muon = matrices if train.optimizer == "muon" else 0
    parts = {
        "weights": 4 * n_params,
        "optimizer": 8 * (n_params - muon) + 4 * muon,
        "gradients": gradients,
        "activations": activations,
        "workspace": workspace,
        "libraries": LIBRARIES if device == "cpu" else 0,
    }
    return {**parts, "total": sum(parts.values())}


def _loss_workspace(model: ModelConfig, tokens: int, precision: str, device: str) -> int:
    """Bytes that the output matrix and the loss need for a moment."""
    size, table = 4 if precision == "fp32" else 2, model.vocab_size * model.dim
    if tokens * model.vocab_size <= CHUNK_ABOVE:  # log-probabilities and two gradients, and a cast of the matrix
        return tokens * 12 * model.vocab_size + (0 if size == 4 else 2 * table)

    if not has_chunked_operator(torch.float16 if precision == "fp16" else torch.float32):
        rows = chunk_rows(LOSS_CHUNK // 4, tokens, model.vocab_size, model.dim, device)
        chunk = min(rows, tokens) * model.vocab_size  # computed again in the backward pass
        return max(12 * chunk + (4 if size == 4 else 6) * table, (12 if size == 4 else 10) * table)

    # the operator computes its gradients at once
    logits = size * (min(LOSS_CHUNK, tokens) * model.vocab_size + 2 * table + tokens * model.dim)
    rounded = 0 if size == 4 else 2 * (table + tokens * model.dim)  # the matrix and the stream
    return logits + rounded


def _optimizer_workspace(model: ModelConfig, train: TrainConfig, matrices: int, device: str) -> int:
    """Bytes that an update needs for a moment: Muon's, whose matrices are orthogonalised in stacks of one shape."""
    if train.optimizer != "muon":
        return 0
    assert model.hidden_dim and model.head_dim
    largest = max(4 * model.n_heads * model.head_dim, 3 * model.hidden_dim) * model.dim * model.n_layers
    stacks = 4 + 3 * (2 if has_bf16(torch.device(device)) else 4)  # one in float32, three to orthogonalise in
    return 4 * matrices + stacks * largest  # all updates, and the stacks


def available_memory(device: str = "cpu") -> int:
    """Bytes that this process can still allocate on a device: of the machine or its container, or of the GPU."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    if device == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    meminfo, limit = Path("/proc/meminfo"), Path("/sys/fs/cgroup/memory.max")
    if not meminfo.exists():  # macOS: all of the machine's memory, free or not
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    free = next(int(line.split()[1]) for line in meminfo.read_text().splitlines() if line.startswith("MemAvailable"))
    if limit.exists() and (most := limit.read_text().strip()) != "max":
        return min(1024 * free, int(most) - int(limit.with_name("memory.current").read_text()))
    return 1024 * free


def advice(model: ModelConfig, train: TrainConfig, device: str) -> str:
    """Text for an error: how much memory a run needs by estimate, and which parameters lower it."""
    need = predict_memory(model, train, device)
    state = need["weights"] + need["gradients"] + need["optimizer"]
    return (
        f"By estimate the run needs {need['total'] / 1e9:.2f} GB: {state / 1e9:.2f} for weights, gradients and "
        f"optimizer, {need['activations'] / 1e9:.2f} for activations, "
        f"{(need['workspace'] + need['libraries']) / 1e9:.2f} to work in. {ways_to_save_memory(model, train)}"
    )


def check_memory(model: ModelConfig, train: TrainConfig, device: str = "cpu") -> None:
    """Refuse a run that cannot fit, before anything of it is allocated.

    The run is refused if it needs more than the free memory even when the estimate is a tenth too high.

    Raises:
        TrainingError: naming the estimate, the free memory and the parameters to lower.
    """
    need, free = predict_memory(model, train, device)["total"], available_memory(device)
    if 0.9 * need > free:
        raise TrainingError(f"{free / 1e9:.2f} GB of memory are free on {device}. {advice(model, train, device)}")
