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
from llmcore.notebook.plots.sampling import cache_work, ways_to_choose
from llmcore.notebook.plots.style import (
    chinese_font,
    png,
)
from llmcore.notebook.plots.training import kept_and_again, number_formats, singular_values, stacked

__all__ = [
    "COSTS",
    "attention_maps",
    "bars",
    "cache_work",
    "chinese_font",
    "compare_runs",
    "compression",
    "document_scores",
    "isoflop_curves",
    "kept_and_again",
    "length_histogram",
    "memory_against_batch",
    "next_tokens",
    "number_formats",
    "piece_lengths",
    "png",
    "rank_frequency",
    "scaling_fit",
    "singular_values",
    "smoothed",
    "stacked",
    "text_pieces",
    "training_curves",
    "ways_to_choose",
]
