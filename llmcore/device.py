"""Which device to compute on, and in which precision."""

from __future__ import annotations

import torch

from llmcore.runs import TrainingError


def pick_device(device: str = "auto") -> torch.device:
    """The device meant: "auto" is CUDA where there is one, else Apple's MPS, else the CPU.

    Raises:
        ValueError: for a device that is unknown or that this machine lacks.
    """
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if device == "auto":
        return torch.device(next(name for name in ("cuda", "mps", "cpu") if available[name]))
    kind = str(device).split(":")[0]
    if kind not in available:
        raise ValueError(f"device={device!r} must be auto, cpu, cuda or mps")
    if not available[kind]:
        raise ValueError(f"device={device!r} is not available here; use auto or cpu")
    return torch.device(device)


def has_bf16(device: torch.device) -> bool:
    """Whether the device itself computes in bf16: emulated, products take a hundred times as long."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def pick_precision(precision: str, device: torch.device) -> str:
    """The precision meant by "auto": bf16 where the device computes in it, fp16 on older GPUs, else fp32.

    Raises:
        TrainingError: for fp16 or bf16 on a device without it.
    """
    if precision == "auto":
        return "bf16" if has_bf16(device) else "fp16" if device.type == "cuda" else "fp32"
    if precision == "fp16" and device.type != "cuda":
        raise TrainingError(f"precision='fp16' needs a CUDA device, not {device}; use auto, bf16 or fp32")
    if precision == "bf16" and device.type == "mps":
        raise TrainingError(f"precision='bf16' is not supported on {device}; use auto or fp32")
    return precision


def autocast(precision: str, device: torch.device) -> torch.autocast:
    """A context in which matrix products run in "bf16" or "fp16"; in "fp32" it changes nothing."""
    dtype = torch.float16 if precision == "fp16" else torch.bfloat16
    return torch.autocast(device.type, dtype, enabled=precision != "fp32")
