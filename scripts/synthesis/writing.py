"""What inference writes of a synthetic contrast CT: the volume, whose header says what it is, a table, projections."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pandas as pd
import torch

from scripts.data.pictures import read_volume
from scripts.data.writing import LikeInputWriter, write_csv
from scripts.sampling.report import Report
from scripts.synthesis.plots import plot_projections
from scripts.synthesis.scores import ENHANCED, body_mask

DESCRIPTION = b"synthetic contrast CT; not for diagnosis"


class SyntheticWriter(LikeInputWriter):
    """Write a CT whose header says that it is synthetic."""

    @classmethod
    def create_backend_obj(cls, data_array, *args, **kwargs) -> nib.Nifti1Image:  # type: ignore[override]
        """MONAI's NIfTI image, with a description."""
        image = super().create_backend_obj(data_array, *args, **kwargs)
        image.header["descrip"] = DESCRIPTION
        return image


class EnhancementTable(Report):
    """Report of an inference: ``enhancement.csv`` and ``<subject>_mip.png``.

    A row has the mean enhancement of the body (HU above the native CT), its 99.9 % quantile, and the volume that is
    enhanced by more than 100 HU (ml).

    Args:
        output_dir: folder of the files.
    """

    def __init__(self, output_dir: str) -> None:
        self.output_dir = Path(output_dir)

    def answer(self, item: Mapping[str, Any]) -> dict[str, Any]:
        """The row of an item, which MONAI Label sends to its client."""
        native, pred = read_volume(item["pred"].meta["filename_or_obj"]), _values(item)
        enhancement = (pred - native)[body_mask(native)]
        voxel = float(np.prod(nib.affines.voxel_sizes(np.asarray(item["pred"].affine)))) / 1000
        return {
            "subject": item["subject"],
            "mean_enhancement_hu": float(enhancement.mean()) if len(enhancement) else float("nan"),
            "highest_enhancement_hu": float(np.quantile(enhancement, 0.999)) if len(enhancement) else float("nan"),
            "enhanced_ml": float((enhancement > ENHANCED).sum() * voxel),
        }

    def rows_of(self, item: Mapping[str, Any]) -> list[dict[str, Any]]:
        volumes = {"native": read_volume(item["pred"].meta["filename_or_obj"]), "synthetic": _values(item)}
        file = self.output_dir / f"{item['subject']}_mip.png"
        plot_projections(volumes, np.asarray(item["pred"].affine), item["subject"], file)
        return [self.answer(item)]

    def write(self, rows: list[dict[str, Any]]) -> None:
        columns = ["subject", "mean_enhancement_hu", "highest_enhancement_hu", "enhanced_ml"]
        write_csv(pd.DataFrame(rows, columns=columns), self.output_dir / "enhancement.csv")


def _values(item: Mapping[str, Any]) -> np.ndarray:
    return torch.as_tensor(item["pred"])[0].cpu().numpy()
