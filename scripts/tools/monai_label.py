"""MONAI Label: options of requests, and training, whose data, epochs and handlers it overrides."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from monai.bundle import ConfigParser

from scripts.config import InputError, check_plain, warn_some
from scripts.data.split import patient
from scripts.data.subjects import Item, attach_grades, check_headers, subject_of
from scripts.net import SETTINGS

TRAINED = {"_target_": "scripts.training.checkpoints.trained_settings", "ckpt_path": "@ckpt_path"}
GRADE_KEYS = ("grade_csv", "subject_column", "grade_column", "grade_labels")


class PlainOptions(dict):
    """Options of MONAI Label, which it updates from requests; text that its parser would evaluate is refused."""

    def update(self, *others: Any, **values: Any) -> None:
        new = dict(*others, **values)
        check_plain(new, "an option of the request")
        super().update(new)


def apply_label_request(parser: ConfigParser) -> None:
    """Adapt the configuration to what MONAI Label has set; do nothing without MONAI Label.

    MONAI Label replaces the data by ``{"image": file, "label": file}``. These become subjects: the files of the other
    modalities are found, and grades are read from a ``name_mapping.csv`` in the same folder. The network takes the
    settings of the served weights, even if training does not start from them, because the server loads the trained
    weights into the network that it already has.

    What comes from files (settings, names) is never written into the configuration as text, which would be parsed:
    the configuration gets functions that read it.

    Raises:
        InputError: if nothing is labelled, or naming the file that cannot be used.
    """
    training, validation = (parser[f"{subset}::dataset::data"] for subset in ("train", "validate"))
    if not isinstance(training, list):
        return
    if not training:
        raise InputError("no image has a submitted label (with the tag 'final') to train on")
    for item in [*training, *(validation if isinstance(validation, list) else [])]:
        for key in ("image", "label"):  # an absolute path is never an expression
            item[key] = str(Path(item[key]).absolute())
    changes: dict[str, Any] = {}
    if Path(parser.get_parsed_content("ckpt_path")).is_file():
        changes |= {"settings": TRAINED} | {key: f"$@settings['{key}']" for key in SETTINGS}
    changes["dataset_dir"] = str(Path(training[0]["image"]).parent)
    changes["max_epochs"] = parser["train::trainer::max_epochs"]
    changes["datalist"] = {
        "_target_": "scripts.tools.monai_label.labelled_subjects",
        "training": training,
        "validation": validation if isinstance(validation, list) else [],
        **{key: f"@{key}" for key in ("dataset_dir", "modalities", "patient_pattern", *GRADE_KEYS)},
    }
    changes |= {"train::dataset::data": "$@datalist['training']", "validate::dataset::data": "$@datalist['validation']"}
    update_config(parser, changes)
    if not parser.get_parsed_content("datalist")["validation"]:  # nothing to choose by: the last weights are kept
        update_config(parser, {"val_interval": changes["max_epochs"] + 1, "validate::dataset": []})


def update_config(parser: ConfigParser, changes: Mapping[str, Any]) -> None:
    """Set keys of a configuration that is already running; everything is parsed again when it is next read."""
    parser.update(dict(changes))
    parser.parse(True)


def labelled_subjects(
    training: Sequence[Mapping[str, str]],
    validation: Sequence[Mapping[str, str]],
    dataset_dir: str,
    modalities: Sequence[str],
    patient_pattern: str,
    **grades: Any,
) -> dict[str, list[Item]]:
    """Training and validation subjects of MONAI Label's items.

    MONAI Label splits by file. A subject whose patient is already in training is left out of validation.

    Args:
        training: ``{"image": file, "label": file}``.
        validation: likewise.
        dataset_dir: folder of ``name_mapping.csv``.
        modalities: file suffixes, in channel order.
        patient_pattern: regular expression for :func:`scripts.data.split.patient`.
        grades: further arguments of :func:`scripts.data.subjects.attach_grades`.
    """
    found = {"training": find_labelled(training, modalities), "validation": find_labelled(validation, modalities)}
    trained = {patient(item["subject"], patient_pattern) for item in found["training"]}
    unseen = [item for item in found["validation"] if patient(item["subject"], patient_pattern) not in trained]
    left_out = [item["subject"] for item in found["validation"] if item not in unseen]
    warn_some("subjects are left out of validation: another file of the same patient is used for training", left_out)
    found["validation"] = unseen
    return {subset: attach_grades(items, dataset_dir, **grades) for subset, items in found.items()}


def find_labelled(items: Sequence[Mapping[str, str]], modalities: Sequence[str]) -> list[Item]:
    """Subjects of MONAI Label's items, each once, with their headers checked."""
    found: dict[str, Item] = {}
    for item in items:
        subject = subject_of(item["image"], modalities) | {"label": item["label"]}
        check_headers(subject, modalities)
        found.setdefault(subject["subject"], subject)
    return list(found.values())
