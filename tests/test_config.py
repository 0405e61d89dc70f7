from __future__ import annotations

import re
import sys

import pytest
import torch
from monai.bundle import ConfigParser

from scripts import config as config_module
from scripts.config import BUNDLE_ROOT, InputError, atomic_path, bundle_root, check_keys, check_values, explain

TRAIN = BUNDLE_ROOT / "configs" / "train.yaml"


def test_the_root_of_a_further_bundle(tmp_path, monkeypatch):
    """A folder of bundles/ in the repository; in a release, the release itself."""
    monkeypatch.setattr(config_module, "BUNDLE_ROOT", tmp_path)
    assert bundle_root("organs") == str(tmp_path)
    (tmp_path / "bundles" / "organs").mkdir(parents=True)
    assert bundle_root("organs") == str(tmp_path / "bundles" / "organs")


def test_known_keys_pass_and_a_typo_names_the_nearest():
    check_keys({"batch_size": 4, "_meta_": {}}, TRAIN)
    with pytest.raises(InputError, match=r"'batch_sise' \(did you mean 'batch_size'\?\)"):
        check_keys({"batch_size": 4, "batch_sise": 8}, TRAIN)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("batch_size", 0),
        ("image_size", "abc"),
        ("val_interval", 2.5),
        ("seed", -1),
        ("fold", "a"),
        ("modalities", "t1"),
        ("regions", "WT"),
        ("grade_labels", ["LGG"]),
        ("learning_rate", "fast"),
        ("use_cls_head", "no"),
        ("device", "cuda"),
    ],
)
def test_values_of_another_kind_are_refused(key, value, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    config = ConfigParser.load_config_file(str(TRAIN))
    check_values(config, TRAIN)
    check_values(config | {key: "$1 + 1"}, TRAIN)
    with pytest.raises(InputError, match=key):
        check_values(config | {key: value}, TRAIN)


def test_atomic_path_replaces_only_on_success(tmp_path):
    file = tmp_path / "sub" / "a.csv"
    with atomic_path(file) as path:
        path.write_text("old")
        assert path.suffix == ".csv"
    with pytest.raises(RuntimeError), atomic_path(file) as path:
        path.write_text("half")
        raise RuntimeError
    assert file.read_text() == "old"
    assert list(file.parent.iterdir()) == [file]


def test_atomic_files_have_ordinary_permissions(tmp_path):
    with atomic_path(tmp_path / "a") as path:
        path.write_text("x")
    (tmp_path / "b").write_text("x")
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "b").stat().st_mode


def test_input_errors_are_printed_alone(capsys):
    try:
        try:
            raise InputError("the file x is broken")
        except InputError as error:
            raise RuntimeError("Failed to evaluate") from error
    except RuntimeError:
        config_module._report_own_error(*sys.exc_info())
    assert capsys.readouterr().err.strip() == "error: the file x is broken"


def test_other_errors_keep_their_traceback(capsys):
    try:
        raise KeyError("x")
    except KeyError:
        config_module._report_own_error(*sys.exc_info())
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("cause", "meaning"),
    [
        (InputError("fold=7 is none"), "fold=7 is none"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), "lower batch_size"),
        (torch.AcceleratorError("CUDA error: out of memory"), "another program uses it"),
        (ModuleNotFoundError("No module named 'mlflow'"), r"pip install -e '.\[tracking\]'"),
        (RuntimeError("[pair.cc:553] Connection closed by peer [127.0.0.1]:1"), "another process of this run died"),
    ],
)
def test_errors_from_outside_are_explained(cause, meaning):
    wrapped = RuntimeError("Failed to evaluate ConfigExpression")
    wrapped.__cause__ = cause
    assert re.search(meaning, explain(wrapped))
    assert explain(KeyError("dice")) is None
