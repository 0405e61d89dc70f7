"""Arm of the peer bench that is a configuration of this bundle."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from benchmarks.bundle import command, options, read_configs
from benchmarks.peers.process import Usage, run, write_cost
from scripts.data.datalist import write_datalist
from scripts.data.split import patient


class BundleArm:
    """Trains for a number of minutes, calibrates to the validation subjects, and evaluates.

    A first training of two epochs, without validation, measures the seconds of one. The number of epochs follows from
    them, because the learning rate needs it from the start.

    Args:
        configs: files in ``configs/``.
        settings: keys of ``train.yaml`` and their values.
        minutes: of training.
        threads: of each process.
        probe: folder of the first training.
        patients: of the training, drawn by the seed; None takes all of the fold.
    """

    def __init__(
        self,
        configs: Sequence[str],
        settings: dict[str, Any],
        minutes: float,
        threads: int,
        probe: Path,
        patients: int | None = None,
    ) -> None:
        self.configs, self.settings, self.minutes = list(configs), settings, minutes
        self.threads, self.probe, self.patients = threads, probe, patients

    def run(self, folder: Path, fold: int, seed: int) -> None:
        """Write ``subjects.csv`` and ``cost.json`` into ``folder``."""
        keys = {"fold": fold, "seed": seed, "datalist::seed": 0, "ckpt_dir": folder} | self._chosen(folder, fold, seed)
        epochs = self.epochs()
        training = self._run([], folder, keys | {"max_epochs": epochs, "val_interval": epochs, "output_dir": folder})
        self._run(["evaluate.yaml", "calibrate.yaml"], folder, keys | {"output_dir": folder / "calibrate"})
        judging = self._run(["evaluate.yaml"], folder, keys | {"output_dir": folder})
        seconds = epoch_seconds(folder)
        minutes = (seconds[:-1].mean() if len(seconds) > 1 else seconds.item()) * epochs / 60  # the last one validates
        write_cost(folder, minutes, epochs, training, judging, len(pd.read_csv(folder / "subjects.csv")))

    def epochs(self) -> int:
        """Number of epochs that take the minutes; the seconds of one are measured once."""
        if not (self.probe / "metrics.csv").is_file():
            keys = {"max_epochs": 2, "val_interval": 3, "output_dir": self.probe, "ckpt_dir": self.probe}
            self._run([], self.probe, keys | self._chosen(self.probe, 0, 0))
        return max(1, round(60 * self.minutes / epoch_seconds(self.probe)[-1]))

    def _chosen(self, folder: Path, fold: int, seed: int) -> dict[str, str]:
        """The key of a data list with some of the patients for training; no key for all of them."""
        if self.patients is None:
            return {}
        config = read_configs(self.configs, self.settings | {"fold": fold, "datalist::seed": 0})
        datalist, pattern = config.get_parsed_content("datalist"), config["patient_pattern"]
        names = sorted({patient(item["subject"], pattern) for item in datalist["training"]})
        if self.patients > len(names):
            raise SystemExit(f"--training_patients {self.patients}: there are {len(names)} in fold {fold}")
        names = np.random.default_rng(seed).permutation(names)[: self.patients].tolist()
        chosen = [item for item in datalist["training"] if patient(item["subject"], pattern) in names]
        write_datalist(datalist | {"training": chosen}, str(folder / "chosen.json"), self.settings["dataset_dir"])
        return {"datalist_file": str(folder / "chosen.json")}

    def _run(self, configs: Sequence[str], folder: Path, keys: dict[str, Any]) -> Usage:
        return run(command([*self.configs, *configs], options(self.settings | keys)), folder / "log.txt", self.threads)


def epoch_seconds(folder: Path) -> np.ndarray:
    """Seconds of each epoch of a training, with validation where there is one."""
    table = pd.read_csv(folder / "metrics.csv")
    return table.loc[table["split"] == "train", "seconds"].to_numpy()
