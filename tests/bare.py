"""What runs on a borrowed GPU: a machine with torch, numpy, sentencepiece, safetensors, transformers, psutil and tqdm.

`tests/test_cuda.py` and `tests/benchmarks/gpu.py` import nothing else. One package that llmcore needs may be missing
there: jsonschema, which checks what is read from disk. These two programs read only what they have just written.
"""

from __future__ import annotations

from typing import Any

from llmcore import files


class _Anything:
    """Stands for jsonschema's validator: any JSON is as it should be."""

    def __init__(self, schema: object) -> None:
        pass

    def iter_errors(self, content: object) -> list[Any]:
        return []


def do_without_jsonschema() -> None:
    """Let JSON be read unchecked, with a word, where jsonschema is not installed; else change nothing."""
    try:
        import jsonschema  # noqa: F401
    except ImportError:
        print("jsonschema is not installed: JSON files are read unchecked")
        files._validator = lambda: _Anything  # type: ignore[assignment]
