"""The fine-tuning curve as a picture, drawn from its table in docs/weights.md.

Example:
    python benchmarks/curve.py --picture docs/images/fine_tuning.png
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import pandas as pd
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

PAGE = Path(__file__).resolve().parents[1] / "docs" / "weights.md"
HEADER = "| start | training patients | Dice | each seed |"


def main() -> None:
    """Draw a dot for each seed, and a line through the means of each start."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--picture", required=True, type=Path)
    args = parser.parse_args()
    table = read(PAGE.read_text(encoding="utf-8"))
    figure = Figure(figsize=(6, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for number, (start, rows) in enumerate(table[table["patients"] > 0].groupby("start")):
        means = rows.groupby("patients")["dice"].mean()
        axes.plot(means.index, means, "-", color=f"C{number}", label=f"from {start}")
        axes.plot(rows["patients"], rows["dice"], "os"[number], color=f"C{number}", markersize=4)
    alone = table.loc[table["patients"] == 0, "dice"].item()
    axes.axhline(alone, color="grey", linestyle="--", label="these weights, no training")
    axes.set(xlabel="training patients", ylabel="Dice of 13 patients", ylim=(0, 1))
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    args.picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.picture, dpi=90)


def read(page: str) -> pd.DataFrame:
    """Start, number of training patients and Dice of each seed; the mean alone where there are no seeds."""
    rows = []
    for line in page[page.index(HEADER) :].splitlines()[2:]:
        if not line.startswith("|"):
            break
        start, patients, dice, seeds, *_ = (cell.strip(" *") for cell in line.strip("|").split("|"))
        values = re.findall(r"\d\.\d+", seeds) or re.findall(r"\d\.\d+", dice)[:1]
        number = 0 if patients == "none" else int(patients)
        rows += [{"start": start, "patients": number, "dice": float(value)} for value in values]
    return pd.DataFrame(rows)


if __name__ == "__main__":
    main()
