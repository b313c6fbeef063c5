"""What a step does with the gradient: AdamW, Muon, and how their learning rates move."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import AdamW, Optimizer

from llmcore.config import TrainConfig
from llmcore.device import has_bf16
from llmcore.model import Transformer


def learning_rate_at(step: int, config: TrainConfig) -> float:
    """The learning rate of a step as a share of its peak: a pure function, warm-up included.

    "plateau" is flat here; the trainer multiplies what validation has lowered it to.
    """
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    if config.schedule == "plateau":
        return 1.0
    if config.schedule == "cosine":
        progress = (step - config.warmup_steps) / max(1, config.max_steps - config.warmup_steps)
        return config.min_lr_ratio + (1 - config.min_lr_ratio) * (1 + math.cos(math.pi * min(1.0, progress))) / 2
    decay_steps = max(1, round(config.decay_fraction * config.max_steps))
    left = (config.max_steps - step) / decay_steps
    return config.min_lr_ratio + (1 - config.min_lr_ratio) * min(1.0, left)


class Muon(torch.optim.Muon):
    """torch.optim.Muon, except that matrices of one shape, or lying across, are orthogonalised together.

    The same numbers but for the order of bf16 sums, in a third of the time where matrices are small. Jordan et al.,
    "Muon: an optimizer for hidden layers in neural networks", 2024.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update from the gradients."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params: list[Tensor] = []
            gradients: list[Tensor] = []
            averages: list[Tensor] = []
            self._init_group(group, params, gradients, averages)
            torch._foreach_lerp_(averages, gradients, 1 - group["momentum"])
            updates = torch._foreach_lerp(gradients, averages, group["momentum"]) if group["nesterov"] else averages
            alike: dict[tuple[int, ...], list[int]] = {}
            for index, param in enumerate(params):
                alike.setdefault(tuple(sorted(param.shape)), []).append(index)
            for indices in alike.values():
                lying = [updates[i] if updates[i].shape[0] <= updates[i].shape[1] else updates[i].T for i in indices]
                turned = orthogonalised(torch.stack(lying), group["ns_coefficients"], group["ns_steps"], group["eps"])
                for i, update in zip(indices, turned, strict=True):
                    rows, columns = params[i].shape
                    rate = group["lr"] * math.sqrt(max(1, rows / columns))
                    params[i].mul_(1 - group["lr"] * group["weight_decay"])
                    params[i].add_(update if rows <= columns else update.T, alpha=-rate)
        return loss


def orthogonalised(matrices: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float) -> Tensor:
    """Each of (count, rows, columns), rows <= columns, with its singular values brought near one.

    Newton and Schulz's iteration X <- aX + b(XXᵀ)X + c(XXᵀ)²X, which needs products only. bf16 is enough for it, but
    where the device does not compute in that, its emulation would take longer than the rest of the step.
    """
    a, b, c = coefficients
    x = matrices.to(torch.bfloat16 if has_bf16(matrices.device) else torch.float32)
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


def back_off(scaler: torch.amp.GradScaler) -> None:
    """Lower fp16's scale after a skipped step, and count good steps anew.

    The scaler does so itself only where single gradients are not finite, not where the loss or their norm alone is not.
    """
    if scaler.is_enabled():
        scaler.update(scaler.get_scale() * scaler.get_backoff_factor())
        scaler.load_state_dict({**scaler.state_dict(), "_growth_tracker": 0})


def build_optimizers(model: Transformer, config: TrainConfig) -> list[Optimizer]:
    """AdamW with decay on matrices only; or Muon for the blocks' matrices and AdamW for the rest.

    Loshchilov and Hutter, arXiv:1711.05101. Each group's `peak` is what the schedule multiplies.
    """
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    muon = [p for name, p in named if config.optimizer == "muon" and p.dim() == 2 and name.startswith("layers.")]
    taken = {id(p) for p in muon}
    matrices = [p for _, p in named if p.dim() >= 2 and id(p) not in taken]
    vectors = [p for _, p in named if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    fused = next(model.parameters()).device.type in ("cpu", "cuda")
    optimizers: list[Optimizer] = [AdamW(groups, config.learning_rate, (config.beta1, config.beta2), fused=fused)]
    if muon:
        optimizers.append(Muon(muon, config.muon_learning_rate, weight_decay=config.weight_decay))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak"] = group["lr"]
    return optimizers
