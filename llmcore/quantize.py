"""Smaller weights to write with on a CPU, where each token takes about as long as reading all weights once."""

from __future__ import annotations

import copy
import warnings

import torch
from torch import Tensor, nn

from llmcore.model import Transformer

# Without VNNI instructions the kernel's 16-bit sums could overflow, so inputs get 7 bits there.
REDUCE_RANGE = not torch.cpu._is_vnni_supported()


class Int8Linear(nn.Module):
    """A linear layer in int8, by PyTorch's own kernel: one scale per row of weights, one for all inputs of a call.

    Each row is divided by its largest magnitude over 127 and rounded, and so are the inputs as they come: Dettmers et
    al., "LLM.int8()", arXiv:2208.07339, section 2.1, without its treatment of outliers.

    Args:
        linear: a layer without bias, float weight (outputs, inputs).
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight = linear.weight.detach().float()
        scale = (weight.abs().amax(1) / 127).clamp(min=1e-12).double()
        with warnings.catch_warnings():
            # PyTorch plans to replace this function; today it has no other that reads the weights as fast
            warnings.simplefilter("ignore", UserWarning)
            zeros = torch.zeros(len(scale), dtype=torch.int64)
            rows = torch.quantize_per_channel(weight, scale, zeros, 0, torch.qint8)
        self.packed = torch.ops.quantized.linear_prepack(rows, None)

    def forward(self, x: Tensor) -> Tensor:
        """(…, inputs) -> (…, outputs), of x's dtype."""
        return torch.ops.quantized.linear_dynamic(x.float(), self.packed, REDUCE_RANGE).to(x.dtype)


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
