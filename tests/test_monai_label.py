"""Training with the keys that MONAI Label overrides, without its server. acceptance/test_label.py uses the server."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from monai.bundle import ConfigParser

from conftest import MODALITIES, ROOT
from scripts.config import InputError
from scripts.training.checkpoints import trained_settings


@pytest.fixture
def request_of(phantoms, tmp_path, run_bundle):
    """Function that trains for one epoch as MONAI Label does, given the numbers of training and validation subjects."""
    studies = tmp_path / "studies"
    studies.mkdir()
    for file in [*phantoms.glob("*/*.nii.gz"), *phantoms.glob("*.csv")]:
        shutil.copy(file, studies)

    def run(training, validation, modality="t1ce", **overrides):
        def items(numbers):
            stems = [studies / (n if isinstance(n, str) else f"BraTS20_Training_{n:03d}") for n in numbers]
            return [{"image": f"{stem}_{modality}.nii.gz", "label": f"{stem}_seg.nii.gz"} for stem in stems]

        set_by_server = {
            "train::trainer::max_epochs": 1,
            "train::dataset::data": items(training),
            "validate::dataset::data": items(validation),
        }
        folders = {"output_dir": str(tmp_path / "out"), "ckpt_dir": str(tmp_path / "models")}
        run_bundle(["train.yaml"], **folders, **set_by_server, **overrides)
        return torch.load(tmp_path / "models" / "model.pt", weights_only=True), tmp_path / "out"

    return run


def test_one_file_of_each_subject_trains(request_of):
    checkpoint, out = request_of([1, 2, 3], [4])
    split = json.loads((out / "datalist.json").read_text())
    assert [[item["subject"][-3:] for item in split[part]] for part in split] == [["001", "002", "003"], ["004"], []]
    first = split["training"][0]
    assert [name.rsplit("_", 1)[1] for name in first["image"]] == [f"{modality}.nii.gz" for modality in MODALITIES]
    assert {item["grade"] for part in split.values() for item in part} == {0, 1}  # from name_mapping.csv
    names = [f"BraTS20_Training_{number:03d}" for number in (1, 2, 3, 4)]
    assert checkpoint["lineage"] == {"training": {"studies": names[:3]}, "validation": {"studies": names[3:]}}


def test_the_served_network_is_trained_whatever_the_defaults_are(request_of):
    served, _ = request_of([1, 2], [3])
    again, _ = request_of([1, 2], [3], channels=[16, 16], calib_channels=None, image_size=64)
    assert again["settings"] == served["settings"]


def test_without_validation_the_last_weights_are_kept(request_of):
    checkpoint, _ = request_of([1, 2], [])
    assert checkpoint["epoch"] == 1


def test_a_subject_does_not_train_and_validate(request_of, capsys):
    """MONAI Label splits by file, so two labelled files of a subject can be in training and in validation."""
    _, out = request_of([1, 2], [2, 3])
    split = json.loads((out / "datalist.json").read_text())
    assert [item["subject"][-3:] for item in split["training"]] == ["001", "002"]
    assert [item["subject"][-3:] for item in split["validation"]] == ["003"]
    assert "1 validation subjects are used for training" in capsys.readouterr().out


def test_training_goes_on_from_served_weights_without_a_leak(request_of, tmp_path, capsys):
    """MONAI Label adds its own loader, and draws the validation files anew: what was trained on trains again."""
    first, _ = request_of([1, 2], [3])
    model = tmp_path / "models" / "model.pt"
    first["model"]["calibration.foreground_temperature"].fill_(3)
    torch.save(first, model)
    loader = {"_target_": "CheckpointLoader", "load_path": str(model), "load_dict": {"model": "$@network"}}
    config = ConfigParser.load_config_file(str(ROOT / "configs" / "train.yaml"))
    handlers = [loader, *config["train"]["handlers"]]
    second, out = request_of([3, 4], [1, 5], **{"train::handlers": handlers}, learning_rate=0.0)
    split = json.loads((out / "datalist.json").read_text())
    assert [[item["subject"][-3:] for item in split[part]] for part in split] == [["003", "004", "001"], ["005"], []]
    assert [name[-3:] for name in second["lineage"]["training"]["studies"]] == ["001", "002", "003", "004"]
    assert (second["model"]["calibration.foreground_temperature"] == 1).all()  # it was fitted to other weights
    weights = [content["model"]["denoiser.conv_in.conv.weight"] for content in (first, second)]
    assert torch.equal(*weights)


def test_nothing_labelled_is_told(request_of):
    with pytest.raises(InputError, match="no image has a submitted label"):
        request_of([], [])


def test_a_missing_sibling_stops_before_anything_is_written(request_of, tmp_path):
    (tmp_path / "studies" / "BraTS20_Training_002_flair.nii.gz").unlink()
    with pytest.raises(InputError, match=r"002_t1ce.nii.gz has no file for \['flair'\] beside it"):
        request_of([1, 2], [3])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("value", ["$__import__('os').getpid()", "$import this", "@device", "%/etc/passwd", ["$1"]])
def test_options_of_a_request_are_never_evaluated(value, tmp_path):
    """What MONAI Label does: read the options once, write those of a request into them, parse again."""
    parser = ConfigParser()
    parser.read_config(str(ROOT / "configs" / "inference.yaml"))
    assert parser.get_parsed_content("displayable_configs")["sampler"] == "ddim"
    parser["displayable_configs"].update({"num_samples": 3})
    parser.parse()
    assert parser.get_parsed_content("inferer").num_samples == 3
    for option in ("sampler", "model_filename"):
        with pytest.raises(InputError, match="is refused"):
            parser["displayable_configs"].update({option: value})


@pytest.mark.parametrize("value", ["$__import__('os').getpid()", "@device", "%file", {"WT": ["$1"]}])
def test_settings_of_a_checkpoint_are_data(value, tmp_path):
    checkpoint = torch.load(ROOT / "models" / "model.pt", weights_only=True)
    checkpoint["settings"]["regions"] = value
    torch.save(checkpoint, tmp_path / "model.pt")
    with pytest.raises(InputError, match=r"model.pt': text that starts with '\$', '@' or '%' is refused"):
        trained_settings(str(tmp_path / "model.pt"))


def test_hostile_names_of_files_are_subjects_like_any_other(request_of, tmp_path):
    """A file may be called like an expression; its subject trains, and nothing is evaluated."""
    marker = tmp_path / "executed"
    hostile = f"$__import__('pathlib').Path({str(marker)!r}.replace('|', chr(47))).touch()".replace("/", "|")
    studies = tmp_path / "studies"
    for file in sorted(studies.glob("BraTS20_Training_001_*")):
        file.rename(studies / file.name.replace("BraTS20_Training_001", hostile))
    checkpoint, _ = request_of([hostile], [])
    assert checkpoint["lineage"]["training"] == {"studies": [hostile]}
    assert not marker.exists()
