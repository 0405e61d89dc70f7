from __future__ import annotations

import pytest
import torch
from monai.data import MetaTensor

from scripts.config import InputError
from scripts.diffusion import GaussianDiffusion
from scripts.inferer import VolumeInferer, area_weighted_mean
from scripts.net import MedSegDiff, PlainUNet
from test_net import TINY, randomise


@pytest.fixture
def network():
    return randomise(MedSegDiff(GaussianDiffusion(), **TINY))


@pytest.fixture
def volume():
    image = torch.randn(1, 4, 16, 16, 6, generator=torch.Generator().manual_seed(1))
    image[..., 0] = 0  # a slice without brain
    return image


def test_outputs(network, volume):
    result = VolumeInferer(num_inference_steps=3, num_samples=2).predict(volume, network)
    assert result["pred"].shape == result["uncertainty"].shape == (1, 1, 16, 16, 6)
    assert result["hgg_prob"].shape == (1,)
    assert 0 < result["hgg_prob"] < 1
    for name in ("pred", "uncertainty"):
        assert ((result[name] >= 0) & (result[name] <= 1)).all()
        assert not result[name][..., 0].any()
        assert result[name][..., 1:].any()


@pytest.mark.parametrize("prediction_type", ["sample", "epsilon", "v_prediction"])
@pytest.mark.parametrize("steps", [1, 4])
def test_same_seed_same_masks_whatever_the_batch(volume, prediction_type, steps):
    network = randomise(MedSegDiff(GaussianDiffusion(prediction_type=prediction_type), **TINY))
    results = [
        VolumeInferer(steps, num_samples=3, sampling_batch_size=size, seed=5).predict(volume, network)
        for size in (3, 7, 100)
    ]
    for other in results[1:]:
        assert torch.allclose(other["pred"], results[0]["pred"], atol=1e-5)
        assert torch.allclose(other["hgg_prob"], results[0]["hgg_prob"], atol=1e-5)


def test_the_seed_matters(network, volume):
    masks = [VolumeInferer(2, seed=seed).predict(volume, network)["pred"] for seed in (0, 1)]
    assert not torch.allclose(*masks)


def test_samples_are_averaged(network, volume):
    image = volume[0].movedim(-1, 0)[1:2]
    network.calibrate(image)
    several, _ = VolumeInferer(2, num_samples=4).sample(image, network, [1])
    inferer = VolumeInferer(2)
    noise = VolumeInferer(2)._noise((4, 1, 16, 16), 1)
    singles = []
    for sample in noise:
        inferer._noise = lambda shape, index, sample=sample: sample[None]
        singles.append(inferer.sample(image, network, [1])[0])
    assert torch.allclose(several, torch.stack(singles).mean(dim=0), atol=1e-6)


def test_one_step_is_one_evaluation_from_pure_noise(network, volume):
    image = volume[0].movedim(-1, 0)[1:3]
    inferer = VolumeInferer(1)
    noise = torch.cat([inferer._noise((1, 1, 16, 16), index) for index in (1, 2)])
    expected = network(image, noise, torch.tensor([999, 999]))[0].sigmoid()
    assert torch.allclose(inferer.sample(image, network, [1, 2])[0], expected, atol=1e-6)


def test_image_branch_runs_once_per_slice(network, volume):
    seen = []
    network.calibrator.register_forward_hook(lambda module, args, out: seen.append(len(out)))
    VolumeInferer(num_inference_steps=5, num_samples=3).predict(volume, network)
    assert sum(seen) == 5  # the slices with brain


def test_batches_stay_within_the_bound(network, volume):
    seen = []
    network.denoiser.register_forward_hook(lambda module, args, out: seen.append(len(out[0])))
    VolumeInferer(num_inference_steps=1, num_samples=3, sampling_batch_size=7).predict(volume, network)
    assert max(seen) <= 7
    assert sum(seen) == 15


def test_meta_survives_for_inversion(network, volume):
    image = MetaTensor(volume, meta={"filename_or_obj": "x"})
    result = VolumeInferer().predict(image, network)
    assert isinstance(result["pred"], MetaTensor)
    assert result["pred"].meta["filename_or_obj"] == "x"
    assert torch.equal(VolumeInferer()(image, network), result["pred"])


def test_no_grading_head_gives_nan(volume):
    network = randomise(MedSegDiff(GaussianDiffusion(), use_cls_head=False, **TINY))
    assert VolumeInferer().predict(volume, network)["hgg_prob"].isnan().all()


def test_plain_unet_is_sampled_alike(volume):
    network = randomise(PlainUNet(GaussianDiffusion(), channels=[8, 8, 16]))
    image = volume[0].movedim(-1, 0)[1:]
    prob = VolumeInferer().predict(volume, network)["pred"][0].movedim(-1, 0)[1:]
    assert torch.allclose(prob, network(image).sigmoid(), atol=1e-5)


def test_volume_without_brain(network, volume):
    with pytest.raises(InputError, match="no brain"):
        VolumeInferer().predict(torch.zeros_like(volume), network)


@pytest.mark.parametrize("bad", ["num_inference_steps", "num_samples", "sampling_batch_size"])
def test_numbers_below_one(bad):
    with pytest.raises(InputError, match=f"{bad}=0"):
        VolumeInferer(**{bad: 0})


def test_samples_of_a_slice_must_fit_in_a_batch():
    with pytest.raises(InputError, match="num_samples=5 must not exceed sampling_batch_size=4"):
        VolumeInferer(num_samples=5, sampling_batch_size=4)


def test_grade_is_weighted_by_predicted_area():
    values = torch.tensor([0.2, 0.8])
    assert area_weighted_mean(values, torch.tensor([3, 1])).item() == pytest.approx(0.35)
    assert area_weighted_mean(values, torch.tensor([0, 0])).item() == pytest.approx(0.5)
