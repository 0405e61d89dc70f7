"""Train and evaluate a grid of settings with several seeds, and compare the results in tables."""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import false_discovery_control, wilcoxon
from sklearn.model_selection import ParameterGrid

from scripts.config import BUNDLE_ROOT, InputError, TrainingError, atomic_path, check_keys
from scripts.data.writing import write_csv
from scripts.report.plots import plot_ablation

logger = logging.getLogger(__name__)

STAGES = {"stage1_segmentation": 0.5, "stage2_grading": 0.25, "stage3_joint": 0.25}  # shares of max_epochs
TRAINING_MODES = ("joint", "staged")
SAMPLING = ("num_inference_steps", "num_samples", "sampler", "fusion")  # keys that only evaluation uses
INFERER = "validate::inferer::"  # start of further keys that only evaluation uses
SCORES = {"dice": "segmentation", "iou": "segmentation", "auc": "grading", "f1": "grading", "accuracy": "grading"}


@dataclass(frozen=True)
class Arm:
    """One row of the table: files of ``configs/`` and keys that override them.

    Args:
        name: name of the row.
        configs: configuration files, base first.
        training: keys that both training and evaluation use.
        sampling: keys that only evaluation uses.
        stages: ``joint`` trains once, ``staged`` in the three stages, which divide ``max_epochs`` as 2 : 1 : 1.
    """

    name: str
    configs: tuple[str, ...]
    training: dict[str, Any]
    sampling: dict[str, Any]
    stages: str

    def folder(self, output_dir: Path, seed: int) -> Path:
        """Folder of the weights. Arms with the same training share it."""
        return output_dir / f"{_digest([self.configs, self.training, self.stages])}_seed{seed}"

    def evaluation(self, output_dir: Path, seed: int) -> Path:
        """Folder of the scores."""
        return self.folder(output_dir, seed) / f"evaluate_{_digest(self.sampling)}"


class Ablation:
    """A grid of settings, each of which is trained and evaluated with several seeds.

    The arms are those of ``arms`` and every combination of the values in ``grid``. Arms that differ only in sampling
    share one training. The same command continues an interrupted grid: finished runs are kept and interrupted ones are
    resumed. The last weights are evaluated, because the best ones are chosen on the validation subjects.

    Writes ``runs.csv`` (scores of each arm and seed), ``table.csv`` and ``table.md`` (mean and standard deviation over
    the seeds; mean difference to the reference per subject with Wilcoxon's signed-rank test, corrected for the number
    of arms by Benjamini and Hochberg), and ``ablation.png``. Each training has a folder with ``log.txt``.

    Args:
        output_dir: folder of all outputs.
        configs: files of ``configs/`` with which every arm starts.
        settings: keys of every arm.
        arms: by name, the keys of an arm; ``configs`` lists more files and ``stages`` is ``joint`` or ``staged``.
        grid: by key (or ``configs`` or ``stages``), a list of values; every combination of values is an arm.
        reference: name of the arm with which the others are compared; None is the first arm.
        seeds: seeds of the split, the weights and the noise.
        processes: number of runs at a time.

    Raises:
        InputError: for an unknown file, key, stage, folder or reference, or if there is nothing to run. It is raised
            before any run starts.
    """

    def __init__(
        self,
        output_dir: str,
        configs: Sequence[str],
        settings: Mapping[str, Any],
        arms: Mapping[str, Mapping[str, Any]],
        grid: Mapping[str, Sequence[Any]],
        reference: str | None = None,
        seeds: Sequence[int] = (0, 1, 2),
        processes: int = 1,
    ) -> None:
        named = {**arms, **dict(_combinations(grid))}
        self.output_dir = Path(output_dir).resolve()
        self.arms = [_parse_arm(name, configs, {**settings, **keys}) for name, keys in named.items()]
        if not self.arms or not seeds:
            raise InputError("nothing to run: set arms or grid, and seeds")
        names = [arm.name for arm in self.arms]
        if reference is not None and reference not in names:
            raise InputError(f"reference '{reference}' is not one of the arms {names}")
        self.reference = reference or names[0]
        self.seeds = list(seeds)
        self.processes = processes

    def run(self) -> None:
        """Train and evaluate the arms that are not finished, then write the tables.

        Raises:
            TrainingError: naming the runs that failed. The tables hold the other runs.
        """
        jobs = {arm.folder(self.output_dir, seed): (arm, seed) for seed in self.seeds for arm in self.arms}
        with ThreadPool(self.processes) as pool:
            failed = [error for error in pool.imap_unordered(lambda job: self._attempt(*job), jobs.values()) if error]
        self.write()
        if failed:
            raise TrainingError("\n".join([f"{len(failed)} of {len(jobs)} trainings failed:", *failed]))

    def _attempt(self, arm: Arm, seed: int) -> str | None:
        """Train an arm and evaluate every arm that shares its weights. Return a message if a run fails."""
        folder = arm.folder(self.output_dir, seed)
        sharing = [other for other in self.arms if other.folder(self.output_dir, seed) == folder]
        try:
            missing = [
                other for other in sharing if not (other.evaluation(self.output_dir, seed) / "summary.json").is_file()
            ]
            if missing:
                logger.info(f"{' / '.join(other.name for other in sharing)}, seed {seed}: {folder}")
                weights = train(arm, seed, folder, self.threads)
            for other in missing:
                evaluate(other, seed, weights, other.evaluation(self.output_dir, seed), self.threads)
        except subprocess.CalledProcessError:
            return f"{arm.name}, seed {seed}: {_last_line(folder / 'log.txt')} (full log: {folder / 'log.txt'})"
        return None

    @property
    def threads(self) -> int:
        """Threads of each process."""
        return max(1, (os.cpu_count() or 1) // self.processes)

    def write(self) -> None:
        """Write the tables and the figure of the finished runs."""
        runs, subjects = [], []
        for arm, seed in itertools.product(self.arms, self.seeds):
            folder = arm.evaluation(self.output_dir, seed)
            if (folder / "summary.json").is_file():
                runs.append({"arm": arm.name, "seed": seed, **read_scores(arm, folder)})
                subjects.append(read_subjects(arm, folder).assign(arm=arm.name, seed=seed))
        if not runs:
            return
        table = compare(pd.DataFrame(runs), pd.concat(subjects), self.reference)
        write_csv(pd.DataFrame(runs), self.output_dir / "runs.csv")
        write_csv(table, self.output_dir / "table.csv")
        plot_ablation(pd.DataFrame(runs), self.output_dir / "ablation.png")
        with atomic_path(self.output_dir / "table.md") as path:
            path.write_text(to_markdown(table), encoding="utf-8")
        logger.info("\n" + to_markdown(table))


def _combinations(grid: Mapping[str, Sequence[Any]]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Name and keys of every combination of the grid's values."""
    for keys in ParameterGrid(dict(grid)) if grid else ():
        yield ", ".join(f"{key} {_readable(value)}" for key, value in keys.items()), keys


def _readable(value: Any) -> str:
    return ("+".join(map(str, value)) or "none") if isinstance(value, list) else str(value)


def _parse_arm(name: str, configs: Sequence[str], keys: dict[str, Any]) -> Arm:
    """Check the keys of an arm and separate those of training and of sampling. Raises InputError."""
    stages = keys.pop("stages", "joint")
    if stages not in TRAINING_MODES:
        raise InputError(f"arm '{name}': stages '{stages}' is not one of {list(TRAINING_MODES)}")
    files = (*configs, *keys.pop("configs", ()))
    absent = [file for file in files if not (BUNDLE_ROOT / "configs" / file).is_file()]
    if absent:
        raise InputError(f"arm '{name}': {absent} are not files of configs/")
    if "max_epochs" not in keys:
        raise InputError(f"arm '{name}': settings must give max_epochs, so that all arms train for the same time")
    if not Path(keys.get("dataset_dir", ".")).is_dir():
        raise InputError(f"arm '{name}': dataset_dir '{keys['dataset_dir']}' is not a folder")
    check_keys({key.split("::")[0]: value for key, value in keys.items()}, BUNDLE_ROOT / "configs" / "train.yaml")
    sampling = {key: value for key, value in keys.items() if key in SAMPLING or key.startswith(INFERER)}
    return Arm(name, files, {key: value for key, value in keys.items() if key not in sampling}, sampling, stages)


def train(arm: Arm, seed: int, folder: Path, threads: int) -> Path:
    """Train an arm, or continue its training, and return the file of the last weights."""
    epochs, log = arm.training["max_epochs"], folder / "log.txt"
    if arm.stages == "joint":
        keys = arm.training | {"seed": seed, "val_interval": epochs, "output_dir": folder, "ckpt_dir": folder}
        run_bundle([*arm.configs, "resume.yaml"], keys, log, threads)
        return folder / "last.pt"
    for stage, share in STAGES.items():
        count = max(1, round(share * epochs))
        stage_folder = folder / stage
        keys = arm.training | {"seed": seed, "val_interval": count, "max_epochs": count}
        keys |= {"output_dir": stage_folder, "ckpt_dir": stage_folder}
        run_bundle([*arm.configs, f"{stage}.yaml", "resume.yaml"], keys, log, threads)
    return folder / stage / "last.pt"


def evaluate(arm: Arm, seed: int, weights: Path, folder: Path, threads: int) -> None:
    """Evaluate the weights of an arm on the validation subjects."""
    keys = arm.training | arm.sampling | {"seed": seed, "ckpt_path": weights, "output_dir": folder}
    run_bundle([*arm.configs, "evaluate.yaml"], keys, folder.parent / "log.txt", threads)


def run_bundle(configs: Sequence[str], keys: Mapping[str, Any], log: Path, threads: int) -> None:
    """Run files of ``configs/`` in a separate process, as on the command line."""
    files = str([f"configs/{name}" for name in configs])
    command = [sys.executable, "-W", "ignore", "-m", "monai.bundle", "run", "--config_file", files]
    for key, value in keys.items():
        command += [f"--{key}", str(value)]
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a", encoding="utf-8") as stream:
        environment = {"OMP_WAIT_POLICY": "PASSIVE"} | os.environ | {"OMP_NUM_THREADS": str(threads)}
        subprocess.run(command, cwd=BUNDLE_ROOT, stdout=stream, stderr=stream, check=True, env=environment)


def read_scores(arm: Arm, folder: Path) -> dict[str, float]:
    """Means over subjects and regions of one evaluation; NaN for the scores of a task that was not trained."""
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    masks, grading = summary["segmentation"].values(), summary["grading"]
    scores = {name: float(np.mean([mask[name]["mean"]["value"] for mask in masks])) for name in ("dice", "iou")}
    scores |= {
        name: float(np.nan if (v := grading[name]["value"]) is None else v) for name in ("auc", "f1", "accuracy")
    }
    tasks = arm.training.get("loss::tasks", list(SCORES.values()))
    return {name: value if SCORES[name] in tasks else np.nan for name, value in scores.items()}


def read_subjects(arm: Arm, folder: Path) -> pd.DataFrame:
    """Per subject: ``dice``, the mean over regions, and ``error``, the Brier score of the grade (0 to 1)."""
    table = pd.read_csv(folder / "subjects.csv")
    tasks = arm.training.get("loss::tasks", list(SCORES.values()))
    regions = [name for name in table if re.match(r"dice_", name)]
    prob = table.filter(regex="^prob_")
    truth = pd.get_dummies(pd.Categorical(table["grade"], categories=range(prob.shape[1])), dtype=float).to_numpy()
    error = (np.square(prob - truth).sum(axis=1, skipna=False) / 2).where(table["grade"] >= 0)
    return pd.DataFrame(
        {
            "subject": table["subject"],
            "dice": table[regions].mean(axis=1) if "segmentation" in tasks else np.nan,
            "error": error if "grading" in tasks else np.nan,
        }
    )


def compare(runs: pd.DataFrame, subjects: pd.DataFrame, reference: str) -> pd.DataFrame:
    """Mean and standard deviation of the scores of each arm, and paired tests against the arm ``reference``.

    Args:
        runs: one row per run with ``arm``, ``seed`` and the scores.
        subjects: one row per run and subject with ``arm``, ``seed``, ``subject``, ``dice`` and ``error``. A subject's
            differences are averaged over the seeds, so that it counts once.
        reference: name of the arm with which the others are compared.
    """
    grouped = runs.drop(columns="seed").groupby("arm", sort=False)
    table = pd.concat([grouped.mean(), grouped.std().add_suffix("_sd")], axis=1)[
        [column for name in SCORES for column in (name, f"{name}_sd")]
    ]
    table.insert(0, "seeds", runs.groupby("arm", sort=False)["seed"].nunique())
    indexed = subjects.set_index(["seed", "subject"])
    other = indexed[indexed["arm"] == reference]
    for score in ("dice", "error"):
        tests = {}
        for arm in table.index:
            difference = (indexed[indexed["arm"] == arm][score] - other[score]).dropna().groupby("subject").mean()
            varied = arm != reference and len(difference) > 0 and bool(difference.any())
            tests[arm] = {
                f"{score}_difference": difference.mean() if arm != reference and len(difference) else np.nan,
                f"{score}_p": float(wilcoxon(difference).pvalue) if varied else np.nan,
            }
        table = table.join(pd.DataFrame.from_dict(tests, orient="index"))
        tested = table[f"{score}_p"].notna()
        if tested.any():
            table.loc[tested, f"{score}_p"] = false_discovery_control(table.loc[tested, f"{score}_p"])
    return table.reset_index()


def to_markdown(table: pd.DataFrame) -> str:
    """The table as Markdown with ``mean +- sd`` in one column, and a dash for a task that was not trained."""
    columns: dict[str, list[str]] = {"arm": table["arm"].tolist(), "seeds": table["seeds"].astype(str).tolist()}
    for name in SCORES:
        columns[name] = [
            "-" if np.isnan(mean) else f"{mean:.3f}" if np.isnan(sd) else f"{mean:.3f} +- {sd:.3f}"
            for mean, sd in zip(table[name], table[f"{name}_sd"], strict=True)
        ]
    for name, title in (("dice", "Dice, per subject"), ("error", "grading error, per subject")):
        columns[f"{title} (p)"] = [
            "-" if np.isnan(difference) else f"{difference:+.3f} ({p:.2g})"
            for difference, p in zip(table[f"{name}_difference"], table[f"{name}_p"], strict=True)
        ]
    return pd.DataFrame(columns).to_markdown(index=False, disable_numparse=True) + "\n"


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:10]


def _last_line(file: Path) -> str:
    lines = file.read_text(encoding="utf-8").strip().splitlines() if file.is_file() else []
    errors = [line for line in lines if line.startswith("error: ")]
    return (errors or lines or ["no output"])[-1]
