"""Our SentencePiece tokenizer as the `tokenizer.json` of Hugging Face's `tokenizers` library, and theirs as ours.

The library's own converter replaces spaces by "▁" first, as SentencePiece does, so a "▁" in the text becomes a space.
Here the pieces are stored with spaces, and the text is not changed before it is cut. The ids are the same.

A tokenizer.json with byte-level BPE is opened as it is. One that was made from a SentencePiece model, as those of Llama
2 and TinyLlama, is turned into such a model again. What such a model changes in a text is left out: see `keep_text`.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llmcore.byte_level import merges_of, roles_beside
from llmcore.files import display_path, read_json
from llmcore.tokenizer import Tokenizer, TokenizerError

# SentencePiece's numbers for types of pieces and of models
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
BPE = 2


def write_hf_tokenizer(tokenizer: Tokenizer, folder: Path, vocab_size: int, max_seq_len: int) -> None:
    """Write tokenizer.model, tokenizer.json and tokenizer_config.json into a folder; of byte-level BPE no .model.

    A SentencePiece model that is not BPE, or that changes the text, cannot be written as tokenizer.json. Then only
    tokenizer.model is written, with a warning. Models of `train_tokenizer` that are BPE have no such problem.
    """
    (folder / tokenizer.file_name).write_bytes(tokenizer.model_bytes)
    if not tokenizer.byte_level:
        if reason := why_other_ids(tokenizer, vocab_size, space_byte=True):
            warnings.warn(f"the tokenizer {reason}: tokenizer.model is written, but no tokenizer.json", stacklevel=3)
            return
        (folder / "tokenizer.json").write_text(tokenizer_json(tokenizer.model_proto()), encoding="utf-8")

    special = {"unk": tokenizer.unk_id, "bos": tokenizer.bos_id, "eos": tokenizer.eos_id, "pad": tokenizer.pad_id}
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **{f"{name}_token": tokenizer.id_to_piece(id) for name, id in special.items() if id >= 0},
        "split_special_tokens": True,  # a "</s>" in a text is four characters, as for our tokenizer
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_seq_len,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2, ensure_ascii=False), encoding="utf-8")


def why_other_ids(
    tokenizer: Tokenizer, vocab_size: int, prefix: bool = False, symbols: bool = False, space_byte: bool = False
) -> str | None:
    """Why a program that cuts text by plain BPE gets other ids than this tokenizer; None if it gets the same ids.

    Args:
        tokenizer: to compare with.
        vocab_size: number of ids of the model.
        prefix: whether the program can be told to put a space before each text.
        symbols: whether it keeps user-defined symbols whole.
        space_byte: whether it spells a space that has no piece as the byte 0x20, as we do.
    """
    proto = tokenizer.model_proto()
    rules, trainer = proto.normalizer_spec, proto.trainer_spec
    changes_text = rules.name not in ("identity", "") or rules.precompiled_charsmap or rules.remove_extra_whitespaces
    has_symbols = any(part.type == USER_DEFINED and len(part.piece) > 1 for part in proto.pieces)
    reasons = {
        "is not BPE": trainer.model_type != BPE,
        "has no byte fallback": not trainer.byte_fallback,
        "changes text before cutting it": changes_text or (rules.add_dummy_prefix and not prefix),
        "has no piece for a space": not tokenizer.has_space_piece and not space_byte,
        "puts spaces elsewhere": trainer.treat_whitespace_as_suffix or not rules.escape_whitespaces,
        "keeps symbols of its own whole": has_symbols and not symbols,
        f"has {tokenizer.vocab_size:,} ids, the model {vocab_size:,}": tokenizer.vocab_size > vocab_size,
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


def tokenizer_json(proto: Any) -> str:
    """The JSON text of a `tokenizers.Tokenizer` from SentencePiece's message (see `Tokenizer.model_proto`)."""
    import tokenizers
    from tokenizers import decoders, models

    pieces = [piece.piece.replace("▁", " ") if piece.type == NORMAL else piece.piece for piece in proto.pieces]
    model = models.BPE(
        {piece: id for id, piece in enumerate(pieces)},
        _merges(proto, pieces),
        unk_token=pieces[proto.trainer_spec.unk_id],
        byte_fallback=True,
    )
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    control = [piece for piece, part in zip(pieces, proto.pieces, strict=True) if part.type in (UNKNOWN, CONTROL)]
    tokenizer.add_special_tokens([tokenizers.AddedToken(piece, special=True, normalized=False) for piece in control])
    return tokenizer.to_str(pretty=False)


def _merges(proto: Any, pieces: list[str]) -> list[tuple[str, str]]:
    """The pairs of pieces to join, the best first.

    SentencePiece has a score for each joined piece. Each way to cut the piece in two gives a merge of that rank.
    """
    scores = {pieces[id]: part.score for id, part in enumerate(proto.pieces) if part.type == NORMAL}
    merges = []
    for piece in sorted(scores, key=lambda piece: -scores[piece]):
        cuts = [(piece[:cut], piece[cut:]) for cut in range(1, len(piece))]
        merges += [(left, right) for left, right in cuts if left in scores and right in scores]
    return merges


def open_sentencepiece(file: Path) -> Tokenizer:
    """The tokenizer of a tokenizer.model; see `keep_text`.

    Raises:
        FileNotFoundError: if there is no such file.
        TokenizerError: if it is no SentencePiece model, or has no piece that ends a text.
    """
    tokenizer = Tokenizer(file)
    if tokenizer.byte_level or not keep_text(proto := tokenizer.model_proto(), file):
        return tokenizer
    return Tokenizer(file, proto.SerializeToString())


def keep_text(proto: Any, file: Path) -> bool:
    """Let SentencePiece's message change no text, with a warning if it did, and tell whether it did.

    Llama 2's model puts a space before each text. So its first word has other ids in other programs; here it has those
    of the first word after a newline.
    """
    rules = proto.normalizer_spec
    changes = {
        "puts a space before each text": rules.add_dummy_prefix,
        "leaves out spaces": rules.remove_extra_whitespaces,
        "replaces characters": rules.precompiled_charsmap,
    }
    if found := [change for change, holds in changes.items() if holds]:
        rules.name, rules.precompiled_charsmap = "identity", b""
        rules.add_dummy_prefix = rules.remove_extra_whitespaces = False
        warnings.warn(
            f"{display_path(file)}: the tokenizer {' and '.join(found)}. This is left out, so that no text is changed: "
            "such text gets other ids than in other programs",
            stacklevel=6,
        )
    if not proto.trainer_spec.byte_fallback:
        warnings.warn(
            f"{display_path(file)}: the tokenizer has no bytes, so characters without a piece are lost", stacklevel=6
        )
    return bool(found)


def open_tokenizer_json(file: Path) -> Tokenizer:
    """The tokenizer of a tokenizer.json: byte-level BPE, or what a SentencePiece model of kind BPE became.

    Raises:
        FileNotFoundError: if there is no such file.
        TokenizerError: naming the file, and what it does with a text that neither of the two does.
    """
    try:
        description = read_json(file, {"type": "object", "required": ["model"]})
        if not description["model"].get("byte_fallback"):
            return Tokenizer(file)
        proto = _back_to_sentencepiece(description, roles_beside(file.parent))
    except (FileNotFoundError, TokenizerError):
        raise
    except Exception as error:  # fields of any type
        reason = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        raise TokenizerError(f"{display_path(file)} cannot be used: {reason}") from None
    keep_text(proto, file)
    return Tokenizer(file, proto.SerializeToString())


def _back_to_sentencepiece(description: Mapping[str, Any], special: Mapping[str, str | int]) -> Any:
    """The SentencePiece model that a tokenizer.json with byte fallback was made from."""
    normalizer, metaspace = description.get("normalizer") or {}, description.get("pre_tokenizer") or {}
    steps = normalizer.get("normalizers", [normalizer] if normalizer else [])
    for step in (*steps, *([metaspace] if metaspace else [])):
        signs = {"Prepend": step.get("prepend"), "Replace": step.get("content"), "Metaspace": step.get("replacement")}
        if signs.get(step["type"]) != "▁" or step.get("split"):
            raise ValueError(f"its {step['type']} changes or cuts the text as no SentencePiece model does")
    add_space = any(step["type"] == "Prepend" for step in steps)
    add_space |= bool(metaspace) and metaspace.get("prepend_scheme", "always") != "never"

    # pieces, and the rank of each as its score
    added = {token["id"]: token for token in description.get("added_tokens") or []}
    ids = dict(description["model"]["vocab"])
    ids |= {token["content"]: id for id, token in added.items()}
    if sorted(ids.values()) != list(range(len(ids))):
        raise ValueError("its ids leave some out, or are there twice")
    merges = [(a.replace(" ", "▁"), b.replace(" ", "▁")) for a, b in merges_of(description)]
    ranks = {a + b: -float(rank) for rank, (a, b) in reversed(list(enumerate(merges)))}
    rows = []
    for piece, id in sorted(ids.items(), key=lambda item: item[1]):
        kind = BYTE if re.fullmatch("<0x[0-9A-F]{2}>", piece) else NORMAL
        if id in added:
            kind = CONTROL if added[id].get("special") else USER_DEFINED
        elif kind == NORMAL:
            piece = piece.replace(" ", "▁")
        rows.append((piece, ranks.get(piece, -float(len(merges) + id)), kind))

    by_role = {"unk": description["model"].get("unk_token"), **special}
    found = {role: ids.get(wanted, -1) if isinstance(wanted, str) else wanted for role, wanted in by_role.items()}
    proto = sentencepiece_model(rows, {role: id for role, id in found.items() if id is not None}, add_space)
    if set(_merges(proto, [piece for piece, _, _ in rows])) != set(merges):
        raise ValueError("its merges are not those of a SentencePiece model")
    return proto


def sentencepiece_model(
    pieces: Sequence[tuple[str, float, int]], special: Mapping[str, int], add_space: bool = False, squeeze: bool = False
) -> Any:
    """SentencePiece's message of a model of kind BPE.

    Args:
        pieces: text, score and type (see above) of each id; "▁" stands for a space.
        special: id by role: unk, bos, eos, pad. Others have none.
        add_space: whether a space is put before each text.
        squeeze: whether spaces at the ends of a text, and double ones, are left out.
    """
    from sentencepiece import sentencepiece_model_pb2  # needs protobuf

    proto = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]
    for id, (piece, score, kind) in enumerate(pieces):
        proto.pieces.add(piece=piece, score=score, type=UNKNOWN if id == special.get("unk") else kind)
    rules, trainer = proto.normalizer_spec, proto.trainer_spec
    rules.name, rules.add_dummy_prefix, rules.remove_extra_whitespaces = "identity", add_space, squeeze
    trainer.model_type, trainer.vocab_size = BPE, len(pieces)
    trainer.byte_fallback = any(kind == BYTE for _, _, kind in pieces)
    for role in ("unk", "bos", "eos", "pad"):
        id = special.get(role, -1)
        setattr(trainer, f"{role}_id", id)
        if 0 <= id < len(pieces):
            setattr(trainer, f"{role}_piece", pieces[id][0])
    return proto
