"""Lineage of weights: every subject that they were trained on, or that helped to choose them, through every start."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from scripts.config import InputError
from scripts.data.split import PATIENT_PATTERN, patient
from scripts.training.checkpoints import read_checkpoint

logger = logging.getLogger(__name__)

# {"training": {data set: [subject, ...]}, "validation": {data set: [subject, ...]}}
Lineage = dict[str, dict[str, list[str]]]


def make_lineage(datalist: Mapping[str, Sequence[Mapping]], dataset: str, init_ckpt: str | None = None) -> Lineage:
    """Lineage of a training: its own subjects, and those of the weights that it starts from.

    Args:
        datalist: items of ``training`` and ``validation``.
        dataset: name of the data set; two data sets may use the same names of subjects.
        init_ckpt: checkpoint whose weights training starts from; None starts from random weights.
    """
    own = {name: {dataset: [item["subject"] for item in datalist[name]]} for name in ("training", "validation")}
    return merge(read_checkpoint(init_ckpt)["lineage"], own) if init_ckpt else own


def merge(first: Lineage, second: Lineage) -> Lineage:
    """Union of two lineages, in sorted order."""
    return {
        name: {
            dataset: sorted({*first[name].get(dataset, []), *second[name].get(dataset, [])})
            for dataset in sorted(first[name].keys() | second[name].keys())
        }
        for name in first.keys() | second.keys()
    }


def seen(
    lineage: Lineage, name: str, items: Sequence[Mapping[str, Any]], dataset: str | None, patient_pattern: str
) -> list[str]:
    """Subjects of ``items`` whose patient is in the list ``name`` of a lineage.

    Args:
        lineage: of the weights.
        name: ``training`` or ``validation``.
        items: subjects.
        dataset: name of their data set; None compares with every data set.
        patient_pattern: see :func:`scripts.data.split.patient`.
    """
    sets = lineage[name].values() if dataset is None else [lineage[name].get(dataset, [])]
    known = {patient(subject, patient_pattern) for subjects in sets for subject in subjects}
    return sorted({item["subject"] for item in items if patient(item["subject"], patient_pattern) in known})


def check_unseen(
    ckpt_path: str,
    items: Sequence[Mapping[str, Any]],
    dataset: str,
    patient_pattern: str = PATIENT_PATTERN,
    refuse: bool = True,
) -> list[str]:
    """Check that weights are not judged on patients that they, or the weights they started from, were trained on.

    Args:
        ckpt_path: checkpoint of the weights.
        items: subjects to be judged.
        dataset: name of their data set. Equal names of subjects in another data set give a warning.
        patient_pattern: see :func:`scripts.data.split.patient`.
        refuse: raise an error; otherwise only warn.

    Returns:
        The subjects that chose the weights or their temperatures, as validation subjects.

    Raises:
        InputError: if a patient was trained on and ``refuse`` is true.
    """
    lineage = read_checkpoint(ckpt_path)["lineage"]
    if found := seen(lineage, "training", items, dataset, patient_pattern):
        message = f"{len(found)} of {len(items)} subjects, such as {found[:3]}, were trained on by '{ckpt_path}'"
        if refuse:
            raise InputError(
                f"{message}, or by the weights that it started from; set seed, fold, num_folds and validation_share as "
                "in training, or datalist_file to its datalist.json"
            )
        logger.warning(f"{message}: the scores are not of unseen subjects")
    elif found := seen(lineage, "training", items, None, patient_pattern):
        logger.warning(
            f"{len(found)} of {len(items)} subjects, such as {found[:3]}, have the names of subjects of another data "
            f"set ({', '.join(lineage['training'])}) that '{ckpt_path}' was trained on; if it is the same data set "
            "under another name, the scores are not of unseen subjects"
        )
    return seen(lineage, "validation", items, dataset, patient_pattern)
