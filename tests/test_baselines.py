from __future__ import annotations

import pytest
import torch

from scripts.config import InputError
from scripts.diffusion.schedule import GaussianDiffusion
from scripts.networks.baselines import GradingDenseNet, GradingResNet, PlainUNet


def inputs():
    return torch.randn(2, 4, 16, 16), torch.randn(2, 1, 16, 16), torch.tensor([3, 999])


def test_plain_unet_has_the_signature_of_the_diffusion_network():
    network = PlainUNet(GaussianDiffusion(), calib_channels=[8, 8, 16]).eval()
    image, x_t, t = inputs()
    seg_logits, cls_logits, calib_map = network(image, x_t, t)
    assert seg_logits.shape == (2, 1, 16, 16)
    assert cls_logits.shape == (2, 2)
    assert calib_map is None
    assert network.condition(image) == {}
    assert torch.equal(network(image), seg_logits)
    assert torch.equal(network(image, x_t + 1, t - 1)[0], seg_logits)


def test_plain_unet_without_grading_head():
    assert PlainUNet(GaussianDiffusion(), calib_channels=[8, 8, 16], use_cls_head=False)(*inputs())[1] is None


@pytest.mark.parametrize("classifier", [GradingResNet, GradingDenseNet])
def test_classifiers_grade_and_find_no_tumour(classifier):
    network = classifier(GaussianDiffusion(), in_channels=4, out_channels=3, num_grades=4).eval()
    image = torch.randn(2, 4, 64, 64)
    seg_logits, cls_logits, _ = network(image, torch.randn(2, 3, 64, 64), torch.tensor([3, 999]))
    assert seg_logits.shape == (2, 3, 64, 64)
    assert cls_logits.shape == (2, 4)
    assert (seg_logits.sigmoid() < 0.5).all()
    cls_logits.square().sum().backward()
    assert all(parameter.grad is not None for parameter in network.parameters())


@pytest.mark.parametrize("baseline", [PlainUNet, GradingResNet, GradingDenseNet])
def test_baselines_predict_masks(baseline):
    with pytest.raises(InputError, match="prediction_type"):
        baseline(GaussianDiffusion(prediction_type="epsilon"))


def test_a_slice_that_is_too_small_for_a_densenet_is_refused():
    network = GradingDenseNet(GaussianDiffusion())
    for size in (32, 80):
        with pytest.raises(InputError, match=f"image_size .{size}, {size}.* (too small|divisible by 32)"):
            network(torch.randn(2, 4, size, size))
    assert network.train()(torch.randn(1, 4, 64, 64)).shape == (1, 1, 64, 64)
