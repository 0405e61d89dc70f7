"""Arm of the peer bench that is nnU-Net v2: the slices of this bundle go in, and this bundle judges the masks."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import monai.transforms as mt
import nibabel as nib
import numpy as np
import pandas as pd
import torch
from monai.bundle import ConfigParser
from monai.data import MetaTensor

from benchmarks.bundle import read_configs
from benchmarks.peers.process import Usage, run, write_cost
from scripts.data.regions import RegionCoding
from scripts.data.split import patient
from scripts.report.metrics import mask_scores

DATASET = "Dataset001_peers"
SPLITS = {"train": "training", "val": "validation"}  # its names and ours
AFFINE = np.diag([1.0, 1.0, 10.0, 1.0])  # nnU-Net cuts slices along the axis with the largest spacing


class NnUNetArm:
    """nnU-Net plans, trains and predicts in two dimensions, in its own environment.

    It gets the slices that the networks of this bundle see, resized and z-scored. Its probabilities are resized back.

    Args:
        configs: files in ``configs/``.
        settings: keys of ``train.yaml`` and their values.
        minutes: of training.
        threads: of the process.
        python: of nnU-Net's environment.
    """

    def __init__(
        self, configs: Sequence[str], settings: dict[str, Any], minutes: float, threads: int, python: Path
    ) -> None:
        self.configs, self.settings = list(configs), settings
        self.minutes, self.threads, self.python = minutes, threads, python

    def run(self, folder: Path, fold: int, seed: int) -> None:
        """Write ``subjects.csv`` and ``cost.json`` into ``folder``."""
        shutil.rmtree(folder, ignore_errors=True)
        config = self.config(fold)
        export(config, folder)
        places = {name: str(folder / name) for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")}
        driver = [str(self.python), str(Path(__file__).with_name("nnunet_driver.py"))]
        arguments = ["--minutes", str(self.minutes), "--seed", str(seed)]
        training = run([*driver, "train", *arguments], folder / "log.txt", self.threads, **places)
        images, masks = folder / "images", folder / "masks"
        arguments = ["--images", str(images), "--masks", str(masks)]
        judging = run([*driver, "predict", *arguments], folder / "log.txt", self.threads, **places)
        start = time.perf_counter()
        table = judge(config, masks)
        judging = Usage(judging.minutes + (time.perf_counter() - start) / 60, judging.gib)
        table.to_csv(folder / "subjects.csv", index=False)
        trained = json.loads((folder / "nnUNet_results" / "trained.json").read_text())
        for name in places:
            shutil.rmtree(folder / name)
        write_cost(folder, trained["minutes"], trained["epochs"], training, judging, len(table))

    def config(self, fold: int) -> ConfigParser:
        """The evaluation of a fold, without a checkpoint."""
        keys = {"fold": fold, "datalist::seed": 0, "settings::judged": None}
        return read_configs([*self.configs, "evaluate.yaml"], self.settings | keys)


def export(config: ConfigParser, folder: Path) -> None:
    """Write the slices of a fold as nnU-Net's data set, and those of its test subjects into ``images``.

    The labels of nested regions are numbers from 1, the largest region first, as nnU-Net needs them.
    """
    raw, datalist = folder / "nnUNet_raw" / DATASET, config.get_parsed_content("datalist")
    coding: RegionCoding = config.get_parsed_content("region_coding")
    majority = config.get_parsed_content("validate::to_network")[-1]  # one truth of those of several annotators
    voted = mt.Compose([*config.get_parsed_content("train::preprocessing").transforms, majority])
    for split in ("training", "validation"):
        for item in datalist[split]:
            found = voted(item)
            write_channels(found["image"], raw / "imagesTr" / found["subject"])
            label = numbered(coding.to_label(torch.as_tensor(found["label"]))[0], coding)
            write(label, raw / "labelsTr" / f"{found['subject']}.nii.gz")
    seen = config.get_parsed_content("validate::preprocessing")
    for item in datalist["judged"]:
        found = seen(item)
        write_channels(found["image"], folder / "images" / found["subject"])
    count = len(datalist["training"]) + len(datalist["validation"])
    (raw / "dataset.json").write_text(json.dumps(description(config, coding) | {"numTraining": count}))
    splits = [{name: [item["subject"] for item in datalist[split]] for name, split in SPLITS.items()}]
    (folder / "nnUNet_preprocessed" / DATASET).mkdir(parents=True)
    (folder / "nnUNet_preprocessed" / DATASET / "splits_final.json").write_text(json.dumps(splits))


def description(config: ConfigParser, coding: RegionCoding) -> dict[str, Any]:
    """What nnU-Net has to know of the data set; a single region is a label, several are lists of labels."""
    names = [config["regions"][channel] for channel, _ in coding.paint]
    values = [value for _, value in coding.paint]
    labels = {
        name: sorted(1 + values.index(value) for value in coding.values[channel] if value in values)
        for name, (channel, _) in zip(names, coding.paint, strict=True)
    }
    return {
        "channel_names": {str(i): name for i, name in enumerate(config["modalities"])},
        "labels": {"background": 0} | ({names[0]: 1} if len(names) == 1 else labels),
        "regions_class_order": list(range(1, len(names) + 1)),
        "file_ending": ".nii.gz",
    }


def numbered(label: torch.Tensor, coding: RegionCoding) -> np.ndarray:
    """Label map ``[H, W, S]`` with the numbers 1, 2, ... instead of its values."""
    found = np.zeros(label.shape, np.uint8)
    for number, (_, value) in enumerate(coding.paint, start=1):
        found[label.numpy() == value] = number
    return found


def write_channels(image: MetaTensor, stem: Path) -> None:
    """Write each modality of ``[M, H, W, S]`` as a file."""
    for channel, volume in enumerate(image):
        write(volume.numpy().astype(np.float32), stem.with_name(f"{stem.name}_{channel:04d}.nii.gz"))


def write(volume: np.ndarray, file: Path) -> None:
    """Write a volume ``[H, W, S]``."""
    file.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(volume, AFFINE), file)


def judge(config: ConfigParser, masks: Path) -> pd.DataFrame:
    """Scores of the test subjects, as :class:`scripts.report.evaluation.SubjectReport` computes them.

    Like those of this bundle, the probabilities are resized to the images, and then become masks.
    """
    seen, back = (config.get_parsed_content(f"validate::{key}") for key in ("preprocessing", "postprocessing"))
    rows = []
    for item in config.get_parsed_content("datalist")["judged"]:
        found = seen(item)
        prob = region_probabilities(masks / f"{found['subject']}.npz", config.get_parsed_content("region_coding"))
        found["pred"] = MetaTensor(torch.as_tensor(prob), meta=found["image"].meta)
        rows.append(row_of(back(found), config))
    return pd.DataFrame(rows)


def region_probabilities(file: Path, coding: RegionCoding) -> np.ndarray:
    """Probability ``[R, H, W, S]`` of each region, in the order of the channels, from a file of nnU-Net.

    It holds those of background and foreground for one region, and else those of each region, the largest first; the
    axes are reversed.
    """
    stored = np.load(file)["probabilities"].transpose(0, 3, 2, 1).astype(np.float32)
    found = stored[1:] if len(coding.paint) == 1 else stored
    return found[np.argsort([channel for channel, _ in coding.paint])]


def row_of(item: Mapping[str, Any], config: ConfigParser) -> dict[str, Any]:
    """Row of a subject."""
    row = {"subject": item["subject"], "patient": patient(item["subject"], config["patient_pattern"])}
    return row | mask_scores(item["pred"], item["label"], item["label"].pixdim.tolist(), config["regions"])
