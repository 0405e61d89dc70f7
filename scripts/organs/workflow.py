"""What a run of the bundle of organs does, in order: one function per verb."""

from __future__ import annotations

import logging
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import ignite.distributed as idist

from scripts.config import InputError, bundle_root, running_parser, save_config
from scripts.data.datalist import describe
from scripts.organs.structures import chosen
from scripts.sampling.jobs import evaluate_subjects, infer_subjects
from scripts.tools import onnx_files
from scripts.tools.monai_label import apply_label_request, option
from scripts.training.checkpoints import check_settings
from scripts.training.run import run_training, start
from scripts.training.weights import load_weights

logger = logging.getLogger(__name__)

__all__ = ["bundle_root", "chosen", "evaluate", "export_int8", "infer", "option", "settings", "train"]
CALIBRATION_BATCHES = 16  # of training slices, from which int8 takes its ranges
SETTINGS = ("modalities", "structures", "windows", "num_slices", "spacing", "image_size", "features")


def settings() -> dict[str, Any]:
    """The settings that give the weights their meaning; groups of structures are replaced by their names."""
    parser = running_parser()
    found = {name: parser.get_parsed_content(name) for name in SETTINGS}
    return found | {"structures": chosen(found["structures"])}


def train() -> None:
    """Train from the start, from the weights of ``init_ckpt``, or from where an earlier run stopped (``resume``)."""
    parser, value = start("train.yaml")
    apply_label_request(parser, SETTINGS)
    _check_training(value)
    datalist, weights = value("datalist"), value("class_weights")
    if idist.get_rank() == 0:
        print(describe(datalist, value("patient_pattern")))
        names = ["background", *value("settings")["structures"]]
        print("\n".join(f"weight {weight:7.3f} {name}" for name, weight in zip(names, weights.tolist(), strict=True)))
    run_training(parser, value("network_def"), datalist)


def evaluate() -> None:
    """Score the weights of ``ckpt_path`` on subjects that they were not trained on."""
    parser, value = start("train.yaml", "evaluate.yaml")
    value("network")  # refuses a checkpoint or an export that does not fit
    value("chosen_by")  # refuses subjects that the weights were trained on
    save_config(value("output_dir") + "/evaluate.yaml")
    evaluate_subjects(parser, value("validate::dataset").data)


def infer() -> None:
    """Segment every subject of ``dataset_dir``."""
    parser, value = start("inference.yaml", "train.yaml")
    trained = value("settings")
    try:
        chosen(trained["structures"])
    except InputError as error:
        raise InputError(f"the model was trained with an {error}: it is not of this bundle") from error
    given = {key: value(key) for key in SETTINGS if key in parser.get()}  # from the command line or an overlay
    if "structures" in given:
        given["structures"] = chosen(given["structures"])
    check_settings(trained, given, "the model")
    value("subset")  # refuses names that the weights do not know
    value("data").check_output_dir(value("output_dir"))
    infer_subjects(parser)


def export_int8() -> None:
    """Quantise the weights of ``ckpt_path`` to ``onnx_dir``; the ranges are those of one epoch of training slices."""
    _, value = start("train.yaml")
    network = value("network_def")
    load_weights(network, value("ckpt_path"), value("settings"))
    batches = (batch["image"] for batch in value("train::dataloader"))
    onnx_files.export_int8(network, islice(batches, CALIBRATION_BATCHES), value("settings"), value("onnx_dir"))


def _check_training(value: Callable[[str], Any]) -> None:
    file = value("datalist_file")
    if file and not Path(file).is_file():
        raise InputError(f"datalist_file '{file}' does not exist; run scripts.organs.merge_structures first")
    if not value("datalist")["validation"]:
        logger.warning("there is no validation subject: model.pt will hold the last weights")
        if value("train::early_stopping"):
            raise InputError("early_stopping needs validation subjects; correct datalist_file")
    slices = len(value("datalist")["training"]) * value("slices_per_volume")
    if slices < value("batch_size"):
        raise InputError(f"an epoch has {slices} slices, fewer than batch_size; raise slices_per_volume")
    size, divisor = value("image_size"), 2 ** (len(value("features")) - 2)
    if size % divisor:
        raise InputError(f"image_size={size} must be divisible by {divisor}: 2 per down-sampling")
