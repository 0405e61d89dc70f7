"""MONAI Label: options of requests, and training, whose data, epochs and handlers it overrides."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from monai.bundle import ConfigParser

from scripts.config import InputError, check_plain, running_parser, warn_some
from scripts.data.split import patient
from scripts.data.subjects import Item, attach_grades, check_headers, subject_of
from scripts.training.checkpoints import read_checkpoint
from scripts.training.lineage import seen

logger = logging.getLogger(__name__)

TRAINED = {"_target_": "scripts.training.checkpoints.trained_settings", "ckpt_path": "@ckpt_path"}
GRADE_KEYS = ("grade_csv", "subject_column", "grade_column", "grade_labels")


class PlainOptions(dict):
    """A part of a configuration that MONAI Label updates from requests; text that its parser would evaluate is refused.

    It replaces the options of ``displayable_configs``, and the configuration itself, which gets the device.
    """

    def update(self, *others: Any, **values: Any) -> None:
        new = dict(*others, **values)
        check_plain(new, "an option of the request")
        super().update(new)


def option(name: str) -> Any:
    """Value of an option of ``displayable_configs``, which MONAI Label shows to its users.

    MONAI Label writes the options of a request into the configuration and parses it again. From the first call on,
    text that the parser would evaluate is refused there (:class:`PlainOptions`).
    """
    parser = running_parser()
    if not isinstance(parser["displayable_configs"], PlainOptions):
        # not parser.set, which would drop what is being resolved
        parser.config["displayable_configs"] = PlainOptions(parser["displayable_configs"])  # type: ignore[index]
        parser.config = PlainOptions(parser.config)  # type: ignore[arg-type, call-overload]
    value = parser["displayable_configs"][name]
    own_text = f"$workflow.option('{name}')"
    return parser.get_parsed_content(name) if value == own_text else check_plain(value, f"option '{name}'")


def apply_label_request(parser: ConfigParser, settings: Iterable[str]) -> None:
    """Adapt the configuration to what MONAI Label has set; do nothing without MONAI Label.

    MONAI Label replaces the data by ``{"image": file, "label": file}``. These become subjects: the files of the other
    modalities are found, and grades are read from a ``name_mapping.csv`` in the same folder. The network takes the
    settings of the served weights, even if training does not start from them, because the server loads the trained
    weights into the network that it already has.

    What comes from files (settings, names) is never written into the configuration as text, which would be parsed:
    the configuration gets functions that read it.

    Args:
        parser: the running configuration.
        settings: keys that are taken from the served weights.

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
    handlers = parser["train::handlers"]
    changes: dict[str, Any] = {"train::handlers": [handler for handler in handlers if not _loads_weights(handler)]}
    starts = [str(Path(handler["load_path"]).absolute()) for handler in handlers if _loads_weights(handler)]
    changes["init_ckpt"] = starts[0] if starts else None
    logger.info(f"training starts from {f'the weights of {starts[0]!r}' if starts else 'random weights'}, with epoch 1")
    if Path(parser.get_parsed_content("ckpt_path")).is_file():
        changes |= {"settings": TRAINED} | {key: f"$@settings.get('{key}')" for key in settings}
    changes["dataset_dir"] = str(Path(training[0]["image"]).parent)
    changes["max_epochs"] = parser["train::trainer::max_epochs"]
    changes["datalist_file"] = None
    changes["datalist"] = {
        "_target_": "scripts.tools.monai_label.labelled_subjects",
        "training": training,
        "validation": validation if isinstance(validation, list) else [],
        **{key: f"@{key}" for key in ("init_ckpt", "dataset_dir", "modalities", "patient_pattern")},
        **{key: f"@{key}" for key in GRADE_KEYS if key in parser.get()},
    }
    changes |= {"train::dataset::data": "$@datalist['training']", "validate::dataset::data": "$@datalist['validation']"}
    update_config(parser, changes)


def _loads_weights(handler: Any) -> bool:
    """Whether a handler is the CheckpointLoader that MONAI Label adds; ``init_ckpt`` does this with its checks."""
    return isinstance(handler, dict) and handler.get("_target_") == "CheckpointLoader"


def update_config(parser: ConfigParser, changes: Mapping[str, Any]) -> None:
    """Set keys of a configuration that is already running; everything is parsed again when it is next read."""
    parser.update(dict(changes))
    parser.parse(True)


def labelled_subjects(
    training: Sequence[Mapping[str, str]],
    validation: Sequence[Mapping[str, str]],
    init_ckpt: str | None,
    dataset_dir: str,
    modalities: Sequence[str],
    patient_pattern: str,
    **grades: Any,
) -> dict[str, list[Item]]:
    """Training and validation subjects of MONAI Label's items; there is no test subject.

    MONAI Label splits by file, anew for every training. Subjects whose patient is in training, now or in an earlier
    training of ``init_ckpt``, are moved from validation to training.

    Args:
        training: ``{"image": file, "label": file}``.
        validation: likewise.
        init_ckpt: checkpoint whose weights training starts from, or None.
        dataset_dir: folder of ``name_mapping.csv``.
        modalities: file suffixes, in channel order.
        patient_pattern: regular expression for :func:`scripts.data.split.patient`.
        grades: further arguments of :func:`scripts.data.subjects.attach_grades`; nothing without grades.
    """
    found = {"training": find_labelled(training, modalities), "validation": find_labelled(validation, modalities)}
    trained = {patient(item["subject"], patient_pattern) for item in found["training"]}
    known = [item["subject"] for item in found["validation"] if patient(item["subject"], patient_pattern) in trained]
    if init_ckpt:
        lineage, dataset = read_checkpoint(init_ckpt)["lineage"], Path(dataset_dir).resolve().name
        known += seen(lineage, "training", found["validation"], dataset, patient_pattern)
    warn_some("validation subjects are used for training: their patients were trained on", sorted(set(known)))
    names = {item["subject"] for item in found["training"]}
    found["training"] += [i for i in found["validation"] if i["subject"] in known and i["subject"] not in names]
    found["validation"] = [item for item in found["validation"] if item["subject"] not in known]
    if grades:
        found = {subset: attach_grades(items, dataset_dir, **grades) for subset, items in found.items()}
    return found | {"test": []}


def find_labelled(items: Sequence[Mapping[str, str]], modalities: Sequence[str]) -> list[Item]:
    """Subjects of MONAI Label's items, each once, with their headers checked."""
    found: dict[str, Item] = {}
    for item in items:
        subject = subject_of(item["image"], modalities) | {"label": [item["label"]]}
        check_headers(subject, modalities)
        found.setdefault(subject["subject"], subject)
    return list(found.values())
