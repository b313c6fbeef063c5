"""Sampling with the KV cache: whole texts, batches of prompts, or a stream of pieces."""

from __future__ import annotations

import codecs
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from llmcore.decode import Decoder
from llmcore.model import KVCache, Transformer
from llmcore.tokenizer import Tokenizer

# The text of a whole context has at most this many characters per token, so more of a prompt need not be encoded.
PIECE_CHARACTERS = 64

_RANGES: list[tuple[str, type, Callable[[Any], bool], str]] = [
    ("temperature", Real, lambda value: 0 <= value < math.inf, "0 (greedy) or more"),
    ("top_k", Integral, lambda value: value >= 1, "a whole number, 1 or more, or None"),
    ("top_p", Real, lambda value: 0 < value <= 1, "above 0 and at most 1, or None"),
    ("min_p", Real, lambda value: 0 <= value <= 1, "between 0 and 1, or None"),
    ("repetition_penalty", Real, lambda value: 0 < value < math.inf, "above 0 (1 is off)"),
]


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen."""

    temperature: float = 1.0  # 0 is greedy, 1 the model's own distribution
    top_k: int | None = None  # only the k most likely tokens
    top_p: float | None = None  # only the most likely tokens that together have this probability
    min_p: float | None = None  # only tokens at least this share as likely as the most likely one
    repetition_penalty: float = 1.0  # above 1, tokens seen before become less likely

    def check(self, max_new_tokens: int) -> None:
        """Raise ValueError, naming each parameter out of range and its range."""
        wrong = []
        if isinstance(max_new_tokens, bool) or not isinstance(max_new_tokens, Integral) or max_new_tokens < 0:
            wrong.append(f"max_new_tokens={max_new_tokens!r} must be a whole number, 0 or more")
        for name, kind, fits, wanted in _RANGES:
            value, optional = getattr(self, name), getattr(Sampling, name) is None
            if not (value is None and optional) and not (isinstance(value, kind) and fits(value)):
                wrong.append(f"{name}={value!r} must be {wanted}")
        if wrong:
            raise ValueError("; ".join(wrong))

    def probabilities(self, logits: Tensor, seen: Tensor | None = None) -> Tensor:
        """See `next_token_probabilities`."""
        logits = logits.float()
        if seen is not None and self.repetition_penalty != 1.0:
            scores = logits.gather(1, seen)
            scores = torch.where(scores > 0, scores / self.repetition_penalty, scores * self.repetition_penalty)
            logits = logits.scatter(1, seen, scores)

        if self.temperature == 0:
            return torch.zeros_like(logits).scatter(1, logits.argmax(1, keepdim=True), 1.0)
        # the largest becomes 0 first, so that a tiny temperature cannot overflow
        logits = (logits - logits.amax(1, keepdim=True)) / max(self.temperature, 1e-6)

        if self.top_k is not None and self.top_k < logits.shape[1]:
            kth = logits.topk(self.top_k, dim=1).values[:, -1:]
            logits = logits.masked_fill(logits < kth, -torch.inf)
        probabilities = logits.softmax(1)

        if self.top_p is not None and self.top_p < 1:
            ordered = _descending(probabilities)
            before = ordered.cumsum(1) - ordered  # probability of all tokens that are more likely
            count = (before < self.top_p).sum(1, keepdim=True).clamp(min=1)
            least = ordered.gather(1, count - 1)
            above, tied = probabilities > least, probabilities == least
            # of those as likely as the last, the first ids
            tied &= tied.cumsum(1) <= count - above.sum(1, keepdim=True)
            probabilities = probabilities.masked_fill(~(above | tied), 0.0)

        if self.min_p:
            floor = self.min_p * probabilities.amax(1, keepdim=True)
            probabilities = probabilities.masked_fill(probabilities < floor, 0.0)
        return probabilities / probabilities.sum(1, keepdim=True)


def _descending(values: Tensor) -> Tensor:
    """Each row (batch, vocab) in descending order. On a CPU, NumPy's sort takes a tenth of the time of torch's."""
    if values.device.type == "cpu":
        return torch.from_numpy(np.sort(values.detach().numpy(), axis=1)).flip(1)
    return values.sort(1, descending=True).values


def _draw(probabilities: Tensor, generator: torch.Generator) -> Tensor:
    """One id (batch,) from each row of probabilities (batch, vocab).

    On a CPU, torch.multinomial draws a random number for each id of the vocabulary. Here it is one number for each row,
    and the id at which the sum of the probabilities passes it.

    Raises:
        ValueError: for probabilities that are NaN.
    """
    if probabilities.device.type != "cpu":
        return torch.multinomial(probabilities, 1, generator=generator)[:, 0]
    sums = probabilities.cumsum(1, dtype=torch.float64)
    if not sums[:, -1].isfinite().all():
        raise ValueError("no token can be drawn: the model's logits are NaN or infinite. Its weights may be damaged")
    places = torch.rand(len(sums), 1, dtype=torch.float64, generator=generator) * sums[:, -1:]
    ids = torch.searchsorted(sums, places, right=True)[:, 0]
    return ids.clamp(max=sums.shape[1] - 1)  # a place may be rounded up to the whole sum


def next_token_probabilities(
    logits: Tensor,
    seen: Tensor | None = None,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float = 1.0,
) -> Tensor:
    """Turn logits (batch, vocab) into the probabilities (batch, vocab) to sample from.

    In this order: repetition penalty (Keskar et al., "CTRL", arXiv:1909.05858, section 4.1) on the ids in `seen`
    (batch, time), temperature, top-k, top-p (nucleus: Holtzman et al., arXiv:1904.09751), min-p (Nguyen et al.,
    arXiv:2407.01082). A temperature of 0 puts everything on the most likely id.
    """
    return Sampling(temperature, top_k, top_p, min_p, repetition_penalty).probabilities(logits, seen)


def generate_ids(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    eos_id: int | None = None,
    vocab_size: int | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float = 1.0,
    seed: int | None = None,
) -> Iterator[list[int]]:
    """Continue prompts of ids, one step at a time, with the KV cache.

    Prompts are padded on the left to one length. When the context is full, the window slides: the newest half is
    kept and read again, so a token always sees at least half a context.

    Args:
        model: the language model.
        prompts: one or more ids each.
        max_new_tokens: steps at most.
        eos_id: a row that has produced it continues to produce it; when all have, generation ends.
        vocab_size: of the tokenizer, where the model has more ids: those are never drawn. None: all may be.
        temperature, top_k, top_p, min_p, repetition_penalty: see `Sampling`.
        seed: of the sampling. None: a different one each time.

    Yields:
        The next id of every prompt.

    Raises:
        ValueError: for a parameter out of range or an empty prompt.
    """
    sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty)
    return _generate_ids(model, prompts, max_new_tokens, sampling, seed, eos_id, vocab_size)


def _generate_ids(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    sampling: Sampling,
    seed: int | None,
    eos_id: int | None,
    vocab_size: int | None,
) -> Iterator[list[int]]:
    sampling.check(max_new_tokens)
    if not prompts or not all(len(prompt) for prompt in prompts):
        raise ValueError("every prompt needs at least one token")

    device, context = model.tok_embeddings.weight.device, model.config.max_seq_len
    length = longest = max(map(len, prompts))
    seen, padding = _padded(prompts, longest + min(max_new_tokens, context), device)
    is_padded = bool(padding.any())
    finished = [False] * len(prompts)
    every_id = vocab_size is None or vocab_size >= model.config.vocab_size
    has_penalty = sampling.repetition_penalty != 1
    generator = torch.Generator(device)
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(seed)

    start = max(0, longest - context)  # of the tokens to read next
    decoder = Decoder(model, len(prompts))
    room = min(context, longest - start + max_new_tokens)
    cache = KVCache(model.config, len(prompts), device, model.tok_embeddings.weight.dtype, room)
    for _ in range(max_new_tokens):
        if cache.length + length - start > context:  # the window slides
            cache.length, start = 0, length - max(1, context // 2)
        if length == seen.shape[1]:  # twice the room, so that few tokens need new memory
            seen, padding = np.pad(seen, ((0, 0), (0, length))), F.pad(padding, (0, length))

        # few calls of torch: the weights went through the processor's caches, so that each takes tens of microseconds
        tokens = torch.from_numpy(seen[:, start:length]).to(device)
        mask = padding[:, start - cache.length : length] if is_padded else None
        logits = decoder.logits(tokens, cache, mask)
        if not every_id:
            logits = logits[:, :vocab_size]
        if sampling.temperature == 0 and not has_penalty:
            # on a CPU, NumPy's argmax is many times as fast as torch's
            new = (logits.float().numpy() if device.type == "cpu" else logits).argmax(1).tolist()
        else:
            before = torch.from_numpy(seen[:, :length]).to(device) if has_penalty else None
            with torch.inference_mode():
                new = _draw(sampling.probabilities(logits, before), generator).tolist()
        if eos_id is not None:
            new = [eos_id if ended else id for id, ended in zip(new, finished, strict=True)]
            finished = [id == eos_id for id in new]
        seen[:, length] = new

        start, length = length, length + 1
        yield new
        if all(finished):
            return


def _padded(prompts: Sequence[Sequence[int]], time: int, device: torch.device) -> tuple[NDArray[np.int64], Tensor]:
    """Ids (batch, time) that begin with the prompts, padded on the left; on the device, where they are padded.

    They have room for the next tokens, so that not each of them needs new memory.
    """
    longest = max(map(len, prompts))
    ids = np.zeros((len(prompts), time), dtype=np.int64)
    padding = torch.zeros(ids.shape, dtype=torch.bool)
    for row, prompt in enumerate(prompts):
        missing = longest - len(prompt)
        # padding repeats the prompt's first token, so that the repetition penalty sees no other ids
        ids[row, :longest] = [*[prompt[0]] * missing, *prompt]
        padding[row, :missing] = True
    return ids, padding.to(device)


def prompt_ids(model: Transformer, tokenizer: Tokenizer | None, prompt: str) -> list[int]:
    """Ids of a prompt. An empty one starts a new document, as an eos does in training.

    A prompt longer than the context is cut from the left, with a warning; of a very long one only the end is encoded.
    """
    if tokenizer is None:
        raise ValueError("the checkpoint has no tokenizer (one of the toy task has none); choose another to write text")
    context = model.config.max_seq_len
    end = prompt[-PIECE_CHARACTERS * context :]
    ids = tokenizer.encode(end) or [tokenizer.eos_id]
    if len(ids) > context or len(end) < len(prompt):
        more = "more than " if len(end) < len(prompt) else ""
        warnings.warn(
            f"the prompt has {more}{len(ids)} tokens; only the last {min(len(ids), context)} fit into the context",
            stacklevel=3,
        )
    return ids[-context:]


def generate(
    model: Transformer,
    tokenizer: Tokenizer,
    prompt: str | Sequence[str],
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float = 1.0,
    seed: int | None = None,
) -> str | list[str]:
    """What the model writes after a prompt, without the prompt; for a list of prompts, a list.

    Args:
        model: the language model.
        tokenizer: the one it was trained with.
        prompt: text, or several texts, continued together.
        max_new_tokens: tokens at most; generation ends before at eos.
        temperature, top_k, top_p, min_p, repetition_penalty: see `Sampling`.
        seed: makes the result repeatable.

    Raises:
        ValueError: for a parameter out of range, naming it.
    """
    sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty)
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    ids = [prompt_ids(model, tokenizer, text) for text in prompts]
    steps = _generate_ids(model, ids, max_new_tokens, sampling, seed, tokenizer.eos_id, tokenizer.vocab_size)
    rows = list(zip(*steps, strict=True)) or [() for _ in prompts]
    texts = [tokenizer.decode(row) for row in rows]
    return texts[0] if isinstance(prompt, str) else texts


def stream(
    model: Transformer,
    tokenizer: Tokenizer,
    prompt: str,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float = 1.0,
    seed: int | None = None,
) -> Iterator[str]:
    """The text of `generate`, piece by piece as it comes, never half a character.

    Arguments and errors are those of `generate`; the pieces add up to its result.
    """
    sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty)
    ids = [prompt_ids(model, tokenizer, prompt)]
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    for [id] in _generate_ids(model, ids, max_new_tokens, sampling, seed, tokenizer.eos_id, tokenizer.vocab_size):
        if piece := decoder.decode(tokenizer.id_to_bytes(id)):
            yield piece
    if rest := decoder.decode(b"", final=True):
        yield rest


@torch.inference_mode()
def surprise(model: Transformer, ids: Sequence[int]) -> list[float]:
    """Nats of surprise at each id but the first, given the ids before it in the same context window.

    Raises:
        ValueError: if there are fewer than two ids.
    """
    if len(ids) < 2:
        raise ValueError("surprise needs at least two tokens")
    nats: list[float] = []
    context = model.config.max_seq_len
    device = model.tok_embeddings.weight.device
    for start in range(0, len(ids) - 1, context):
        window = torch.as_tensor(ids[start : start + context + 1], device=device)
        logits = model(window[None, :-1])[0].float()
        nats += F.cross_entropy(logits, window[1:], reduction="none").tolist()
    return nats
