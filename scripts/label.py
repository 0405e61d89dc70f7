"""Training for MONAI Label, which sets data, epochs and handlers alone: here the rest of the configuration follows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from scripts.checkpoint import trained_settings
from scripts.config import running_parser, warn_some
from scripts.datalist import Item, attach_grades, check_headers, subject_of
from scripts.split import patient


def take_label_request() -> None:
    """Bring the running configuration in line with what MONAI Label has set; without it, do nothing.

    It hands over ``{"image": file, "label": file}``, which become subjects: with the files of the other modalities, and
    with grades where a ``name_mapping.csv`` lies beside them. The network is that of the served weights, whether
    training starts from them or not, for the server goes on with what is trained.

    Raises:
        InputError: naming the file that cannot be used.
    """
    parser = running_parser()
    training, validation = (parser[f"{part}::dataset::data"] for part in ("train", "validate"))
    if not isinstance(training, list):
        return
    value = parser.get_parsed_content
    settings = trained_settings(value("ckpt_path")) if Path(value("ckpt_path")).is_file() else {}
    modalities = settings.get("modalities", value("modalities"))
    parts = {"training": subjects(training, modalities)}
    parts["validation"] = subjects(validation if isinstance(validation, list) else [], modalities)
    parts["validation"] = unseen(parts["validation"], parts["training"], value("patient_pattern"))
    dataset_dir = str(Path(training[0]["image"]).parent)
    options = {key: value(key) for key in ("grade_csv", "subject_column", "grade_column", "grade_labels")}
    options |= {key: settings[key] for key in options.keys() & settings.keys()}
    settings["max_epochs"] = parser["train::trainer::max_epochs"]
    settings["dataset_dir"] = dataset_dir
    settings["datalist"] = {part: attach_grades(items, dataset_dir, **options) for part, items in parts.items()}
    settings["train::dataset::data"], settings["validate::dataset::data"] = (
        "@datalist::training",
        "@datalist::validation",
    )
    if not parts["validation"]:  # nothing to choose by: the last weights are kept
        settings |= {"val_interval": settings["max_epochs"] + 1, "validate::dataset": []}
    parser.update(settings)
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
