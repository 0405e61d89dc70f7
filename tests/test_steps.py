from __future__ import annotations

import pytest
import torch
from monai.networks.schedulers import DDPMScheduler

from scripts.config import InputError
from scripts.diffusion.schedule import GaussianDiffusion
from scripts.net import MedSegDiff
from scripts.networks.baselines import PlainUNet
from scripts.training.losses import MultiTaskLoss
from scripts.training.steps import DenoisingInferer, DrawNoise
from test_net import TINY, randomise

STOCHASTIC = {**TINY, "conditioning": ["highway", "stochastic"]}


def batch(size):
    return {
        "image": torch.randn(size, 4, 16, 16),
        "label": (torch.rand(size, 1, 16, 16) > 0.5).float(),
        "grade": torch.randint(-1, 2, (size,)),
        "empty": torch.zeros(size, dtype=torch.bool),
        "subject": [f"s{i}" for i in range(size)],
    }


def seen_by_denoiser(network, noised_mask, data):
    """Run a training step. Return the arguments of each call of the network, the outputs and the drawn noise."""
    image, _, _, kwargs = DrawNoise(network.diffusion.num_train_timesteps)(data)
    calls = []
    forward = network.forward
    network.forward = lambda image, *args: calls.append(args) or forward(image, *args)
    outputs = DenoisingInferer(noised_mask)(image, network, **kwargs)
    return calls, outputs, kwargs


def test_prepares_what_the_loss_and_the_network_need():
    data = batch(4)
    image, targets, args, kwargs = DrawNoise(7)(data)
    assert args == ()
    assert torch.equal(image, data["image"])
    assert targets["subject"] == data["subject"]
    assert torch.equal(targets["timesteps"], kwargs["timesteps"])
    assert kwargs["noise"].shape == targets["label"].shape


def test_timesteps_are_uniform():
    torch.manual_seed(0)
    timesteps = DrawNoise(4)(batch(4000))[3]["timesteps"]
    assert timesteps.bincount().tolist() == pytest.approx([1000] * 4, rel=0.1)


def test_noises_the_truth():
    torch.manual_seed(0)
    data = batch(16)
    calls, outputs, kwargs = seen_by_denoiser(randomise(MedSegDiff(GaussianDiffusion(), **TINY)), "truth", data)
    ((x_t, t, _, estimate),) = calls
    abar = DDPMScheduler(1000, schedule="linear_beta").alphas_cumprod[t].reshape(-1, 1, 1, 1)
    expected = abar.sqrt() * (2 * data["label"] - 1) + (1 - abar).sqrt() * kwargs["noise"]
    assert torch.allclose(x_t, expected, atol=1e-5)
    assert estimate is None
    assert outputs[0].shape == data["label"].shape


@pytest.mark.parametrize("noised_mask", ["prediction", "calibration"])
def test_noises_what_the_network_says_and_nothing_of_the_truth(noised_mask):
    network = randomise(MedSegDiff(GaussianDiffusion(), **TINY))
    data = batch(4)
    noised = []
    for label in (data["label"], 1 - data["label"]):
        torch.manual_seed(1)
        calls, outputs, _ = seen_by_denoiser(network, noised_mask, data | {"label": label})
        noised.append(calls[-1][0])
        assert len(calls) == (2 if noised_mask == "prediction" else 1)
        if noised_mask == "prediction":
            assert (calls[0][1] == 999).all()  # the prediction starts from pure noise
        outputs[0].sum().backward()
        assert network.denoiser.conv_in.conv.weight.grad.abs().sum() > 0
        assert network.calibrator.input_block.conv1.conv.weight.grad.abs().sum() > 0
        network.zero_grad()
    assert torch.equal(*noised)
    assert not noised[0].requires_grad


def test_the_calibration_map_is_what_is_noised():
    network = randomise(MedSegDiff(GaussianDiffusion(), **TINY))
    calls, _, kwargs = seen_by_denoiser(network, "calibration", batch(4))
    ((x_t, t, condition, _),) = calls
    expected = network.diffusion.add_noise(torch.tanh(condition["calib_map"] / 2), kwargs["noise"], t)
    assert torch.allclose(x_t, expected, atol=1e-6)


def test_self_conditioning_sees_its_own_estimate_in_half_of_the_slices():
    torch.manual_seed(0)
    network = randomise(MedSegDiff(GaussianDiffusion(), conditioning=["highway", "self_conditioning"], **TINY))
    calls, outputs, _ = seen_by_denoiser(network, "truth", batch(64))
    first, second = calls
    assert len(first) == 3  # the first call gets no estimate
    assert torch.equal(first[0], second[0])
    used = second[3].flatten(1).any(dim=1)
    assert 16 < used.sum() < 48
    assert second[3].abs().max() <= 1
    assert not second[3].requires_grad
    outputs[0].sum().backward()  # the extra channel is trained
    assert network.denoiser.conv_in.conv.weight.grad[:, -1].abs().sum() > 0


def test_the_plain_unet_has_nothing_to_recycle():
    network = randomise(PlainUNet(GaussianDiffusion(), calib_channels=[8, 8, 16]))
    for noised_mask in ("truth", "prediction"):
        calls, _, _ = seen_by_denoiser(network, noised_mask, batch(2))
        assert len(calls) == 1
        del network.forward


def test_the_calibration_map_cannot_be_noised_without_one():
    network = MedSegDiff(GaussianDiffusion(), channels=[8, 8, 8], conditioning=[])
    DenoisingInferer().check(network)
    with pytest.raises(InputError, match="'highway' in conditioning"):
        DenoisingInferer("calibration").check(network)


def test_without_a_calibration_map_the_prediction_is_noised():
    network = randomise(MedSegDiff(GaussianDiffusion(), channels=[8, 8, 8], conditioning=[]))
    calls, _, _ = seen_by_denoiser(network, None, batch(2))
    assert len(calls) == 2


def test_unknown_noised_mask():
    with pytest.raises(InputError, match="noised_mask 'mask'"):
        DenoisingInferer("mask")


def step_losses(network, data, **options):
    """Loss and gradient of a training step with options of precision."""
    torch.manual_seed(0)
    image, targets, _, kwargs = DrawNoise(1000)(data)
    loss = MultiTaskLoss(network.diffusion)(
        DenoisingInferer("calibration", **options)(image, network, **kwargs), targets
    )
    network.zero_grad()
    loss.backward()
    return loss.item(), network.denoiser.conv_in.conv.weight.grad.clone()


def learner(seed=0):
    torch.manual_seed(seed)
    network = randomise(MedSegDiff(GaussianDiffusion(), **TINY))
    (dropout,) = (module for module in network.cls_head if isinstance(module, torch.nn.Dropout))
    dropout.p = 0.0  # dropout draws other numbers with another precision
    return network


def test_compiled_steps_are_the_plain_step():
    data = batch(4)
    loss, gradient = step_losses(learner(), data)
    compiled = learner()
    for part in compiled.children():
        part.compile(backend="aot_eager")  # as train::compile does, but without the C++ compiler
    names = compiled.state_dict().keys()
    compiled_loss, compiled_gradient = step_losses(compiled, data)
    assert compiled_loss == pytest.approx(loss, rel=1e-4)
    assert torch.allclose(compiled_gradient, gradient, atol=1e-4 * gradient.abs().max())
    assert compiled.state_dict().keys() == names == learner().state_dict().keys()


@pytest.mark.parametrize("amp_dtype", ["bfloat16", "float16"])
def test_half_precision_gives_the_same_losses(amp_dtype):
    data = batch(4)
    (loss, _), (half, gradient) = (step_losses(learner(), data, amp=amp, amp_dtype=amp_dtype) for amp in (False, True))
    assert half != loss
    assert half == pytest.approx(loss, rel=0.02)
    assert gradient.dtype == torch.float32
    assert gradient.isfinite().all()


def test_unknown_amp_dtype():
    with pytest.raises(InputError, match="amp_dtype 'half'"):
        DenoisingInferer(amp=True, amp_dtype="half")


# ---- a stochastic network
def test_what_a_stochastic_network_adds_to_its_outputs():
    torch.manual_seed(0)
    network = randomise(MedSegDiff(GaussianDiffusion(), **STOCHASTIC))
    data = batch(8)
    calls, outputs, kwargs = seen_by_denoiser(network, None, data)
    seg_logits, cls_logits, calib_map, draws, first_mask, samples, truth = outputs
    assert seg_logits.shape == calib_map.shape == first_mask.shape == (8, 1, 16, 16)
    assert cls_logits.shape == (8, 2)
    assert draws.shape == (8, 10, 1, 16, 16)
    assert draws.std(dim=1).min() > 0
    draws.sum().backward()
    assert network.distribution.output_block.conv.conv.weight.grad.abs().min() > 0
    assert network.denoiser.conv_in.conv.weight.grad is None
    assert network.calibrator.output_block.conv.conv.weight.grad is None
    sampled = len(truth)
    assert 0 < sampled < 8
    assert len(samples) == 2 * sampled
    ((x_t, timesteps, *_),) = calls
    assert torch.equal(timesteps[:8], torch.full((8,), 999))
    first, second = x_t[8:].chunk(2)
    assert torch.equal(timesteps[8:].chunk(2)[0], timesteps[8:].chunk(2)[1])
    assert not torch.equal(first, second)
    rows = [(data["label"] == mask).flatten(1).all(dim=1).nonzero().item() for mask in truth]
    assert torch.equal(timesteps[8 : 8 + sampled], kwargs["timesteps"][rows])


def test_samples_of_a_stochastic_network_start_from_the_truth():
    """With hardly any noise, both noised masks are the true mask."""
    torch.manual_seed(0)
    network = randomise(MedSegDiff(GaussianDiffusion(), **STOCHASTIC))
    image, _, _, kwargs = DrawNoise(1)(batch(8))
    seen = []
    forward = network.forward
    network.forward = lambda image, x_t, *args: seen.append(x_t) or forward(image, x_t, *args)
    *_, truth = DenoisingInferer()(image, network, **kwargs)
    noised = seen[0][8:].chunk(2)
    assert len(truth)
    assert all(((mask > 0) == (truth > 0)).all() for mask in noised)


def test_a_stochastic_network_noises_the_truth():
    assert MedSegDiff(GaussianDiffusion(), **STOCHASTIC).noised_mask == "truth"
    assert MedSegDiff(GaussianDiffusion(), **TINY).noised_mask == "calibration"


def test_masks_and_probability_have_networks_of_their_own():
    """No gradient of the mask reaches the network of the probability, and none the reverse."""
    network = randomise(MedSegDiff(GaussianDiffusion(), **STOCHASTIC))
    outputs = seen_by_denoiser(network, None, batch(2))[1]
    of_mask, of_probability = list(network.calibrator.parameters()), list(network.distribution.parameters())
    for output, own, other in ((outputs[0], of_mask, of_probability), (outputs[2], of_probability, of_mask)):
        network.zero_grad()
        output.sum().backward(retain_graph=True)
        assert all(parameter.grad is None for parameter in other)
        assert all(parameter.grad.abs().sum() > 0 for parameter in own)


def test_the_losses_of_a_stochastic_network():
    """L_calib is cross entropy. The other losses are minimised too, but the reported L_total is without them."""
    torch.manual_seed(0)
    network = randomise(MedSegDiff(GaussianDiffusion(), **STOCHASTIC))
    image, targets, _, kwargs = DrawNoise(1000)(batch(8))
    outputs = DenoisingInferer()(image, network, **kwargs)
    loss = MultiTaskLoss(network.diffusion, tasks=["segmentation"], stochastic=True)
    total, parts = loss(outputs, targets), loss.components
    label = targets["label"]
    entropy = torch.nn.functional.binary_cross_entropy_with_logits(outputs[2], label)
    sampled = loss.energy_score(*outputs[5].chunk(2), outputs[6])
    assert torch.allclose(parts["L_seg"], loss.mask_loss(outputs[0], label))
    assert torch.allclose(parts["L_calib"], entropy)
    assert torch.allclose(parts["L_first"], loss.mask_loss(outputs[4], label))
    assert torch.allclose(parts["L_sample"], sampled)
    assert torch.allclose(parts["L_total"], parts["L_seg"] + parts["L_calib"])
    assert torch.allclose(total, sum(parts[name] for name in ("L_total", "L_draw", "L_first", "L_sample")))
    loss(outputs[:3], targets)  # as in validation
    assert not {"L_draw", "L_first", "L_sample"} & set(loss.components)


@pytest.mark.parametrize("chance", [0.0, 1.0])
def test_batches_in_which_all_or_no_slices_are_sampled(chance, monkeypatch):
    network = randomise(MedSegDiff(GaussianDiffusion(), **STOCHASTIC))
    image, targets, _, kwargs = DrawNoise(1000)(batch(2))
    monkeypatch.setattr(torch, "rand", lambda count, device: torch.full((count,), chance))
    loss = MultiTaskLoss(network.diffusion, stochastic=True)
    loss(DenoisingInferer()(image, network, **kwargs), targets).backward()
    assert ("L_sample" in loss.components) == (chance == 0)
    assert loss.components["L_seg"] > 0
    assert all(p.grad.isfinite().all() for p in network.parameters() if p.grad is not None)


def test_the_energy_score_is_lowest_for_the_distribution_of_the_truth():
    """Two masks, each the truth in half of the cases: samples of both beat the same mask twice, and their mean."""
    one, two = torch.zeros(2, 1, 1, 8, 8)
    one[..., :4], two[..., 4:] = 1, 1
    loss = MultiTaskLoss(GaussianDiffusion(), stochastic=True)

    def expected(samples):
        pairs = [(first, second, label) for first in samples for second in samples for label in (one, two)]
        first, second, label = (torch.cat(part) for part in zip(*pairs, strict=True))
        return loss.energy_score(torch.logit(first, 1e-6), torch.logit(second, 1e-6), label)

    both, always, mean = (expected(samples) for samples in ([one, two], [one], [(one + two) / 2]))
    assert both < always - 0.1
    assert both < mean - 0.1
    assert expected([torch.zeros_like(one)]) > both
