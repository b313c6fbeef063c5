"""Which device to compute on, in which precision, and compiled or not."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import getpass
import os
import re
import shlex
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llmcore.config import ModelConfig, TrainConfig


class DeviceError(ValueError):
    """A device that is not here, or a precision that the device does not compute in. The message says what works."""


def pick_device(device: str = "auto") -> torch.device:
    """The device by its name; "auto" is CUDA where there is one, else Apple's MPS, else the CPU.

    Raises:
        DeviceError: for a device that is unknown or that this machine lacks.
    """
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if device == "auto":
        return torch.device(next(name for name in ("cuda", "mps", "cpu") if available[name]))
    kind = str(device).split(":")[0]
    if kind not in available:
        raise DeviceError(f"device={device!r} must be auto, cpu, cuda or mps")
    if not available[kind]:
        raise DeviceError(f"device={device!r} is not available here; use auto or cpu")
    return torch.device(device)


def has_bf16(device: torch.device) -> bool:
    """Whether the device itself computes in bf16. Where that is emulated, products take a hundred times as long."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def pick_precision(precision: str, device: torch.device) -> str:
    """The precision by its name; "auto" is bf16 where the device computes in it, fp16 on older GPUs, else fp32.

    Raises:
        DeviceError: for fp16 or bf16 on a device without it.
    """
    if precision == "auto":
        return "bf16" if has_bf16(device) else "fp16" if device.type == "cuda" else "fp32"
    if precision == "fp16" and device.type != "cuda":
        raise DeviceError(f"precision='fp16' needs a CUDA device, not {device}; use auto, bf16 or fp32")
    if precision == "bf16" and device.type == "mps":
        raise DeviceError(f"precision='bf16' is not supported on {device}; use auto or fp32")
    return precision


def autocast(precision: str, device: torch.device) -> torch.autocast:
    """A context in which matrix products run in "bf16" or "fp16"; in "fp32" it changes nothing."""
    dtype = torch.float16 if precision == "fp16" else torch.bfloat16
    return torch.autocast(device.type, dtype, enabled=precision != "fp32")


def sent_to(device: torch.device, *tensors: Tensor) -> list[Tensor]:
    """Tensors on a device. To CUDA they are copied from pinned memory, so that the CPU need not wait for the copy."""
    if device.type == "cuda":
        tensors = tuple(tensor.pin_memory() for tensor in tensors)
    return [tensor.to(device, non_blocking=True) for tensor in tensors]


def chunk_rows(few: int, tokens: int, vocab_size: int, dim: int, device: str) -> int:
    """How many tokens' logits the loss computes at a time, where each chunk takes a few dozen calls of torch.

    On a CPU `few`, which its caches hold. On a GPU each call takes a launch, and small products do not fill it: there
    so many that the logits are as large as the batch's hidden states, the rule of torch's own operator.
    """
    return few if device == "cpu" else max(few, -(-tokens * dim // vocab_size))


def settle_cache_folder() -> str:
    """The cache folder of torch's compiler; another one, with a warning, where its own cannot be written.

    torch makes that folder as soon as it defines or optimizes anything, compiled or not, and fails where it cannot.
    """
    return _settled(os.environ.get("TORCHINDUCTOR_CACHE_DIR", ""))


@functools.cache  # each text that is written asks for it
def _settled(folder: str) -> str:
    try:  # where none is named, the default as torch makes it up, which needs the user's name
        name = re.sub(r'[\\/:*?"<>|]', "_", getpass.getuser()) if not folder else ""
        folder = folder or os.path.join(tempfile.gettempdir(), f"torchinductor_{name}")
        os.makedirs(folder, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except (OSError, KeyError, ImportError) as error:
        other = os.environ["TORCHINDUCTOR_CACHE_DIR"] = tempfile.mkdtemp(prefix="torchinductor_")
        warnings.warn(
            f"torch's cache folder cannot be used ({error_line(error)}); it is {other} for now. "
            "Set TORCHINDUCTOR_CACHE_DIR to a folder that can be written",
            stacklevel=3,
        )
        return other
    return folder


def quote_library_folder() -> None:
    """Let torch's compiler link where the path to torch holds a space, at which it would split its command."""
    libraries = str(Path(torch.__file__).parent / "lib")
    if os.name == "posix" and libraries != shlex.quote(libraries):
        import torch.utils.cpp_extension as cpp_extension

        cpp_extension.TORCH_LIB_PATH = shlex.quote(libraries)


def compile_if_worth(
    model: nn.Module, shape: ModelConfig, train: TrainConfig, device: torch.device
) -> Callable[..., Tensor]:
    """The model as torch.compile runs it, or the model itself.

    "auto" compiles where a run is long enough to win back the about ten seconds that it takes on a CPU. The whole run
    counts, not what is left of it: compiled code rounds otherwise, and a resume must not change that.

    The first forward and the first backward pass compile. On a CPU both call a C++ compiler, and both write to a cache
    folder. Where that fails, they raise errors of many kinds.
    """
    windows = train.max_steps * train.batch_size * train.grad_accum_steps
    flops = windows * shape.max_seq_len * shape.flops_per_token()
    long = device.type != "mps" and flops > (2e12 if device.type == "cpu" else 2e16)
    if train.compile == "off" or (train.compile == "auto" and not long):
        return model

    quote_library_folder()
    compiled = functools.cache(lambda: torch.compile(model))  # this, too, fails in the first forward pass
    return lambda *inputs: compiled()(*inputs)


def error_line(error: Exception) -> str:
    """An error in one line. Of an error that quotes a compiler, the compiler's first complaint."""
    error = getattr(error, "inner_exception", error)  # torch wraps what its compiler raises
    lines = [line.strip() for line in str(error).split("Output:")[-1].splitlines() if line.strip()]
    said = next((line for line in lines if "error:" in line or "cannot" in line), lines[0] if lines else "")
    return f"{type(error).__name__}: {said}"[:300]


@contextlib.contextmanager
def deterministic_sums(device: torch.device) -> Iterator[None]:
    """On a CPU, let the threads of a compiled model add up in a fixed order, so that a seed always gives one result.

    Without this the gradient of the embeddings is summed in the order in which the threads happen to arrive.
    """
    if device.type != "cpu":
        yield
        return
    debugging: Any = torch.utils.deterministic
    before = torch.get_deterministic_debug_mode(), debugging.fill_uninitialized_memory
    torch.set_deterministic_debug_mode("warn")
    debugging.fill_uninitialized_memory = False  # makes bugs visible, but takes time
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(before[0])
        debugging.fill_uninitialized_memory = before[1]


def keep_freed_memory() -> None:
    """Let glibc keep the memory that a step frees for the next one. To get zeroed pages from the system takes time.

    An uncompiled step on a CPU becomes a tenth faster. Tensors of 32 MiB and more are left out: gaps between them would
    cost memory, and in models that large the pages take little of the time. Without glibc (macOS, Windows, musl), and
    where MALLOC_MMAP_THRESHOLD_ is set in the environment, this does nothing.
    """
    if "MALLOC_MMAP_THRESHOLD_" in os.environ:
        return
    m_trim_threshold, m_mmap_threshold = -1, -3  # of malloc.h
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        mallopt(m_mmap_threshold, 2**25)
        mallopt(m_trim_threshold, 2**31 - 1)


def use_huge_pages(tensors: Iterable[Tensor]) -> None:
    """Let Linux hold tensors of a CPU in pages of 2 MiB: with fewer addresses to look up, they are read a tenth faster.

    Their memory is moved once, in about a second a gigabyte; values and addresses stay as they are. Nothing is done on
    other systems, before Linux 6.1, and where such pages are not to be had.
    """
    page, collapse = 2**21, 25  # MADV_COLLAPSE of linux/mman.h
    spans: list[list[int]] = []  # of addresses; tensors that share a page are taken together
    for start, end in sorted((each.data_ptr(), each.data_ptr() + each.nbytes) for each in tensors):
        if spans and start < spans[-1][1] + page:
            spans[-1][1] = max(spans[-1][1], end)
        else:
            spans.append([start, end])
    with contextlib.suppress(OSError, AttributeError):
        madvise = ctypes.CDLL("libc.so.6").madvise
        for start, end in spans:
            start, end = -(-start // page) * page, end // page * page
            if start < end:
                madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), collapse)


def is_out_of_memory(error: Exception) -> bool:
    """Whether torch has run out of memory. CUDA has an exception for it, CPU and MPS have only their words."""
    words = ("can't allocate memory", "not enough memory", "MPS backend out of memory")
    return isinstance(error, torch.OutOfMemoryError) or any(word in str(error) for word in words)


def ways_to_save_memory(model: ModelConfig, train: TrainConfig) -> str:
    """Which settings lower the memory that a training step needs, with their values now, in words."""
    recompute = {"none": "selective or full", "selective": "full", "full": ""}[train.activation_checkpointing]
    return (
        "Each of these needs less, as far as it can be set here: "
        f"less than batch_size={train.batch_size}, with more than grad_accum_steps={train.grad_accum_steps} in turn; "
        f"less than context_size={train.context_size or model.max_seq_len}; "
        + (f"activation_checkpointing={recompute}; " if recompute else "")
        + "a smaller preset or model"
    )
