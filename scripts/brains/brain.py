"""A head with its tumours, drawn from a seed."""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
import torch

from scripts.brains.anatomy import Anatomy
from scripts.brains.fields import SmoothField
from scripts.brains.lesions import Lesion
from scripts.config import InputError

HEALTHY, RESECTED = 0.25, 0.05  # share of heads without a tumour, and of tumours with a cavity
COUNTS = (1, 1, 1, 2, 3)  # tumours of a head


@dataclass(frozen=True)
class Randomisation:
    """How random each part is, from 0 to 1. Place, kind and number of the tumours, noise and motion are always random.

    Attributes:
        contrast: brightness of the tissues, gamma, bias field.
        shape: proportions of the head, outline and size of the tumours, tilt, position and field of view of the scan.
        mimics: how often there is what looks like a tumour and is none: white-matter lesions, vessels, choroid plexus,
            cavities.
        resolution: how often slices are thicker than 1 mm, and how strong the blur is.
        skull: 0 strips every head; with 1, half of them have scalp, skull and face.

    Raises:
        InputError: for a value outside 0 to 1.
    """

    contrast: float = 1.0
    shape: float = 1.0
    mimics: float = 1.0
    resolution: float = 1.0
    skull: float = 1.0

    def __post_init__(self) -> None:
        if wrong := {name: value for name, value in vars(self).items() if not 0 <= value <= 1}:
            raise InputError(f"randomisation {wrong} must lie between 0 and 1")

    @classmethod
    def of_strength(cls, strength: float) -> Randomisation:
        """All parts alike."""
        return cls(*[strength] * len(fields(cls)))


class Brain:
    """A head with tumours whose tissue is a function of the place.

    Args:
        rng: draws it.
        randomisation: how random its parts are.
    """

    def __init__(self, rng: np.random.Generator, randomisation: Randomisation) -> None:
        shape, mimics = randomisation.shape, randomisation.mimics
        self.anatomy = Anatomy(rng, shape, mimics)
        self.texture = SmoothField(rng, 10)  # of the brightness inside a tissue
        count = 0 if rng.random() < HEALTHY else int(rng.choice(COUNTS))
        self.lesions = [
            Lesion(rng, self.anatomy, shape, resected=bool(rng.random() < RESECTED * mimics)) for _ in range(count)
        ]

    @property
    def grade(self) -> str:
        """``HGG`` with a glioblastoma, ``LGG`` with other tumours, empty without."""
        kinds = {lesion.kind for lesion in self.lesions}
        return "HGG" if "glioblastoma" in kinds else "LGG" if kinds else ""

    def tissue(self, points: torch.Tensor) -> torch.Tensor:
        """Tissue ``[...]``, a number of :class:`~scripts.brains.tissues.Tissue`, at points ``[..., 3]`` in mm."""
        pushed = points
        for lesion in self.lesions:
            pushed = lesion.push(pushed)
        tissue = self.anatomy(pushed)
        for lesion in self.lesions:
            lesion.paint(tissue, points)
        return tissue
