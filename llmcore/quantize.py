"""Smaller weights to write with on a CPU, where each token takes about as long as reading all weights once."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmcore.model import Transformer

FEW_ROWS = 4  # for more, inputs in int8 too are faster
BLOCK = 16  # inputs: torch's kernels are wrong for some other numbers of them
# Without these instructions, torch's product of two int8 matrices takes longer than any other way.
HAS_VNNI = torch.cpu._is_vnni_supported()


def rounds_inputs(rows: int) -> bool:
    """Whether the inputs too are in int8, where a product has this number of rows."""
    return rows > FEW_ROWS and HAS_VNNI


class Int8Linear(nn.Module):
    """A linear layer with weights in int8 and one scale for each row of them.

    Each row is divided by its largest magnitude over 127 and rounded. Where there are more inputs than a few, so are
    they: Dettmers et al., "LLM.int8()", arXiv:2208.07339, section 2.1, without its treatment of outliers.

    Args:
        linear: a layer without bias, float weight (outputs, inputs).

    Attributes:
        weight: (outputs, inputs) int8.
        scale: (outputs,) float32.
    """

    weight: Tensor
    scale: Tensor

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight = linear.weight.detach().float()
        scale = (weight.abs().amax(1) / 127).clamp(min=1e-12)
        self.register_buffer("weight", (weight / scale[:, None]).round().to(torch.int8))
        self.register_buffer("scale", scale)

    def forward(self, x: Tensor) -> Tensor:
        """(…, inputs) -> (…, outputs), of x's dtype."""
        rows = x.flatten(0, -2)
        if rows.shape[1] % BLOCK:
            y = F.linear(rows.float(), self.weight * self.scale[:, None])
        elif not rounds_inputs(len(rows)):
            y = torch._weight_int8pack_mm(rows.bfloat16(), self.weight, self.scale.bfloat16())
        else:
            step = (rows.float().abs().amax(1, keepdim=True) / 127).clamp(min=1e-12)
            y = torch._int_mm((rows / step).round().to(torch.int8), self.weight.T) * step * self.scale
        return y.to(x.dtype).unflatten(0, x.shape[:-1])


def int8_weights(model: Transformer) -> Transformer:
    """A copy of a model for a CPU, with every matrix but the embedding table in int8: a quarter of the bytes.

    It is an approximation (notebook 05 shows how small the change is), and for inference only.

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
