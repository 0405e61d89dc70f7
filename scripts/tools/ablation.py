"""Train and evaluate a grid of settings with several seeds, and compare the results in tables."""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import false_discovery_control, wilcoxon
from sklearn.model_selection import ParameterGrid

from scripts.cluster import end_with_parent, run_all, workers
from scripts.config import InputError, TrainingError, atomic_path, check_keys, start_run
from scripts.data.writing import write_csv
from scripts.report.plots import plot_ablation
from scripts.report.results import Results

logger = logging.getLogger(__name__)

STAGES = {"stage1_segmentation": 0.5, "stage2_grading": 0.25, "stage3_joint": 0.25}  # shares of max_epochs
MIN_STAGED = 4  # epochs that they can share
TRAINING_MODES = ("joint", "staged")
INFERER = "validate::inferer::"  # start of keys that only evaluation uses


@dataclass(frozen=True)
class Arm:
    """One row of the table: files of ``configs/`` and keys that override them.

    Args:
        name: name of the row.
        bundle: folder of ``configs/``.
        configs: configuration files, base first.
        training: keys that both training and evaluation use.
        evaluating: keys that only evaluation uses.
        stages: ``joint`` trains once, ``staged`` in the three stages, which divide ``max_epochs`` as 2 : 1 : 1.
        first: digest of the training that comes before; its weights decide the results, too.
    """

    name: str
    bundle: Path
    configs: tuple[str, ...]
    training: dict[str, Any]
    evaluating: dict[str, Any]
    stages: str
    first: str = ""

    def folder(self, output_dir: Path, seed: int) -> Path:
        """Folder of the weights. Arms with the same training share it."""
        parts = [self.configs, self.training, self.stages, *filter(None, [self.first])]
        return output_dir / f"{_digest(parts)}_seed{seed}"

    def evaluation(self, output_dir: Path, seed: int) -> Path:
        """Folder of the scores."""
        return self.folder(output_dir, seed) / f"evaluate_{_digest(self.evaluating)}"


class Ablation:
    """A grid of settings, each of which is trained and evaluated with several seeds.

    The arms are those of ``arms`` and every combination of the values in ``grid``. Arms that differ only in keys of
    evaluation share one training. The same command continues an interrupted grid: finished runs are kept and
    interrupted ones are resumed. The last weights are evaluated, because the best ones are chosen on the validation
    subjects.

    Writes ``runs.csv`` (scores of each arm and seed), ``table.csv`` and ``table.md`` (mean and standard deviation over
    the seeds; mean difference to the reference per subject with Wilcoxon's signed-rank test, corrected for the number
    of arms by Benjamini and Hochberg), ``parts.csv`` and ``parts.md`` (a score of each part: region, structure or
    method), and ``ablation.png``. Each training has a folder with ``log.txt``.

    Args:
        bundle: folder of ``configs/``.
        read: reads the scores in the folder of an evaluation; its second argument is the keys of the training.
        plotted: names of the scores in ``ablation.png``.
        output_dir: folder of all outputs.
        configs: files of ``configs/`` with which every arm starts.
        settings: keys of every arm.
        arms: by name, the keys of an arm; ``configs`` lists more files and ``stages`` is ``joint`` or ``staged``.
        grid: by key (or ``configs`` or ``stages``), a list of values; every combination of values is an arm.
        reference: name of the arm with which the others are compared; None is the first arm.
        seeds: seeds of the split, the weights and the noise.
        processes: number of runs at a time on a machine.
        scheduler: address of a Dask scheduler (:func:`scripts.cluster.workers`); None runs on this machine.
        evaluation_keys: keys that only evaluation uses, besides those that start with ``validate::inferer::``.
        first: keys of a training that comes first, for each seed, such as that of a generator; None: there is none.
        first_key: key that gets the file of its weights.

    Raises:
        InputError: for an unknown file, key, stage, folder or reference, or if there is nothing to run. It is raised
            before any run starts.
    """

    def __init__(
        self,
        bundle: str,
        read: Callable[[Path, Mapping[str, Any]], Results],
        plotted: Sequence[str],
        output_dir: str,
        configs: Sequence[str],
        settings: Mapping[str, Any],
        arms: Mapping[str, Mapping[str, Any]],
        grid: Mapping[str, Sequence[Any]],
        reference: str | None = None,
        seeds: Sequence[int] = (0, 1, 2),
        processes: int = 1,
        scheduler: str | None = None,
        evaluation_keys: Sequence[str] = (),
        first: Mapping[str, Any] | None = None,
        first_key: str = "init_ckpt",
    ) -> None:
        named = {**arms, **dict(_combinations(grid))}
        self.output_dir = Path(output_dir).resolve()
        self.read, self.plotted = read, list(plotted)
        self.arms = [
            _parse_arm(name, Path(bundle), configs, {**settings, **keys}, evaluation_keys)
            for name, keys in named.items()
        ]
        self.first: Arm | None = None
        if first is not None:
            self.first = _parse_arm("first", Path(bundle), configs, {**settings, **first}, evaluation_keys)
            own = _digest([self.first.configs, self.first.training])
            self.arms = [replace(arm, first=own) for arm in self.arms]
        self.first_key = first_key
        if not self.arms or not seeds:
            raise InputError("nothing to run: set arms or grid, and seeds")
        names = [arm.name for arm in self.arms]
        if reference is not None and reference not in names:
            raise InputError(f"reference '{reference}' is not one of the arms {names}")
        self.reference = reference or names[0]
        self.seeds = list(seeds)
        self.processes, self.scheduler = processes, scheduler

    def run(self) -> None:
        """Train and evaluate the arms that are not finished, then write the tables.

        Raises:
            TrainingError: naming the runs that failed. The tables hold the other runs.
        """
        jobs = {}  # by folder: arms that share their training are one job
        for seed, arm in itertools.product(self.seeds, self.arms):
            if missing := self._missing(arm, seed):
                name = f"{' / '.join(other.name for other in missing)}, seed {seed}"
                jobs[arm.folder(self.output_dir, seed)] = (name, arm, seed)
        failed = self._run_jobs(list(jobs.values())) if jobs else {}
        self.write()
        if failed:
            raise TrainingError("\n".join([f"{len(failed)} of {len(jobs)} trainings failed:", *failed.values()]))

    def _missing(self, arm: Arm, seed: int) -> list[Arm]:
        """The arms with this training that are not evaluated yet."""
        folder = arm.folder(self.output_dir, seed)
        sharing = [other for other in self.arms if other.folder(self.output_dir, seed) == folder]
        return [other for other in sharing if not (other.evaluation(self.output_dir, seed) / "summary.json").is_file()]

    def _run_jobs(self, jobs: Sequence[tuple[str, Arm, int]]) -> dict[Any, str]:
        """Run the jobs, after the first trainings of their seeds. Return a message for each that failed."""
        seeds = sorted({seed for _, _, seed in jobs}) if self.first else []
        failed: dict[Any, str] = {}
        with workers(self.scheduler, self.processes) as client:
            errors = run_all(client, self._train_first, [(seed,) for seed in seeds])
            failed |= {s: f"{self.first_key}, seed {s}: {e}" for s, e in zip(seeds, errors, strict=True) if e}
            ready = [job for job in jobs if job[2] not in failed]
            errors = run_all(client, self._train_and_evaluate, [job[1:] for job in ready])
            failed |= {job[0]: f"{job[0]}: {e}" for job, e in zip(ready, errors, strict=True) if e}
        return failed

    def _train_first(self, seed: int) -> None:
        """Train what every arm needs, unless it is complete."""
        assert self.first is not None
        train(self.first, seed, self.first.folder(self.output_dir, seed), self.threads)

    def _train_and_evaluate(self, arm: Arm, seed: int) -> None:
        """Train an arm, and evaluate every arm that shares its weights."""
        weights = train(self._after_first(arm, seed), seed, arm.folder(self.output_dir, seed), self.threads)
        for other in self._missing(arm, seed):
            evaluate(other, seed, weights, other.evaluation(self.output_dir, seed), self.threads)

    def _after_first(self, arm: Arm, seed: int) -> Arm:
        """The arm with the weights of the first training."""
        if not self.first:
            return arm
        return replace(
            arm, training={self.first_key: str(self.first.folder(self.output_dir, seed) / "last.pt"), **arm.training}
        )

    @property
    def threads(self) -> int:
        """Threads of each process."""
        return max(1, (os.cpu_count() or 1) // self.processes)

    def write(self) -> None:
        """Write the tables and the figure of the finished runs."""
        runs, subjects, parts = [], [], []
        for arm, seed in itertools.product(self.arms, self.seeds):
            folder = arm.evaluation(self.output_dir, seed)
            if (folder / "summary.json").is_file():
                found = self.read(folder, arm.training)
                runs.append({"arm": arm.name, "seed": seed, **found.scores})
                subjects.append(found.subjects.assign(arm=arm.name, seed=seed))
                parts.append({"arm": arm.name, **found.parts})
        if not runs:
            return
        table = compare(pd.DataFrame(runs), pd.concat(subjects), self.reference)
        by_part = pd.DataFrame(parts).groupby("arm", sort=False).mean().T.rename_axis("part")
        write_csv(pd.DataFrame(runs), self.output_dir / "runs.csv")
        write_csv(table, self.output_dir / "table.csv")
        write_csv(by_part.reset_index(), self.output_dir / "parts.csv")
        plot_ablation(pd.DataFrame(runs), self.plotted, self.output_dir / "ablation.png")
        for name, text in {"table": to_markdown(table), "parts": by_part.to_markdown(floatfmt=".3f") + "\n"}.items():
            with atomic_path(self.output_dir / f"{name}.md") as path:
                path.write_text(text, encoding="utf-8")
        logger.info("\n" + to_markdown(table))


def ablate() -> None:
    """Run the ablation of the running configuration."""
    start_run("ablation.yaml").get_parsed_content("ablation").run()


def _combinations(grid: Mapping[str, Sequence[Any]]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Name and keys of every combination of the grid's values."""
    for keys in ParameterGrid(dict(grid)) if grid else ():
        yield ", ".join(f"{key} {_readable(value)}" for key, value in keys.items()), keys


def _readable(value: Any) -> str:
    return ("+".join(map(str, value)) or "none") if isinstance(value, list) else str(value)


def _parse_arm(
    name: str, bundle: Path, configs: Sequence[str], keys: dict[str, Any], evaluation_keys: Sequence[str]
) -> Arm:
    """Check the keys of an arm and separate those of training and of evaluation. Raises InputError."""
    stages = keys.pop("stages", "joint")
    if stages not in TRAINING_MODES:
        raise InputError(f"arm '{name}': stages '{stages}' is not one of {list(TRAINING_MODES)}")
    files = (*configs, *keys.pop("configs", ()))
    needed = [f"{stage}.yaml" for stage in STAGES] if stages == "staged" else []
    absent = [file for file in (*files, *needed) if not (bundle / "configs" / file).is_file()]
    if absent:
        raise InputError(f"arm '{name}': {absent} are not files of configs/")
    if "max_epochs" not in keys:
        raise InputError(f"arm '{name}': settings must give max_epochs, so that all arms train for the same time")
    if stages == "staged" and keys["max_epochs"] < MIN_STAGED:
        raise InputError(f"arm '{name}': three stages need max_epochs {MIN_STAGED} or more, not {keys['max_epochs']}")
    if not Path(keys.get("dataset_dir", ".")).is_dir():
        raise InputError(f"arm '{name}': dataset_dir '{keys['dataset_dir']}' is not a folder")
    check_keys({key.split("::")[0]: value for key, value in keys.items()}, bundle / "configs" / "train.yaml")
    evaluating = {key: keys[key] for key in keys if key in evaluation_keys or key.startswith(INFERER)}
    training = {key: keys[key] for key in keys if key not in evaluating}
    return Arm(name, bundle, files, training, evaluating, stages)


def train(arm: Arm, seed: int, folder: Path, threads: int) -> Path:
    """Train an arm, or continue its training, and return the file of the last weights."""
    epochs, log = arm.training["max_epochs"], folder / "log.txt"
    if arm.stages == "joint":
        keys = arm.training | {"seed": seed, "val_interval": epochs, "output_dir": folder, "ckpt_dir": folder}
        run_bundle(arm, ["resume.yaml"], keys, log, threads)
        return folder / "last.pt"
    counts = {stage: round(share * epochs) for stage, share in STAGES.items()}
    counts["stage3_joint"] += epochs - sum(counts.values())
    for stage, count in counts.items():
        stage_folder = folder / stage
        keys = arm.training | {"seed": seed, "val_interval": count, "max_epochs": count}
        keys |= {"output_dir": stage_folder, "ckpt_dir": stage_folder}
        run_bundle(arm, [f"{stage}.yaml", "resume.yaml"], keys, log, threads)
    return folder / stage / "last.pt"


def evaluate(arm: Arm, seed: int, weights: Path, folder: Path, threads: int) -> None:
    """Evaluate the weights of an arm on the test subjects."""
    keys = arm.training | arm.evaluating | {"seed": seed, "ckpt_path": weights, "output_dir": folder}
    run_bundle(arm, ["evaluate.yaml"], keys, folder.parent / "log.txt", threads)


def run_bundle(arm: Arm, configs: Sequence[str], keys: Mapping[str, Any], log: Path, threads: int) -> None:
    """Run the files of an arm, and further ones, in a separate process, as on the command line.

    Raises:
        TrainingError: with the last line of the log, if the process fails.
    """
    files = str([f"configs/{name}" for name in (*arm.configs, *configs)])
    command = [sys.executable, "-W", "ignore", "-m", "monai.bundle", "run", "--config_file", files]
    for key, value in keys.items():
        command += [f"--{key}", "$None" if value is None else str(value)]  # MONAI leaves out a value of None
    log.parent.mkdir(parents=True, exist_ok=True)
    before = log.stat().st_size if log.is_file() else 0
    with log.open("a", encoding="utf-8") as stream:
        environment = {"OMP_WAIT_POLICY": "PASSIVE"} | os.environ | {"OMP_NUM_THREADS": str(threads)}
        done = subprocess.run(
            command, cwd=arm.bundle, stdout=stream, stderr=stream, env=environment, preexec_fn=end_with_parent
        )
    if done.returncode:
        raise TrainingError(f"{_last_line(log, before)} (full log: {log})")


def compare(runs: pd.DataFrame, subjects: pd.DataFrame, reference: str) -> pd.DataFrame:
    """Mean and standard deviation of the scores of each arm, and paired tests against the arm ``reference``.

    Args:
        runs: one row per run with ``arm``, ``seed`` and the scores.
        subjects: one row per run and subject with ``arm``, ``seed``, ``subject`` and the scores that are compared. A
            subject's differences are averaged over the seeds, so that it counts once.
        reference: name of the arm with which the others are compared.
    """
    grouped = runs.drop(columns="seed").groupby("arm", sort=False)
    table = pd.concat([grouped.mean(), grouped.std().add_suffix("_sd")], axis=1)[
        [column for name in runs.columns.drop(["arm", "seed"]) for column in (name, f"{name}_sd")]
    ]
    table.insert(0, "seeds", runs.groupby("arm", sort=False)["seed"].nunique())
    indexed = subjects.set_index(["seed", "subject"])
    other = indexed[indexed["arm"] == reference]
    for score in subjects.columns.drop(["arm", "seed", "subject"]):
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
    for name in (column.removesuffix("_sd") for column in table if column.endswith("_sd")):
        columns[name] = [
            "-" if np.isnan(mean) else f"{mean:.3f}" if np.isnan(sd) else f"{mean:.3f} +- {sd:.3f}"
            for mean, sd in zip(table[name], table[f"{name}_sd"], strict=True)
        ]
    for name in (column.removesuffix("_p") for column in table if column.endswith("_p")):
        columns[f"{name}, per subject (p)"] = [
            "-" if np.isnan(difference) else f"{difference:+.3f} ({p:.2g})"
            for difference, p in zip(table[f"{name}_difference"], table[f"{name}_p"], strict=True)
        ]
    return pd.DataFrame(columns).to_markdown(index=False, disable_numparse=True) + "\n"


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:10]


def _last_line(file: Path, start: int) -> str:
    """The last error, or the last line, of a log from a position on."""
    lines = file.read_bytes()[start:].decode(errors="replace").strip().splitlines()
    errors = [line for line in lines if line.startswith("error: ")]
    return (errors or lines or ["no output"])[-1]
