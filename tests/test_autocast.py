from __future__ import annotations

import pytest
import torch

from scripts.config import InputError
from scripts.training.autocast import AutocastInferer


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
