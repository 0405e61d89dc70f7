"""What a run does, in order: one function per verb. Every ``run`` list of ``configs/`` calls one of them.

The functions read the running configuration. Everything that can be wrong is checked before the first volume is read.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ignite.distributed as idist
from torch.optim.lr_scheduler import ReduceLROnPlateau

from scripts.config import InputError, running_parser, save_config
from scripts.data.datalist import describe
from scripts.data.grades import check_alpha
from scripts.data.transforms import check_modalities
from scripts.net import SETTINGS
from scripts.networks.base import SegmentationNetwork
from scripts.sampling.jobs import evaluate_subjects, infer_subjects
from scripts.tools.monai_label import apply_label_request, option
from scripts.tools.onnx_network import export_onnx
from scripts.training.autocast import has_bfloat16
from scripts.training.checkpoints import NAMING, check_settings, trained_settings
from scripts.training.run import run_training, start
from scripts.training.weights import load_weights

__all__ = ["evaluate", "export", "has_bfloat16", "infer", "option", "settings", "train"]
logger = logging.getLogger(__name__)


def settings(init_ckpt: str | None, judged: str | None) -> dict[str, Any]:
    """The settings that give the weights their meaning, read from the public keys of the running configuration.

    The modalities and their dropout are those of the checkpoint, if there is one. A training that starts from weights
    with dropout keeps it.

    Args:
        init_ckpt: checkpoint from which training starts.
        judged: checkpoint that is evaluated.

    Raises:
        InputError: for a ``slice_size`` that is no number of at least ``image_size``, a ``modality_dropout`` outside
            0 to 1, or modalities that the checkpoint does not do without.
    """
    parser = running_parser()
    found = {name: parser.get_parsed_content(name) for name in SETTINGS}
    if ckpt_path := judged or init_ckpt:
        trained = trained_settings(ckpt_path)
        if "architecture" not in trained:
            raise InputError(f"'{ckpt_path}' holds weights of another bundle")
        found["modalities"] = _completed(found["modalities"], trained, parser.get_parsed_content("image_dir"))
        share = 0.0 if judged else found["modality_dropout"]
        found["modality_dropout"] = max(share, trained["modality_dropout"])
    if not isinstance(share := found["modality_dropout"], (int, float)) or not 0 <= share <= 1:
        raise InputError(f"modality_dropout={share!r} must be a number from 0 to 1")
    size, window = found["slice_size"], found["image_size"]
    if size is not None and (not isinstance(size, int) or size < window):
        raise InputError(
            f"slice_size={size!r} must be a whole number, image_size={window} or more, so that a window fits; null is "
            "for whole slices"
        )
    return found


def train() -> None:
    """Train from the start, from the weights of ``init_ckpt``, or from where an earlier run stopped (``resume``)."""
    parser, value = start("train.yaml")
    apply_label_request(parser, SETTINGS)
    network, datalist = _check_training(value)
    run_training(parser, network, datalist, lambda: _reset_calibration(network, value("validated_network")))


def evaluate() -> None:
    """Score or calibrate the weights of ``ckpt_path`` on subjects that they were not trained on."""
    parser, value = start("train.yaml", "evaluate.yaml")
    value("validate::inferer").check(value("network_def"), value("image_size"))
    value("network")  # refuses a checkpoint that does not fit
    value("chosen_by")  # refuses subjects that the weights were trained on
    save_config(value("output_dir") + "/evaluate.yaml")
    evaluate_subjects(parser, value("validate::dataset").data)


def infer() -> None:
    """Segment and grade every subject of ``dataset_dir``."""
    parser, value = start("inference.yaml", "train.yaml")
    network, trained = value("network_def"), value("settings")
    given = {key: value(key) for key in SETTINGS if key in parser.get()}  # from the command line or an overlay
    given["modalities"] = _completed(given["modalities"], trained, value("image_dir"))
    check_settings(trained, given, "the model")
    for key in NAMING:
        if key in given and given[key] != trained[key]:
            logger.warning(f"{key}={given[key]} is ignored: the checkpoint has {trained[key]}")
    value("inferer").check(network, trained["image_size"])
    value("data").check_output_dir(value("output_dir"), value("mask_dir"))
    infer_subjects(parser)


def export() -> None:
    """Export the weights of ``ckpt_path`` to ``onnx_dir``."""
    _, value = start("inference.yaml", "train.yaml")
    network = value("network_def")
    load_weights(network, value("ckpt_path"), value("settings"))
    export_onnx(network, value("onnx_dir"), value("settings"))


def _completed(modalities: Sequence[str], trained: Mapping[str, Any], image_dir: str | None) -> list[str]:
    """Modalities of the network, of which the folder may have some, in any order; a warning names those it lacks.

    A file with all modalities does not name its channels, so that a wrong order would not be noticed: with
    ``image_dir`` they are those of the folder, which :func:`check_settings` compares.
    """
    if image_dir is not None or not set(modalities) <= set(trained["modalities"]):
        return list(modalities)
    if absent := check_modalities(modalities, trained["modalities"], trained["modality_dropout"] > 0):
        logger.warning(f"modalities {absent} are absent: they are 0 for the network, which was trained for that")
    return list(trained["modalities"])


def _check_training(value: Callable[[str], Any]) -> tuple[SegmentationNetwork, dict[str, list]]:
    """Network and data list of a training, after they have been checked and described on the console."""
    network, datalist, alpha = value("network_def"), value("datalist"), value("alpha")
    check_alpha(alpha, value("grade_labels"))
    if not datalist["validation"]:
        logger.warning("there is no validation subject: model.pt will hold the last weights")
        if value("train::early_stopping") or isinstance(value("lr_scheduler"), ReduceLROnPlateau):
            raise InputError("early_stopping and lr_plateau.yaml need validation subjects: raise validation_share")
    value("validate::inferer").check(network, value("image_size"))
    value("train::inferer").check(network)
    value("loss").check(network, [item["grade"] for item in datalist["training"]])
    if idist.get_rank() == 0:
        grades = value("grade_labels") if network.cls_head is not None else None
        print(describe(datalist, value("patient_pattern"), alpha, grades), flush=True)
    return network, datalist


def _reset_calibration(*networks: SegmentationNetwork) -> None:
    """Forget a calibration: it belongs to other weights."""
    for network in networks:
        network.calibration.reset()
