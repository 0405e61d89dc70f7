"""Transforms that draw brains."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

import numpy as np
import torch
from monai.transforms import Randomizable, Transform

from scripts.brains.brain import Brain, Randomisation
from scripts.brains.scan import Scan
from scripts.data.grades import UNKNOWN_GRADE
from scripts.data.transforms import normalised

COARSE_SLICES, COARSE_SIZE = 24, 24  # of the volume whose statistics normalise the slices


class RandBraind(Randomizable, Transform):
    """Draw slices of a new brain: ``image [M, H, W, S]`` and ``label [1, H, W, S]`` of BraTS.

    Half of the slices are drawn where the tumour is, if there is one. The modalities are normalised with the
    statistics of a coarse volume. ``empty`` says that the head has no tumour.

    Args:
        size: pixels of each side.
        num_slices: S.
        grade_labels: class index of each grade.
        normalisation: see :func:`scripts.data.transforms.normalised`.
        randomisation: strengths of :class:`~scripts.brains.brain.Randomisation` by name; those not named are 1.
    """

    def __init__(
        self,
        size: int,
        num_slices: int,
        grade_labels: Mapping[str, int],
        normalisation: str = "nonzero",
        randomisation: Mapping[str, float] | None = None,
    ) -> None:
        self.size, self.num_slices, self.grade_labels = size, num_slices, dict(grade_labels)
        self.normalisation = normalisation
        self.randomisation = Randomisation(**(randomisation or {}))

    def __call__(self, data: Mapping[Hashable, Any]) -> dict:
        rng = np.random.default_rng(self.R.randint(2**32, dtype=np.uint64))
        brain = Brain(rng, self.randomisation)
        scan = Scan(rng, brain, self.randomisation)
        heights = scan.heights()
        coarse, _ = scan.slices(np.linspace(heights[0], heights[-1], COARSE_SLICES), COARSE_SIZE)
        image, label = scan.slices(self._chosen(rng, scan, heights), self.size)
        grade = self.grade_labels.get(brain.grade, UNKNOWN_GRADE)
        channels = [normalised(*pair, self.normalisation) for pair in zip(image, coarse, strict=True)]
        found = {"image": torch.stack(channels), "label": label[None].float()}
        return {**data, **found, "grade": grade, "empty": not brain.lesions}

    def _chosen(self, rng: np.random.Generator, scan: Scan, heights: np.ndarray) -> np.ndarray:
        """Heights ``[S]`` of the slices to draw, with replacement."""
        odds = np.full(len(heights), 1 / len(heights))
        lesions = scan.brain.lesions
        if lesions:
            centres = [float(scan.rotation[:, 2] @ (lesion.centre - scan.offset)) for lesion in lesions]
            near = np.zeros(len(heights))
            for lesion, centre in zip(lesions, centres, strict=True):
                near += np.abs(heights - centre) < lesion.radius
            if near.any():
                odds = odds / 2 + near / near.sum() / 2
        return rng.choice(heights, self.num_slices, p=odds)
