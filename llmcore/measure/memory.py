"""How much memory a training step needs, counted before anything is allocated, and how much there is.

The count follows one step through the moments at which most is held, tensor by tensor, as the uncompiled model keeps
them; tests hold it against what PyTorch's allocator hands out and against a process's memory. A compiled step keeps
somewhat less. What the C library keeps at hand between tensors (`device.keep_freed_memory`) is not counted.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch

from llmcore.config import ModelConfig, TrainConfig
from llmcore.device import has_bf16, pick_precision, ways_to_save_memory
from llmcore.model import CHUNK_ABOVE, LOSS_CHUNK, SHORT_CONTEXT, has_chunked_operator
from llmcore.runs import TrainingError

LIBRARIES = 12_000_000  # bytes beside the tensors that a CPU's libraries take for themselves, whatever the model


def block_activations(model: ModelConfig, policy: str, context: int, size: int, fused: bool) -> int:
    """Bytes per token that one block keeps for its backward pass.

    Args:
        model: the shape.
        policy: of activation checkpointing: none, selective or full.
        context: tokens in a window.
        size: bytes of a number in matrix products: 4 in float32, 2 in bf16 or fp16.
        fused: whether RMSNorm is one kernel, as on CUDA, which does not keep the normalised stream.
    """
    assert model.hidden_dim and model.head_dim and model.n_kv_heads
    dim, hidden = model.dim, model.hidden_dim
    queries, keys = model.n_heads * model.head_dim, model.n_kv_heads * model.head_dim
    if policy == "full":
        return 4 * dim  # the block's input
    attention = size * queries + 4 * model.n_heads  # the result, and the logarithm of each softmax's sum
    short = (
        size == 2 and context <= SHORT_CONTEXT and not fused and model.n_heads == model.n_kv_heads
    )  # as in model.attend
    if policy == "selective":  # the input, what seven matrices give, and attention if it is one kernel
        return 4 * dim + size * (queries + 2 * keys + 2 * dim + 2 * hidden) + (0 if short else attention)
    if short:
        attention = size * queries + (4 + 2) * context * model.n_heads  # the pattern, in float32 and in bf16
    norm = 4 * dim + 4 + (0 if fused else 4 * dim)  # the stream in float32, 1 / rms, the normalised stream
    inputs = 4 * 2 * dim if size == 4 else 2 * (3 + 2) * dim  # of wq, wk and wv, of w1 and w3: autocast copies for each
    feed_forward = size * 4 * hidden  # gate, silu(gate), up and their product
    return 2 * norm + inputs + size * (queries + 2 * keys) + attention + feed_forward


def predict_memory(model: ModelConfig, train: TrainConfig, device: str = "cpu") -> dict[str, int]:
    """Bytes held at the fullest moment of a training step, by what they are for.

    Args:
        model: the shape.
        train: batch, context, optimizer, precision and policy of activation checkpointing.
        device: "cpu", "cuda" or "mps".

    Returns:
        weights, optimizer, gradients, activations, workspace (what one operation or one block needs for a moment, the
        logits among it), libraries, and their total.
    """
    assert model.hidden_dim and model.head_dim and model.n_kv_heads
    policy, context = train.activation_checkpointing, train.context_size or model.max_seq_len
    tokens, fused = train.batch_size * context, device == "cuda"
    precision = pick_precision(train.precision, torch.device(device))
    size = 4 if precision == "fp32" else 2
    n_params, table = model.n_params(), model.vocab_size * model.dim
    matrices = model.n_params(embeddings=False) - (2 * model.n_layers + 1) * model.dim  # all blocks' together
    casts = 2 * matrices * (size == 2)  # autocast's copies of them

    kept = tokens * block_activations(model, policy, context, size, fused)
    again = 0  # what one block computes once more
    if policy != "none":
        again = tokens * block_activations(model, "none", context, size, fused) - kept + casts // model.n_layers
    if policy == "selective":
        again += tokens * size * model.dim  # w2's result, kept although nothing needs it
    backward = tokens * (4 * model.dim + 2 * size * model.hidden_dim)  # one block's gradients on their way
    activations = model.n_layers * kept + tokens * (8 * model.dim + 4 + size * model.dim)  # and around the last norm

    chunked = tokens * model.vocab_size > CHUNK_ABOVE
    if chunked and not has_chunked_operator(torch.float16 if precision == "fp16" else torch.float32):
        chunk = min(LOSS_CHUNK // 4, tokens) * model.vocab_size  # computed again in the backward pass
        logits = max(12 * chunk + (4 if size == 4 else 6) * table, (12 if size == 4 else 10) * table)
    elif chunked:  # the loss computes its own gradients at once
        logits = size * (min(LOSS_CHUNK, tokens) * model.vocab_size + 2 * table + tokens * model.dim)
        logits += 2 * (table + tokens * model.dim) * (size == 2)  # rounded weights and stream
    else:
        logits = tokens * 12 * model.vocab_size + 2 * table * (size == 2)  # log-probabilities and two gradients

    muon = matrices if train.optimizer == "muon" else 0
    largest = max(4 * model.n_heads * model.head_dim, 3 * model.hidden_dim) * model.dim * model.n_layers  # of one shape
    stacks = 4 + 3 * (2 if has_bf16(torch.device(device)) else 4)  # one in float32, three to orthogonalise in
    orthogonal = 4 * muon + stacks * largest * (muon > 0)  # all updates, and one shape's

    all_gradients = 4 * n_params
    earlier = all_gradients if train.grad_accum_steps > 1 else 0  # from the batches before
    missing = 4 * (matrices // model.n_layers + (0 if model.tie_embeddings else table))  # first block's, embeddings'
    moments = [  # gradients, activations, workspace
        (earlier, activations, logits + casts * (policy == "none" or chunked)),  # the loss
        (earlier or 4 * table, model.n_layers * kept, casts * (policy == "none") + again + backward),  # the last block
        (earlier or all_gradients - missing, kept, again + backward),  # the first block
        (all_gradients, 0, orthogonal),  # the optimizer
    ]
    gradients, activations, workspace = max(moments, key=sum)
    parts = {
        "weights": 4 * n_params,
        "optimizer": 8 * (n_params - muon) + 4 * muon,
        "gradients": gradients,
        "activations": activations,
        "workspace": workspace,
        "libraries": LIBRARIES if device == "cpu" else 0,
    }
    return {**parts, "total": sum(parts.values())}


def available_memory(device: str = "cpu") -> int:
    """Bytes that this process may still take on a device: of the machine or its container, or of the GPU."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    if device == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    meminfo, limit = Path("/proc/meminfo"), Path("/sys/fs/cgroup/memory.max")
    if not meminfo.exists():  # macOS: all there is, free or not
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    free = next(int(line.split()[1]) for line in meminfo.read_text().splitlines() if line.startswith("MemAvailable"))
    if limit.exists() and (most := limit.read_text().strip()) != "max":
        return min(1024 * free, int(most) - int(limit.with_name("memory.current").read_text()))
    return 1024 * free


def advice(model: ModelConfig, train: TrainConfig, device: str) -> str:
    """What a run needs by estimate and which parameters lower it, in words."""
    need = predict_memory(model, train, device)
    state = need["weights"] + need["gradients"] + need["optimizer"]
    return (
        f"By estimate the run needs {need['total'] / 1e9:.2f} GB: {state / 1e9:.2f} for weights, gradients and "
        f"optimizer, {need['activations'] / 1e9:.2f} for activations, "
        f"{(need['workspace'] + need['libraries']) / 1e9:.2f} to work in. {ways_to_save_memory(model, train)}"
    )


def check_memory(model: ModelConfig, train: TrainConfig, device: str = "cpu") -> None:
    """Refuse a run that cannot fit, before anything of it is allocated.

    A tenth is left to the estimate's error: what is refused would fail.

    Raises:
        TrainingError: naming the estimate, the memory there is and the parameters to lower.
    """
    need, free = predict_memory(model, train, device)["total"], available_memory(device)
    if 0.9 * need > free:
        raise TrainingError(f"{free / 1e9:.2f} GB of memory are free on {device}. {advice(model, train, device)}")
