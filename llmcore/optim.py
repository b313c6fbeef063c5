"""The optimizers, AdamW and Muon, and their learning rates."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.amp import GradScaler
from torch.optim import AdamW, Optimizer

from llmcore.config import TrainConfig
from llmcore.device import has_bf16
from llmcore.model import Transformer


def learning_rate_at(step: int, config: TrainConfig) -> float:
    """The learning rate of a step as a share of its peak: a pure function, warm-up included.

    "plateau" is flat here; the trainer multiplies it by `Plateau.scale`.
    """
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    if config.schedule == "plateau":
        return 1.0
    if config.schedule == "cosine":
        progress = (step - config.warmup_steps) / max(1, config.max_steps - config.warmup_steps)
        return config.min_lr_ratio + (1 - config.min_lr_ratio) * (1 + math.cos(math.pi * min(1.0, progress))) / 2
    # wsd: flat, then a line down
    decay_steps = max(1, round(config.decay_fraction * config.max_steps))
    left = (config.max_steps - step) / decay_steps
    return config.min_lr_ratio + (1 - config.min_lr_ratio) * min(1.0, left)


@dataclass
class Plateau:
    """The schedule "plateau": the rate falls when validation has stopped to improve.

    Attributes:
        scale: what the learning rate is multiplied by.
        best: the lowest validation loss so far.
        bad: validations in a row that were not lower, since `best` or since the rate last fell.
    """

    scale: float = 1.0
    best: float = math.inf
    bad: int = 0

    def update(self, val_loss: float, config: TrainConfig) -> None:
        """Take in a validation loss. After `plateau_patience` bad ones the rate falls, to `min_lr_ratio` at least."""
        if val_loss < self.best:
            self.best, self.bad = val_loss, 0
        else:
            self.bad += 1
        if self.bad >= config.plateau_patience:
            self.scale, self.bad = max(self.scale * config.plateau_factor, config.min_lr_ratio), 0


def set_rates(optimizers: Sequence[Optimizer], share: float) -> None:
    """Set each group's learning rate to a share of its peak."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = share * group["peak"]


class Muon(torch.optim.Muon):
    """torch.optim.Muon, but matrices of one shape, transposed or not, are orthogonalised together.

    The numbers are the same but for the order of bf16 sums. Small matrices take a third of the time. Jordan et al.,
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

            # momentum
            torch._foreach_lerp_(averages, gradients, 1 - group["momentum"])
            updates = torch._foreach_lerp(gradients, averages, group["momentum"]) if group["nesterov"] else averages

            # matrices of one shape together, none higher than wide
            by_shape: dict[tuple[int, ...], list[int]] = {}
            for index, param in enumerate(params):
                by_shape.setdefault(tuple(sorted(param.shape)), []).append(index)
            for indices in by_shape.values():
                wide = [updates[i] if updates[i].shape[0] <= updates[i].shape[1] else updates[i].T for i in indices]
                steps = orthogonalised(torch.stack(wide), group["ns_coefficients"], group["ns_steps"], group["eps"])

                # decay and update
                for i, step in zip(indices, steps, strict=True):
                    rows, columns = params[i].shape
                    rate = group["lr"] * math.sqrt(max(1, rows / columns))
                    params[i].mul_(1 - group["lr"] * group["weight_decay"])
                    params[i].add_(step if rows <= columns else step.T, alpha=-rate)
        return loss


def orthogonalised(matrices: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float) -> Tensor:
    """Matrices (count, rows, columns), rows <= columns, with their singular values brought near 1.

    Newton and Schulz's iteration X <- aX + b(XXᵀ)X + c(XXᵀ)²X, which needs only products. bf16 is exact enough. Where
    the device does not compute in bf16, its emulation would take longer than the rest of the step.
    """
    a, b, c = coefficients
    x = matrices.to(torch.bfloat16 if has_bf16(matrices.device) else torch.float32)
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


def clip_gradient(model: Transformer, optimizers: Sequence[Optimizer], scaler: GradScaler, most: float) -> Tensor:
    """Undo the loss scale and shorten the gradient to a norm of at most `most` (0: any); returns the norm before."""
    if _has_gradient(optimizers):
        for optimizer in optimizers:
            scaler.unscale_(optimizer)
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), most or math.inf)
    return norm.to(model.tok_embeddings.weight.device)


def update_or_skip(optimizers: Sequence[Optimizer], scaler: GradScaler, finite: bool) -> None:
    """Let all optimizers take a step if loss and gradient are finite, else none, and clear the gradient.

    The scaler's own step() would decide for each optimizer alone. It lowers the loss scale only if single gradients are
    not finite, not if only the loss or the norm is not. So a skipped step lowers it here, and counts good steps from 0.
    """
    if finite and _has_gradient(optimizers):
        for optimizer in optimizers:
            optimizer.step()
        scaler.update()
    elif not finite and scaler.is_enabled():
        scaler.update(scaler.get_scale() * scaler.get_backoff_factor())
        scaler.load_state_dict({**scaler.state_dict(), "_growth_tracker": 0})
    clear_gradient(optimizers)


def clear_gradient(optimizers: Sequence[Optimizer]) -> None:
    """Drop the gradients and free their memory."""
    for optimizer in optimizers:
        optimizer.zero_grad(set_to_none=True)


def _has_gradient(optimizers: Sequence[Optimizer]) -> bool:
    """Whether there was anything to learn from: batches may have no target at all."""
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    return any(parameter.grad is not None for group in groups for parameter in group["params"])


def build_optimizers(model: Transformer, config: TrainConfig) -> list[Optimizer]:
    """AdamW with decay on matrices only; or Muon for the blocks' matrices and AdamW for the rest.

    Loshchilov and Hutter, arXiv:1711.05101. Each group's `peak` is what the schedule multiplies.
    """
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    muon = [p for name, p in named if config.optimizer == "muon" and p.dim() == 2 and name.startswith("layers.")]
    in_muon = {id(p) for p in muon}
    matrices = [p for _, p in named if p.dim() >= 2 and id(p) not in in_muon]
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
