from __future__ import annotations

import json
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data import MetaTensor

from scripts.config import InputError
from scripts.diffusion.schedule import GaussianDiffusion
from scripts.net import MedSegDiff
from scripts.report.calibration import TemperatureFit, cross_fitted, fit_temperature, to_classes
from scripts.sampling.probability import temperature_scaled
from scripts.training.checkpoints import load_weights, read_checkpoint
from test_net import TINY


def overconfident(temperature, num=100_000, seed=0):
    rng = np.random.default_rng(seed)
    logit = rng.normal(0, 2, num)
    truth = rng.random(num) < 1 / (1 + np.exp(-logit))
    return 1 / (1 + np.exp(-temperature * logit)), truth


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_the_temperature_is_found(temperature):
    prob, truth = overconfident(temperature)
    assert fit_temperature(to_classes(prob), truth) == pytest.approx(temperature, rel=0.03)


def test_scaling_keeps_masks_and_orders():
    prob = torch.linspace(0, 1, 101)
    scaled = temperature_scaled(prob, torch.tensor(2.5))
    assert torch.equal(scaled > 0.5, prob > 0.5)
    assert (scaled.diff() > 0).all()
    assert torch.equal(temperature_scaled(prob, torch.tensor(1.0)), prob)
    background = temperature_scaled(torch.zeros(1000), torch.tensor(2.0))
    assert background.sum() < 0.2  # a certain background adds no volume
    assert temperature_scaled(torch.tensor(torch.nan), torch.tensor(2.0)).isnan()


def test_cross_fitting_uses_the_others():
    # nine subjects need temperature 2, the tenth needs 1: the tenth must be scaled by the temperature of the nine
    subjects = [overconfident(2.0, 5000, seed) for seed in range(9)] + [overconfident(1.0, 5000, 9)]
    probs = [to_classes(prob) for prob, _ in subjects]
    truths = [truth for _, truth in subjects]
    scaled = cross_fitted(probs, truths)
    expected = temperature_scaled(torch.tensor(subjects[9][0]), torch.tensor(2.0)).numpy()
    assert np.abs(scaled[9][:, 1] - expected).max() < 0.02
    assert cross_fitted(probs[:1], truths[:1])[0] is probs[0]


@pytest.fixture
def checkpoint(tmp_path):
    network = MedSegDiff(GaussianDiffusion(), out_channels=2, **TINY)
    torch.save({"model": network.state_dict(), "settings": {"seed": 1}}, tmp_path / "model.pt")
    return str(tmp_path / "model.pt")


@pytest.fixture
def items(tmp_path):
    """Six subjects of 16^3 voxels that need temperature 2. Half of the voxels are background of the image."""

    def make(grades=(0, 1)):
        found = []
        for i in range(6):
            background = np.ones((16, 16, 16), np.float32)
            background[8:] = 0
            nib.save(nib.Nifti1Image(background, np.eye(4)), tmp_path / f"{i}_t1.nii")
            prob, truth = overconfident(2.0, 2 * 16**3, i)
            prob, label = (torch.tensor(values, dtype=torch.float32).reshape(2, 16, 16, 16) for values in (prob, truth))
            prob[:, 8:] = label[:, 8:]  # must not count for the foreground
            pred = MetaTensor(prob > 0.5, meta={"filename_or_obj": str(tmp_path / f"{i}_t1.nii")})
            found.append(
                {
                    "prob": prob,
                    "label": label,
                    "pred": pred,
                    "grade": grades[i % 2],
                    "grade_prob": torch.tensor([0.8 - 0.1 * i, 0.2 + 0.1 * i]),
                }
            )
        return found

    return make


def fit(checkpoint, folder, evaluated):
    handler = TemperatureFit(checkpoint, str(folder), ["TC", "WT"])
    network = MedSegDiff(GaussianDiffusion(), out_channels=2, **TINY)
    network.foreground_temperature.fill_(9)
    engine = SimpleNamespace(network=network, state=SimpleNamespace(output=evaluated))
    handler.started(engine)
    assert (network.foreground_temperature == 1).all()  # an earlier fit must not change this one
    handler.iteration_completed(engine)
    handler.completed(engine)
    return network


def test_fits_and_stores_in_the_checkpoint(checkpoint, tmp_path, items):
    network = fit(checkpoint, tmp_path, items())
    load_weights(network, checkpoint, {"seed": 1})
    assert network.foreground_temperature.tolist() == pytest.approx([2, 2], rel=0.1)
    # the right and certain voxels outside the foreground belong to the lesion set only
    assert (network.lesion_temperature < network.foreground_temperature).all()
    assert network.grade_temperature != 1
    report = json.loads((tmp_path / "calibration.json").read_text())
    for region in ("TC", "WT"):
        scores = report[region]["foreground"]
        assert scores["after"]["ece"] < 0.03 < scores["before"]["ece"]
        assert scores["after"]["brier"] < scores["before"]["brier"]
        assert scores["cross_fitted"]["ece"] == pytest.approx(scores["after"]["ece"], abs=0.02)
        assert scores["subjects"] == 6
    assert report["grade"]["after"]["log_loss"] <= report["grade"]["before"]["log_loss"]
    assert read_checkpoint(checkpoint)["settings"] == {"seed": 1}  # the rest of the checkpoint is kept


def test_one_class_leaves_the_grade_alone(checkpoint, tmp_path, caplog, items):
    network = fit(checkpoint, tmp_path, items(grades=(1, 1)))
    load_weights(network, checkpoint, {"seed": 1})
    assert network.grade_temperature == 1
    assert "fewer than two grades" in caplog.text


def test_nothing_to_calibrate_leaves_the_checkpoint(checkpoint, tmp_path, items):
    empty = [item | {"label": torch.zeros(2, 16, 16, 16)} for item in items()]
    with pytest.raises(InputError, match="region 'TC' has no voxel in any true mask"):
        fit(checkpoint, tmp_path, empty)
    assert (read_checkpoint(checkpoint)["model"]["foreground_temperature"] == 1).all()
    assert not (tmp_path / "calibration.json").exists()
