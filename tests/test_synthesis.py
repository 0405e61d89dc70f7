"""The bundle of synthesis from pairs to files, on tiny CTs."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import torch
from monai.bundle import ConfigParser, verify_net_in_out
from monai.losses import JukeboxLoss
from monai.metrics import SSIMMetric
from torch import nn

from conftest import ROOT, assert_same, run_files, state, wait_for
from scripts.config import InputError
from scripts.synthesis.inferer import SynthesisInferer
from scripts.synthesis.losses import SynthesisLoss
from scripts.synthesis.networks import FrozenRefine, Generator, build
from scripts.synthesis.registration import Registration
from scripts.synthesis.report import summary
from scripts.synthesis.scores import body_mask, looked_up, lookup_table, mask_file, scores
from scripts.synthesis.transforms import CheckPaird, ToHounsfieldd

BUNDLE = ROOT / "bundles" / "synthesis"
FEATURES = [8, 8, 8, 8, 8, 8]
TINY = {"features": FEATURES, "refiner_width": 8, "refiner_units": 2, "slices_per_volume": 4, "val_interval": 1}
TINY |= {"discriminator_def::scales": 1, "discriminator_def::channels": 8}
TINY |= {"max_epochs": 2, "learning_rate": 1e-3, "validation_share": 0.3, "num_folds": 3}
HU_RANGE = [-1000, 600]


def run(*configs, **overrides):
    run_files([BUNDLE / "configs" / name for name in configs], **overrides)


@pytest.fixture(scope="module")
def generator(pairs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("generator")
    folders = {"dataset_dir": str(pairs), "output_dir": str(folder), "ckpt_dir": str(folder)}
    run("train.yaml", "stage0_generator.yaml", **folders, **TINY)
    return folder


@pytest.fixture(scope="module")
def refined(pairs, generator, tmp_path_factory):
    folder = tmp_path_factory.mktemp("refined")
    folders = {"dataset_dir": str(pairs), "output_dir": str(folder), "ckpt_dir": str(folder)}
    run("train.yaml", generator_ckpt=str(generator / "model.pt"), **folders, **TINY)
    return folder


def infer(weights, data, out, **overrides):
    options = {"dataset_dir": str(data), "ckpt_path": str(weights / "model.pt"), "output_dir": str(out)}
    run("inference.yaml", **options | overrides)


# ---- networks and losses
def test_both_networks_start_as_the_identity():
    image = torch.randn(2, 3, 32, 48)
    network = Generator(3, FEATURES)
    assert torch.equal(network(image), image[:, 1:2])
    with torch.no_grad():
        network.unet.final_conv.bias.fill_(0.25)
    for intermediate, expected in {
        "direct": image[:, 1:2] + 0.25,
        "product": image[:, 1:2] * (image[:, 1:2] + 0.25).abs(),
        "both": image[:, 1:2] + 0.25,
    }.items():
        assert torch.allclose(FrozenRefine(network, intermediate, 8, 2)(image), expected), intermediate


def test_the_generator_stays_as_it_is():
    network = FrozenRefine(Generator(1, FEATURES), width=8, units=2).train()
    assert not network.generator.training
    assert network.refiner.training
    before = {name: value.clone() for name, value in network.generator.state_dict().items()}
    optimizer = torch.optim.Adam([p for p in network.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        network(torch.randn(2, 1, 32, 32)).square().mean().backward()
        optimizer.step()
    assert all(torch.equal(before[name], value) for name, value in network.generator.state_dict().items())
    assert network.refiner.last.weight.abs().sum() > 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"features": [12] * 6}, "must be multiples of 8"),
        ({"intermediate": "sum"}, "intermediate 'sum' is not one of"),
    ],
)
def test_other_networks_are_refused(change, message):
    settings = {"num_slices": 1, "features": FEATURES, "intermediate": "both", "refiner_width": 8, "refiner_units": 1}
    with pytest.raises(InputError, match=message):
        build(settings | change)


def of(label, **further):
    return {"label": label, **further}


def test_the_loss_is_0_for_equal_slices_and_sees_each_resolution():
    image = torch.rand(2, 1, 32, 32) * 2 - 1
    assert SynthesisLoss([1, 2])(image, of(image)).item() == pytest.approx(0, abs=1e-6)
    checks = image + 0.5 * (-1) ** (torch.arange(32)[:, None] + torch.arange(32))  # invisible at half the resolution
    assert SynthesisLoss([1], ssim_weight=0)(checks, of(image)).item() == pytest.approx(0.5, abs=1e-6)
    assert SynthesisLoss([2], ssim_weight=0)(checks, of(image)).item() == pytest.approx(0, abs=1e-6)
    with pytest.raises(InputError, match="slices of 8 px are too small"):
        SynthesisLoss([1, 4]).check((48, 32))
    SynthesisLoss([1, 4], ssim_weight=0).check((48, 32))
    with pytest.raises(InputError, match="the loss has no term"):
        SynthesisLoss([1], l1_weight=0, ssim_weight=0)
    with pytest.raises(InputError, match="resolutions"):
        SynthesisLoss([0])
    with pytest.raises(InputError, match="spectral_weight=-1 must be 0 or more"):
        SynthesisLoss([1], spectral_weight=-1)


def test_the_lungs_weigh_more():
    """An error in a quarter of the pixels, the lungs: with weight 3 they are half of the weighted mean."""
    label, lung = torch.zeros(1, 1, 16, 16), torch.zeros(1, 1, 16, 16)
    lung[..., :8, :8] = 1
    loss = SynthesisLoss([1], ssim_weight=0)
    assert loss(lung, of(label, lung=lung)).item() == pytest.approx(0.25)
    loss.set_lung_weight(3.0)
    for value in (1, 13, 255):  # masks of other programs
        assert loss(lung, of(label, lung=value * lung)).item() == pytest.approx(0.5)
    assert loss(lung, of(label)).item() == pytest.approx(0.25)


def test_further_terms_and_their_weights():
    pred, label = torch.rand(2, 1, 32, 32), torch.rand(2, 1, 32, 32)
    loss = SynthesisLoss([1], spectral_weight=0.5)
    total = loss(pred, of(label))
    assert set(loss.components) == {"l1", "ssim", "spectral"}
    assert total.item() == pytest.approx(sum(value.item() for value in loss.components.values()))
    assert loss.components["spectral"].item() == pytest.approx(0.5 * JukeboxLoss(2)(pred, label).item())


def test_perceptual_weights_that_cannot_be_loaded():
    """The package that MONAI needs for them is not installed here."""
    with pytest.raises(InputError, match="perceptual_weight: its network cannot be loaded .* Install lpips"):
        SynthesisLoss([1], perceptual_weight=1.0)


@pytest.mark.parametrize("attention", [False, True])
def test_registration_starts_at_0_and_learns_a_shift(attention):
    torch.manual_seed(0)
    x, y = torch.meshgrid(torch.arange(32.0), torch.arange(32.0), indexing="ij")
    pred, target = (torch.exp(-((x - c) ** 2 + (y - 16) ** 2) / 40)[None, None] for c in (14, 17))
    registration = Registration(attention)
    moved, smoothness = registration(pred, target)
    assert torch.allclose(moved, pred, atol=1e-5)
    assert smoothness.item() == pytest.approx(0, abs=1e-8)
    loss = SynthesisLoss([1], ssim_weight=0, registration=registration, smoothness_weight=0.01)
    optimizer = torch.optim.Adam(loss.parameters(), lr=5e-3)
    for _ in range(100):
        optimizer.zero_grad()
        loss(pred, of(target)).backward()
        optimizer.step()
    assert loss.components["l1"] < 0.5 * nn.functional.l1_loss(pred, target)
    assert loss.components["smoothness"] > 0


@pytest.mark.parametrize(("net_id", "name"), [("network_def", "network"), ("generator", "generator")])
def test_the_data_formats_of_both_networks(net_id, name):
    """On the command line, MONAI verifies network_data_format alone."""
    metadata = json.loads((BUNDLE / "configs" / "metadata.json").read_text())
    formats = {"_meta_::network_data_format": metadata[f"{name}_data_format"], "generator": "$@network_def.generator"}
    verify_net_in_out(
        net_id,
        meta_file=str(BUNDLE / "configs" / "metadata.json"),
        config_file=str(BUNDLE / "configs" / "inference.yaml"),
        device="cpu",
        **formats,
    )
    wrong = formats["_meta_::network_data_format"]["inputs"]["image"] | {"num_channels": 2}
    with pytest.raises(RuntimeError, match="to have 3 channels, but got 2"):
        verify_net_in_out(
            net_id,
            meta_file=str(BUNDLE / "configs" / "metadata.json"),
            config_file=str(BUNDLE / "configs" / "inference.yaml"),
            device="cpu",
            **formats | {"_meta_::network_data_format::inputs::image": wrong},
        )


@pytest.mark.parametrize("options", [{}, {"discriminator": "resblock", "d_input": "concat"}])
def test_the_first_weights_do_not_depend_on_the_discriminator(pairs, generator, tmp_path, options):
    weights = []
    for index, given in enumerate(({"discriminator": "$None"}, options)):
        folders = {"dataset_dir": str(pairs), "output_dir": str(tmp_path / str(index)), "ckpt_dir": str(tmp_path)}
        frozen = {"learning_rate": 0.0, "generator_ckpt": str(generator / "model.pt")}
        run("train.yaml", **folders, **TINY | frozen | given | {"max_epochs": 1})
        weights.append(state(tmp_path / "last.pt")["network"])
    assert_same(*weights)


# ---- volumes
@pytest.mark.parametrize("tta", [False, True])
@pytest.mark.parametrize("num_slices", [1, 3])
def test_slices_come_back_at_their_place(tta, num_slices):
    """The middle of the neighbours is returned, whatever the size of the volume and the flips."""
    volume = torch.randn(1, 1, 37, 21, 9)
    network = Generator(num_slices, FEATURES)
    result = SynthesisInferer(num_slices, batch_size=4, tta=tta, with_generator=True).predict(volume, network)
    assert torch.allclose(result["pred"], volume, atol=1e-6)
    assert torch.equal(result["pred"], result["generator"])


@pytest.mark.parametrize("options", [{"num_slices": 2}, {"batch_size": 0}, {"batch_size": 1.5}])
def test_other_numbers_of_slices_are_refused(options):
    with pytest.raises(InputError, match=f"{next(iter(options))}=.* must be"):
        SynthesisInferer(**options)


def test_hu_are_whole_and_within_their_range():
    item = ToHounsfieldd("pred", HU_RANGE)({"pred": torch.tensor([-2.0, -1.0, 0.0, 0.0004, 1.0, 3.0])})
    assert item["pred"].tolist() == [-1000, -1000, -200, -200, 600, 600]
    for wrong in ([600, -1000], [1], "ab", None, [0, "1"]):
        with pytest.raises(InputError, match="hu_range="):
            ToHounsfieldd("pred", wrong)


def test_pairs_that_look_wrong(caplog):
    native = torch.zeros(1, 8, 8, 4)
    contrast = native.clone()
    contrast[0, 2:6, 2:6] = 300
    CheckPaird()({"image": native, "label": contrast, "subject": "s1"})
    assert not caplog.messages
    CheckPaird()({"image": contrast, "label": native, "subject": "s1"})
    assert "subject 's1': more voxels are darker" in caplog.text
    caplog.clear()
    noise = 40 * torch.randn(1, 8, 8, 4, generator=torch.Generator().manual_seed(0))
    CheckPaird()({"image": contrast, "label": contrast + noise, "subject": "s1"})
    assert caplog.messages == ["subject 's1': contrast changes hardly a voxel. Is the native CT already enhanced?"]
    caplog.clear()
    contrast[0, 0, 0, :3] = 35988
    CheckPaird()({"image": native, "label": contrast, "subject": "s1"})
    assert caplog.messages == ["subject 's1': 3 voxels of the contrast CT are above 3071 HU (metal) and clipped"]


@pytest.mark.parametrize(
    ("contrast", "mask"),
    [
        ("a/s1_cta.nii.gz", "a/s1_vessels.nii.gz"),
        ("a/cta.nii", "a/vessels.nii"),
        ("a/s1-CTA.nii.gz", "a/s1-vessels.nii.gz"),
        ("data/CTA/s1.nii.gz", "data/vessels/s1.nii.gz"),
        ("data/CTA/scta.nii.gz", "data/vessels/scta.nii.gz"),
    ],
)
def test_masks_lie_beside_the_contrast_ct(contrast, mask):
    assert str(mask_file(contrast, "cta", "vessels")) == mask


# ---- scores
def test_scores_of_known_errors():
    truth = np.full((16, 16, 4), 100.0)
    truth[:, :3] = -1000
    body, vessels = body_mask(truth), np.zeros(truth.shape, bool)
    assert body.sum() == 16 * 13 * 4
    vessels[4, 8] = True
    native = np.where(vessels, 0, truth)
    truth[vessels] = 300
    perfect = scores(truth, truth, native, body, vessels, HU_RANGE)
    assert (perfect["mae"], perfect["vessel_mae"], perfect["vessel_dice"]) == (0, 0, 1)
    assert np.isnan(perfect["ms_ssim"])
    assert perfect["ssim"] == pytest.approx(1)
    assert perfect["psnr"] == pytest.approx(10 * np.log10(1600**2 * 12))
    wrong = scores(truth + 16, truth, native, body, vessels, HU_RANGE)
    assert (wrong["mae"], wrong["vessel_mae"]) == (16, 16)
    assert wrong["psnr"] == pytest.approx(40)
    assert np.isnan(scores(truth, truth, native, body, None, HU_RANGE)["vessel_mae"])
    assert scores(native, truth, native, body, vessels, HU_RANGE)["vessel_dice"] == 0
    assert np.isnan(scores(truth, native, native, body, vessels, HU_RANGE)["vessel_dice"])
    missed = np.where(np.arange(4) < 1, native, truth)  # a quarter
    assert scores(missed, truth, native, body, vessels, HU_RANGE)["vessel_dice"] == pytest.approx(2 * 0.75 / 1.75)


def test_scores_without_a_body_are_undefined():
    air = np.full((16, 16, 2), -1000.0)
    found = scores(air, air, air, body_mask(air), None, HU_RANGE)
    assert np.isnan([found["ssim"], found["ms_ssim"], found["vessel_dice"]]).all()


def test_the_similarity_does_not_depend_on_the_air_around():
    rng = np.random.default_rng(0)
    truth = rng.normal(100, 50, (190, 180, 2))
    image, body = truth + rng.normal(0, 30, truth.shape), np.ones(truth.shape, bool)
    one = scores(image, truth, truth, body, None, HU_RANGE)
    wider = [
        np.pad(part, ((40, 40), (40, 40), (0, 0)), constant_values=v) for part, v in ((image, -1000), (truth, -1000))
    ]
    two = scores(*wider, wider[1], np.pad(body, ((40, 40), (40, 40), (0, 0))), None, HU_RANGE)
    assert 0 < one["ssim"] < 0.99
    assert 0 < one["ms_ssim"] < 1
    assert two == pytest.approx(one, nan_ok=True)
    expected = SSIMMetric(spatial_dims=2, data_range=1600)
    pair = [torch.from_numpy(part.clip(-1000, 600) + 1000).permute(2, 0, 1)[:, None].float() for part in (image, truth)]
    assert one["ssim"] == pytest.approx(expected(*pair).mean().item(), abs=1e-5)


def test_the_body_has_its_lungs():
    image = np.full((20, 20, 2), -1000)
    image[4:16, 4:16] = 50
    image[7:10, 7:10] = -800
    assert body_mask(image).sum() == 12 * 12 * 2


def test_the_lookup_table_is_the_best_pointwise_map(tmp_path):
    native = np.tile(np.array([-1000, 0, 3, 400], np.int16), (4, 4, 1))
    contrast = np.tile(np.array([-1000, 100, 200, 410], np.int16), (4, 4, 1))
    for name, volume in {"n": native, "c": contrast}.items():
        nib.save(nib.Nifti1Image(volume, np.eye(4)), tmp_path / f"{name}.nii.gz")
    items = [{"subject": "s", "image": [str(tmp_path / "n.nii.gz")], "label": [str(tmp_path / "c.nii.gz")]}]
    table = lookup_table(items, HU_RANGE)
    assert looked_up(native, table, HU_RANGE)[0, 0].tolist() == [-1000, 150, 150, 410]  # 0 and 3 share a step
    assert looked_up(np.array([205.0]), table, HU_RANGE)[0] == pytest.approx(205)  # never seen: as it is


def test_differences_are_paired():
    rows = [
        {
            "subject": s,
            "patient": s,
            "method": m,
            "psnr": 30 + i + d,
            "mae": 1,
            "ssim": 1,
            "ms_ssim": 1,
            "vessel_mae": 1,
            "vessel_dice": 1,
        }
        for i, s in enumerate("abc")
        for m, d in {"identity": 0, "lookup": 1, "generator": 2, "refined": 3}.items()
    ]
    found = summary(pd.DataFrame(rows))
    difference = found["differences"]["refined - identity"]["psnr"]
    assert [difference[key] for key in ("value", "low", "high")] == pytest.approx([3, 3, 3])
    assert found["methods"]["lookup"]["psnr"]["value"] == 32


# ---- the bundle
def test_training_writes_a_table_and_weights(refined, generator):
    table = pd.read_csv(refined / "metrics.csv")
    assert table["split"].tolist() == ["train", "validation"] * 2
    assert table.loc[table["split"] == "validation", "psnr"].between(15, 60).all()
    checkpoint = torch.load(refined / "model.pt", weights_only=True)
    assert checkpoint["settings"]["hu_range"] == HU_RANGE
    before = torch.load(generator / "model.pt", weights_only=True)["model"]
    assert all(torch.equal(checkpoint["model"][f"generator.{name}"], value) for name, value in before.items())


def test_evaluation_beside_the_baselines(refined, pairs, tmp_path):
    common = {"dataset_dir": str(pairs), "ckpt_path": str(refined / "model.pt"), **TINY}
    run("train.yaml", "evaluate.yaml", output_dir=str(tmp_path), **common)
    found = json.loads((tmp_path / "summary.json").read_text())
    assert found["subjects"] == 2
    table = pd.read_csv(tmp_path / "subjects.csv")
    assert table["method"].tolist() == ["identity", "lookup", "generator", "refined"] * 2
    assert found["methods"]["refined"]["psnr"]["value"] == pytest.approx(
        table.loc[table["method"] == "refined", "psnr"].mean(), rel=1e-4
    )
    assert table["vessel_mae"].gt(0).all()
    assert len(list((tmp_path / "overlays").glob("*_mip.png"))) == 2


def test_pairs_in_two_folders(pairs, tmp_path):
    """NCCT/s0.nii.gz and CTA/s0.nii.gz, with masks in vessels/ and lung/."""
    for name, folder in {"ncct": "NCCT", "cta": "CTA", "vessels": "vessels", "lung": "lung"}.items():
        (tmp_path / "data" / folder).mkdir(parents=True)
        for file in pairs.glob(f"*/*_{name}.nii.gz"):
            shutil.copy(file, tmp_path / "data" / folder / f"{file.parent.name}.nii.gz")
    options = {"dataset_dir": str(tmp_path / "data"), "image_dir": "NCCT", "mask_dir": "CTA", **TINY}
    folders = {"output_dir": str(tmp_path / "out"), "ckpt_dir": str(tmp_path / "out")}
    run("train.yaml", "stage0_generator.yaml", **options | folders | {"max_epochs": 1, "lung_weight": 5.0})
    run("train.yaml", "stage0_generator.yaml", "evaluate.yaml", **options | folders)
    table = pd.read_csv(tmp_path / "out" / "subjects.csv")
    assert set(table["method"]) == {"identity", "lookup", "generator", "refined"}
    assert table["vessel_mae"].gt(0).all()


def test_files_of_inference(refined, pairs, tmp_path):
    infer(refined, pairs, tmp_path)
    image, native = nib.load(tmp_path / "s0_cta.nii.gz"), nib.load(pairs / "s0" / "s0_ncct.nii.gz")
    assert image.get_data_dtype() == np.int16
    assert b"not for diagnosis" in image.header["descrip"].tobytes()
    assert np.allclose(image.affine, native.affine)
    assert image.shape == native.shape
    assert pd.read_csv(tmp_path / "enhancement.csv")["subject"].tolist() == [f"s{index}" for index in range(6)]
    assert (tmp_path / "s5_mip.png").stat().st_size > 5000
    infer(refined, pairs / "s0", tmp_path / "tta", tta=True)
    assert not np.array_equal(nib.load(tmp_path / "tta" / "s0_cta.nii.gz").dataobj, image.dataobj)


@pytest.mark.parametrize("kind", ["LPS", "flipped", "oblique"])
def test_the_identity_gives_the_input_on_its_own_grid(kind, tmp_path):
    c, s = np.cos(0.3), np.sin(0.3)
    axes = {"LPS": np.diag([-2.0, -2, 3]), "flipped": np.array([[0, 0, 3.0], [2, 0, 0], [0, -2, 0]])}
    axes["oblique"] = np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]]) @ np.diag([2.0, 2, 4])
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = axes[kind], (-30, 20, 10)
    volume = np.random.default_rng(0).integers(-1000, 600, (37, 30, 12)).astype(np.int16)
    (tmp_path / "data" / "s1").mkdir(parents=True)
    nib.save(nib.Nifti1Image(volume, affine), tmp_path / "data" / "s1" / "s1_ncct.nii.gz")
    settings = {"modalities": ["ncct"], "hu_range": HU_RANGE, "num_slices": 1, "features": FEATURES}
    settings |= {"intermediate": "direct", "refiner_width": 8, "refiner_units": 1}
    parser = ConfigParser()
    parser.read_config(str(BUNDLE / "configs" / "inference.yaml"))
    parser.update({"settings": settings, "dataset_dir": str(tmp_path / "data"), "output_dir": str(tmp_path / "out")})
    parser.update({"device": torch.device("cpu"), "network": "@network_def"})  # without weights
    parser.get_parsed_content("evaluator").run()
    found = nib.load(tmp_path / "out" / "s1_cta.nii.gz")
    assert np.allclose(found.affine, affine, atol=1e-4)
    assert np.abs(np.asarray(found.dataobj).astype(int) - volume).max() <= 1


LOSSES = {"lung_weight": 5.0, "lung_weight_epochs": 2, "registration": True, "registration_attention": True}
ADVERSARY = {
    "adversary::feature_weight": 0.1,
    "r1_gamma": 0.1,
    "adversary::r1_interval": 2,
    "adversary::augmented": True,
}


def test_killed_training_resumes_to_the_same_weights(generator, pairs, tmp_path):
    """With discriminator, registration, weights of the lung and average. The generator stays as it was."""
    options = {"dataset_dir": str(pairs), "generator_ckpt": str(generator / "model.pt"), **TINY, **LOSSES, **ADVERSARY}
    options |= {"max_epochs": 4, "spectral_weight": 0.1, "ema::decay": 0.9}
    whole, killed = ({"output_dir": str(tmp_path / n), "ckpt_dir": str(tmp_path / n)} for n in ("whole", "killed"))
    files = ["train.yaml", "ema.yaml", "resume.yaml"]
    run(*files, **options, **whole)
    command = [sys.executable, "-W", "ignore", "-m", "monai.bundle", "run", "--config_file"]
    command += [str([str(BUNDLE / "configs" / name) for name in files])]
    command += [text for key, value in (options | killed).items() for text in (f"--{key}", str(value))]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        wait_for(lambda: (tmp_path / "killed" / "last.pt").is_file(), process)
        process.send_signal(signal.SIGKILL)
    assert 1 <= state(tmp_path / "killed" / "last.pt")["epoch"] < 4
    run(*files, **options, **killed)
    for name in ("last.pt", "model.pt"):
        assert_same(state(tmp_path / "whole" / name), state(tmp_path / "killed" / name))
    before, after = state(generator / "model.pt")["model"], state(tmp_path / "whole" / "model.pt")["model"]
    assert all(torch.equal(after[f"generator.{name}"], value) for name, value in before.items())
    table = pd.read_csv(tmp_path / "killed" / "metrics.csv").dropna(axis=1, how="all")
    assert {"d_auc", "r1", "gan", "feature", "smoothness", "spectral"} <= set(table)


def test_pix2pix_trains_the_generator(pairs, tmp_path):
    folders = {"dataset_dir": str(pairs), "output_dir": str(tmp_path), "ckpt_dir": str(tmp_path)}
    run("train.yaml", "pix2pix.yaml", **folders, **TINY | {"max_epochs": 1})
    table = pd.read_csv(tmp_path / "metrics.csv")
    assert table["d_auc"].notna().any()
    assert table["ssim"].isna().all()
    assert not any(name.startswith("refiner") for name in torch.load(tmp_path / "model.pt", weights_only=True)["model"])


def test_an_ablation_shares_its_generator(pairs, tmp_path):
    arms = {"off": {"discriminator": None}, "on": {}}
    settings = {"dataset_dir": str(pairs), "max_epochs": 1, **TINY} | {"max_epochs": 1}
    parser = ConfigParser()
    parser.read_config(str(BUNDLE / "configs" / "ablation.yaml"))
    parser.update({"arms": arms, "reference": "off", "seeds": [0], "output_dir": str(tmp_path), "processes": 2})
    parser.update({"ablation::settings": settings})
    parser.get_parsed_content("ablation").run()
    runs = pd.read_csv(tmp_path / "runs.csv").set_index("arm")
    assert runs["psnr"].between(15, 60).all()
    assert runs["d_auc"].notna().tolist() == [False, True]
    assert len(list(tmp_path.glob("*_seed0"))) == 3


def test_resuming_a_complete_training_changes_nothing(refined, generator, pairs, capsys):
    before = (refined / "last.pt").read_bytes()
    folders = {"dataset_dir": str(pairs), "output_dir": str(refined), "ckpt_dir": str(refined)}
    run("train.yaml", "resume.yaml", generator_ckpt=str(generator / "model.pt"), **folders, **TINY)
    assert "training is complete" in capsys.readouterr().out
    assert (refined / "last.pt").read_bytes() == before


# ---- bad input
def train(data, out, **overrides):
    folders = {"dataset_dir": str(data), "output_dir": str(out), "ckpt_dir": str(out)}
    run("train.yaml", **folders, **TINY | overrides)


def with_nan(folder):
    image = nib.load(folder / "s1_cta.nii.gz")
    volume = image.get_fdata()
    volume[3, 4, 5] = np.nan
    nib.save(nib.Nifti1Image(volume.astype(np.float32), image.affine), folder / "s1_cta.nii.gz")


def save(name, volume):
    image = nib.Nifti1Image(volume, np.diag([10.0, 10.0, 20.0, 1.0]))
    return lambda folder: nib.save(image, folder / name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: (folder / "s1_cta.nii.gz").unlink(), "subject 's1': no .*cta"),
        (save("s1_cta.nii.gz", np.zeros((32, 32, 20), np.int16)), "subject 's1': .*32, 32, 20"),
        (save("s1_ncct.nii.gz", np.full((32, 32, 24), -1000, np.int16)), "subject 's1': modality 1 of 1 is constant"),
        (with_nan, "subject 's1'.* has NaN or infinite voxels"),
    ],
    ids=["no pair", "another grid", "constant", "NaN"],
)
def test_a_pair_that_cannot_be_used(pairs, generator, tmp_path, change, message):
    data = tmp_path / "data"
    shutil.copytree(pairs, data)
    change(data / "s1")
    with pytest.raises(InputError, match=message):
        train(data, tmp_path / "out", generator_ckpt=str(generator / "model.pt"))
    assert not list(tmp_path.glob("out/*.pt"))


def test_a_pair_that_looks_wrong_is_used_with_a_warning(pairs, generator, tmp_path, capsys):
    data = tmp_path / "data"
    shutil.copytree(pairs, data)
    for folder in data.iterdir():
        native, contrast = (folder / f"{folder.name}_{name}.nii.gz" for name in ("ncct", "cta"))
        native.rename(tmp_path / "n.nii.gz")
        contrast.rename(native)
        raw = nib.load(tmp_path / "n.nii.gz")
        nib.save(nib.Nifti1Image(np.asarray(raw.dataobj) + 1024, raw.affine), contrast)
    train(data, tmp_path / "out", generator_ckpt=str(generator / "model.pt"), max_epochs=1)
    assert capsys.readouterr().out.count("a CT in Hounsfield units has air below") >= 2
    save("s1_cta.nii.gz", np.asarray(nib.load(pairs / "s1" / "s1_ncct.nii.gz").dataobj))(data / "s1")
    train(data, tmp_path / "again", generator_ckpt=str(generator / "model.pt"), max_epochs=1)
    assert "subject 's1': more voxels are darker in the contrast CT than brighter" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"generator_ckpt": "none.pt"}, "none.pt"),
        ({"hu_range": [600, -1000]}, "hu_range=.*600, -1000.* must be the lowest and the highest HU"),
        ({"hu_range": [-500, 500]}, "was trained with hu_range=.*, now it is"),
        ({"num_slices": 3}, "was trained with num_slices=1, now it is 3"),
        ({"num_slices": 2}, "num_slices=2 must be 1, 3 or 5"),
        ({"modalities": ["ncct", "cta"]}, "must be one file suffix"),
        ({"label_suffix": "ncct"}, "s0_ncct.nii.gz is both the native and the contrast CT"),
        ({"discriminator_def::scales": 4}, "slices of 32 x 32 px are too small for the 4 scales"),
        ({"discriminator": "unet"}, "discriminator 'unet' is not one of"),
        ({"d_input": "sum"}, "d_input 'sum' is not one of"),
        ({"gan_loss": "wgan"}, "gan_loss 'wgan' is not one of"),
        ({"perceptual_weight": 1.0}, "perceptual_weight: its network cannot be loaded"),
        ({"resolutions": [1, 4]}, "slices of 8 px are too small for the SSIM"),
        ({"slices_per_volume": 1, "batch_size": 40}, "fewer than batch_size; raise slices_per_volume"),
    ],
    ids=str,
)
def test_settings_that_cannot_be_used(pairs, generator, tmp_path, options, message):
    with pytest.raises(InputError, match=message):
        train(pairs, tmp_path / "out", **{"generator_ckpt": str(generator / "model.pt")} | options)
    assert not (tmp_path / "out").exists()


def test_slices_of_other_sizes_do_not_fit_into_one_batch(pairs, generator, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(pairs, data)
    for file in (data / "s1").glob("*.nii.gz"):
        image = nib.load(file)
        nib.save(image.slicer[:16], file)
    options = {"generator_ckpt": str(generator / "model.pt"), "resolutions": [1], "max_epochs": 1}
    with pytest.raises(InputError, match=r"slices of \(16, 32\) px \('s1'\) and .* set batch_size=1"):
        train(data, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()
    train(data, tmp_path / "out", **options, batch_size=1, discriminator="resblock")
    assert (tmp_path / "out" / "model.pt").is_file()


def test_a_generator_that_has_seen_the_test_subjects_is_refused(pairs, generator, tmp_path):
    with pytest.raises(InputError, match="trained on"):
        train(pairs, tmp_path / "out", generator_ckpt=str(generator / "model.pt"), seed=1)
    assert not (tmp_path / "out").exists()


def test_weights_of_the_lung_need_masks(pairs, generator, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(pairs, data)
    for folder in data.iterdir():
        (folder / f"{folder.name}_lung.nii.gz").unlink()
    with pytest.raises(InputError, match="_lung.nii.gz is missing; it is needed if lung_weight is not 1"):
        train(data, tmp_path / "out", generator_ckpt=str(generator / "model.pt"), lung_weight=5.0)
    assert not list(tmp_path.glob("out/*.pt"))


def test_inference_of_weights_and_folders_that_do_not_fit(refined, pairs, tmp_path):
    with pytest.raises(InputError, match="trained with hu_range="):
        infer(refined, pairs, tmp_path / "out", hu_range=[-500, 500])
    with pytest.raises(InputError, match="holds volumes"):
        infer(refined, pairs, pairs / "s0")
    with pytest.raises(InputError, match="is not of this bundle|older"):
        infer(ROOT / "models", pairs, tmp_path / "out")
    assert not (tmp_path / "out").exists()
