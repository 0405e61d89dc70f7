from __future__ import annotations

import pytest
import torch
from monai.data import DataLoader

from scripts.diffusion.schedule import GaussianDiffusion
from scripts.net import MedSegDiff
from scripts.sampling.evaluator import VolumeEvaluator
from scripts.sampling.inferer import VolumeInferer
from test_net import TINY, randomise


@pytest.mark.parametrize("amp", [False, True])
def test_half_precision_on_the_device_that_is_there(amp):
    network = randomise(MedSegDiff(GaussianDiffusion(), **TINY))
    dtypes = []
    network.denoiser.register_forward_hook(lambda module, args, out: dtypes.append(out[0].dtype))
    item = {"image": torch.randn(4, 16, 16, 2), "subject": "s1", "grade": 1, "label": torch.zeros(1, 16, 16, 2)}
    evaluator = VolumeEvaluator(torch.device("cpu"), DataLoader([item]), network, inferer=VolumeInferer(), amp=amp)
    evaluator.run()
    assert dtypes == [torch.bfloat16 if amp else torch.float32]
    (output,) = evaluator.state.output
    assert output["pred"].dtype == torch.float32
    assert output.keys() >= {"image", "pred", "uncertainty", "sample_dice", "grade_prob", "subject", "grade", "label"}
