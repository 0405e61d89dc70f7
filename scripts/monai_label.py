"""Training for MONAI Label, which sets data, epochs and handlers alone: here the rest of the configuration follows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from monai.bundle import ConfigParser

from scripts.checkpoint import trained_settings
from scripts.config import InputError, running_parser, warn_some
from scripts.split import patient
from scripts.subjects import Item, attach_grades, check_headers, subject_of


def take_label_request() -> None:
    """Bring the running configuration in line with what MONAI Label has set; without it, do nothing.

    It hands over ``{"image": file, "label": file}``, which become subjects: with the files of the other modalities, and
    with grades where a ``name_mapping.csv`` lies beside them. The network is that of the served weights, whether
    training starts from them or not, for the server goes on with what is trained.

    Raises:
        InputError: when nothing is labelled, or naming the file that cannot be used.
    """
    parser, value = running_parser(), running_parser().get_parsed_content
    training, validation = (parser[f"{part}::dataset::data"] for part in ("train", "validate"))
    if not isinstance(training, list):
        return
    if not training:
        raise InputError("no image has a submitted label (of the tag 'final') to train on")
    if Path(value("ckpt_path")).is_file():
        change(parser, trained_settings(value("ckpt_path")))
    modalities, dataset_dir = value("modalities"), str(Path(training[0]["image"]).parent)
    parts = {"training": subjects(training, modalities)}
    others = subjects(validation if isinstance(validation, list) else [], modalities)
    parts["validation"] = unseen(others, parts["training"], value("patient_pattern"))
    grading = {key: value(key) for key in ("grade_csv", "subject_column", "grade_column", "grade_labels")}
    settings = {
        "max_epochs": parser["train::trainer::max_epochs"],
        "dataset_dir": dataset_dir,
        "datalist": {part: attach_grades(items, dataset_dir, **grading) for part, items in parts.items()},
        "train::dataset::data": "@datalist::training",
        "validate::dataset::data": "@datalist::validation",
    }
    if not parts["validation"]:  # nothing to choose by: the last weights are kept
        settings |= {"val_interval": settings["max_epochs"] + 1, "validate::dataset": []}
    change(parser, settings)


def change(parser: ConfigParser, settings: Mapping[str, Any]) -> None:
    """Set keys of a configuration that is being run, so that what is read from now on sees them."""
    parser.update(dict(settings))
    parser.parse(True)


def subjects(items: Sequence[Mapping[str, str]], modalities: Sequence[str]) -> list[Item]:
    """Subjects of MONAI Label's items, each once, with their headers checked."""
    found: dict[str, Item] = {}
    for item in items:
        subject = subject_of(item["image"], modalities) | {"label": item["label"]}
        check_headers(subject, modalities)
        found.setdefault(subject["subject"], subject)
    return list(found.values())


def unseen(validation: Sequence[Item], training: Sequence[Item], patient_pattern: str) -> list[Item]:
    """Subjects of ``validation`` whose patient does not train: MONAI Label splits by file."""
    trained = {patient(item["subject"], patient_pattern) for item in training}
    kept = [item for item in validation if patient(item["subject"], patient_pattern) not in trained]
    warn_some(
        "subjects train and do not validate: another of their files is labelled as well",
        [item["subject"] for item in validation if item not in kept],
    )
    return kept
