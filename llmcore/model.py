"""A Llama-like decoder, small enough to read in one sitting.

Pre-norm blocks (RMSNorm), rotary position embedding on interleaved pairs, SwiGLU, no biases; on request grouped-query
attention, tied embeddings, norms of queries and keys. Parameter names are Meta's: its weights load without renaming.

Touvron et al., "LLaMA: Open and Efficient Foundation Language Models", arXiv:2302.13971.
"""

from __future__ import annotations

import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from llmcore.config import ModelConfig
from llmcore.device import chunk_rows, settle_cache_folder

settle_cache_folder()  # before the first use of torch.compiler below imports the compiler


def rope_frequencies(config: ModelConfig) -> Tensor:
    """By how much each pair turns from one position to the next: (head_dim / 2,) radians, float32.

    Pair i turns by theta^(-2i / head_dim): Su et al., "RoFormer", arXiv:2104.09864, equation 15. Llama 3.1 slows pairs
    that turn less than `rope_low_freq_factor` times in the original context by a factor, keeps those that turn more
    than `rope_high_freq_factor` times, and goes linearly from one to the other (`apply_scaling` in Meta's code).
    """
    assert config.head_dim
    frequencies = config.rope_theta ** (-torch.arange(0, config.head_dim, 2).float() / config.head_dim)
    if config.rope_scaling_factor == 1:
        return frequencies
    low, high = config.rope_low_freq_factor, config.rope_high_freq_factor
    turns = config.rope_original_max_seq_len * frequencies / (2 * math.pi)
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return frequencies * (kept + (1 - kept) / config.rope_scaling_factor)


def rope_table(frequencies: Tensor, max_seq_len: int) -> tuple[Tensor, Tensor]:
    """Cosine and sine of every (position, pair): two float32 tensors (max_seq_len, head_dim / 2)."""
    angles = torch.outer(torch.arange(max_seq_len).float(), frequencies)
    return angles.cos(), angles.sin()


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the interleaved pairs (x0, x1), (x2, x3), … of each head, in float32: (x0 + i x1) (cos + i sin).

    x is (batch, time, heads, head_dim); cos and sin are (time, head_dim / 2). The compiler cannot fuse complex numbers,
    so it gets the same product in real ones. Uncompiled, that takes five times as long.
    """
    pairs = x.float().unflatten(-1, (-1, 2))
    cos, sin = cos[:, None, :].float(), sin[:, None, :].float()  # the same for every head
    if torch.compiler.is_compiling():
        even, odd = pairs.unbind(-1)
        turned = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1)
    else:
        turned = torch.view_as_real(torch.view_as_complex(pairs) * torch.complex(cos, sin))
    return turned.flatten(-2).type_as(x)


LOSS_CHUNK = 1024  # tokens whose logits exist at a time
CHUNK_ABOVE = 2**23  # logits in a batch above which the loss is computed in chunks: glibc never reuses 32 MiB


def has_chunked_operator(dtype: torch.dtype) -> bool:
    """Whether torch's own chunked loss can be used: torch 2.11 has none, and in float16 it is wrong.

    It computes gradients before the scaler has multiplied the loss, so in float16 the small ones become zero.
    """
    return hasattr(F, "linear_cross_entropy") and dtype != torch.float16


@torch.compiler.disable  # the chunked operator works outside the compiler only
def _chunked_loss(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy of (tokens, dim) hidden states without the (tokens, vocab) logits."""
    kind, dtype = hidden.device.type, hidden.dtype
    if kind in ("cpu", "cuda") and torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
    if not has_chunked_operator(dtype):
        return _recomputed_loss(hidden.to(dtype), weight, targets)
    options = nn.LinearCrossEntropyOptions()
    if kind == "cpu":  # the defaults take five to ten times as long
        options = nn.LinearCrossEntropyOptions(batch_chunk_size=LOSS_CHUNK, acc_policy="accurate")
    loss = functools.partial(F.linear_cross_entropy, hidden.to(dtype), weight.to(dtype), targets, options=options)
    if torch.is_grad_enabled():  # its value is rounded to bf16, its gradient is not; "none" has a slow backward pass
        return loss()
    return loss(reduction="none").float().sum() / (targets != -100).sum()


def _recomputed_loss(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """The same without torch's operator: each chunk's logits are computed once more for the backward pass."""

    def chunk_loss(rows: Tensor, wanted: Tensor) -> Tensor:
        logits = F.linear(rows, weight.to(rows.dtype))  # cast anew, so that the chunks' gradients add up in float32
        return F.cross_entropy(logits.float(), wanted, reduction="sum")

    size = chunk_rows(LOSS_CHUNK // 4, len(hidden), weight.shape[0], weight.shape[1], hidden.device.type)
    chunks = zip(hidden.split(size), targets.split(size), strict=True)
    total = torch.stack([checkpoint(chunk_loss, *chunk, use_reentrant=False) for chunk in chunks]).sum()
    return total / (targets != -100).sum()  # cross_entropy too leaves out -100


SHORT_CONTEXT = 256  # tokens up to which the plain formula, compiled, is the faster attention in bf16 on a CPU


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, causal: bool = False) -> Tensor:
    """softmax(q kᵀ / √head_dim) v, (batch, heads, time, head_dim), by PyTorch's fused kernels.

    For training on short sequences in bf16 on a CPU the formula itself is used: its products then run in bf16, in two
    thirds of the kernels' time (forward and backward).
    """
    grouped = q.shape[1] != k.shape[1]
    if causal and q.device.type == "cpu" and q.dtype == torch.bfloat16 and k.shape[2] <= SHORT_CONTEXT and not grouped:
        scores = (q @ k.mT).float() / math.sqrt(q.shape[-1])
        future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
        return scores.masked_fill(future, -torch.inf).softmax(-1).to(q.dtype) @ v
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=grouped)


# What selective checkpointing keeps of a block: results that take long to compute again and are not the largest.
_aten = torch.ops.aten
_KERNELS = ("flash_attention", "flash_attention_for_cpu", "efficient_attention", "cudnn_attention")
SAVED_OPERATIONS = [_aten.mm.default, *(getattr(_aten, f"_scaled_dot_product_{name}").default for name in _KERNELS)]


class KVCache:
    """Keys and values of the tokens seen so far, in buffers allocated once.

    They have room for `max_seq_len` tokens in each of `batch_size` rows. None: for all that the model's context holds.
    """

    def __init__(
        self,
        config: ModelConfig,
        batch_size: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        max_seq_len: int | None = None,
    ) -> None:
        room = max_seq_len or config.max_seq_len
        shape = (config.n_layers, batch_size, config.n_kv_heads, room, config.head_dim)
        self.keys = torch.empty(shape, device=device, dtype=dtype)  # type: ignore[arg-type]
        self.values = torch.empty_like(self.keys)
        self.length = 0  # tokens held

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append (batch, kv_heads, time, head_dim) to a layer; returns all keys and values held, newest last."""
        end = self.length + k.shape[2]
        self.keys[layer, :, :, self.length : end] = k
        self.values[layer, :, :, self.length : end] = v
        return self.keys[layer, :, :, :end].type_as(k), self.values[layer, :, :, :end].type_as(v)


class Attention(nn.Module):
    """Causal self-attention with rotary positions, optional grouped queries and optional norms of queries and keys."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        assert config.head_dim and config.n_kv_heads
        self.layer, self.head_dim = layer, config.head_dim
        self.n_heads, self.n_kv_heads = config.n_heads, config.n_kv_heads
        self.wq = nn.Linear(config.dim, config.n_heads * config.head_dim, bias=False)
        self.wk = nn.Linear(config.dim, config.n_kv_heads * config.head_dim, bias=False)
        self.wv = nn.Linear(config.dim, config.n_kv_heads * config.head_dim, bias=False)
        self.wo = nn.Linear(config.n_heads * config.head_dim, config.dim, bias=False)
        self.qk_norm = config.qk_norm
        if config.qk_norm:  # one for all heads
            self.q_norm = nn.RMSNorm(config.head_dim, eps=config.norm_eps)
            self.k_norm = nn.RMSNorm(config.head_dim, eps=config.norm_eps)

    def project(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(batch, time, dim) -> queries, keys (both rotated) and values, (batch, heads, time, head_dim)."""
        q = self.wq(x).unflatten(-1, (self.n_heads, self.head_dim))
        k = self.wk(x).unflatten(-1, (self.n_kv_heads, self.head_dim))
        v = self.wv(x).unflatten(-1, (self.n_kv_heads, self.head_dim))
        if self.qk_norm:  # in the dtype of its weights, as the other norms
            q, k = self.q_norm(q.type_as(self.q_norm.weight)), self.k_norm(k.type_as(self.k_norm.weight))
        q, k = apply_rope(q, cos, sin).type_as(v), apply_rope(k, cos, sin).type_as(v)
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None = None, cache: KVCache | None = None
    ) -> Tensor:
        """(batch, time, dim) -> the same shape. `mask` (True: may look) replaces the plain causal one."""
        q, k, v = self.project(x, cos, sin)
        if cache is not None:
            k, v = cache.update(self.layer, k, v)
        causal = mask is None and x.shape[1] > 1  # a single new token may look at all others
        y = attend(q, k, v, mask, causal)
        return self.wo(y.transpose(1, 2).flatten(-2))

    def pattern(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """The attention pattern itself, (batch, heads, time, time), for pictures: `forward` never builds it."""
        q, k, _ = self.project(x, cos, sin)
        k = k.repeat_interleave(self.n_heads // self.n_kv_heads, dim=1)
        scores = q @ k.transpose(-1, -2) / math.sqrt(self.head_dim)
        future = torch.ones_like(scores, dtype=torch.bool).triu(1)
        return scores.masked_fill(future, -torch.inf).softmax(-1)


class FeedForward(nn.Module):
    """SwiGLU: w2(silu(w1 x) * w3 x). Shazeer, "GLU Variants Improve Transformer", arXiv:2002.05202."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        assert config.hidden_dim
        self.w1 = nn.Linear(config.dim, config.hidden_dim, bias=False)
        self.w2 = nn.Linear(config.hidden_dim, config.dim, bias=False)
        self.w3 = nn.Linear(config.dim, config.hidden_dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, time, dim) -> the same shape."""
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Block(nn.Module):
    """Attention and feed-forward, each on a normalised copy of the stream and added back to it."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.attention = Attention(config, layer)
        self.feed_forward = FeedForward(config)
        self.attention_norm = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.ffn_norm = nn.RMSNorm(config.dim, eps=config.norm_eps)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None = None, cache: KVCache | None = None
    ) -> Tensor:
        """(batch, time, dim) -> the same shape."""
        x = x + self.attention(self.attention_norm(x), cos, sin, mask, cache)
        return x + self.feed_forward(self.ffn_norm(x))


class Transformer(nn.Module):
    """The language model: `model(tokens)` gives logits, `model(tokens, targets)` the mean loss.

    Attributes:
        activation_checkpointing: "none"; "full", which keeps only each block's input for the backward pass and computes
            the block again (Chen et al., "Training Deep Nets with Sublinear Memory Cost", arXiv:1604.06174); or
            "selective", which also keeps the results that take long to compute (Korthikanti et al., "Reducing
            Activation Recomputation in Large Transformer Models", arXiv:2205.05198).
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.activation_checkpointing = "none"
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.dim)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.n_layers))
        self.norm = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.output = nn.Linear(config.dim, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.output.weight = self.tok_embeddings.weight
        self.reset_rope()
        self.init_weights()

    def reset_rope(self) -> None:
        """Compute the rotary table, which a model that was built on the meta device does not have yet."""
        cos, sin = rope_table(rope_frequencies(self.config), self.config.max_seq_len)
        self.rope_cos, self.rope_sin = nn.Buffer(cos, persistent=False), nn.Buffer(sin, persistent=False)

    def init_weights(self) -> None:
        """Normal(0, 0.02), and for the matrices that write to the residual stream (wo, w2) 1 / sqrt(2 n_layers) of it.

        Radford et al., "Language Models are Unsupervised Multitask Learners", section 2.3.
        """
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                residual = name.endswith(("wo.weight", "w2.weight"))
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * self.config.n_layers) if residual else 0.02)

    def _rope(self, past: int, time: int) -> tuple[Tensor, Tensor]:
        """The rotary table's rows for `time` tokens that follow `past` others."""
        if past + time > self.config.max_seq_len:
            raise ValueError(f"{past} cached + {time} new tokens exceed max_seq_len={self.config.max_seq_len}")
        return self.rope_cos[past : past + time], self.rope_sin[past : past + time]

    def hidden_states(self, tokens: Tensor, cache: KVCache | None = None, padding: Tensor | None = None) -> Tensor:
        """The stream after the last norm, (batch, time, dim).

        Args:
            tokens: (batch, time) ids; with a cache they follow the tokens it holds.
            cache: filled with the new keys and values.
            padding: (batch, held + time) bool, True where a token is only padding on the left.

        Raises:
            ValueError: if the tokens do not fit into max_seq_len.
        """
        past, time = cache.length if cache is not None else 0, tokens.shape[1]
        cos, sin = self._rope(past, time)

        # which tokens each one may look at; otherwise SDPA's own causal mask is enough
        mask = None
        if padding is not None or (past and time > 1):
            mask = torch.ones(time, past + time, dtype=torch.bool, device=tokens.device).tril(past)
            if padding is not None:  # padding may look at itself, since a softmax over nothing is NaN
                own = torch.eye(time, past + time, dtype=torch.bool, device=tokens.device).roll(past, 1)
                mask = (mask & ~padding[:, None, None, :]) | own

        # through the blocks
        x = self.tok_embeddings(tokens)
        for block in self.layers:
            if self.activation_checkpointing == "none" or not torch.is_grad_enabled() or cache is not None:
                x = block(x, cos, sin, mask, cache)
            elif self.activation_checkpointing == "selective":
                keep = functools.partial(create_selective_checkpoint_contexts, SAVED_OPERATIONS)
                x = checkpoint(block, x, cos, sin, mask, use_reentrant=False, context_fn=keep)
            else:
                x = checkpoint(block, x, cos, sin, mask, use_reentrant=False)
        if cache is not None:
            cache.length += time
        return self.norm(x)

    def forward(self, tokens: Tensor, targets: Tensor | None = None) -> Tensor:
        """Logits, or the loss.

        Args:
            tokens: (batch, time) int64 ids.
            targets: (batch, time) int64: what follows each token; -100 is left out of the mean.

        Returns:
            Without targets, logits (batch, time, vocab_size). With targets, the mean cross-entropy, a scalar in nats.
        """
        hidden = self.hidden_states(tokens)
        return self.output(hidden) if targets is None else self.loss(hidden, targets)

    def loss(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy in nats from hidden states (batch, time, dim).

        A large batch is computed in chunks, so that all its logits never exist at once. A small one is computed in one
        piece, which the compiler can fuse.
        """
        hidden, targets = hidden.flatten(0, 1), targets.flatten()
        if targets.numel() * self.config.vocab_size > CHUNK_ABOVE:
            return _chunked_loss(hidden, self.output.weight, targets)
        return F.cross_entropy(self.output(hidden).float(), targets)

    @torch.no_grad()
    def attention_weights(self, tokens: Tensor) -> Tensor:
        """Every head's attention pattern for (batch, time) ids: (layers, batch, heads, time, time)."""
        cos, sin = self._rope(0, tokens.shape[1])
        x, patterns = self.tok_embeddings(tokens), []
        for block in self.layers:
            assert isinstance(block, Block)
            patterns.append(block.attention.pattern(block.attention_norm(x), cos, sin))
            x = block(x, cos, sin)
        return torch.stack(patterns)
