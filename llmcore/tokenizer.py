"""SentencePiece, set up to lose nothing: `decode(encode(text)) == text` for any text.

Kudo and Richardson, "SentencePiece", arXiv:1808.06226. Its defaults are made for translation: they turn full-width
punctuation into ASCII, drop newlines, squeeze spaces and add one in front. Here they are all off, characters
outside the vocabulary fall back to bytes, and the newline is a symbol of its own.

Models from elsewhere may bring a tokenizer of another kind, byte-level BPE in a `tokenizer.json`: see `byte_level`.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
from collections.abc import Container, Iterable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece
from numpy.typing import NDArray

from llmcore.byte_level import ROLES, ByteLevelBPE
from llmcore.files import one_line

PAD_ID, UNK_ID, BOS_ID, EOS_ID = 0, 1, 2, 3
_SPACE = "▁"  # U+2581: SentencePiece's own sign for a space
_IDS_AS: Any = "numpy" if sentencepiece.__version__ > "0.2.1" else int  # 0.2.1 hands ids over as a list only


class TokenizerError(ValueError):
    """A tokenizer that cannot be trained or read. The message says which parameter to change, and to what."""


@contextlib.contextmanager
def _surrogates_refused() -> Iterator[None]:
    """SentencePiece's error for half a surrogate pair in plain words."""
    try:
        yield
    except (RuntimeError, TypeError):  # the latter for a list of texts
        raise ValueError("the text holds half a surrogate pair, which no UTF-8 file can; take it out") from None


class Tokenizer:
    """A SentencePiece model, or byte-level BPE, read from a file.

    Args:
        tokenizer_model_file: a SentencePiece `.model`, or a `tokenizer.json` with byte-level BPE. What begins and ends
            a text there, the tokenizer_config.json or config.json beside it says.
        model_bytes: the file's content, where it is part of another file; the file then only has its name in errors.

    Attributes:
        vocab_size: number of ids, with those of added tokens.
        pad_id, unk_id, bos_id, eos_id: the special ids; -1 for one that there is not.
        model_bytes: the content, with the special ids: `Tokenizer(file)` needs nothing else.
        fingerprint: SHA-256 of `model_bytes`, in hexadecimal.
        byte_level: what reads byte-level BPE; None for SentencePiece.
        file_name: what such a file is called in a checkpoint: tokenizer.model or tokenizer.json.
        has_space_piece: whether a piece holds a space; if none does, a space is the byte 0x20.

    Raises:
        FileNotFoundError: if there is no such file.
        TokenizerError: if it is neither of the two, changes the text, or has no end-of-text piece.
    """

    def __init__(self, tokenizer_model_file: str | os.PathLike[str], model_bytes: bytes | None = None) -> None:
        path = Path(tokenizer_model_file)
        if not path.is_file():
            raise FileNotFoundError(
                f"tokenizer_model_file={str(path)!r} does not exist; train one with notebook 01_tokenize"
            )
        self.model_bytes = path.read_bytes() if model_bytes is None else model_bytes
        self.file_name = "tokenizer.model"
        self.byte_level: ByteLevelBPE | None = None
        if self.model_bytes.lstrip()[:1] == b"{":
            self._open_byte_level(path)
        else:
            self._open_sentencepiece(path)
        self.vocab_size, self.fingerprint = len(self._bytes), hashlib.sha256(self.model_bytes).hexdigest()
        self.pad_id, self.unk_id, self.bos_id, self.eos_id = (self._special[role] for role in ROLES)
        if self.eos_id < 0:
            raise TokenizerError(
                f"tokenizer_model_file={str(path)!r} has no piece that ends a text (eos), and data sets and prompts "
                "need it; train one with notebook 01_tokenize, or name one in the tokenizer_config.json beside it"
            )

    def _open_sentencepiece(self, path: Path) -> None:
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=self.model_bytes)
            count = int(self._processor.vocab_size())
        except Exception as error:  # SentencePiece's parser raises errors of several types
            raise TokenizerError(f"tokenizer_model_file={str(path)!r} is not a SentencePiece model: {error}") from None
        if not count:
            raise TokenizerError(f"tokenizer_model_file={str(path)!r} is not a SentencePiece model: no pieces")
        self._special = {role: getattr(self._processor, f"{role}_id")() for role in ROLES}
        self._bytes = [self._piece_bytes(i) for i in range(count)]
        # SentencePiece writes a space as U+2581. A real U+2581 would come back as a space, so it goes in as its bytes.
        # So does a space that no piece holds: SentencePiece would spell the bytes of U+2581 instead.
        space = b"".join(self._bytes[id] for id in self._processor.encode(" "))
        self.has_space_piece = space != _SPACE.encode()
        self._spelled = re.compile(f"({_SPACE})" if self.has_space_piece else f"([{_SPACE} ])")

    def _open_byte_level(self, path: Path) -> None:
        try:
            self.byte_level = ByteLevelBPE(self.model_bytes, path.parent)
        except ValueError as error:
            reason = one_line(error)[:500]
            raise TokenizerError(f"tokenizer_model_file={str(path)!r} cannot be used: {reason}") from None
        self.file_name, self.model_bytes = "tokenizer.json", self.byte_level.content
        self._special, self._bytes, self.has_space_piece = self.byte_level.special, self.byte_level.bytes, True

    def _piece_bytes(self, id: int) -> bytes:
        if self._processor.is_control(id) or self._processor.is_unknown(id):
            return b""
        piece = self._processor.id_to_piece(id)
        if self._processor.is_byte(id):
            return bytes([int(piece[3:5], 16)])
        return piece.replace(_SPACE, " ").encode()

    def encode(self, text: str, bos: bool = False, eos: bool = False) -> list[int]:
        """Text to ids, on request with bos in front and eos behind.

        Raises:
            ValueError: for half a surrogate pair, which no UTF-8 text can hold.
        """
        before, after = [self.bos_id] if bos and self.bos_id >= 0 else [], [self.eos_id] if eos else []
        return [*before, *self.encode_array(text).tolist(), *after]

    def encode_batch(self, texts: Sequence[str], num_threads: int = -1) -> list[list[int]]:
        """`encode` for many texts, on all cores (`num_threads=-1`) at once."""
        if self.byte_level or any(self._spelled.search(text) for text in texts):
            return [self.encode(text) for text in texts]
        with _surrogates_refused():
            return self._processor.encode(list(texts), num_threads=num_threads)

    def encode_array(self, text: str) -> NDArray[np.int32]:
        """`encode` to an array, about a third faster. Other threads can run meanwhile."""
        if self.byte_level:
            with _surrogates_refused():
                return self.byte_level.encode(text)
        first, *rest = self._spelled.split(text)  # text, sign, text, sign, …, text
        with _surrogates_refused():
            parts = [self._processor.encode(first, out_type=_IDS_AS)]
            for sign, part in zip(rest[::2], rest[1::2], strict=True):
                ids = [self._processor.piece_to_id(f"<0x{byte:02X}>") for byte in sign.encode()]
                parts += [np.array(ids, dtype=np.int32), self._processor.encode(part, out_type=_IDS_AS)]
        return np.concatenate(parts, dtype=np.int32, casting="unsafe")  # an empty list is of float64

    def inner_pairs(self) -> Container[str]:
        """Every two characters that stand side by side in some piece; of byte-level BPE, in some word.

        A text may be cut between any other two: no piece reaches across, so its parts encode as the whole does. (BPE
        merges only what a piece holds. Unigram adds up scores along the text, so if two segmentations have the same
        score to the last bit of a float, the cut may change which of them is taken.) Where it is not known how
        byte-level BPE makes words, every pair counts.
        """
        if self.byte_level:
            return self.byte_level.inner_pairs
        pieces = (self.id_to_piece(id) for id in range(self.vocab_size) if not self.is_byte(id))
        return {a + b for piece in pieces for a, b in pairwise(piece.replace(_SPACE, " "))}

    def decode(self, ids: Iterable[int], errors: str = "replace") -> str:
        """Ids to text. Special ids give nothing; bytes that are no UTF-8 give U+FFFD, or nothing with "ignore"."""
        return b"".join(map(self.id_to_bytes, ids)).decode("utf-8", errors)

    def id_to_bytes(self, id: int) -> bytes:
        """The UTF-8 bytes of one id: half a character where it is a byte piece, none where it is special.

        Raises:
            ValueError: if the id is not in the vocabulary.
        """
        if not 0 <= id < self.vocab_size:
            raise ValueError(f"token id {id} is not in the vocabulary of {self.vocab_size}")
        return self._bytes[id]

    def id_to_piece(self, id: int) -> str:
        """The piece as the file writes it: "▁" for a space, "<0x0A>" for a byte; in byte-level BPE "Ġ" and "Ċ"."""
        return self.byte_level.pieces[id] if self.byte_level else self._processor.id_to_piece(id)

    def is_byte(self, id: int) -> bool:
        """Whether the id stands for one raw byte; in byte-level BPE, for bytes that are no whole characters."""
        if self.byte_level:
            return self._bytes[id].decode(errors="replace").encode() != self._bytes[id]
        return self._processor.is_byte(id)

    def model_proto(self) -> Any:
        """SentencePiece's own message: `pieces` with piece, score and type, and how the model was trained.

        Raises:
            TokenizerError: for byte-level BPE, which is none.
        """
        if self.byte_level:
            raise TokenizerError("the tokenizer is byte-level BPE, not a SentencePiece model")
        from sentencepiece import sentencepiece_model_pb2  # needs protobuf, and only exports need it

        proto = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]
        proto.ParseFromString(self.model_bytes)
        return proto
