"""llama2.c's files, version 0: a model and a tokenizer for its C program, written."""

from __future__ import annotations

import contextlib
import math
import os
import re
import struct
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

from torch import Tensor

from llmcore.config import ModelConfig
from llmcore.files import replacing, resolve
from llmcore.formats.hf_tokenizer import why_other_ids
from llmcore.formats.shared import AnyCheckpoint, FormatError, open_checkpoint, warn_of_other_ids, weights_of
from llmcore.model import rope_frequencies, rope_table
from llmcore.tokenizer import Tokenizer

EPS = 1e-5  # what RMSNorm adds in the C program


def to_llama2c(checkpoint: AnyCheckpoint, file: str | os.PathLike[str], adapt: bool = False) -> Path:
    """Write llama2.c's format, version 0: the model in float32, and its `tokenizer.bin` in the same folder.

    Three numbers are built into its C program. A text begins with id 1, and ends when id 1 comes again. A character
    without a piece is spelled with the ids 3 + byte. RMSNorm adds 1e-5. With `adapt`, ids and weights are changed to
    suit: id 1 is our eos (our texts begin after it too), ids 3 to 258 are the bytes, and the weights are scaled so that
    1e-5 there has the effect of norm_eps here. Without `adapt`, ids and weights stay as they are.

    The program puts a space before a prompt.

    Args:
        checkpoint: a `Checkpoint`, or what `load_checkpoint` takes.
        file: such as model.bin; replaced if it is there.
        adapt: True for the C program, False for another program that reads the file.

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
    only = {"head_dim": config.dim / config.n_heads, "rope_theta": 10_000, "qk_norm": False, "rope_scaling_factor": 1}
    for name, value in only.items():
        if getattr(config, name) != value:
            raise FormatError(f"llama2.c has no room for {name}={getattr(config, name)}: it computes with {value}")
    if tokenizer is not None and tokenizer.byte_level:
        raise FormatError("llama2.c has no room for byte-level BPE (tokenizer.json), only for SentencePiece's scores")
    if tokenizer is not None:
        warn_of_other_ids("llama2.c's program", why_other_ids(tokenizer, config.vocab_size))

    ids = list(range(config.vocab_size))  # our id at each place of the vocabulary
    if adapt:
        weights = _with_other_eps(weights, config)
    if adapt and tokenizer is not None:
        ids = _ids_in_llama_order(tokenizer, config.vocab_size)
        for name in {"tok_embeddings.weight", "output.weight"} & set(weights):
            weights[name] = weights[name][ids]

    sizes = (config.dim, config.hidden_dim, config.n_layers, config.n_heads, config.n_kv_heads)
    vocab_size = config.vocab_size if config.tie_embeddings else -config.vocab_size
    file.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:  # the two files take their places together, when both are complete
        with open(stack.enter_context(replacing(file)), "wb") as out:
            out.write(struct.pack("<7i", *sizes, vocab_size, config.max_seq_len))
            for tensor in _tensors_in_order(weights, config):
                tensor.float().numpy().astype("<f4", copy=False).tofile(out)
        if tokenizer is not None:
            tokenizer_file = stack.enter_context(replacing(file.with_name("tokenizer.bin")))
            tokenizer_file.write_bytes(_llama2c_tokenizer(tokenizer, ids))
    return file


def speed_of_run(program: str | os.PathLike[str], checkpoint: AnyCheckpoint, tokens: int = 256) -> float:
    """Tokens per second that llama2.c's own program says it writes with this model, after the first token.

    Args:
        program: llama2.c's `run`, compiled.
        checkpoint: a `Checkpoint`, or what `load_checkpoint` takes.
        tokens: to write; as many as the context holds at most.

    Raises:
        FormatError: for a program that is not llama2.c's `run`, or a model that its format cannot hold.
    """
    program = check_run(program)
    usage = _said_by([program])
    with tempfile.TemporaryDirectory() as folder:
        file = to_llama2c(checkpoint, Path(folder) / "model.bin", adapt=True)
        # since August 2023 it has options; before, it took the tokenizer from the folder in which it was started
        options = ["-t", "0", "-n", str(tokens), "-z", "tokenizer.bin"] if "-z" in usage else ["0", str(tokens)]
        said = _said_by([program, file.name, *options], folder)
    found = re.search(r"achieved tok/s: ([0-9.]+)", said)
    if found is None:
        raise FormatError(f"{program} does not say how fast it wrote, as llama2.c's run does. It said: {said[-200:]!r}")
    return float(found[1])


def check_run(program: str | os.PathLike[str]) -> Path:
    """The path of a program; FormatError if there is none."""
    path = resolve(program)
    if not path.is_file() or not os.access(path, os.X_OK):
        raise FormatError(f"{path} is not a program; give the path of llama2.c's compiled `run`")
    return path


def _said_by(command: list[str | Path], folder: str | None = None) -> str:
    try:
        done = subprocess.run(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=600)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise FormatError(f"{command[0]} cannot be run: {error}") from None
    return done.stdout.decode(errors="replace")


def _with_other_eps(weights: dict[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Scale weights so that the model computes the same with llama2.c's eps as ours does with norm_eps.

    All that is added to the residual stream is multiplied by a factor. RMSNorm divides by the size of the stream, so
    its output stays the same if eps grows by the square of the factor.
    """
    factor = math.sqrt(EPS / config.norm_eps)
    weights = dict(weights)
    for name in weights:
        if name == "tok_embeddings.weight" or name.endswith(("wo.weight", "w2.weight")):
            weights[name] = weights[name].float() * factor
    if config.tie_embeddings:  # the output matrix is now larger, too
        weights["norm.weight"] = weights["norm.weight"].float() / factor
    return weights


def _tensors_in_order(weights: dict[str, Tensor], config: ModelConfig) -> Iterator[Tensor]:
    """The tensors of the file, one after the other: of each kind, those of all layers."""
    yield weights["tok_embeddings.weight"]
    attention = ("attention_norm", "attention.wq", "attention.wk", "attention.wv", "attention.wo")
    for part in (*attention, "ffn_norm", "feed_forward.w1", "feed_forward.w2", "feed_forward.w3"):
        for layer in range(config.n_layers):
            yield weights[f"layers.{layer}.{part}.weight"]
    yield weights["norm.weight"]
    yield from rope_table(rope_frequencies(config), config.max_seq_len)
    if not config.tie_embeddings:
        yield weights["output.weight"]


def _ids_in_llama_order(tokenizer: Tokenizer, vocab_size: int) -> list[int]:
    """Our ids in the order of Llama's first tokenizer: unknown, begin, end, the bytes, and all others."""
    if (tokenizer.unk_id, tokenizer.bos_id, tokenizer.eos_id) == (0, 1, 2) and tokenizer.is_byte(3):
        return list(range(vocab_size))  # they are in this order
    first = [tokenizer.unk_id, tokenizer.eos_id, tokenizer.bos_id]
    first += [id for id in range(tokenizer.vocab_size) if tokenizer.is_byte(id)]
    return first + sorted(set(range(vocab_size)) - set(first))


def _llama2c_tokenizer(tokenizer: Tokenizer, ids: list[int]) -> bytes:
    """tokenizer.bin: the longest piece's length, then for each id its score, its length and its bytes."""
    proto = tokenizer.model_proto()
    rows, longest = [], 0
    for id in ids:
        piece, score = f"<unused{id}>".encode(), -1e9  # a model may have more ids than its tokenizer
        if id < tokenizer.vocab_size:
            text, score = tokenizer.id_to_piece(id).encode(), proto.pieces[id].score
            piece = text if tokenizer.is_byte(id) else tokenizer.id_to_bytes(id) or text
        rows.append(struct.pack("<fi", score, len(piece)) + piece)
        longest = max(longest, len(piece))
    return struct.pack("<i", longest) + b"".join(rows)
