from __future__ import annotations

import pytest
import torch

from scripts.config import InputError
from scripts.training.autocast import AutocastInferer, warn_of_slow_amp


def test_autocast_on_a_processor():
    network, image = torch.nn.Conv2d(1, 4, 3), torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    exact, half = (AutocastInferer(amp)(image, network) for amp in (False, True))
    assert exact.dtype == half.dtype == torch.float32
    assert torch.equal(exact, network(image))
    assert not torch.equal(exact, half)
    assert torch.allclose(exact, half, atol=0.05)


def test_unknown_amp_dtype():
    with pytest.raises(InputError, match="amp_dtype 'half'"):
        AutocastInferer(True, "half")


@pytest.mark.parametrize(
    ("amp", "device", "known", "warns"),
    [
        (True, "cpu", {"architecture": "x86_64", "avx512_bf16": False, "amx_bf16": False}, True),
        (False, "cpu", {"architecture": "x86_64", "avx512_bf16": False, "amx_bf16": False}, False),
        (True, "cuda", {"architecture": "x86_64", "avx512_bf16": False, "amx_bf16": False}, False),
        (True, "cpu", {"architecture": "x86_64", "avx512_bf16": True, "amx_bf16": False}, False),
        (True, "cpu", {"architecture": "aarch64"}, False),
    ],
)
def test_processors_without_bfloat16_are_told(amp, device, known, warns, monkeypatch, caplog):
    assert {"architecture"} <= torch.cpu.get_capabilities().keys()
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: known)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    warn_of_slow_amp(amp, torch.device(device), lambda: {"dtype": torch.bfloat16})
    assert ("amp=True is very slow" in caplog.text) == warns


@pytest.mark.parametrize(("dtype", "warns"), [(torch.bfloat16, True), (torch.float16, False)])
def test_graphics_cards_without_bfloat16_are_told(dtype, warns, monkeypatch, caplog):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: including_emulation)
    warn_of_slow_amp(True, torch.device("cuda"), lambda: {"dtype": dtype})
    assert ("this GPU has no bfloat16" in caplog.text) == warns
