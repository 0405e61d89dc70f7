"""Plots: learning curves, overlays, reliability and risk-coverage diagrams, ablations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pandas as pd
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from scipy.stats import binomtest

from scripts.config import atomic_path
from scripts.data.pictures import read_volume
from scripts.report.uncertainty import COVERAGE, expected_calibration_error

SAMPLE_COLOURS = ("yellow", "cyan", "magenta")


def plot_learning_curves(
    table: pd.DataFrame,
    panels: Mapping[str, Sequence[str]],
    shared: Sequence[str],
    file: str | Path,
    healthy: Mapping[str, Sequence[float]],
) -> None:
    """Draw the epoch table: training as solid lines, validation as dashed lines with dots.

    A column without a value is left out, and a plot without a column.

    Args:
        table: rows with ``epoch``, ``split`` and the columns of ``panels``.
        panels: title of each plot and the columns that it shows.
        shared: columns that are the same in both rows of an epoch, drawn once.
        file: PNG to write.
        healthy: by title, the range that is shaded in green.
    """
    filled = table.columns[table.notna().any()]
    panels = {title: [name for name in names if name in filled] for title, names in panels.items()}
    panels = {title: names for title, names in panels.items() if names}
    if not panels:
        return
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(14 / 3 * columns, 3.5 * rows), layout="constrained")
    for axes, (title, names) in zip(figure.subplots(rows, columns, squeeze=False).flat, panels.items(), strict=False):
        for colour, name in enumerate(names):
            for split, style in (("train", "-"), ("validation", ".--")):
                chosen = table[(table["split"] == split) & table[name].notna()]
                if len(chosen) and not (split == "validation" and name in shared):
                    label = f"{name} {split}" if len(names) > 1 else split
                    axes.plot(chosen["epoch"], chosen[name], style, color=f"C{colour}", label=label)
        if title in healthy:
            axes.axhspan(*healthy[title], color="tab:green", alpha=0.15, label="healthy")
        axes.set(title=title, xlabel="epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        if axes.lines:
            axes.legend(fontsize="small")
    for axes in figure.axes[len(panels) :]:
        axes.set_axis_off()
    _save(figure, file)


def plot_overlay(
    image: np.ndarray,
    pred: np.ndarray,
    uncertainty: np.ndarray,
    label: np.ndarray | None,
    title: str,
    file: str | Path,
    samples: Sequence[np.ndarray] = (),
) -> None:
    """Draw the axial slice with the largest mask: image with outlines (red: prediction, green: truth), and uncertainty.

    Samples are outlined with dashes on an image of their own.

    Args:
        image: one modality ``[H, W, S]``, axes towards right, anterior and superior.
        pred: binary masks ``[R, H, W, S]``.
        uncertainty: entropy in bits ``[H, W, S]``.
        label: true masks ``[R, H, W, S]``, or None.
        title: text above the image.
        file: PNG to write.
        samples: further masks ``[R, H, W, S]``; up to three are shown.
    """
    mask = pred if label is None or not label.any() else label
    index = int(mask.any(axis=0).sum(axis=(0, 1)).argmax()) if mask.any() else mask.shape[-1] // 2
    panels = 3 if samples else 2
    figure = Figure(figsize=(4.5 * panels, 4.5), layout="constrained")
    left, *middle, right = figure.subplots(1, panels)
    turn = partial(np.rot90, k=1)  # anterior up, the patient's left on the right: the radiological convention
    flip = slice(None, None, -1)
    for axes in (left, *middle, right):
        axes.imshow(turn(image[flip, :, index]), cmap="gray")
        axes.set_axis_off()
    shown = right.imshow(turn(uncertainty[flip, :, index]), cmap="magma", vmin=0, vmax=1, alpha=0.6)
    figure.colorbar(shown, ax=right, label="entropy (bits)")
    outlines = [(left, pred, "red"), (left, () if label is None else label, "lime")]
    outlines += [(middle[0], sample, colour) for sample, colour in zip(samples, SAMPLE_COLOURS, strict=False)]
    for axes, volumes, colour in outlines:
        for volume in volumes:
            if volume[..., index].any():
                style = "solid" if axes is left else "dashed"
                axes.contour(turn(volume[flip, :, index]), levels=[0.5], colors=colour, linewidths=1, linestyles=style)
    left.set_title(f"{title}, slice {index + 1}\nred: prediction" + ("" if label is None else ", green: truth"))
    right.set_title("uncertainty")
    for axes in middle:
        axes.set_title(f"samples: {len(samples)}")
    _save(figure, file)


def read_background(item: Mapping[str, Any]) -> np.ndarray:
    """First modality or channel of an evaluated item ``[H, W, S]``, as it is stored in its file."""
    return read_volume(item["pred"].meta["filename_or_obj"])


def write_overlay(
    item: Mapping[str, Any],
    background: np.ndarray,
    title: str,
    folder: Path,
    samples: Sequence[torch.Tensor] = (),
) -> None:
    """Write ``<folder>/<subject>_overlay.png``.

    Args:
        item: an evaluated item with ``pred``, ``uncertainty`` and perhaps ``label``, all on the input's grid.
        background: image ``[H, W, S]`` on the same grid.
        title: text above the image.
        folder: where the picture is written.
        samples: region channels of each sample ``[R, H, W, S]``.
    """
    orientation = nib.io_orientation(np.asarray(item["pred"].affine))

    def canonical(volume: torch.Tensor | np.ndarray) -> np.ndarray:
        return nib.apply_orientation(np.asarray(volume), orientation)

    file = folder / f"{item['subject']}_overlay.png"

    def regions(mask: torch.Tensor) -> np.ndarray:
        return np.stack([canonical(region.cpu()) > 0 for region in mask])

    truth = regions(item["label"]) if "label" in item else None
    uncertainty = canonical(item["uncertainty"].amax(dim=0).cpu())
    # spread over all of them: three in a row may be alike by chance
    step = max(1, len(samples) // len(SAMPLE_COLOURS))
    shown = [regions(sample) for sample in samples[::step][: len(SAMPLE_COLOURS)]]
    plot_overlay(canonical(background), regions(item["pred"]), uncertainty, truth, title, file, shown)


def plot_reliability(bins: Mapping[str, np.ndarray], file: str | Path) -> None:
    """Draw observed frequency against predicted probability, and below it the share of voxels per bin.

    Args:
        bins: by region and voxels, such as ``WT lesion``: :func:`~scripts.report.uncertainty.calibration_bins` of n
            subjects, ``[n, 3, 20]``.
        file: PNG to write.
    """
    figure = Figure(figsize=(5, 6.5), layout="constrained")
    upper, lower = figure.subplots(2, 1, height_ratios=[3, 1], sharex=True)
    upper.plot([0, 1], [0, 1], color="grey", linewidth=1)
    for region, counts in bins.items():
        prob, truth, count = counts.sum(axis=0)
        seen = count > 0
        label = f"{region}, ECE {expected_calibration_error(counts):.3f}"
        upper.plot(prob[seen] / count[seen], truth[seen] / count[seen], ".-", label=label)
        lower.stairs(count / count.sum(), np.linspace(0, 1, len(count) + 1))
    upper.set(
        ylabel="observed frequency",
        title="calibration of the voxels\n(lesion: truth or prediction, dilated by 3 voxels)",
        aspect="equal",
    )
    upper.legend()
    lower.set(xlabel="predicted probability", ylabel="share of voxels", yscale="log", xlim=(0, 1))
    _save(figure, file)


def plot_risk_coverage(risks: Mapping[str, np.ndarray], file: str | Path) -> None:
    """Draw the share of wrong voxels among the most certain ones, as the mean over subjects.

    Args:
        risks: by region, :func:`~scripts.report.uncertainty.risk_coverage` of the subjects, ``[n, 100]``.
        file: PNG to write.
    """
    figure = Figure(figsize=(5, 4), layout="constrained")
    axes = figure.subplots()
    for colour, (region, risk) in enumerate(risks.items()):
        axes.plot(COVERAGE, risk.mean(axis=0), color=f"C{colour}", label=region)
        axes.axhline(risk[:, -1].mean(), color=f"C{colour}", linestyle=":", label=f"{region}, all voxels")
    axes.set(
        xlabel="coverage: share of the foreground's voxels, most certain first",
        ylabel="share of wrong voxels",
        ylim=(0, None),
    )
    axes.legend()
    _save(figure, file)


def plot_grade_calibration(table: pd.DataFrame, grades: Sequence[str], file: str | Path) -> None:
    """Draw the frequency of each grade against its predicted probability, in up to five groups of equal size.

    With two grades only the second is drawn: the first is its mirror image. A bar is the 95 % interval of a frequency
    (Wilson's); with few subjects it is wide.

    Args:
        table: one row per graded subject with ``grade`` and ``prob_<grade>``.
        grades: names of the grades.
        file: PNG to write.
    """
    figure = Figure(figsize=(5, 5), layout="constrained")
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], color="grey", linewidth=1)
    for index in range(len(grades)) if len(grades) > 2 else [1]:
        prob, truth = table[f"prob_{grades[index]}"].to_numpy(), (table["grade"] == index).to_numpy()
        groups = np.array_split(np.argsort(prob, kind="stable"), min(5, len(prob)))
        for group in groups:
            low, high = binomtest(int(truth[group].sum()), len(group)).proportion_ci(method="wilson")
            axes.plot([prob[group].mean()] * 2, [low, high], color=f"C{index}", linewidth=1)
        points = [(prob[group].mean(), truth[group].mean()) for group in groups]
        axes.plot(*zip(*points, strict=True), ".-", color=f"C{index}", label=grades[index])
    axes.set(
        xlabel="predicted probability",
        ylabel="observed frequency",
        title=f"calibration of the grade, {len(table)} subjects",
        xlim=(-0.02, 1.02),
        ylim=(-0.02, 1.02),
        aspect="equal",
    )
    axes.legend()
    _save(figure, file)


def _save(figure: Figure, file: str | Path) -> None:
    FigureCanvasAgg(figure)  # needs no display and no global state of pyplot
    with atomic_path(file) as path:
        figure.savefig(path, dpi=90)


def plot_ablation(runs: pd.DataFrame, scores: Sequence[str], file: str | Path) -> None:
    """Draw the scores of every arm: a dot per seed, a bar for mean and standard deviation.

    Args:
        runs: ``arm``, ``seed`` and the scores; NaN where an arm has none.
        scores: names of the columns, one panel each.
        file: PNG to write.
    """
    arms = list(dict.fromkeys(runs["arm"]))
    figure = Figure(figsize=(6 * len(scores), 1.2 + 0.35 * len(arms)), layout="constrained")
    for axes, name in zip(figure.subplots(1, len(scores), sharey=True, squeeze=False)[0], scores, strict=True):
        for row, arm in enumerate(arms):
            values = runs.loc[runs["arm"] == arm, name].dropna()
            axes.plot(values, [row] * len(values), ".", color="C0", alpha=0.6)
            if len(values) > 1:
                axes.errorbar(values.mean(), row, xerr=values.std(), fmt="|", color="C1", capsize=4)
        axes.set(xlabel=name, yticks=range(len(arms)), yticklabels=arms)
        axes.grid(axis="x", alpha=0.3)
    figure.axes[0].invert_yaxis()
    _save(figure, file)
