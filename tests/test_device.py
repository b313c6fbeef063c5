"""Devices and precisions, on machines that have them or not."""

from __future__ import annotations

import platform
import re
from pathlib import Path

import pytest
import torch

from llmcore.device import DeviceError, pick_device, pick_precision, use_huge_pages


def test_devices_are_checked_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert pick_device("auto") == pick_device("cpu") == torch.device("cpu")
    for device in ("cuda", "cuda:0", "mps"):
        with pytest.raises(DeviceError, match=f"device='{device}' is not available here"):
            pick_device(device)
    for device in ("gpu", "", "tpu"):
        with pytest.raises(DeviceError, match=f"device='{device}' must be auto, cpu, cuda or mps"):
            pick_device(device)


@pytest.mark.parametrize(
    ("cuda", "mps", "meant"), [(True, True, "cuda"), (True, False, "cuda"), (False, True, "mps"), (False, False, "cpu")]
)
def test_auto_takes_the_fastest_that_is_there(
    cuda: bool, mps: bool, meant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    assert pick_device("auto") == torch.device(meant)
    for name, there in (("cuda", cuda), ("cuda:1", cuda), ("mps", mps), ("cpu", True)):
        if there:
            assert pick_device(name) == torch.device(name)


@pytest.mark.parametrize(
    ("device", "has_bf16", "auto", "allowed"),
    [
        ("cuda", True, "bf16", {"bf16", "fp16", "fp32"}),
        ("cuda", False, "fp16", {"bf16", "fp16", "fp32"}),
        ("cpu", True, "bf16", {"bf16", "fp32"}),
        ("cpu", False, "fp32", {"bf16", "fp32"}),
        ("mps", False, "fp32", {"fp32"}),
    ],
)
def test_each_device_gets_a_precision_that_it_computes_in(
    device: str, has_bf16: bool, auto: str, allowed: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: has_bf16)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: has_bf16)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    assert pick_precision("auto", torch.device(device)) == auto
    for precision in ("bf16", "fp16", "fp32"):
        if precision in allowed:
            assert pick_precision(precision, torch.device(device)) == precision
        else:
            with pytest.raises(DeviceError, match=f"precision='{precision}' .* {device}"):
                pick_precision(precision, torch.device(device))


def memory_in_huge_pages() -> int:
    """Kilobytes of this process; -1 where the system does not tell."""
    try:
        lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    except OSError:
        return -1
    return sum(int(line.split()[1]) for line in lines if line.startswith("AnonHugePages"))


def test_tensors_in_huge_pages_keep_their_values_and_places() -> None:
    tensors = [torch.randn(3, 2**20), torch.arange(2**21), torch.randn(5), torch.empty(0)]
    copies, places = [each.clone() for each in tensors], [each.data_ptr() for each in tensors]
    before = memory_in_huge_pages()
    use_huge_pages([*tensors, tensors[0][1:]])
    assert all(map(torch.equal, tensors, copies)) and [each.data_ptr() for each in tensors] == places
    release = re.match(r"(\d+)\.(\d+)", platform.release())
    if before < 0 or not release or (int(release[1]), int(release[2])) < (6, 1):
        pytest.skip("this system does not move memory into huge pages")
    assert memory_in_huge_pages() - before >= 2**14  # of 28 MB: what is left at the ends is in small pages
