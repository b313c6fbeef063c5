"""Figures for the notebooks. Each function takes data and returns a matplotlib Figure."""

from llmcore.notebook.plots.corpus import (
    compression,
    length_histogram,
    piece_lengths,
    rank_frequency,
    text_pieces,
)
from llmcore.notebook.plots.curves import (
    COSTS,
    compare_runs,
    isoflop_curves,
    memory_against_batch,
    prediction_bands,
    scaling_fit,
    smoothed,
    training_curves,
)
from llmcore.notebook.plots.results import (
    attention_maps,
    bars,
    document_scores,
    next_tokens,
)
from llmcore.notebook.plots.style import (
    chinese_font,
    png,
)

__all__ = [
    "COSTS",
    "attention_maps",
    "bars",
    "chinese_font",
    "compare_runs",
    "compression",
    "document_scores",
    "isoflop_curves",
    "length_histogram",
    "memory_against_batch",
    "next_tokens",
    "piece_lengths",
    "png",
    "prediction_bands",
    "rank_frequency",
    "scaling_fit",
    "smoothed",
    "text_pieces",
    "training_curves",
]
