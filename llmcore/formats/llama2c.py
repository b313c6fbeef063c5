"""llama2.c's files, version 0: a model and a tokenizer for its C program."""

from __future__ import annotations

import contextlib
import math
import os
import struct
from pathlib import Path

from llmcore.files import replacing, resolve
from llmcore.formats.hf_tokenizer import why_other_ids
from llmcore.formats.shared import AnyCheckpoint, FormatError, open_checkpoint, warn_of_other_ids, weights_of
from llmcore.model import rope_table
from llmcore.tokenizer import Tokenizer

# llama2.c


def to_llama2c(checkpoint: AnyCheckpoint, file: str | os.PathLike[str], adapt: bool = False) -> Path:
    """Write llama2.c's format, version 0: the model in float32, and its `tokenizer.bin` in the same folder.

    Three numbers are built into its C program: a text begins with id 1, and ends where that comes again; a character
    without a piece is spelled with ids 3 + byte; RMSNorm adds 1e-5. With `adapt`, ids and weights are made to suit:
    1 is our eos (with which a text begins here too), 3 to 258 are the bytes, and the residual stream is scaled so
    that 1e-5 there has the effect of our norm_eps here. Without it, ids and weights are as they are.

    Before a prompt, the program puts a space.

    Args:
        checkpoint: a loaded one, or what `load_checkpoint` takes.
        file: such as model.bin; replaced if it is there.
        adapt: suit the C program rather than a reader of one's own.

    Returns:
        The file: seven int32 (dim, hidden_dim, n_layers, n_heads, n_kv_heads, vocab_size, negative if the output matrix
        follows at the end, and max_seq_len), then the tensors.

    Raises:
        CheckpointError: if there is no such checkpoint.
        FormatError: for a model that the format cannot hold.
    """
    checkpoint, file = open_checkpoint(checkpoint), resolve(file)
    config, tokenizer, weights = checkpoint.model.config, checkpoint.tokenizer, weights_of(checkpoint)
    assert config.head_dim and config.hidden_dim and config.n_kv_heads
    if config.dim != config.n_heads * config.head_dim or config.rope_theta != 10_000:
        raise FormatError(
            f"llama2.c has no room for head_dim={config.head_dim}, rope_theta={config.rope_theta:g}: "
            f"it computes with dim / n_heads = {config.dim / config.n_heads:g} and 10000"
        )
    if tokenizer is not None:
        warn_of_other_ids("llama2.c's program", why_other_ids(tokenizer, config.vocab_size))
    ids = list(range(config.vocab_size))  # which of our ids is at each place
    if adapt:
        # the stream is so many times as large; all it meets are norms, but for eps they do not care
        scale = math.sqrt(1e-5 / config.norm_eps)
        for name in weights:
            if name == "tok_embeddings.weight" or name.endswith(("wo.weight", "w2.weight")):
                weights[name] = weights[name].float() * scale
        if config.tie_embeddings:
            weights["norm.weight"] = weights["norm.weight"].float() / scale
        if tokenizer is not None:
            ids = _ids_of_its_program(tokenizer, config.vocab_size)
            for name in {"tok_embeddings.weight", "output.weight"} & set(weights):
                weights[name] = weights[name][ids]
    tensors = [weights["tok_embeddings.weight"]]
    for part in ("attention_norm", "attention.wq", "attention.wk", "attention.wv", "attention.wo", "ffn_norm"):
        tensors += [weights[f"layers.{layer}.{part}.weight"] for layer in range(config.n_layers)]
    for part in ("w1", "w2", "w3"):
        tensors += [weights[f"layers.{layer}.feed_forward.{part}.weight"] for layer in range(config.n_layers)]
    tensors += [weights["norm.weight"], *rope_table(config.head_dim, config.max_seq_len, config.rope_theta)]
    if not config.tie_embeddings:
        tensors.append(weights["output.weight"])
    sizes = (config.dim, config.hidden_dim, config.n_layers, config.n_heads, config.n_kv_heads)
    vocab_size = config.vocab_size if config.tie_embeddings else -config.vocab_size
    file.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as both:  # they take their places together, when both are whole
        with open(both.enter_context(replacing(file)), "wb") as out:
            out.write(struct.pack("<7i", *sizes, vocab_size, config.max_seq_len))
            for tensor in tensors:
                tensor.float().numpy().astype("<f4", copy=False).tofile(out)
        if tokenizer is not None:
            pieces = both.enter_context(replacing(file.with_name("tokenizer.bin")))
            pieces.write_bytes(_llama2c_tokenizer(tokenizer, ids))
    return file


def _ids_of_its_program(tokenizer: Tokenizer, vocab_size: int) -> list[int]:
    """Our ids in the order of Llama's first tokenizer: unknown, begin, end, the bytes, and all the rest."""
    if (tokenizer.unk_id, tokenizer.bos_id, tokenizer.eos_id) == (0, 1, 2) and tokenizer.is_byte(3):
        return list(range(vocab_size))  # it is one of those
    first = [tokenizer.unk_id, tokenizer.eos_id, tokenizer.bos_id]
    first += [id for id in range(tokenizer.vocab_size) if tokenizer.is_byte(id)]
    return first + sorted(set(range(vocab_size)) - set(first))


def _llama2c_tokenizer(tokenizer: Tokenizer, ids: list[int]) -> bytes:
    """tokenizer.bin: the longest piece's length, then for each id its score, its length and its bytes."""
    proto = tokenizer.model_proto()
    pieces, scores = [], []
    for id in ids:
        known = id < tokenizer.vocab_size  # a model may have more ids than its tokenizer
        text = tokenizer.id_to_piece(id) if known else f"<unused{id}>"
        plain = known and not tokenizer.is_byte(id) and tokenizer.id_to_bytes(id)
        pieces.append(plain or text.encode())
        scores.append(proto.pieces[id].score if known else -1e9)
    rows = [struct.pack("<fi", score, len(piece)) + piece for score, piece in zip(scores, pieces, strict=True)]
    return struct.pack("<i", max(map(len, pieces))) + b"".join(rows)
