from __future__ import annotations

import json
import math

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from scipy.special import expit

from scripts.calibration.cross_fit import cross_fitted
from scripts.calibration.fits import calibrate, fit_expected_dice, fit_temperature, to_classes
from scripts.calibration.grades import SLOPE, Measured, calibrate_grades, evidence, fit_grades
from scripts.calibration.handler import CalibrationFit
from scripts.calibration.parts import HIGH, Parts, dice_curve, fit_high_threshold, parts_of
from scripts.calibration.volumes import COVERAGE, conformal_margin, volume_at, volume_curve
from scripts.config import InputError
from scripts.diffusion.schedule import GaussianDiffusion
from scripts.net import MedSegDiff
from scripts.networks.calibration import expected_dice
from scripts.networks.measurements import num_measurements
from scripts.report.metrics import grade_losses
from scripts.sampling.inferer import VolumeInferer
from scripts.sampling.probability import temperature_scaled
from scripts.training.checkpoints import read_checkpoint
from scripts.training.losses import MultiTaskLoss
from scripts.training.weights import load_weights
from test_net import TINY


def overconfident(temperature, num=100_000, seed=0):
    rng = np.random.default_rng(seed)
    logit = rng.normal(0, 2, num)
    truth = rng.random(num) < 1 / (1 + np.exp(-logit))
    return 1 / (1 + np.exp(-temperature * logit)), truth


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_the_temperature_is_found(temperature):
    prob, truth = overconfident(temperature)
    assert fit_temperature(to_classes(prob), truth)[0] == pytest.approx(temperature, rel=0.03)


def expected(confidence, fitted):
    return expected_dice(torch.as_tensor(confidence), torch.tensor(fitted)).numpy()


def test_the_dice_is_read_from_the_confidence():
    """A network that is too sure: its masks of confidence 0.6 to 0.99 have a Dice of 0.1 to 0.9."""
    confidence = np.linspace(0.6, 0.99, 400)
    dice = expit(1.2 * np.log(confidence / (1 - confidence)) - 2.5) + np.tile([-0.05, 0.05], 200)
    bias, slope, _ = fit_expected_dice(confidence, dice)
    assert (bias, slope) == pytest.approx((-2.5, 1.2), abs=0.1)
    assert fit_expected_dice(confidence, dice[::-1])[1] == 0  # never the surer, the worse
    assert expected(confidence, fit_expected_dice(confidence, dice[::-1])) == pytest.approx(
        [dice.mean()] * 400, abs=1e-3
    )
    few = fit_expected_dice(confidence[::100], dice[::100])
    assert 0 < few[1] < slope  # four masks say little of the slope
    assert expected(confidence[::100], few).mean() == pytest.approx(dice[::100].mean(), abs=0.01)


@pytest.mark.parametrize("dice", [0.0, 1.0])
def test_masks_that_are_all_right_or_all_wrong(dice):
    fitted = fit_expected_dice(np.array([1.0, 0.9, 0.8]), np.full(3, dice))
    assert expected(np.array([0.0, 0.5, 1.0]), fitted) == pytest.approx([dice] * 3, abs=0.01)


def test_empty_masks_are_expected_to_be_as_right_as_those_of_the_fit():
    confidence = np.array([np.nan, np.nan, np.nan, 0.9])
    bias, slope, of_empty = fit_expected_dice(confidence, np.array([1.0, 1.0, 0.0, 0.8]))
    assert of_empty == pytest.approx(2.5 / 4)
    assert slope == pytest.approx(0, abs=1e-6)  # of one mask
    assert expected(np.array([np.nan, 0.9]), (bias, slope, of_empty)) == pytest.approx([2.5 / 4, 0.8], abs=1e-3)
    assert fit_expected_dice(confidence[3:], np.array([0.8]))[2] == 0.5  # none was empty
    only_empty = fit_expected_dice(confidence[:3], np.zeros(3))
    assert expected(np.array([np.nan]), only_empty) == pytest.approx([0.5 / 4])
    assert np.isnan(expected(np.array([0.9]), only_empty)).all()


def test_scaling_keeps_masks_and_orders():
    prob = torch.linspace(0, 1, 101)
    scaled = temperature_scaled(prob, torch.tensor(2.5))
    assert torch.equal(scaled > 0.5, prob > 0.5)
    assert (scaled.diff() > 0).all()
    assert torch.equal(temperature_scaled(prob, torch.tensor(1.0)), prob)
    background = temperature_scaled(torch.zeros(1000), torch.tensor(2.0))
    assert background.sum() < 0.2  # a certain background adds no volume
    assert temperature_scaled(torch.tensor(torch.nan), torch.tensor(2.0)).isnan()


def test_cross_fitting_uses_other_patients():
    # eight subjects need temperature 2; the ninth and tenth, of one patient, need 1 and are scaled by that of the eight
    subjects = [overconfident(2.0, 5000, seed) for seed in range(8)] + [overconfident(1.0, 5000, 8 + i) for i in (0, 1)]
    probs = [to_classes(prob) for prob, _ in subjects]
    truths = [truth for _, truth in subjects]
    scaled = cross_fitted(probs, truths, [*"abcdefghii"], fit_temperature)
    for i in (8, 9):
        expected = temperature_scaled(torch.tensor(subjects[i][0]), torch.tensor(2.0)).numpy()
        assert np.abs(scaled[i][:, 1] - expected).max() < 0.02
    assert cross_fitted(probs[8:], truths[8:], ["i", "i"], fit_temperature)[0] is probs[8]


def graded(count, seed, share=0.79):
    """Grades, and the probabilities of a network that was trained with equal weight on both, twice too sure."""
    rng = np.random.default_rng(seed)
    truth = (rng.random(count) < share).astype(int)
    logit = rng.normal(2 * truth - 1, 1)  # the log likelihood ratio is twice this value
    return to_classes(1 / (1 + np.exp(-4 * logit))), truth


def test_the_grade_gets_the_prior_of_its_patients():
    """A temperature alone leaves the mean probability of the frequent grade too low, and the log loss too high."""
    prior_bias = np.log([0.21, 0.79])
    prob, truth = graded(100, 0)
    new, new_truth = graded(20_000, 1)
    temperature, bias = fit_grades(prob, truth, prior_bias)[:2]
    both = grade_losses(calibrate(new, temperature, bias), new_truth)["log_loss"]
    alone = grade_losses(calibrate(new, *fit_temperature(prob, truth)), new_truth)["log_loss"]
    ideal = grade_losses(calibrate(new, 2.0, prior_bias), new_truth)["log_loss"]
    assert ideal < both < ideal + 0.01
    assert both < alone - 0.03
    assert calibrate(new, temperature, bias)[:, 1].mean() == pytest.approx(0.79, abs=0.04)


def test_few_patients_change_little():
    expected = 1 / SLOPE[0]
    for truth in (0, 1):
        temperature, bias = fit_grades(np.array([[0.7, 0.3]]), np.array([truth]), np.log([0.5, 0.5]))[:2]
        assert expected * 0.75 < temperature < expected * 1.5
        assert abs(bias[1] - bias[0]) < 0.3


def test_a_network_that_is_much_too_sure_is_tamed():
    """Ten patients are right by chance. How much too large the logits are makes no difference."""
    rng = np.random.default_rng(0)
    truth = np.arange(10) % 2
    evidence = np.where(truth == 1, 4.0, -4.0) + rng.normal(0, 1, 10)
    graded = []
    for factor in (0.5, 1.0, 2.0):
        prob = to_classes(expit(factor * evidence))
        graded.append(calibrate(prob, *fit_grades(prob, truth, np.zeros(2))[:2]))
    assert np.allclose(graded[0], graded[1], atol=0.01)
    assert np.allclose(graded[0], graded[2], atol=0.01)
    assert 0.8 < graded[0].max() < 0.95


def measured_subjects(count, rng):
    """Grades, and four measurements of which the third decides, the second is often NaN and the fourth always."""
    truth = np.arange(count) % 2
    found = rng.normal(5, 2, (count, 4))
    found[:, 2] += 6 * truth
    found[::7, 1], found[:, 3] = np.nan, np.nan
    return found, truth


@pytest.mark.parametrize(("patients", "trained"), [(300, 0), (10, 60)])
@pytest.mark.parametrize("use_head", [True, False])
def test_a_grade_is_learnt_from_measurements(patients, trained, use_head):
    """From many new patients, or from a few and those of the training. The head knows nothing."""
    rng = np.random.default_rng(0)
    found, truth = measured_subjects(patients, rng)
    prob = to_classes(rng.uniform(0.3, 0.7, patients))
    known = Measured(*measured_subjects(trained, rng)) if trained else None
    fitted = fit_grades(prob, truth, np.zeros(2), measurements=found, trained=known, use_head=use_head)
    assert fitted.weight.shape == (2, 4)
    assert np.abs(fitted.weight).argmax() % 4 == 2
    assert not fitted.weight[:, 3].any()
    assert math.isinf(fitted.temperature) != use_head
    new, new_truth = measured_subjects(1000, rng)
    graded = calibrate_grades(to_classes(rng.uniform(0.3, 0.7, 1000)), new, fitted)
    assert grade_losses(graded, new_truth)["log_loss"] < 0.45
    head = fit_grades(prob, truth, np.zeros(2))
    assert head.weight.shape == (2, 0)
    assert grade_losses(calibrate_grades(prob, found, head), truth)["log_loss"] > 0.6


def test_what_the_training_subjects_say_must_hold_for_others():
    """Their masks give the grade away, those of the new patients do not: the weight falls, and the harm is small."""
    rng = np.random.default_rng(0)
    found, truth = measured_subjects(60, rng)
    known = Measured(*measured_subjects(60, rng))
    prob, useless = to_classes(np.full(60, 0.5)), rng.permutation(found)
    trusted, distrusted = (
        fit_grades(prob, truth, np.zeros(2), measurements=values, trained=known) for values in (found, useless)
    )
    assert np.abs(distrusted.weight[:, 2]).max() < 0.3 * np.abs(trusted.weight[:, 2]).max()
    assert grade_losses(calibrate_grades(prob, rng.permutation(found), distrusted), truth)["log_loss"] < 0.75


def test_evidence_has_a_row_for_each_grade():
    rng = np.random.default_rng(0)
    scores, truth = rng.normal(size=(90, 2)), np.arange(90) % 3
    scores[:, 0] += truth - 1
    weights, offset = evidence(scores, truth, 4)
    assert weights.shape == (4, 2)
    assert offset.shape == (4,)
    assert weights[0, 0] < 0 < weights[2, 0]
    assert not weights[3].any()  # no subject has it
    assert not offset[3]
    assert not any(part.any() for part in evidence(scores, np.zeros(90, int), 3))


def test_evidence_does_not_know_how_frequent_the_grades_are():
    rng = np.random.default_rng(0)
    truth = (rng.random(4000) < 0.9).astype(int)
    scores = rng.normal(size=(4000, 1)) + truth[:, None]  # the log likelihood ratio is s - 1 / 2
    weights, offset = evidence(scores, truth, 2)
    assert float(weights[1, 0] - weights[0, 0]) == pytest.approx(1, abs=0.15)
    assert float(offset[1] - offset[0]) == pytest.approx(-0.5, abs=0.2)


@pytest.mark.parametrize("patients", [9, 30, 100])
def test_margins_cover_the_next_patient(patients):
    """The coverage of split conformal prediction, over many draws: 90 % to 90 % + 1 / (n + 1)."""
    rng = np.random.default_rng(0)
    names = [str(i) for i in range(patients)]
    covered = [rng.normal() <= conformal_margin(rng.normal(size=patients), names) for _ in range(4000)]
    assert COVERAGE - 0.015 < np.mean(covered) < COVERAGE + 1 / (patients + 1) + 0.015


def test_patients_with_many_subjects_count_once():
    """Of ten patients, one has a hundred subjects with large scores: its weight is that of one patient."""
    scores, names = [*range(9), *([50.0] * 100)], [*"abcdefghi", *("j" * 100)]
    assert conformal_margin(scores, names) == 50
    assert conformal_margin([*scores, *range(20)], [*names, *map(str, range(20))]) < 50
    assert np.isinf(conformal_margin([1.0] * 50, ["a"] * 43 + [*"bcdefgh"]))


def test_parts_of_a_mask():
    """A true part, a false one, and what its values are without the false one."""
    mask, truth, prob = (np.zeros((8, 8, 1)) for _ in range(3))
    mask[0:2, 0:2] = mask[5:7, 5:7] = truth[0:2, 0:4] = 1
    prob[0:2, 0:2], prob[5:7, 5:7], prob[0, 0] = 0.8, 0.6, 0.9
    parts = parts_of(mask > 0, truth > 0, prob, prob)
    assert parts.peak.tolist() == pytest.approx([0.9, 0.6])
    assert parts.size.tolist() == [4, 4]
    assert parts.shared.tolist() == [4, 0]
    assert parts.dice(0.5) == 2 * 4 / (8 + 8)
    assert parts.dice(0.7) == 2 * 4 / (4 + 8)
    assert parts.confidence(0.7) == pytest.approx((3 * 0.8 + 0.9) / 4)
    assert (parts.dice(0.95), math.isnan(parts.confidence(0.95))) == (0, True)
    nothing = parts_of(mask > 1, truth > 1, prob, prob)
    assert (nothing.dice(0.5), math.isnan(nothing.confidence(0.5))) == (1, True)
    assert parts_of(mask > 0, truth > 0, prob / 3, prob).peak.tolist() == [0.5, 0.5]  # of a nested region


def test_the_lowest_of_the_best_thresholds_is_fitted():
    unsure = Parts(np.float32([0.7]), np.array([5]), np.array([0]), np.array([3.0]), 0)
    sure = Parts(np.float32([0.9]), np.array([5]), np.array([5]), np.array([4.5]), 5)
    curves = np.concatenate([dice_curve(unsure), dice_curve(sure)])
    (position,) = fit_high_threshold(curves)
    assert HIGH[position - 1] <= 0.7 < HIGH[position]
    assert curves[:, position].tolist() == [1, 1]
    assert fit_high_threshold(dice_curve(sure)) == (0,)
    assert HIGH[0] == 0.5


def test_volumes_at_any_temperature():
    prob = np.random.default_rng(0).random((20, 20, 20)).astype(np.float32)
    curve = volume_curve(prob)
    for temperature in (0.5, 1.0, 3.0):
        scaled = temperature_scaled(torch.tensor(prob), torch.tensor(temperature))
        for level in (0.05, 0.5, 0.95):
            assert volume_at(curve, level, temperature) == pytest.approx((scaled > level).sum().item(), abs=100)


@pytest.fixture
def checkpoint(tmp_path):
    network = MedSegDiff(GaussianDiffusion(), out_channels=2, **TINY)
    loss = MultiTaskLoss(network.diffusion, alpha=[1.0, 1.0])
    content = {"model": network.state_dict(), "loss": loss.state_dict(), "settings": {"seed": 1}}
    lineage = {"training": {"d": [f"ts{i}" for i in range(6)]}, "validation": {}}
    torch.save(content | {"lineage": lineage}, tmp_path / "model.pt")
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
            prob, label = (MetaTensor(values, dtype=torch.float32).reshape(2, 16, 16, 16) for values in (prob, truth))
            prob[:, 8:] = label[:, 8:]  # must not count for the foreground
            pred = MetaTensor(prob > 0.5, meta={"filename_or_obj": str(tmp_path / f"{i}_t1.nii")})
            found.append(
                {
                    "subject": f"s{i}",
                    "prob": prob,
                    "label": label,
                    "pred": pred,
                    "confidence": (prob * pred).sum(dim=(1, 2, 3)) / pred.sum(dim=(1, 2, 3)),
                    "grade": grades[i % 2],
                    "grade_prob": torch.tensor([0.8 - 0.1 * i, 0.2 + 0.1 * i]),
                }
            )
        return found

    return make


@pytest.fixture
def fit(checkpoint, tmp_path, evaluate_items):
    """Function that fits the calibration to evaluated items, and returns the network with the result."""

    def run(evaluated, grade_from="head", measured=(), **sampling):
        names = [item["subject"] for item in evaluated]
        labels = {"LGG": 0, "HGG": 1}
        network = MedSegDiff(GaussianDiffusion(), out_channels=2, **TINY)
        network.calibration.foreground_temperature.fill_(9)  # an earlier fit must not change this one
        inferer = VolumeInferer(num_samples=3, **sampling)
        files, data = (checkpoint, str(tmp_path)), (["TC", "WT"], labels, "(.+)", evaluated, {"d": names})
        evaluate_items(CalibrationFit(network, inferer, *files, *data, grade_from, measured), evaluated)
        assert (network.calibration.foreground_temperature == 1).all()
        load_weights(network, checkpoint, {"seed": 1})
        return network.calibration

    return run


def test_fits_and_stores_in_the_checkpoint(checkpoint, tmp_path, items, fit, caplog):
    calibration = fit(items())
    assert calibration.foreground_temperature.tolist() == pytest.approx([2, 2], rel=0.1)
    # the right and certain voxels outside the foreground belong to the lesion set only
    assert (calibration.lesion_temperature < calibration.foreground_temperature).all()
    assert calibration.grade_temperature != 1
    assert calibration.sampling == VolumeInferer(num_samples=3).sampling
    assert calibration.grade_prior.tolist() == [0.5, 0.5]
    report = json.loads((tmp_path / "calibration.json").read_text())
    for region in ("TC", "WT"):
        scores = report[region]["foreground"]
        assert scores["after"]["ece"] < 0.03 < scores["before"]["ece"]
        assert scores["after"]["brier"] < scores["before"]["brier"]
        assert scores["cross_fitted"]["ece"] == pytest.approx(scores["after"]["ece"], abs=0.02)
        assert scores["subjects"] == scores["patients"] == 6
        assert report[region]["volume_margin"] is None
        quality = report[region]["expected_dice"]
        assert quality["subjects"] == 6
        assert quality["after"]["mean_error"] < 0.02 < quality["before"]["mean_error"]
        assert quality["cross_fitted"]["mean_error"] < 0.02
    assert calibration.volume_margin.isinf().all()
    assert "6 patients are too few for intervals of the volume" in caplog.text
    assert report["grade"]["after"]["log_loss"] < math.log(2)  # that of the frequencies
    assert read_checkpoint(checkpoint)["settings"] == {"seed": 1}  # the rest of the checkpoint is kept
    assert read_checkpoint(checkpoint)["lineage"]["validation"] == {"d": [f"s{i}" for i in range(6)]}


def test_other_fusions_are_refused(items, fit):
    with pytest.raises(InputError, match="fusion=majority: the calibration is fitted to masks of fusion=mean"):
        fit(items(), fusion="majority")


def test_the_threshold_of_the_parts_is_fitted_and_the_expected_dice_to_what_is_kept(tmp_path, items, fit):
    """Each subject has a false part that the network is less sure of."""
    found = items()
    for item in found:
        for name in ("prob", "label", "pred"):
            item[name][:] = 0
        item["prob"][:, 1:4, 1:4], item["prob"][:, 5:7, 9:14] = 0.98, 0.8
        item["label"][:, 1:4, 1:5] = 1
        item["pred"] = MetaTensor(item["prob"] > 0.5, meta=item["pred"].meta)
    calibration = fit(found)
    assert all(0.8 < threshold <= 0.98 for threshold in calibration.high_threshold.tolist())
    report = json.loads((tmp_path / "calibration.json").read_text())["TC"]
    dice = 2 * 9 / (9 + 12)
    assert report["parts"]["before"]["dice"] == pytest.approx(2 * 9 / (9 + 10 + 12))
    assert report["parts"]["cross_fitted"]["dice"] == report["parts"]["after"]["dice"] == pytest.approx(dice)
    expected = expected_dice(torch.tensor([0.98] * 2), calibration.dice_fit)
    assert expected.tolist() == pytest.approx([dice] * 2, abs=0.02)


def test_a_network_that_finds_nothing_is_calibrated(tmp_path, items, fit):
    found = items()
    for item in found:
        item["pred"] = torch.zeros_like(item["pred"])
        item["confidence"] = torch.full((2,), torch.nan)
    calibration = fit(found)
    assert calibration.dice_fit[:, :2].isinf().all()
    assert calibration.dice_fit[:, 2].tolist() == pytest.approx([0.5 / 7] * 2)
    report = json.loads((tmp_path / "calibration.json").read_text(), parse_constant=pytest.fail)
    assert report["WT"]["expected_dice"]["slope"] is None


def test_volumes_are_calibrated_with_enough_patients(tmp_path, items, fit):
    found = [item | {"subject": f"{name}{item['subject']}"} for name in "ab" for item in items()]
    calibration = fit(found)
    assert calibration.volume_margin.isfinite().all()
    # 11 of 12 volumes must lie inside; those of this model differ little from what it expects
    assert (calibration.volume_margin < 0).all()


@pytest.mark.parametrize(("factors", "chosen"), [((0.5, 1.5), "samples"), ((0.1, 0.2), "levels")])
def test_volumes_come_from_what_holds_them(tmp_path, checkpoint, items, fit, factors, chosen):
    """Level sets of these unsure maps hold all 6 volumes: too many. Samples hold 5 (83 %), or none."""
    found = items()
    for i, item in enumerate(found):
        item["prob"] = MetaTensor(0.4 + 0.2 * item["pred"], meta=item["pred"].meta)
        volumes = item["label"].flatten(1).sum(dim=1)
        item["sample_volumes"] = torch.cat([(factor if i else 0) * volumes for factor in factors])
    calibration = fit(found)
    report = json.loads((tmp_path / "calibration.json").read_text())["WT"]
    assert calibration.volumes_from == report["volumes_from"] == chosen
    expected = {"levels": 1.0, "samples": 5 / 6 if chosen == "samples" else 0.0}
    assert report["volume_coverage"] == pytest.approx(expected)


def test_one_class_leaves_the_grade_alone(caplog, items, fit):
    calibration = fit(items(grades=(1, 1)))
    assert calibration.grade_temperature == 1
    assert not calibration.grade_bias.any()
    assert "fewer than two grades" in caplog.text


def test_training_subjects_teach_measurements_alone(tmp_path, items, fit, caplog):
    """Those that the network was trained on change no temperature and no interval."""
    found, count = items(), num_measurements(2, 4)
    for i, item in enumerate(found):
        item["measurements"] = torch.full((count,), torch.nan, dtype=torch.float64)
        item["measurements"][1] = 4.0 + i % 2
    before = fit(found, "both")
    known = [item | {"subject": f"t{item['subject']}", "prob": 1 - item["prob"]} for item in found]
    strangers = [item | {"subject": f"x{item['subject']}"} for item in known]  # not of the training
    assert torch.equal(fit(found + strangers, "both", strangers).measurement_weight, before.measurement_weight)
    assert "no two training subjects of different grades" in caplog.text
    after = fit(found + known, "both", known)
    assert torch.equal(after.foreground_temperature, before.foreground_temperature)
    assert torch.equal(after.volume_margin, before.volume_margin)
    assert json.loads((tmp_path / "calibration.json").read_text())["grade"]["subjects"] == 6
    assert after.measurement_weight[1, 1] > before.measurement_weight[1, 1] > 0


def test_measurements_are_stored_and_applied_as_fitted(tmp_path, items, checkpoint, fit):
    found = items()
    count = num_measurements(2, 4)
    for i, item in enumerate(found):
        item["measurements"] = torch.full((count,), torch.nan, dtype=torch.float64)
        item["measurements"][1] = 4.0 + i % 2  # the size tells the grade
    calibration = fit(found, "both")
    assert calibration.measures
    assert json.loads((tmp_path / "calibration.json").read_text())["grade"]["grade_from"] == "both"
    small, large = (item["measurements"].float() for item in found[:2])
    even = torch.tensor([0.5, 0.5])
    grades = [calibration.calibrated_grades(even, None, measured)[1] for measured in (small, large)]
    assert grades[0] < 0.5 < grades[1]
    assert not calibration.like().measures


def test_another_source_of_the_grade_is_refused(items, fit):
    with pytest.raises(InputError, match=r"grade_from 'mask' is not one of \['head', 'measurements', 'both'\]"):
        fit(items(), "mask")


def test_nothing_to_calibrate_leaves_the_checkpoint(checkpoint, tmp_path, items, fit):
    empty = [item | {"label": MetaTensor(torch.zeros(2, 16, 16, 16))} for item in items()]
    with pytest.raises(InputError, match="region 'TC' has no voxel in any true mask"):
        fit(empty)
    assert (read_checkpoint(checkpoint)["model"]["calibration.foreground_temperature"] == 1).all()
    assert not (tmp_path / "calibration.json").exists()
