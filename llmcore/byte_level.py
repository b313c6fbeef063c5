"""Byte-level BPE, as in GPT-2, Llama 3 and Qwen: a `tokenizer.json`, read with Hugging Face's `tokenizers`.

A pre-tokenizer cuts a text into words. The UTF-8 bytes of a word are then merged, pair by pair: Radford et al.,
"Language Models are Unsupervised Multitask Learners" (2019), section 2.2. The file writes each byte as a visible
character, such as "Ġ" for a space. Nothing is lost if every byte has a piece, and if nothing changes the text before.

Such a file does not say which tokens begin and end a text. Here it does: an added token may have `roles`.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmcore.files import read_json, warn_once

ROLES = ("pad", "unk", "bos", "eos")
MOST_IDS = 1 << 20

_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_GPT2 = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}


def _split(digits: str) -> list[dict[str, Any]]:
    regex = {"Regex": _WORDS % digits}
    return [
        {"type": "Split", "pattern": regex, "behavior": "Isolated", "invert": False},
        {**_GPT2, "use_regex": False},
    ]


# Pre-tokenizers, by llama.cpp's names, and whether a whole word that is a piece is taken without merges
PRE_TOKENIZERS: dict[str, tuple[list[dict[str, Any]], bool]] = {
    "gpt-2": ([_GPT2], False),
    "smollm": ([{"type": "Digits", "individual_digits": True}, _GPT2], False),
    "llama-bpe": (_split("{1,3}"), True),
    "smaug-bpe": (_split("{1,3}"), False),
    "qwen2": (_split(""), False),
}


def _byte_signs() -> dict[str, int]:
    """The character that stands for each byte in a file: itself where it is visible, else one from U+0100 on."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in visible]
    return {chr(byte): byte for byte in visible} | {chr(256 + i): byte for i, byte in enumerate(others)}


BYTE_SIGNS = _byte_signs()


class ByteLevelBPE:
    """What `Tokenizer` needs of a `tokenizer.json`.

    Args:
        content: of the file.
        folder: where tokenizer_config.json or config.json name the special tokens, if the file itself does not.

    Attributes:
        content: as given, with the roles of the special tokens. A Unicode normalisation (NFC) is left out, with a
            warning, since a text would not come back as it was.
        description: the same, parsed.
        pieces, bytes: of each id, as the file writes it and in a text; no bytes for a special one.
        special: the id by role, or -1.
        pre_name: the pre-tokenizer's name in PRE_TOKENIZERS; None if it is not there.
        inner_pairs: see `Tokenizer.inner_pairs`.

    Raises:
        ValueError: for a file that cannot be used, and for one that does not keep the text, naming the reason.
    """

    def __init__(self, content: bytes, folder: Path) -> None:
        import tokenizers  # here, because few runs need it

        try:
            self.description = json.loads(content)
            steps = self._check_steps()
            if not any("roles" in token for token in self.description.setdefault("added_tokens", [])):
                mark_roles(self.description, roles_beside(folder))
                content = json.dumps(self.description, ensure_ascii=False).encode()
            self._encoder = tokenizers.Tokenizer.from_str(json.dumps(self.description))
            self._encoder.encode_special_tokens = True  # a "</s>" in a text is four characters
            self.content = content
            self._read_vocabulary()
        except BaseException as error:  # a panic of the library is no Exception
            if isinstance(error, ValueError | KeyboardInterrupt | SystemExit):
                raise
            raise ValueError(f"it is not a tokenizer.json: {type(error).__name__} {error}") from None

        # places where a text may be cut
        known = {name: whole_words for name, (others, whole_words) in PRE_TOKENIZERS.items() if others == steps}
        whole_words = bool(self.description["model"].get("ignore_merges"))
        self.pre_name = next((name for name in known if known[name] == whole_words), None)
        plain = [token["content"] for token in self.description["added_tokens"] if not token.get("special")]
        pairs = {a + b for content in plain for a, b in pairwise(content)}
        self.inner_pairs = _InnerPairs(self._encoder.pre_tokenizer, bool(known), pairs)

    def _read_vocabulary(self) -> None:
        """Make the tables of ids, and refuse a vocabulary that some text cannot be written with."""
        vocabulary: dict[str, int] = self._encoder.get_vocab(with_added_tokens=True)
        size = max(vocabulary.values(), default=-1) + 1
        if size > MOST_IDS or len(set(vocabulary.values())) < len(vocabulary):
            raise ValueError(f"its {len(vocabulary):,} pieces have ids up to {size:,}, some perhaps twice")
        self.pieces = [f"<unused{id}>" for id in range(size)]
        self.bytes = [b""] * size
        for piece, id in vocabulary.items():
            self.pieces[id] = piece
            in_signs = all(sign in BYTE_SIGNS for sign in piece)
            self.bytes[id] = bytes(BYTE_SIGNS[sign] for sign in piece) if in_signs else piece.encode()

        # bytes that no piece stands for; a few control characters may be among them
        absent = {byte for sign, byte in BYTE_SIGNS.items() if sign not in vocabulary}
        absent -= {0xC0, 0xC1, *range(0xF5, 0x100)}  # no text holds them
        if absent & {*b"\t\n\r", *range(0x20, 0x7F), *range(0x80, 0xF0)}:
            raise ValueError(f"it loses text: it has no pieces for the bytes {bytes(sorted(absent)).hex(' ').upper()}")
        self._unspelled = re.compile(f"[{''.join(map(_characters, sorted(absent)))}]" if absent else "(?!)")

        # added tokens
        self.special = dict.fromkeys(ROLES, -1)
        products = {"".join(pair) for pair in merges_of(self.description)}
        for token in self.description["added_tokens"]:
            piece, id = token["content"], token["id"]
            if vocabulary.get(piece) != id:
                raise ValueError(f"its added token {piece!r} has the id {vocabulary.get(piece)}, not {id}")
            spelled = self._encoder.encode(self.bytes[id].decode(errors="replace"), add_special_tokens=False).ids
            if token.get("special") and (piece in products or id in spelled):
                raise ValueError(f"its special token {piece!r} can come from plain text, which would be lost")
            if not token.get("special") and any(token.get(name) for name in ("lstrip", "rstrip", "single_word")):
                raise ValueError(
                    f"its added token {piece!r} depends on the text around it (lstrip, rstrip, single_word)"
                )
            self.bytes[id] = b"" if token.get("special") else piece.encode()
            self.special.update(dict.fromkeys(set(token.get("roles", ())) & set(ROLES), id))

    def _check_steps(self) -> list[dict[str, Any]]:
        """Refuse what changes the text, and return the steps of the pre-tokenizer."""
        model = self.description["model"]
        kind = model.get("type", "BPE")
        if kind != "BPE":
            raise ValueError(f"it holds a model of type {kind}, and only BPE keeps the text")
        for name in ("byte_fallback", "continuing_subword_prefix", "end_of_word_suffix"):
            if model.get(name):
                raise ValueError(f"its BPE has {name}={model[name]!r}, so it is not byte-level BPE")
        model["dropout"] = self.description["truncation"] = self.description["padding"] = None

        normalizer, pre_tokenizer = self.description.get("normalizer"), self.description.get("pre_tokenizer") or {}
        if normalizer:
            if normalizer["type"] != "NFC":
                raise ValueError(f"it changes the text before it cuts it (normalizer {normalizer['type']})")
            warnings.warn(
                "the tokenizer's Unicode normalisation (NFC) is left out, so that no text is changed: text that is not "
                "NFC gets other ids than in transformers",
                stacklevel=5,
            )
            self.description["normalizer"] = None
        steps = pre_tokenizer["pretokenizers"] if pre_tokenizer.get("type") == "Sequence" else [pre_tokenizer]
        steps = [{key: value for key, value in step.items() if key != "trim_offsets"} for step in steps]
        steps[-1].setdefault("use_regex", True)
        for step in steps:
            keeps = {"Digits": True, "Split": step.get("behavior") != "Removed"}
            keeps["ByteLevel"] = step is steps[-1] and not step.get("add_prefix_space", True)
            if not keeps.get(str(step.get("type"))):
                raise ValueError(f"its pre-tokenizer {step.get('type')} does not keep the text: {str(step)[:200]}")
        if steps[-1]["type"] != "ByteLevel":
            raise ValueError("its pre-tokenizer does not end with ByteLevel, so it is not byte-level BPE")
        return steps

    def encode(self, text: str) -> NDArray[np.int32]:
        """The ids of a text. Added tokens are found in it, but for special ones."""
        if self._unspelled.search(text):
            warn_once(
                f"unspelled {self._unspelled.pattern}",
                "a text holds rare characters that the tokenizer has no pieces for, such as control characters: each "
                "becomes U+FFFD",
            )
            text = self._unspelled.sub("\ufffd", text)
        return np.array(self._encoder.encode(text, add_special_tokens=False).ids, dtype=np.int32)


class _InnerPairs:
    """Pairs of characters that a word may hold side by side; see `Tokenizer.inner_pairs`.

    In all pre-tokenizers of PRE_TOKENIZERS, a word ends between a letter or digit and another sign, whatever stands
    around them. Of any other pre-tokenizer, all pairs are inner.
    """

    def __init__(self, pre_tokenizer: Any, is_known: bool, added: set[str]) -> None:
        self.pre_tokenizer, self.is_known, self.added = pre_tokenizer, is_known, added

    def __contains__(self, pair: object) -> bool:
        a, b = list(str(pair))
        if not self.is_known or not a.isalnum() or b.isalnum() or pair in self.added:
            return True
        return len(self.pre_tokenizer.pre_tokenize_str(a + b)) == 1  # it may know other letters than Python


def _characters(byte: int) -> str:
    """The characters that begin with a byte in UTF-8, as part of a regular expression's [...]."""
    if byte < 0x80:
        return f"\\x{byte:02x}"
    first, last = max(byte - 0xF0 << 18, 1 << 16), min((byte - 0xEF << 18) - 1, 0x10FFFF)  # from F0 on
    return f"{chr(first)}-{chr(last)}"


def roles_beside(folder: Path) -> dict[str, str | int]:
    """The special tokens that the files of a Hugging Face folder name, by content or id."""
    found: dict[str, str | int] = {}
    for file in (folder / "tokenizer_config.json", folder / "config.json"):
        settings = read_json(file, {"type": "object"}) if file.is_file() else {}
        for role in ROLES:
            token, ids = settings.get(f"{role}_token"), settings.get(f"{role}_token_id")
            token = token.get("content") if isinstance(token, dict) else token
            id = ids[0] if isinstance(ids, list) and ids else ids
            wanted = token if isinstance(token, str) else id
            if isinstance(wanted, str) or type(wanted) is int:
                found.setdefault(role, wanted)
    return found


def added_token(id: int, piece: str, special: bool) -> dict[str, Any]:
    """An added token as a tokenizer.json has it, which does not depend on the text around it."""
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": id, "content": piece, **flags, "special": special}


def mark_roles(description: dict[str, Any], special: Mapping[str, str | int]) -> None:
    """Write into the content of a tokenizer.json which tokens, by content or id, are pad, unk, bos and eos."""
    added, vocabulary = description.setdefault("added_tokens", []), description["model"]["vocab"]
    for role, wanted in special.items():
        token = next((token for token in added if wanted in (token["content"], token["id"])), None)
        if token is None:  # it may be a token of the model itself
            pieces = {piece: id for piece, id in vocabulary.items() if wanted in (piece, id)}
            for piece, id in pieces.items():
                token = added_token(id, piece, special=True)
                added.append(token)
        if token is not None:
            token["special"] = True
            token["roles"] = sorted({*token.get("roles", ()), role})
    added.sort(key=lambda token: token["id"])


def merges_of(description: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The merges of a tokenizer.json, the first to be done first. Older files write a pair as one text."""
    merges = description["model"]["merges"]
    return [tuple(merge.split(" ", 1) if isinstance(merge, str) else merge) for merge in merges]
