from __future__ import annotations

import pytest
import torch
from monai.networks.nets import DiffusionModelUNet

from scripts.config import InputError
from scripts.diffusion.schedule import GaussianDiffusion
from scripts.net import MedSegDiff, build
from scripts.networks.conditioning import CONDITIONING, HIGHWAY, MODULES, STOCHASTIC, ConditioningModule
from scripts.networks.stochastic import RANK, StochasticUNet, draw_logits, negative_log_likelihood
from scripts.networks.unets import Denoiser
from scripts.networks.variants import VARIANTS, Variant
from scripts.sampling.inferer import VolumeInferer
from scripts.training.losses import MultiTaskLoss

TINY = {"channels": [8, 8, 16], "calib_channels": [8, 16, 16]}


def inputs(batch=2, modalities=4, regions=1, size=16):
    return torch.randn(batch, modalities, size, size), torch.randn(batch, regions, size, size), torch.tensor([3, 999])


def randomise(network):
    torch.manual_seed(0)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return network.eval()


@pytest.mark.parametrize("modalities", [1, 4])
@pytest.mark.parametrize("regions", [1, 3])
def test_forward_shapes(modalities, regions):
    network = MedSegDiff(GaussianDiffusion(), modalities, regions, **TINY)
    seg_logits, cls_logits, calib_map = network(*inputs(2, modalities, regions))
    assert seg_logits.shape == calib_map.shape == (2, regions, 16, 16)
    assert cls_logits.shape == (2, 2)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("conditioning", [["highway"], ["highway", *MODULES], ["highway", "self_conditioning"]])
def test_the_denoiser_corrects_the_map_at_a_part_of_the_resolution(stride, conditioning):
    network = randomise(MedSegDiff(GaussianDiffusion(), conditioning=conditioning, denoiser_stride=stride, **TINY))
    seen = []
    network.denoiser.conv_in.register_forward_hook(lambda module, args, output: seen.append(output.shape[2:]))
    seg_logits, _, calib_map = network(*inputs(size=32))
    assert seg_logits.shape == calib_map.shape == (2, 1, 32, 32)
    assert seen == [(32 // stride, 32 // stride)]
    assert (seg_logits != calib_map).all()
    with pytest.raises(InputError, match=f"divisible by {4 * stride}"):
        network(*inputs(size=34))


@pytest.mark.parametrize(
    ("settings", "prediction_type"),
    [({"conditioning": []}, "sample"), ({"conditioning": ["highway", "stochastic"]}, "sample"), ({}, "v_prediction")],
)
def test_nothing_else_is_denoised_at_a_part_of_the_resolution(settings, prediction_type):
    network = MedSegDiff(GaussianDiffusion(prediction_type=prediction_type), denoiser_stride=2, **TINY | settings)
    assert network.denoiser.stride == 1
    assert network.divisor == 4


def test_without_grading_head():
    network = MedSegDiff(GaussianDiffusion(), use_cls_head=False, **TINY)
    seg_logits, cls_logits, calib_map = network(*inputs())
    assert cls_logits is None
    assert seg_logits.shape == calib_map.shape
    assert not any("cls_head" in name for name, _ in network.named_parameters())


@pytest.mark.parametrize("channels", [[5, 7, 11], [8, 16, 24, 32], [4, 4, 4, 4, 4], [12, 20, 36]])
def test_any_width_and_depth(channels):
    network = MedSegDiff(GaussianDiffusion(), channels=channels, calib_channels=channels)
    assert network(*inputs(size=16))[0].shape == (2, 1, 16, 16)


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_builds(variant):
    with torch.device("meta"):
        network = MedSegDiff(GaussianDiffusion(), variant=variant)
    denoiser = network.denoiser
    assert len(denoiser.down_blocks) == len(VARIANTS[variant].channels)
    assert [hasattr(block, "attentions") for block in denoiser.down_blocks].count(True) == (variant != "S")
    modules = [name for place in denoiser.conditioning.values() for name in place]
    assert modules == (["anchor", "ss_former"] if variant == "v2" else [])


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_trains_a_step_and_samples(variant):
    """Images have 64 pixels, the network has its full width."""
    network = MedSegDiff(GaussianDiffusion(), variant=variant)
    before = network.denoiser.out[-1].conv.weight.clone()
    targets = {
        "label": torch.rand(2, 1, 64, 64).round(),
        "grade": torch.tensor([0, 1]),
        "empty": torch.tensor([False, False]),
        "timesteps": torch.tensor([3, 999]),
    }
    image, x_t, t = inputs(size=64)
    loss = MultiTaskLoss(network.diffusion)(network(image, x_t, t), targets)
    loss.backward()
    torch.optim.SGD(network.parameters(), lr=0.01).step()
    assert loss.isfinite()
    assert not torch.equal(network.denoiser.out[-1].conv.weight, before)
    prob = VolumeInferer().predict(image[:1, ..., None], network.eval())["prob"]
    assert prob.shape == (1, 1, 64, 64, 1)
    assert prob.isfinite().all()


def test_down_samplings_of_v1():
    assert [len(VARIANTS[name].channels) - 1 for name in ("S", "B", "L", "++")] == [4, 5, 6, 6]


def test_official_highway_has_as_many_parameters():
    with torch.device("meta"):
        network = MedSegDiff(GaussianDiffusion(), variant="v2")
    assert sum(p.numel() for p in network.calibrator.parameters()) == pytest.approx(15.7e6, rel=0.02)


def test_channels_override_all_of_the_variant_but_its_conditioning():
    network = MedSegDiff(GaussianDiffusion(), variant="v2", channels=[8, 8, 16])
    assert not any(hasattr(block, "attentions") for block in network.denoiser.down_blocks)
    assert network.calibrator.filters == (16, 16, 32)
    assert "ss_former" in network.denoiser.conditioning["bottom"]


def test_seed_settings_build():
    """The network of seed_settings.yaml: 128 channels in the first level, 2 residual blocks per level."""
    with torch.device("meta"):
        network = MedSegDiff(GaussianDiffusion(), variant="v2", channels=[128, 128, 256, 256, 512])
    assert network.denoiser.num_res_blocks == (2, 2, 2, 2, 2)


@pytest.mark.parametrize(
    ("bad", "message"), [({"variant": "XL"}, "variant 'XL'"), ({"channels": [8, 8]}, "channels=.*three or more")]
)
def test_unusable_sizes(bad, message):
    with pytest.raises(InputError, match=message):
        MedSegDiff(GaussianDiffusion(), **bad)


def test_image_size_must_be_divisible():
    with pytest.raises(InputError, match="divisible by 4"):
        MedSegDiff(GaussianDiffusion(), **TINY)(*inputs(size=18))


def test_denoiser_is_monais_network():
    monai = DiffusionModelUNet(
        spatial_dims=2,
        in_channels=3,
        out_channels=1,
        channels=[8, 8, 16],
        num_res_blocks=1,
        attention_levels=[False, False, True],
        norm_num_groups=8,
        num_head_channels=16,
    ).eval()
    ours = randomise(Denoiser(3, 1, Variant((8, 8, 16), attention=(2,)), image_channels=()))
    monai.load_state_dict(ours.state_dict())
    x, t = torch.randn(2, 3, 16, 16), torch.tensor([1, 700])
    output, middle = ours(x, t, {})
    assert torch.allclose(output, monai(x, t), atol=1e-6)
    assert output.abs().max() > 1e-3
    assert middle.shape == (2, 16, 4, 4)


@pytest.mark.parametrize(
    "conditioning", [[], [HIGHWAY], ["ff_parser"], *([HIGHWAY, name] for name in MODULES), CONDITIONING]
)
def test_every_parameter_gets_a_gradient(conditioning):
    network = randomise(MedSegDiff(GaussianDiffusion(), conditioning=conditioning, **TINY)).train()
    outputs = network(*inputs())
    sum(output.square().mean() for output in outputs if output is not None).backward()
    assert [n for n, p in network.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_every_input_matters():
    network = randomise(MedSegDiff(GaussianDiffusion(), **TINY))
    image, x_t, t = inputs()
    seg_logits, cls_logits, _ = network(image, x_t, t)
    for changed in ((image + 1, x_t, t), (image, x_t + 1, t), (image, x_t, t - 3)):
        other = network(*changed)
        assert not torch.allclose(other[0], seg_logits)
        assert not torch.allclose(other[1], cls_logits)


def test_condition_sees_only_the_image_and_can_be_reused():
    network = randomise(MedSegDiff(GaussianDiffusion(), conditioning=CONDITIONING, **TINY))
    image, x_t, t = inputs()
    seg_logits, _, calib_map = network(image, x_t, t)
    assert torch.equal(network(image, x_t + 1, t - 1)[2], calib_map)
    condition = network.condition(image)
    network.calibrator.forward = None  # must not be called again
    assert torch.equal(network(image, x_t, t, condition)[0], seg_logits)


@pytest.mark.parametrize("module", MODULES)
def test_every_module_changes_the_answer(module):
    """The network without the module has the same weights otherwise."""
    network = randomise(MedSegDiff(GaussianDiffusion(), conditioning=["highway", module], **TINY))
    without = MedSegDiff(GaussianDiffusion(), conditioning=["highway"], **TINY).eval()
    without.load_state_dict(
        {name: weight for name, weight in network.state_dict().items() if name in without.state_dict()}
    )
    given = inputs()
    for with_module, other in zip(network(*given)[:2], without(*given)[:2], strict=True):
        assert not torch.allclose(with_module, other)


def test_conditioning_on_an_image_that_the_denoiser_does_not_see():
    """Each module uses its own part of the condition: if the part changes, the logits change."""
    network = randomise(MedSegDiff(GaussianDiffusion(), conditioning=CONDITIONING, **TINY))
    for parameter in network.denoiser.conditioning["bottom"].parameters():
        parameter.data *= 5  # the attention's small random weights would hide its effect
    image, x_t, t = inputs()
    condition = network.condition(image)
    seg_logits = network(image, x_t, t, condition)[0]
    for name in ("stem_anchor", "bottom_ss_former", "level1_dynamic_encoding", "level2_dynamic_encoding"):
        changed = condition | {name: condition[name] + torch.randn_like(condition[name])}
        assert not torch.allclose(network(image, x_t, t, changed)[0], seg_logits), name


@pytest.mark.parametrize("conditioning", [["highway"], [name for name in CONDITIONING if name != STOCHASTIC]])
def test_a_fresh_network_answers_with_its_calibration_map(conditioning):
    seg_logits, _, calib_map = MedSegDiff(GaussianDiffusion(), conditioning=conditioning, **TINY)(*inputs())
    assert torch.equal(seg_logits, calib_map)


def test_a_fresh_stochastic_network_answers_with_its_first_mask():
    network = MedSegDiff(GaussianDiffusion(), conditioning=["highway", "stochastic"], **TINY)
    image, x_t, timesteps = inputs()
    seg_logits, _, calib_map = network(image, x_t, timesteps)
    condition = network.condition(image)
    assert torch.equal(seg_logits, condition["first_mask"])
    assert torch.equal(calib_map, condition["calib_map"])
    assert not torch.equal(seg_logits, calib_map)


def test_the_calibration_map_is_the_probability_of_the_draws():
    """MacKay's approximation of the marginal is within 0.02 of the mean of many draws."""
    torch.manual_seed(0)
    network = StochasticUNet(1, 2, [4, 8, 8])
    network.output_block.conv.conv.weight.data *= 4
    distribution, decoded = network(torch.randn(1, 1, 8, 8))
    assert decoded.shape == (1, 4, 8, 8)
    draws = draw_logits(distribution, torch.randn(1, 20000, RANK), torch.randn(1, 20000, 2, 8, 8))
    variance = (distribution["factors"].unflatten(1, (RANK, 2)) ** 2).sum(dim=1) + distribution["deviation"] ** 2
    assert torch.allclose(draws.var(dim=1), variance, rtol=0.1)
    assert variance.max() > 4
    assert (draws.sigmoid().mean(dim=1) - distribution["calib_map"].sigmoid()).abs().max() < 0.02


def test_the_likelihood_of_draws():
    """With draws that do not differ it is the cross entropy; with several it is the log of the mean likelihood."""
    torch.manual_seed(0)
    logits, label = torch.randn(3, 1, 2, 4, 4), (torch.rand(3, 2, 4, 4) > 0.5).float()
    entropy = torch.nn.functional.binary_cross_entropy_with_logits(logits[:, 0], label)
    assert torch.allclose(negative_log_likelihood(logits.expand(-1, 5, -1, -1, -1), label), entropy)
    two = torch.randn(1, 2, 1, 2, 2)
    truth = torch.ones(1, 1, 2, 2)
    expected = -two[0].sigmoid().flatten(1).prod(dim=1).mean().log() / 4
    assert torch.allclose(negative_log_likelihood(two, truth), expected)


def test_uniform_slices_have_a_finite_likelihood():
    """The paper's Cholesky decomposition fails where nothing varies; direct draws do not."""
    network = MedSegDiff(GaussianDiffusion(), conditioning=["highway", "stochastic"], **TINY)
    condition = network.condition(torch.zeros(1, 4, 16, 16))
    draws = draw_logits(condition, torch.randn(1, 10, RANK), torch.randn(1, 10, 1, 16, 16))
    loss = negative_log_likelihood(draws, torch.zeros(1, 1, 16, 16))
    loss.backward()
    assert loss.isfinite()
    assert network.distribution.output_block.conv.conv.weight.grad.isfinite().all()


def test_image_alone_gives_logits_for_export_and_verification():
    network = randomise(MedSegDiff(GaussianDiffusion(), **TINY))
    image, _, _ = inputs()
    expected = network(image, torch.zeros(2, 1, 16, 16), torch.tensor([999, 999]))[0]
    assert torch.equal(network(image), expected)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_logits_come_through_the_implied_mask(prediction_type):
    diffusion = GaussianDiffusion(prediction_type=prediction_type)
    network = randomise(MedSegDiff(diffusion, **TINY))
    image, x_t, t = inputs()
    captured = []
    network.denoiser.register_forward_hook(lambda module, args, out: captured.append(out[0]))
    seg_logits = network(image, x_t, t)[0]
    assert torch.equal(seg_logits, diffusion.to_logits(captured[0], x_t, t))


def test_without_highway_image_and_mask_are_concatenated():
    network = MedSegDiff(GaussianDiffusion(), conditioning=[], **TINY)
    assert network.calibrator is None
    assert network.denoiser.conv_in.conv.in_channels == 5
    assert network(*inputs())[2] is None
    assert network.condition(inputs()[0]) == {}


@pytest.mark.parametrize("deeper", [{"channels": [8, 8, 8, 8]}, {"calib_channels": [8, 8, 8, 8]}])
def test_the_two_unets_may_differ_in_depth(deeper):
    network = randomise(MedSegDiff(GaussianDiffusion(), conditioning=CONDITIONING, **TINY | deeper))
    assert network(*inputs(size=16))[0].shape == (2, 1, 16, 16)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"conditioning": ["highways"]}, "list of names"),
        ({"conditioning": "highway"}, "list of names"),
        ({"conditioning": ["anchor", "ff_parser"]}, "'anchor'.*'highway'"),
        ({"variant": "XL"}, "variant 'XL'"),
        ({"denoiser_stride": 3}, "denoiser_stride=3 must be 1, 2, 4 or 8"),
        ({"denoiser_stride": "2"}, "denoiser_stride='2'"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(InputError, match=message):
        MedSegDiff(GaussianDiffusion(), **settings)


SETTINGS_OF_MODEL = {
    "architecture": "MedSegDiff",
    "modalities": ["t1", "t2"],
    "regions": ["WT", "ET"],
    "grade_labels": {"G2": 0, "G3": 1, "G4": 2},
    "num_train_timesteps": 20,
    "schedule": "cosine",
    **TINY,
}


def test_a_network_is_built_from_plain_settings():
    network = build(SETTINGS_OF_MODEL)
    assert network.diffusion.num_train_timesteps == 20
    seg_logits, cls_logits, _ = network(*(part for part in (torch.zeros(2, 2, 16, 16), torch.zeros(2, 2, 16, 16))))
    assert seg_logits.shape == (2, 2, 16, 16)
    assert cls_logits.shape == (2, 3)
    baseline = build(SETTINGS_OF_MODEL | {"architecture": "PlainUNet"})
    assert baseline.unet.filters == tuple(TINY["calib_channels"])
    with pytest.raises(InputError, match="architecture 'UNet' is not one of"):
        build(SETTINGS_OF_MODEL | {"architecture": "UNet"})


def test_one_more_module_is_one_class_and_one_entry(monkeypatch):
    class Scale(ConditioningModule):
        place = "bottom"

        def __init__(self, channels, image_channels, embedding):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(channels, 1, 1))

        def prepare(self, image_features):
            return image_features.mean(dim=(1, 2, 3), keepdim=True)

        def forward(self, x, prepared, emb):
            return x + self.weight * prepared

    monkeypatch.setitem(MODULES, "scale", Scale)
    monkeypatch.setattr("scripts.networks.conditioning.CONDITIONING", (*CONDITIONING, "scale"))
    network = randomise(MedSegDiff(GaussianDiffusion(), conditioning=["highway", "scale"], **TINY))
    outputs = network(*inputs())
    outputs[0].sum().backward()
    assert network.denoiser.conditioning["bottom"]["scale"].weight.grad.any()


def test_the_noisy_mask_matters():
    """Trained on masks that the image does not show, the network reads them from x_t."""
    torch.manual_seed(0)
    network = MedSegDiff(GaussianDiffusion(), in_channels=1, **TINY)
    optimizer = torch.optim.Adam(network.parameters(), lr=0.01)
    image = torch.zeros(8, 1, 16, 16)

    def noised(mask, timestep):
        timesteps = torch.full((8,), timestep)
        return network.diffusion.add_noise(2 * mask - 1, torch.randn_like(mask), timesteps), timesteps

    for _ in range(100):
        mask = (torch.rand(8, 1, 2, 2) > 0.5).float().repeat_interleave(8, 2).repeat_interleave(8, 3)
        logits = network(image, *noised(mask, 50))[0]
        optimizer.zero_grad()
        torch.nn.functional.binary_cross_entropy_with_logits(logits, mask).backward()
        optimizer.step()
    network.eval()
    x_t, timesteps = noised(mask, 50)
    with torch.no_grad():
        same, inverted = (network(image, x, timesteps)[0] > 0 for x in (x_t, -x_t))
    assert (same == (mask > 0)).float().mean() > 0.95
    assert (inverted == (mask > 0)).float().mean() < 0.05
