"""What a run of the bundle of synthesis does, in order: one function per verb."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import ignite.distributed as idist
import nibabel as nib
import numpy as np

from scripts.adversarial.step import d_channels
from scripts.config import InputError, bundle_root, check_all, running_parser, save_config
from scripts.data.datalist import describe
from scripts.data.pictures import read_grid
from scripts.data.subjects import Item
from scripts.sampling.jobs import evaluate_subjects, infer_subjects
from scripts.synthesis.inferer import DIVISOR
from scripts.synthesis.transforms import check_hu_range
from scripts.tools.monai_label import apply_label_request, option
from scripts.training.checkpoints import check_settings
from scripts.training.lineage import check_unseen
from scripts.training.run import run_training, start
from scripts.training.weights import load_weights

__all__ = ["bundle_root", "evaluate", "infer", "option", "settings", "train"]
logger = logging.getLogger(__name__)
OF_GENERATOR = ("modalities", "hu_range", "num_slices", "features")
SETTINGS = (*OF_GENERATOR, "intermediate", "refiner_width", "refiner_units")


def settings() -> dict[str, Any]:
    """The settings that give the weights their meaning."""
    parser = running_parser()
    found = {name: parser.get_parsed_content(name) for name in SETTINGS}
    if len(found["modalities"]) != 1:
        raise InputError(f"modalities={found['modalities']!r} must be one file suffix, that of the native CT")
    if found["num_slices"] not in (1, 3, 5):
        raise InputError(f"num_slices={found['num_slices']!r} must be 1, 3 or 5")
    return found | {"hu_range": list(check_hu_range(found["hu_range"]))}


def train() -> None:
    """Train the refiner of a frozen generator or, without ``intermediate``, the generator.

    Training starts anew, from the weights of ``init_ckpt``, or from where an earlier run stopped (``resume``).
    """
    parser, value = start("train.yaml")
    apply_label_request(parser, SETTINGS)
    trained, datalist = value("settings"), value("datalist")
    network = value("network_def")  # first: its weights do not depend on the discriminator
    _check_training(value)
    if trained["intermediate"] and not value("init_ckpt"):  # which holds a generator, too
        file, judged = value("generator_ckpt"), datalist["validation"] + datalist["test"]
        check_unseen(file, judged, value("dataset_name"), value("patient_pattern"))
        load_weights(network.generator, file, {key: trained[key] for key in OF_GENERATOR})
    if idist.get_rank() == 0:
        print(describe(datalist, value("patient_pattern")))
    run_training(parser, network, datalist)


def evaluate() -> None:
    """Score the weights of ``ckpt_path`` on subjects that they were not trained on."""
    parser, value = start("train.yaml", "evaluate.yaml")
    value("network")  # refuses a checkpoint that does not fit
    value("chosen_by")  # refuses subjects that the weights were trained on
    save_config(value("output_dir") + "/evaluate.yaml")
    evaluate_subjects(parser, value("validate::dataset").data)


def infer() -> None:
    """Synthesise the contrast CT of every subject of ``dataset_dir``."""
    parser, value = start("inference.yaml", "train.yaml")
    trained = value("settings")
    if absent := [key for key in SETTINGS if key not in trained]:
        raise InputError(f"ckpt_path '{value('ckpt_path')}' has no settings {absent}: it is not of this bundle")
    given = {key: value(key) for key in SETTINGS if key in parser.get()}  # from the command line or an overlay
    check_settings(trained, given, "the model")
    value("data").check_output_dir(value("output_dir"))
    infer_subjects(parser)


def _check_training(value: Callable[[str], Any]) -> None:
    datalist = value("datalist")
    check_all([item for items in datalist.values() for item in items], _check_pair)
    if not datalist["validation"]:
        logger.warning("there is no validation subject: model.pt will hold the last weights")
    slices = -(-len(datalist["training"]) // idist.get_world_size()) * value("slices_per_volume")
    if slices < value("batch_size"):
        raise InputError(f"an epoch has {slices} slices, fewer than batch_size; raise slices_per_volume")
    sizes = {item["subject"]: _slice_size(item) for item in datalist["training"] + datalist["validation"]}
    if len(set(sizes.values())) > 1 and value("batch_size") > 1:
        (one, first), (two, second) = min(sizes.items(), key=lambda s: s[1]), max(sizes.items(), key=lambda s: s[1])
        raise InputError(
            f"slices of {first} px ('{one}') and of {second} px ('{two}') cannot be in one batch: set batch_size=1, or "
            "crop the CTs to one size"
        )
    smallest = min(sizes.values())
    value("loss").check(smallest)
    if value("discriminator_network") is not None:
        value("discriminator_network").check(d_channels(value("d_input")), smallest)


def _slice_size(item: Item) -> tuple[int, int]:
    """Sides (H, W) of the padded axial slices of a subject. Only the header is read."""
    grid = read_grid(item["image"][0])
    sides = np.array(grid.shape)[np.argsort(nib.io_orientation(grid.affine)[:, 0])][:2]
    height, width = (int(-(-side // DIVISOR) * DIVISOR) for side in sides)
    return height, width


def _check_pair(item: Item) -> None:
    if set(item["image"]) & set(item["label"]):
        raise InputError(f"subject '{item['subject']}': {item['image'][0]} is both the native and the contrast CT")
