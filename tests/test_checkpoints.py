from __future__ import annotations

import pytest
import torch
from ignite.engine import Engine

from scripts.config import InputError, TrainingError
from scripts.diffusion.schedule import GaussianDiffusion
from scripts.net import MedSegDiff
from scripts.training.checkpoints import (
    SaveCheckpoints,
    check_settings,
    of_this_version,
    store_calibration,
    trained_settings,
)
from scripts.training.lineage import check_unseen, make_lineage
from scripts.training.losses import MultiTaskLoss
from scripts.training.run import check_resumable
from scripts.training.weights import load_weights, of_shared_regions, start_from

STOCHASTIC = ["highway", "stochastic"]

LINEAGE = {"training": {"brats": ["s1", "BraTS-GLI-00005-100"]}, "validation": {"brats": ["s2"]}}
SETTINGS = {"modalities": ["t1", "t2"], "image_size": 32, "grade_labels": {"G2": 0, "G3": 1}}


def network(width=8, **kwargs):
    return MedSegDiff(GaussianDiffusion(), channels=[width] * 3, calib_channels=[8] * 3, **kwargs)


def train(tmp_path, best_epochs, max_epochs=3):
    """Run an engine whose validation score improves at ``best_epochs``. Epoch e sets every weight to e."""
    net = network()
    evaluator = Engine(lambda engine, batch: None)
    evaluator.state.best_metric, evaluator.state.best_metric_epoch = 0.5, -1

    def step(engine, batch):
        if engine.state.epoch in best_epochs:
            evaluator.state.best_metric_epoch = engine.state.epoch
        for parameter in net.parameters():
            parameter.data.fill_(engine.state.epoch)

    engine = Engine(step)
    parts = {"model": net, "loss": MultiTaskLoss(net.diffusion), "optimizer": torch.optim.AdamW(net.parameters())}
    engine.scaler = None
    SaveCheckpoints(str(tmp_path), parts, ["model", "loss"], evaluator, SETTINGS, LINEAGE).attach(engine)
    engine.run([0], max_epochs=max_epochs)
    return net


def weight(path):
    return torch.load(path, weights_only=True)["model"]["denoiser.conv_in.conv.weight"].unique().item()


def test_last_and_best(tmp_path):
    train(tmp_path, best_epochs=[1, 2])
    assert weight(tmp_path / "model.pt") == 2
    assert weight(tmp_path / "last.pt") == 3
    last = torch.load(tmp_path / "last.pt", weights_only=True)
    assert {"model", "loss", "optimizer", "epoch", "best_metric", "lineage"} <= last.keys()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["last.pt", "model.pt"]


def test_without_validation_the_last_weights_are_kept(tmp_path):
    train(tmp_path, best_epochs=[])
    assert weight(tmp_path / "model.pt") == 3


def test_interrupted_save_keeps_the_old_file(tmp_path, monkeypatch):
    train(tmp_path, best_epochs=[1], max_epochs=1)

    def half(content, path):
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(TrainingError, match="disk full"):
        train(tmp_path, best_epochs=[1], max_epochs=1)
    assert weight(tmp_path / "model.pt") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["last.pt", "model.pt"]


def test_weights_round_trip(tmp_path):
    trained = train(tmp_path, best_epochs=[3])
    loaded = network()
    load_weights(loaded, str(tmp_path / "model.pt"), SETTINGS)
    for ours, theirs in zip(loaded.parameters(), trained.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_calibration_text_of_another_length_loads(tmp_path):
    """Version 0.7.0 did not fill it up to 256 bytes."""
    train(tmp_path, best_epochs=[3])
    checkpoint = torch.load(tmp_path / "model.pt", weights_only=True)
    text = b'{"num_samples": 5}'
    checkpoint["model"]["calibration._extra_state"] = torch.tensor(list(text), dtype=torch.uint8)
    torch.save(checkpoint, tmp_path / "model.pt")
    loaded = network()
    load_weights(loaded, str(tmp_path / "model.pt"), SETTINGS)
    assert loaded.calibration.sampling == {"num_samples": 5}


def test_log_sigmas_are_checkpointed(tmp_path):
    train(tmp_path, best_epochs=[3])
    assert "weighting.log_sigma" in torch.load(tmp_path / "model.pt", weights_only=True)["loss"]


@pytest.mark.parametrize("other", [{"width": 16}, {"out_channels": 3}, {"use_cls_head": False}])
def test_checkpoint_of_another_network_is_refused(tmp_path, other):
    train(tmp_path, best_epochs=[3])
    with pytest.raises(InputError, match=r"model.pt' does not fit .* set the keys of data and network"):
        load_weights(network(**other), str(tmp_path / "model.pt"), SETTINGS)


@pytest.mark.parametrize("other", [{"modalities": ["t2", "t1"]}, {"image_size": 64}])
def test_checkpoint_trained_for_other_settings_is_refused(tmp_path, other):
    train(tmp_path, best_epochs=[3])
    with pytest.raises(InputError, match=f"was trained with {next(iter(other))}="):
        load_weights(network(), str(tmp_path / "model.pt"), SETTINGS | other)


def test_absent_and_damaged_checkpoints_are_named(tmp_path):
    with pytest.raises(InputError, match="x.pt' does not exist"):
        load_weights(network(), str(tmp_path / "x.pt"), SETTINGS)
    (tmp_path / "x.pt").write_bytes(b"damaged")
    with pytest.raises(InputError, match="x.pt' cannot be read"):
        load_weights(network(), str(tmp_path / "x.pt"), SETTINGS)


def test_judging_trained_subjects_is_refused(tmp_path, caplog):
    train(tmp_path, best_epochs=[3])
    file = str(tmp_path / "model.pt")
    assert check_unseen(file, [{"subject": "s3"}], "brats") == []
    assert check_unseen(file, [{"subject": "s3"}, {"subject": "s2"}], "brats") == ["s2"]  # it chose the weights
    for seen in ("s1", "BraTS-GLI-00005-101"):  # the second is another scan of a training patient
        with pytest.raises(InputError, match=rf"1 of 2 subjects, such as \['{seen}'\], were trained on"):
            check_unseen(file, [{"subject": seen}, {"subject": "s3"}], "brats")
    with pytest.raises(InputError, match="were trained on"):
        check_unseen(file, [{"subject": "s1_2"}], "brats", r"(s\d+)_\d+")
    check_unseen(file, [{"subject": "s1"}], "brats", refuse=False)
    assert "not of unseen subjects" in caplog.text
    caplog.clear()
    check_unseen(file, [{"subject": "s1"}], "phantoms")  # two data sets may use the same names
    assert "have the names of subjects of another data set (brats)" in caplog.text


def test_the_lineage_goes_through_every_start(tmp_path):
    """Training in three data sets, one after the other: the last weights have seen all of them."""
    train(tmp_path, best_epochs=[3])
    lineage = make_lineage({"training": [{"subject": "p1"}], "validation": []}, "phantoms", str(tmp_path / "model.pt"))
    content = torch.load(tmp_path / "model.pt", weights_only=True)
    torch.save(content | {"lineage": lineage}, tmp_path / "second.pt")
    datalist = {"training": [{"subject": "s2"}], "validation": [{"subject": "s3"}]}
    assert make_lineage(datalist, "brats", str(tmp_path / "second.pt")) == {
        "training": {"brats": ["BraTS-GLI-00005-100", "s1", "s2"], "phantoms": ["p1"]},
        "validation": {"brats": ["s2", "s3"], "phantoms": []},
    }


def test_a_calibration_is_stored_with_the_subjects_that_it_was_fitted_to(tmp_path):
    train(tmp_path, best_epochs=[3])
    fitted = network().calibration.like()
    fitted.foreground_temperature.fill_(2)
    fitted.sampling = {"sampler": "a longer text than that of the checkpoint"}
    store_calibration(str(tmp_path / "model.pt"), fitted.state_dict(), {"brats": ["s2", "s9"], "other": ["t1"]})
    loaded = network()
    load_weights(loaded, str(tmp_path / "model.pt"), SETTINGS)
    assert loaded.calibration.foreground_temperature == 2
    assert loaded.calibration.sampling == fitted.sampling
    content = torch.load(tmp_path / "model.pt", weights_only=True)
    assert content["lineage"]["validation"] == {"brats": ["s2", "s9"], "other": ["t1"]}
    assert content["lineage"]["training"] == LINEAGE["training"]


def test_an_older_checkpoint_with_fewer_numbers_is_loaded(tmp_path):
    train(tmp_path, best_epochs=[1])
    file = tmp_path / "model.pt"
    content = torch.load(file, weights_only=True)
    added = ("calibration.dice_fit", "calibration.measurement_")
    content["model"] = {name: value for name, value in content["model"].items() if not name.startswith(added)}
    torch.save(content, file)
    loaded = network()
    load_weights(loaded, str(file), SETTINGS)
    assert not loaded.calibration.measures
    assert loaded.calibration.dice_fit.isinf().all()


@pytest.mark.parametrize(
    ("older", "conditioning"),
    [
        ({"self_conditioning": False, "conditioning": None}, None),
        ({"self_conditioning": True, "conditioning": None}, ["highway"]),
        ({"self_conditioning": True, "conditioning": None, "variant": "v2"}, ["highway", "anchor", "ss_former"]),
        ({"self_conditioning": True, "conditioning": ["highway", "anchor"]}, ["highway", "anchor"]),
    ],
)
def test_settings_of_older_checkpoints_get_their_names_of_now(tmp_path, older, conditioning):
    train(tmp_path, best_epochs=[1])
    file = tmp_path / "model.pt"
    content = torch.load(file, weights_only=True)
    content["settings"] = {"architecture": "MedSegDiff", "variant": "S", "prediction_type": "sample", **older}
    torch.save(content, file)
    settings = trained_settings(str(file))
    assert (settings["denoiser_stride"], settings["slice_size"]) == (1, None)
    added = ["self_conditioning"] if older["self_conditioning"] else []
    assert settings["conditioning"] == (None if conditioning is None else conditioning + added)
    assert "self_conditioning" not in settings


@pytest.mark.parametrize(("nonzero", "named"), [(True, "nonzero"), (False, "all")])
def test_the_normalisation_of_older_checkpoints_has_a_name(nonzero, named):
    settings = of_this_version({"architecture": "MedSegDiff", "normalise_nonzero": nonzero})
    assert settings["normalisation"] == named
    assert "normalise_nonzero" not in settings


def test_a_dropout_that_is_no_number_is_refused(tmp_path):
    train(tmp_path, best_epochs=[1])
    file = tmp_path / "model.pt"
    content = torch.load(file, weights_only=True)
    content["settings"] |= {"architecture": "MedSegDiff", "modality_dropout": "$print(1)"}
    torch.save(content, file)
    with pytest.raises(InputError, match="modality_dropout that is no number"):
        trained_settings(str(file))


@pytest.mark.parametrize(
    ("conditioning", "named"), [(None, ["highway"]), ([], []), (["highway", "anchor"], ["highway", "anchor"])]
)
def test_two_residual_blocks_of_older_checkpoints_are_those_of_v2(conditioning, named):
    older = {"variant": "S", "channels": [8, 8, 16], "conditioning": conditioning, "num_res_blocks": 2}
    settings = of_this_version({"architecture": "MedSegDiff", **older})
    assert (settings["variant"], settings["conditioning"]) == ("v2", named)
    assert "num_res_blocks" not in settings
    assert of_this_version({"architecture": "MedSegDiff", **older, "num_res_blocks": None})["variant"] == "S"
    with pytest.raises(InputError, match="num_res_blocks=3"):
        of_this_version({"architecture": "MedSegDiff", **older, "num_res_blocks": 3})


@pytest.mark.parametrize(
    "older",
    [{"architecture": "PlainUNet"}, {"conditioning": []}, {"prediction_type": "epsilon"}, {"conditioning": STOCHASTIC}],
)
def test_a_stride_without_effect_refuses_no_older_checkpoint(older):
    newest = {"architecture": "MedSegDiff", "prediction_type": "sample", "conditioning": None}
    check_settings(of_this_version(newest | older), {"denoiser_stride": 2}, "model.pt")
    with pytest.raises(InputError, match="denoiser_stride=1, now it is 2"):
        check_settings(of_this_version(newest), {"denoiser_stride": 2}, "model.pt")


def test_inference_finds_its_settings_in_the_checkpoint(tmp_path):
    train(tmp_path, best_epochs=[1])
    file = tmp_path / "model.pt"
    assert trained_settings(str(file)) == SETTINGS
    with pytest.raises(InputError, match="does not exist"):
        trained_settings(str(tmp_path / "typo.pt"))
    torch.save({"model": {}}, file)
    with pytest.raises(InputError, match="older than version 0.7"):
        trained_settings(str(file))


def test_other_names_of_the_grades_are_no_other_network(tmp_path):
    train(tmp_path, best_epochs=[1])
    load_weights(network(), str(tmp_path / "model.pt"), SETTINGS | {"grade_labels": {"LGG": 0, "HGG": 1}})


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"loss::lambda_focal": 1.0}, "was trained with loss::lambda_focal=0.5, now it is 1.0"),
        ({"augmentations::0::prob": 0.1}, "was trained with augmentations::0::prob=absent, now it is 0.1"),
    ],
)
def test_resuming_compares_the_whole_configuration(tmp_path, other, message):
    train(tmp_path, best_epochs=[1])
    config = {"loss::lambda_focal": 0.5, "amp": False}
    content = torch.load(tmp_path / "last.pt", weights_only=True)
    torch.save(content | {"config": config}, tmp_path / "last.pt")
    renamed = {name: {"moved": sets["brats"]} for name, sets in LINEAGE.items()}
    check_resumable(str(tmp_path), network(), SETTINGS, config, renamed)
    with pytest.raises(InputError, match=message):
        check_resumable(str(tmp_path), network(), SETTINGS, config | other, LINEAGE)
    for name in ("training", "validation"):
        with pytest.raises(InputError, match=f"has . {name} subjects, and these are not the 1 of now"):
            check_resumable(str(tmp_path), network(), SETTINGS, config, LINEAGE | {name: {"brats": ["s7"]}})


def test_shared_regions_keep_their_channels(tmp_path, caplog):
    """The calibration map of a region is the same without the others; a new region starts anew."""
    old, new = network(in_channels=2, out_channels=3).eval(), network(in_channels=2, out_channels=2).eval()
    settings = {"regions": ["TC", "WT", "ET"], "conditioning": None}
    torch.save({"model": old.state_dict(), "settings": settings, "lineage": LINEAGE}, tmp_path / "model.pt")
    random = new.denoiser.conv_in.conv.weight.clone()
    start_from(new, str(tmp_path / "model.pt"), settings | {"regions": ["cyst", "WT"]})
    image = torch.randn(1, 2, 16, 16)
    assert torch.equal(new.condition(image)["calib_map"][:, 1], old.condition(image)["calib_map"][:, 1])
    first, then = old.denoiser.conv_in.conv.weight, new.denoiser.conv_in.conv.weight
    assert torch.equal(then[:, [0, 1, 3, 5]], first[:, [0, 1, 3, 6]])  # image, noisy mask and map of WT
    assert torch.equal(then[:, [2, 4]], random[:, [2, 4]])
    assert "'calibrator.output_block.conv.conv', 'denoiser.conv_in.conv'" in caplog.text


def test_shapes_that_differ_otherwise_have_no_regions():
    old = torch.arange(12.0).reshape(3, 4)
    for new in (torch.zeros(3, 4), torch.zeros(3, 5), torch.zeros(2, 2), torch.zeros(4)):
        assert of_shared_regions(old, new, ["TC", "WT", "ET"], ["WT"]) is old
    found = of_shared_regions(old, torch.zeros(1, 4), ["TC", "WT", "ET"], ["WT"])
    assert torch.equal(found, old[1:2])
