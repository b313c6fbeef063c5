"""How good is a model: figures to lay beside its bits per byte."""

from __future__ import annotations

import lzma


def xz_bits_per_byte(known: str, text: str) -> float:
    """What `xz -9e` needs for a text, in bits per UTF-8 byte, when it has already read the known text.

    That is the growth of the compressed file when the text is appended; with nothing known, its plain size.
    """

    def size(content: str) -> int:
        return len(lzma.compress(content.encode(), preset=9 | lzma.PRESET_EXTREME)) if content else 0

    return 8 * (size(known + text) - size(known)) / len(text.encode())
