from __future__ import annotations

import pytest
import torch
from monai.data import MetaTensor
from test_samplers import NAMES

from scripts.config import InputError
from scripts.diffusion.schedule import GaussianDiffusion
from scripts.net import MedSegDiff
from scripts.networks.baselines import PlainUNet
from scripts.networks.stochastic import draw_logits, spread_noise
from scripts.sampling.inferer import SampledSlices, VolumeInferer
from scripts.sampling.parts import without_unsure_parts
from test_net import TINY, randomise


@pytest.fixture
def network():
    return randomise(MedSegDiff(GaussianDiffusion(), **TINY))


@pytest.fixture
def volume():
    image = torch.randn(1, 4, 16, 16, 6, generator=torch.Generator().manual_seed(1))
    image[..., 0] = 0  # an empty slice
    return image


def test_outputs(network, volume):
    result = VolumeInferer(num_inference_steps=3, num_samples=2).predict(volume, network)
    assert result["pred"].shape == result["uncertainty"].shape == (1, 1, 16, 16, 6)
    assert result["grade_prob"].shape == (1, 2)
    assert ((result["grade_prob"] > 0) & (result["grade_prob"] < 1)).all()
    for name in ("pred", "uncertainty"):
        assert ((result[name] >= 0) & (result[name] <= 1)).all()
        assert not result[name][..., 0].any()
        assert result[name][..., 1:].any()


@pytest.mark.parametrize("prediction_type", ["sample", "epsilon", "v_prediction"])
@pytest.mark.parametrize("settings", [{"eta": 1.0}, *({"sampler": name} for name in NAMES)])
@pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "cosine"])
def test_same_seed_same_masks_whatever_the_batch(volume, prediction_type, settings, schedule):
    network = randomise(MedSegDiff(GaussianDiffusion(20, schedule, prediction_type), **TINY))
    results = [
        VolumeInferer(4, num_samples=3, sampling_batch_size=size, seed=5, **settings).predict(volume, network)
        for size in (3, 100)
    ]
    assert results[0]["pred"].isfinite().all()
    for other in results[1:]:
        assert torch.allclose(other["pred"], results[0]["pred"], atol=1e-5)
        assert torch.allclose(other["grade_prob"], results[0]["grade_prob"], atol=1e-5)


def test_the_seed_matters(network, volume):
    masks = [VolumeInferer(2, seed=seed).predict(volume, network)["pred"] for seed in (0, 1)]
    assert not torch.allclose(*masks)


def noise_of(seed, index, draws=1, shape=(1, 1, 16, 16)):
    generator = torch.Generator().manual_seed(seed * 1_000_003 + index)
    return [torch.randn(shape, generator=generator) for _ in range(draws)]


def test_samples_differ_by_their_noise_alone(network, volume):
    image = volume[0].movedim(-1, 0)[1:2]
    samples = VolumeInferer(num_samples=4).sample(image, network, [1]).samples
    (noise,) = noise_of(0, 1, shape=(4, 1, 16, 16))
    expected = network(image.expand(4, -1, -1, -1), noise, torch.full((4,), 999))[0].sigmoid()
    assert torch.allclose(samples, expected[None], atol=1e-6)


def test_the_mean_of_samples_and_their_spread(network, volume):
    samples = torch.rand(3, 5, 1, 16, 16)
    inferer = VolumeInferer(num_samples=5, sampling_batch_size=15)
    inferer.sample = lambda image, network, indices: SampledSlices(
        samples[: len(indices)], samples[: len(indices)].mean(dim=1), samples[: len(indices), 0], None
    )
    result = inferer.predict(volume[..., :4], network)
    mean, variance = samples.mean(dim=1).movedim(0, -1), samples.var(dim=1).movedim(0, -1)
    assert torch.allclose(result["pred"][0, ..., 1:], mean, atol=1e-6)
    assert torch.allclose(result["variance"][0, ..., 1:], variance, atol=1e-6)
    assert 0 < result["sample_dice"].item() < 1
    inferer.fusion = "majority"
    votes = (samples > 0.5).float().mean(dim=1).movedim(0, -1)
    fused = inferer.predict(volume[..., :4], network)
    assert torch.allclose(fused["pred"][0, ..., 1:], votes)
    assert torch.equal(fused["prob"], result["prob"])  # the fusion changes only pred
    assert "variance" not in VolumeInferer().predict(volume, network)


def test_one_step_is_one_evaluation_from_pure_noise(network, volume):
    image = volume[0].movedim(-1, 0)[1:3]
    noise = torch.cat([noise_of(0, index)[0] for index in (1, 2)])
    expected = network(image, noise, torch.tensor([999, 999]))[0].sigmoid()
    assert torch.allclose(VolumeInferer().sample(image, network, [1, 2])[0][:, 0], expected, atol=1e-6)


def test_truncated_start_is_the_noised_calibration_map(network, volume):
    image = volume[0].movedim(-1, 0)[1:2]
    t = torch.tensor([300])
    x_t = network.diffusion.add_noise(torch.tanh(network.condition(image)["calib_map"] / 2), noise_of(0, 1)[0], t)
    expected = network(image, x_t, t)[0].sigmoid()
    assert torch.allclose(VolumeInferer(start_timestep=300).sample(image, network, [1])[0][0], expected, atol=1e-6)


def test_self_conditioning_hands_the_estimate_on(volume):
    network = randomise(MedSegDiff(GaussianDiffusion(), conditioning=["highway", "self_conditioning"], **TINY))
    seen = []
    forward = network.forward
    network.forward = lambda *args: seen.append(args[4]) or forward(*args)
    VolumeInferer(3).sample(volume[0].movedim(-1, 0)[1:2], network, [1])
    assert seen[0] is None
    assert seen[1].abs().max() <= 1
    assert not torch.equal(seen[1], seen[2])


def test_temperatures_are_applied(network, volume):
    before = VolumeInferer().predict(volume, network)
    network.calibration.foreground_temperature.fill_(2.0)
    network.calibration.lesion_temperature.fill_(4.0)
    network.calibration.grade_temperature.fill_(3.0)
    after = VolumeInferer().predict(volume, network)
    filled = (..., slice(1, None))
    assert torch.allclose(after["pred"][filled].logit(), before["pred"][filled].logit() / 2, atol=1e-3)
    logits = [result["grade_prob"][:, 1].logit() for result in (after, before)]
    assert torch.allclose(logits[0], logits[1] / 3, atol=1e-3)
    assert not after["pred"][..., 0].any()  # empty slices stay 0
    assert after["volume_temperature"].tolist() == [[1.0]]
    lesion = VolumeInferer(calibrated_for="lesion").predict(volume, network)
    assert torch.allclose(lesion["pred"][filled].logit(), before["pred"][filled].logit() / 4, atol=1e-3)
    assert lesion["volume_temperature"].tolist() == [[0.5]]
    assert (after["uncertainty"][filled] > before["uncertainty"][filled]).float().mean() > 0.9


def test_the_confidence_is_the_probability_inside_the_mask(network, volume):
    """It is the mean before temperature scaling, by which the calibration reads the Dice."""
    raw = VolumeInferer().predict(volume, network)
    inside = raw["pred"] > 0.5
    expected = (raw["prob"] * inside).sum(dim=(2, 3, 4)) / inside.sum(dim=(2, 3, 4))
    assert torch.allclose(raw["confidence"], expected, equal_nan=True)
    assert raw["expected_dice"].isnan().all()
    network.calibration.foreground_temperature.fill_(2.0)
    network.calibration.dice_fit[:] = torch.tensor([-1.0, 0.5, 0.3])
    scaled = VolumeInferer().predict(volume, network)
    assert torch.equal(scaled["confidence"], raw["confidence"])
    dice = torch.sigmoid(0.5 * torch.logit(raw["confidence"]) - 1)
    assert torch.allclose(scaled["expected_dice"], dice.nan_to_num(0.3))
    for other in ({"fusion": "majority"}, {"num_inference_steps": 0}):  # masks that are made in another way
        network.calibration.sampling = VolumeInferer(num_inference_steps=1).sampling
        assert VolumeInferer(**other).predict(volume, network)["expected_dice"].isnan().all()


def test_parts_that_are_nowhere_sure_are_left_out():
    """Two parts of one mask; one region has no threshold."""
    prob = torch.zeros(2, 6, 6, 2)
    prob[:, 0:2, 0:2] = 0.8
    prob[:, 4:6, 4:6] = 0.8
    prob[:, 5, 5, 1] = 0.97
    kept = without_unsure_parts(prob, prob, torch.tensor([0.95, 0.5]))
    assert torch.equal(kept[1], prob[1])
    assert not kept[0, 0:2, 0:2].any()
    assert torch.equal(kept[0, 4:6], prob[0, 4:6])
    assert prob[0, 0, 0, 0] == pytest.approx(0.8)  # the input is not changed
    assert torch.equal(without_unsure_parts(prob, prob, torch.tensor([0.97, 0.98]))[0], kept[0])


def test_the_threshold_of_the_parts_changes_the_mask_alone(network, volume):
    before = VolumeInferer().predict(volume, network)
    assert (before["pred"] > 0.5).any()
    network.calibration.high_threshold.fill_(0.999)
    after = VolumeInferer().predict(volume, network)
    assert torch.equal(after["prob"], before["prob"])
    assert (after["prob"] < 0.999).all()  # so that no part is sure
    assert not (after["pred"] > 0.5).any()
    assert after["confidence"].isnan().all()
    network.calibration.sampling = VolumeInferer().sampling
    for other in ({"fusion": "majority"}, {"num_inference_steps": 0}):  # masks that are made in another way
        network.calibration.high_threshold.fill_(0.5)
        plain = VolumeInferer(**other).predict(volume, network)["pred"]
        network.calibration.high_threshold.fill_(0.999)
        assert torch.equal(VolumeInferer(**other).predict(volume, network)["pred"], plain)


def test_a_grade_can_be_read_from_the_mask(network, volume):
    before = VolumeInferer().predict(volume, network)
    assert "measurements" not in before
    calibration = network.calibration
    calibration.measurement_weight[1, 1] = 0.7  # of the size
    calibration.measurement_mean[1] = 2.0
    after = VolumeInferer().predict(volume, network)
    size = after["measurements"][:, 1]
    expected = before["grade_prob"][:, 1].logit() + 0.7 * (size - 2).clamp(-3, 3)
    assert torch.allclose(after["grade_prob"][:, 1].logit(), expected, atol=1e-3)
    assert torch.allclose(after["grade_reasons"][:, 1, 2], (0.7 * (size - 2).clamp(-3, 3)).double(), atol=1e-5)
    calibration.grade_temperature.fill_(torch.inf)  # the head does not count
    alone = VolumeInferer().predict(volume, network)
    assert torch.allclose(alone["grade_prob"][:, 1].logit(), 0.7 * (size - 2).clamp(-3, 3), atol=1e-3)


def test_sizes_are_in_mm(network, volume):
    network.calibration.measurement_weight[1, 1] = 1.0
    affine = torch.diag(torch.tensor([2.0, 3.0, 4.0, 1.0]))
    one, other = (
        VolumeInferer().predict(MetaTensor(volume, affine=matrix), network)["measurements"][:, 1]
        for matrix in (torch.eye(4), affine)
    )
    assert torch.allclose(other - one, torch.tensor(24.0).log(), atol=1e-4)


def test_a_calibration_holds_for_its_sampling_settings_alone(network, volume, caplog):
    before = VolumeInferer().predict(volume, network)
    network.calibration.foreground_temperature.fill_(2.0)
    network.calibration.grade_bias.copy_(torch.tensor([1.0, 0.0]))
    network.calibration.sampling = VolumeInferer().sampling
    assert not torch.allclose(VolumeInferer().predict(volume, network)["prob"], before["prob"])
    assert not torch.allclose(VolumeInferer(fusion="majority").predict(volume, network)["prob"], before["prob"])
    assert "not applied" not in caplog.text
    other = VolumeInferer(eta=0.5)  # with one step it gives the same samples
    for _ in range(2):
        after = other.predict(volume, network)
    assert torch.equal(after["prob"], before["prob"])
    assert torch.equal(after["grade_prob"], before["grade_prob"])
    assert caplog.text.count("the calibration is not applied") == 1


def test_the_calibration_map_is_an_output(network, volume):
    result = VolumeInferer(num_samples=2).predict(volume, network)
    assert torch.allclose(result["calib_prob"], VolumeInferer(0).predict(volume, network)["prob"])


@pytest.mark.parametrize("prior", [[0.5], [0.7, 0.7], [1.0, 0.0], "0.5", [0.2, 0.3, 0.5]])
def test_impossible_priors(network, prior):
    with pytest.raises(InputError, match="grade_prior="):
        VolumeInferer(grade_prior=prior).check(network, 32)


def test_image_branch_runs_once_per_slice(network, volume):
    seen = []
    network.calibrator.register_forward_hook(lambda module, args, out: seen.append(len(out[0])))
    VolumeInferer(num_inference_steps=5, num_samples=3).predict(volume, network)
    assert sum(seen) == 5  # one slice of six is empty


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


def test_without_a_grading_head_there_is_no_grade(volume):
    network = randomise(MedSegDiff(GaussianDiffusion(), use_cls_head=False, **TINY))
    assert "grade_prob" not in VolumeInferer().predict(volume, network)


def test_plain_unet_is_sampled_alike(volume):
    network = randomise(PlainUNet(GaussianDiffusion(), calib_channels=[8, 8, 16]))
    image = volume[0].movedim(-1, 0)[1:]
    prob = VolumeInferer().predict(volume, network)["pred"][0].movedim(-1, 0)[1:]
    assert torch.allclose(prob, network(image).sigmoid(), atol=1e-5)


def test_empty_volume(network, volume):
    with pytest.raises(InputError, match="a volume is empty"):
        VolumeInferer().predict(torch.zeros_like(volume), network)


def test_three_grades(volume):
    network = randomise(MedSegDiff(GaussianDiffusion(), num_grades=3, **TINY))
    prob = VolumeInferer(2, num_samples=2).predict(volume, network)["grade_prob"]
    assert prob.shape == (1, 3)
    assert prob.sum().item() == pytest.approx(1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_inference_steps": -1}, "num_inference_steps=-1"),
        ({"num_samples": 0}, "num_samples=0"),
        ({"sampling_batch_size": 0}, "sampling_batch_size=0"),
        ({"num_samples": 5, "sampling_batch_size": 4}, "num_samples=5 must not exceed sampling_batch_size=4"),
        ({"fusion": "median"}, "fusion 'median'"),
        ({"sampler": "heun"}, "sampler 'heun'"),
        ({"calibrated_for": "head"}, "calibrated_for 'head'"),
    ],
)
def test_unusable_settings(settings, message):
    with pytest.raises(InputError, match=message):
        VolumeInferer(**settings)


def test_larger_slices_make_smaller_batches(network):
    seen = []
    network.calibrator.register_forward_hook(lambda module, args, out: seen.append(len(out[0])))
    VolumeInferer(num_samples=2, sampling_batch_size=16).predict(torch.rand(1, 4, 256, 256, 5) + 1, network)
    assert seen == [2, 2, 1]  # a quarter of 16 // 2


def test_check_before_any_volume_is_read(network):
    VolumeInferer(1000).check(network, 16)
    with pytest.raises(InputError, match="divisible by 4"):
        VolumeInferer().check(network, 18)
    with pytest.raises(InputError, match="num_inference_steps=1001"):
        VolumeInferer(1001).check(network, 16)
    with pytest.raises(InputError, match="start_timestep=1000"):
        VolumeInferer(start_timestep=1000).check(network, 16)
    with pytest.raises(InputError, match="need a calibration map"):
        VolumeInferer(start_timestep=9).check(PlainUNet(GaussianDiffusion(), calib_channels=[8, 8, 16]), 16)


def test_no_evaluation_gives_the_calibration_map(network, volume):
    inferer = VolumeInferer(num_inference_steps=0, num_samples=2)
    inferer.check(network, 16)
    network.denoiser.forward = None  # must not be called
    result = inferer.predict(volume, network)
    expected = network.condition(volume[0].movedim(-1, 0))["calib_map"].sigmoid().movedim(0, -1)
    filled = (volume[0] != 0).flatten(0, 2).any(dim=0)
    assert torch.allclose(result["prob"][0][..., filled], expected[..., filled], atol=1e-5)
    assert "grade_prob" not in result
    with pytest.raises(InputError, match="add 'highway'"):
        inferer.check(PlainUNet(GaussianDiffusion(), calib_channels=[8, 8, 16]), 16)


# ---- a stochastic network
@pytest.fixture
def stochastic():
    return randomise(MedSegDiff(GaussianDiffusion(), conditioning=["highway", "stochastic"], **TINY))


def draws_of(network, image, seed, index, samples, denoised=True):
    """Logits that the image branch draws for a slice, and the noise that is then added to their masks."""
    values = torch.cat(noise_of(seed, index, draws=2 * samples + denoised))  # if denoised, the first is of the mask
    noise, own = values[denoised:].split(samples)
    return draw_logits(network.condition(image), spread_noise(samples, seed), own[None])[0], noise


def test_the_noise_of_draws_is_normal_and_even():
    noise = torch.cat([spread_noise(16, seed) for seed in range(500)])
    assert noise.shape == (500, 16, 10)
    assert noise.mean().abs() < 0.02
    assert noise.var() == pytest.approx(1, abs=0.03)
    assert noise.mean(dim=1).var() < 0.3 / 16  # of independent draws it would be 1 / 16


def test_several_samples_start_from_noised_draws(stochastic, volume):
    image, t = volume[0].movedim(-1, 0)[1:2], torch.full((3,), 500)
    draws, noise = draws_of(stochastic, image, 5, 1, 3)
    x_t = stochastic.diffusion.add_noise(torch.tanh(draws / 2), noise, t)
    expected = stochastic(image.expand(3, -1, -1, -1), x_t, t)[0].sigmoid()
    found = VolumeInferer(num_samples=3, seed=5).sample(image, stochastic, [1])[0][0]
    assert torch.allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize("options", [{}, {"start_timestep": 300}, {"num_samples": 4}, {"num_samples": 4, "seed": 0}])
def test_mask_and_grade_of_a_stochastic_network_take_one_evaluation_from_noise(stochastic, volume, options):
    """They do not depend on the samples."""
    image = volume[0].movedim(-1, 0)[1:2]
    logits, cls_logits, _ = stochastic(image, noise_of(0, 1)[0], torch.tensor([999]))
    found = VolumeInferer(**options).sample(image, stochastic, [1])
    assert torch.allclose(found.mask, logits.sigmoid(), atol=1e-6)
    assert torch.allclose(found.grade_prob, cls_logits.softmax(dim=1), atol=1e-6)
    if "num_samples" not in options:
        assert torch.equal(found.samples[:, 0], found.mask)


def test_more_evaluations_are_for_the_samples(stochastic, volume):
    image = volume[0].movedim(-1, 0)[1:2]
    one, ten = (VolumeInferer(steps, num_samples=4).sample(image, stochastic, [1]) for steps in (1, 10))
    assert torch.equal(one.mask, ten.mask)
    assert not torch.allclose(one.samples, ten.samples)
    with pytest.raises(InputError, match="num_inference_steps=10 is for the samples"):
        VolumeInferer(10).check(stochastic, 16)


def test_draws_are_masks_without_any_evaluation(stochastic, volume):
    image = volume[0].movedim(-1, 0)[1:2]
    draws, _ = draws_of(stochastic, image, 0, 1, 4, denoised=False)
    stochastic.denoiser.forward = None  # is not called
    found = VolumeInferer(0, num_samples=4).sample(image, stochastic, [1])
    assert torch.equal(found.samples[0], (draws > 0).float())
    assert found.grade_prob is None
    assert torch.equal(found.mask, found.calib_prob)


def test_factors_are_common_to_the_slices_of_a_sample(stochastic, volume):
    """The same noise in all slices: with the diagonal at 0, equal slices have equal draws."""
    stochastic.distribution.output_block.conv.conv.weight.data *= 100
    stochastic.distribution.output_block.conv.conv.bias.data[:] = 0  # the masks must not be full or empty
    stochastic.distribution.output_block.conv.conv.bias.data[-1] = -100  # softplus is 0
    stochastic.distribution.output_block.conv.conv.weight.data[-1] = 0
    image = volume[0].movedim(-1, 0)[1:2].expand(2, -1, -1, -1)
    samples = VolumeInferer(0, num_samples=8).sample(image, stochastic, [1, 2])[0]
    assert (samples[0] == samples[1]).float().mean() > 0.99
    assert not torch.equal(samples[0, 0], samples[0, 1])


def test_the_probability_of_a_stochastic_network_is_its_calibration_map(stochastic, volume):
    """Whatever is sampled."""
    sampled = VolumeInferer(num_samples=2, keep_samples=True).predict(volume, stochastic)
    alone = VolumeInferer(0).predict(volume, stochastic)
    assert torch.allclose(sampled["prob"], alone["prob"])
    assert torch.equal(alone["prob"], alone["pred"])
    assert torch.equal(sampled["seg_prob"], sampled["pred"])
    assert torch.equal(VolumeInferer().predict(volume, stochastic)["pred"], sampled["pred"])
    assert "samples" not in alone
    stochastic.calibration.foreground_temperature.fill_(2.0)
    calibrated = VolumeInferer(num_samples=2).predict(volume, stochastic)
    assert torch.equal(calibrated["pred"], sampled["pred"])  # the mask is not the probability
    assert not torch.equal(calibrated["prob"], sampled["prob"])


def test_samples_are_kept_for_the_volumes_that_are_read_from_them(stochastic, volume):
    assert "samples" not in VolumeInferer(num_samples=2).predict(volume, stochastic)
    stochastic.calibration.volumes_from = "samples"
    stochastic.calibration.sampling = VolumeInferer(num_samples=2).sampling
    found = VolumeInferer(num_samples=2).predict(volume, stochastic)
    assert found["samples"].shape[1] == 2
    assert found["volumes_from"].tolist() == [1]
    assert "samples" not in VolumeInferer().predict(volume, stochastic)  # fitted with other settings


def test_the_calibration_of_a_stochastic_network_holds_for_any_number_of_samples(stochastic, volume):
    """Its probability, mask and grade do not depend on them; volumes that are read from samples do."""
    stochastic.calibration.sampling = VolumeInferer(num_samples=16).sampling
    assert VolumeInferer().calibration_of(stochastic) is stochastic.calibration
    stochastic.calibration.volumes_from = "samples"
    assert VolumeInferer().calibration_of(stochastic) is not stochastic.calibration
    assert VolumeInferer(num_samples=16).calibration_of(stochastic) is stochastic.calibration


@pytest.mark.parametrize("fusion", ["majority", "staple"])
def test_a_stochastic_network_does_not_fuse_its_samples(stochastic, fusion):
    with pytest.raises(InputError, match=f"fusion={fusion}.*mask of its own"):
        VolumeInferer(num_samples=3, fusion=fusion).check(stochastic, 16)


def test_the_start_must_leave_room_for_the_steps(stochastic):
    VolumeInferer(501, num_samples=2).check(stochastic, 16)
    VolumeInferer(602, num_samples=2, start_timestep=999).check(stochastic, 16)
    with pytest.raises(InputError, match="between 1 and 501"):
        VolumeInferer(502, num_samples=2).check(stochastic, 16)


def test_samples_are_kept_region_by_region(volume):
    network = randomise(MedSegDiff(GaussianDiffusion(), out_channels=3, **TINY))
    result = VolumeInferer(num_samples=2, keep_samples=True).predict(volume, network)
    assert result["samples"].shape == (1, 6, 16, 16, 6)
    assert torch.allclose(result["samples"].unflatten(1, (2, 3)).mean(dim=1), result["pred"], atol=1e-6)
