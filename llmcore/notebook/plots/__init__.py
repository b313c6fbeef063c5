"""Figures for the notebooks. Each function takes data and returns a matplotlib Figure."""

from llmcore.notebook.plots.corpus import (
    box_rows,
    compression,
    length_histogram,
    merge_steps,
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
from llmcore.notebook.plots.habits import (
    learned_by_heart,
    quality_and_repetition,
    recall_by_prompt,
    recited_shares,
)
from llmcore.notebook.plots.learning import loss_units, reading_order, staircase, surprise
from llmcore.notebook.plots.machine import (
    accuracy_by_place,
    attention_head,
    attention_maps,
    attention_moments,
    attention_steps,
    block_diagram,
    norm_and_gate,
    rope,
    score_spread,
    shapes,
)
from llmcore.notebook.plots.results import (
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
    "accuracy_by_place",
    "attention_head",
    "attention_maps",
    "attention_moments",
    "attention_steps",
    "bars",
    "block_diagram",
    "box_rows",
    "cache_work",
    "chinese_font",
    "compare_runs",
    "compression",
    "document_scores",
    "isoflop_curves",
    "kept_and_again",
    "learned_by_heart",
    "length_histogram",
    "loss_units",
    "memory_against_batch",
    "merge_steps",
    "next_tokens",
    "norm_and_gate",
    "number_formats",
    "piece_lengths",
    "png",
    "prediction_bands",
    "quality_and_repetition",
    "rank_frequency",
    "reading_order",
    "recall_by_prompt",
    "recited_shares",
    "rope",
    "scaling_fit",
    "score_spread",
    "shapes",
    "singular_values",
    "smoothed",
    "stacked",
    "staircase",
    "surprise",
    "text_pieces",
    "training_curves",
    "ways_to_choose",
]
