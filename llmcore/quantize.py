"""Smaller weights to decode with on a CPU: a token costs as long as it takes to read all weights once."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from llmcore.model import Transformer


class Int8Linear(nn.Module):
    """A linear layer whose weights are int8, with one scale per output: W ≈ scale · weight.

    Each row is divided by its largest magnitude over 127 and rounded: Dettmers et al., "LLM.int8()",
    arXiv:2208.07339, section 2.1, for weights only. Inputs and outputs pass in bfloat16.

    Args:
        linear: a layer without bias, float weight (outputs, inputs).
    """

    weight: Tensor
    scale: Tensor

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        scale = (linear.weight.detach().float().abs().amax(1) / 127).clamp(min=1e-12).bfloat16()
        rounded = (linear.weight.detach() / scale[:, None].float()).round().clamp(-127, 127)
        self.register_buffer("weight", rounded.to(torch.int8))
        self.register_buffer("scale", scale)

    def forward(self, x: Tensor) -> Tensor:
        """(…, inputs) -> (…, outputs), of x's dtype."""
        rows = x.flatten(0, -2).to(torch.bfloat16)
        return torch._weight_int8pack_mm(rows, self.weight, self.scale).to(x.dtype).unflatten(0, x.shape[:-1])


def int8_weights(model: Transformer) -> Transformer:
    """A copy of a model for writing on a CPU, every matrix but the embedding table in int8: a quarter of the bytes.

    An approximation (notebook 05 shows how little it changes), and for inference only.

    Raises:
        ValueError: for a model on another device: a GPU decodes faster in bfloat16, by `model.bfloat16()`.
    """
    device = model.tok_embeddings.weight.device
    if device.type != "cpu":
        raise ValueError(f"int8 weights are for a CPU, and this model is on {device}; use model.bfloat16() there")
    small = copy.deepcopy(model).eval().requires_grad_(False)
    for module in list(small.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.Linear):
                setattr(module, name, Int8Linear(child))
    return small
