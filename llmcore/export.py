"""Our models in other programs' formats, and others' models in ours.

| format | read by | written by | read here by |
| --- | --- | --- | --- |
| Hugging Face Llama | transformers, vLLM, torchtitan | `to_hf` | `from_hf` |
| Meta Llama | Meta's own code | | `from_meta` |
| llama2.c | its C program | `to_llama2c` | |
| GGUF | llama.cpp and what builds on it | `to_gguf` | |
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import struct
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from llmcore.checkpoint import Checkpoint, load_checkpoint
from llmcore.files import replacing, replacing_folder, resolve
from llmcore.foreign import from_hf, from_meta
from llmcore.formats import GGUF_NAMES, HF_FILES, HF_NAMES, FormatError, to_halves, translate
from llmcore.hf_tokenizer import BPE, UNUSED, why_other_ids, write_hf_tokenizer
from llmcore.model import rope_table
from llmcore.tokenizer import Tokenizer

__all__ = ["FormatError", "from_hf", "from_meta", "to_gguf", "to_hf", "to_llama2c"]

AnyCheckpoint = Checkpoint | str | os.PathLike[str]


def open_checkpoint(checkpoint: AnyCheckpoint) -> Checkpoint:
    """A checkpoint as it is, or the one that `load_checkpoint` finds, on the CPU."""
    return checkpoint if isinstance(checkpoint, Checkpoint) else load_checkpoint(checkpoint, device="cpu")


def _weights(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """The weights by our names, on the CPU; without the output matrix where it is the embedding's."""
    weights = {name: tensor.detach().cpu() for name, tensor in checkpoint.model.state_dict().items()}
    if checkpoint.model.config.tie_embeddings:
        del weights["output.weight"]
    return weights


def to_hf(checkpoint: AnyCheckpoint, folder: str | os.PathLike[str], dtype: torch.dtype | None = None) -> Path:
    """Write a folder that `transformers.AutoModelForCausalLM` and `AutoTokenizer` load, without code of ours.

    Args:
        checkpoint: a loaded one, or what `load_checkpoint` takes.
        folder: replaced as a whole; it may hold nothing but an earlier export.
        dtype: of the weights. None: their own.

    Returns:
        The folder: config.json, generation_config.json, model.safetensors; tokenizer.json, tokenizer_config.json
        and tokenizer.model where the checkpoint has a tokenizer.

    Raises:
        CheckpointError: if there is no such checkpoint.
        FileExistsError: if the folder holds something else.
    """
    checkpoint, folder = open_checkpoint(checkpoint), resolve(folder)
    config, tokenizer = checkpoint.model.config, checkpoint.tokenizer
    assert config.head_dim
    weights = {}
    for name, tensor in _weights(checkpoint).items():
        if name.endswith(("attention.wq.weight", "attention.wk.weight")):
            tensor = to_halves(tensor, config.head_dim)
        weights[translate(name, HF_NAMES, "model.layers.{}.")] = tensor.to(dtype or tensor.dtype).contiguous()
    kind = str(weights["model.embed_tokens.weight"].dtype).removeprefix("torch.")
    ids = {} if tokenizer is None else {f"{n}_token_id": getattr(tokenizer, f"{n}_id") for n in ("bos", "eos", "pad")}
    ids = {name: id for name, id in ids.items() if id >= 0}
    description = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.dim,
        "intermediate_size": config.hidden_dim,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
        "max_position_embeddings": config.max_seq_len,
        "rope_theta": config.rope_theta,  # transformers before version 5, vLLM, llama.cpp's converter
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},  # from version 5 on
        "tie_word_embeddings": config.tie_embeddings,
        "attention_bias": False,
        "mlp_bias": False,
        "dtype": kind,
        "torch_dtype": kind,  # before version 5
        **ids,
    }
    with replacing_folder(folder, HF_FILES) as new:
        save_file(weights, new / "model.safetensors", metadata={"format": "pt"})
        (new / "config.json").write_text(json.dumps(description, indent=2), encoding="utf-8")
        (new / "generation_config.json").write_text(json.dumps(ids, indent=2), encoding="utf-8")
        if tokenizer is not None:
            write_hf_tokenizer(tokenizer, new, config.vocab_size, config.max_seq_len)
    return folder


def _warn(program: str, reason: str | None) -> None:
    if reason:
        warnings.warn(f"{program} will not cut prompts as the tokenizer does: it {reason}", stacklevel=3)


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
    config, tokenizer, weights = checkpoint.model.config, checkpoint.tokenizer, _weights(checkpoint)
    assert config.head_dim and config.hidden_dim and config.n_kv_heads
    if config.dim != config.n_heads * config.head_dim or config.rope_theta != 10_000:
        raise FormatError(
            f"llama2.c has no room for head_dim={config.head_dim}, rope_theta={config.rope_theta:g}: "
            f"it computes with dim / n_heads = {config.dim / config.n_heads:g} and 10000"
        )
    if tokenizer is not None:
        _warn("llama2.c's program", why_other_ids(tokenizer, config.vocab_size))
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


# GGUF


def to_gguf(checkpoint: AnyCheckpoint, file: str | os.PathLike[str], dtype: torch.dtype = torch.float32) -> Path:
    """Write a GGUF file, which llama.cpp and what builds on it run: weights and tokenizer in one.

    llama.cpp turns spaces into U+2581 before it cuts a text, so a U+2581 in the text becomes a space there.

    Args:
        checkpoint: a loaded one, or what `load_checkpoint` takes.
        file: such as model.gguf; replaced if it is there.
        dtype: of the matrices, torch.float32 or torch.float16. The norms are always float32.

    Raises:
        CheckpointError: if there is no such checkpoint.
        FormatError: for another dtype, or a tokenizer that is not BPE. (One that llama.cpp cannot follow in other
            ways goes along with a warning.)
    """
    import gguf  # here, because only this function needs it

    kinds = {torch.float32: gguf.LlamaFileType.ALL_F32, torch.float16: gguf.LlamaFileType.MOSTLY_F16}
    if dtype not in kinds:
        raise FormatError(f"dtype={dtype} must be torch.float32 or torch.float16 in a GGUF file")
    checkpoint, file = open_checkpoint(checkpoint), resolve(file)
    config, tokenizer = checkpoint.model.config, checkpoint.tokenizer
    assert config.head_dim and config.hidden_dim and config.n_kv_heads
    if tokenizer is not None and tokenizer.model_proto().trainer_spec.model_type != BPE:
        raise FormatError(
            "llama.cpp cuts text as BPE does, and the tokenizer is of another kind; train one that is BPE"
        )
    if tokenizer is not None:
        _warn("llama.cpp", why_other_ids(tokenizer, config.vocab_size, prefix=True, symbols=True))
    file.parent.mkdir(parents=True, exist_ok=True)
    with replacing(file) as temporary:
        writer = gguf.GGUFWriter(temporary, "llama")
        writer.add_name(os.fsencode(checkpoint.path.parent.name).decode("utf-8", "replace"))
        writer.add_file_type(kinds[dtype])
        writer.add_vocab_size(config.vocab_size)
        writer.add_context_length(config.max_seq_len)
        writer.add_embedding_length(config.dim)
        writer.add_block_count(config.n_layers)
        writer.add_feed_forward_length(config.hidden_dim)
        writer.add_head_count(config.n_heads)
        writer.add_head_count_kv(config.n_kv_heads)
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
        writer.add_rope_dimension_count(config.head_dim)
        writer.add_rope_freq_base(config.rope_theta)
        writer.add_layer_norm_rms_eps(config.norm_eps)
        _add_tokenizer(writer, tokenizer, config.vocab_size)
        for name, tensor in _weights(checkpoint).items():
            kind = dtype if tensor.dim() == 2 else torch.float32
            writer.add_tensor(translate(name, GGUF_NAMES, "blk.{}."), tensor.to(kind).numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return file


def _add_tokenizer(writer: Any, tokenizer: Tokenizer | None, vocab_size: int) -> None:
    """The vocabulary: pieces, scores and types are SentencePiece's own."""
    if tokenizer is None:
        writer.add_tokenizer_model("none")
        return
    proto = tokenizer.model_proto()
    more = range(len(proto.pieces), vocab_size)  # a model may have more ids than its tokenizer
    writer.add_tokenizer_model("llama")
    writer.add_token_list([*(part.piece.encode() for part in proto.pieces), *(f"<unused{id}>".encode() for id in more)])
    writer.add_token_scores([*(part.score for part in proto.pieces), *(-1e9 for _ in more)])
    writer.add_token_types([*(part.type for part in proto.pieces), *(UNUSED for _ in more)])
    for name in ("bos", "eos", "unk", "pad"):
        if getattr(tokenizer, f"{name}_id") >= 0:
            getattr(writer, f"add_{name}_token_id")(getattr(tokenizer, f"{name}_id"))
    writer.add_add_bos_token(False)  # texts are not begun with it in training either
    writer.add_add_eos_token(False)
    writer.add_add_space_prefix(proto.normalizer_spec.add_dummy_prefix)
