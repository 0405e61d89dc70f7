"""Tumours of random kind, shape and place."""

from __future__ import annotations

import math

import numpy as np
import torch

from scripts.brains.anatomy import SEMI_AXES, Anatomy
from scripts.brains.fields import SmoothField, length
from scripts.brains.tissues import Tissue

KINDS = {"diffuse": 0.4, "glioblastoma": 0.3, "cystic": 0.15, "solid": 0.15}  # and how often
MEDIAN_RADIUS, LOG_SPREAD, RADII = 19.0, 0.45, (5.0, 42.0)  # mm
CANDIDATES = 64  # places that are tried for the centre
SOLID = (Tissue.GREY, Tissue.WHITE, Tissue.NUCLEUS, Tissue.STEM, Tissue.WHITE_LESION)


class Lesion:
    """A tumour: a rough ellipsoid that pushes all tissue away, bone a little, too, and grows along white matter.

    Args:
        rng: draws it.
        anatomy: the head, whose grey or white matter holds the centre.
        shape: 0 gives spheres of the same radius, 1 rough ellipsoids of many sizes.
        resected: a part of the tumour is a cavity.
    """

    def __init__(self, rng: np.random.Generator, anatomy: Anatomy, shape: float = 1.0, resected: bool = False) -> None:
        self.kind = str(rng.choice(list(KINDS), p=list(KINDS.values())))
        self.centre = _place(rng, anatomy)
        self.radius = float(np.clip(MEDIAN_RADIUS * math.exp(LOG_SPREAD * shape * rng.standard_normal()), *RADII))
        semi_axes = self.radius * (1 + shape * (rng.uniform(0.65, 1.4, 3) - 1))
        self.semi_axes = torch.from_numpy(semi_axes).float()
        self.rough = [(SmoothField(rng, max(10, 0.9 * self.radius)), shape * rng.uniform(0.12, 0.4))]
        self.rough += [(SmoothField(rng, 7), shape * rng.uniform(0, 0.15))]
        self.push_share = rng.uniform(0, 0.35)  # of the distance to the centre
        self.along_white = shape * rng.uniform(0, 0.5)
        self.core, self.rim, self.cyst = rng.uniform(0.35, 0.75), rng.uniform(0.08, 0.3), rng.uniform(0.4, 0.8)
        self.chance = rng.random()  # decides what a kind has in some cases only
        self.cavity = rng.uniform(0.3, 1.0) if resected else 0.0

    def push(self, points: torch.Tensor) -> torch.Tensor:
        """Where the tissue at points ``[..., 3]`` was before the tumour grew."""
        offset = points - self.centre
        near = torch.exp(-((length(offset).unsqueeze(-1) / (1.6 * self.radius)) ** 2))
        return points - self.push_share * near * offset

    def paint(self, tissue: torch.Tensor, points: torch.Tensor) -> None:
        """Replace the tissue ``[...]`` at points ``[..., 3]`` where the tumour is."""
        distance = length((points - self.centre) / self.semi_axes)
        near = distance < 2.7  # the rough outline reaches no further
        if not near.any():
            return
        distance = distance + sum(scale * field(points, near) for field, scale in self.rough)
        white = (tissue == Tissue.WHITE) | (tissue == Tissue.WHITE_LESION)
        reach = 1 + self.along_white * (white.float() - 0.5)
        room = (tissue >= Tissue.CSF) & (tissue != Tissue.VENTRICLE) & (tissue != Tissue.CHOROID)
        for part, inside in self._parts(distance, reach):
            tissue[room & inside] = part
        if self.cavity:
            tissue[room & (distance < self.cavity)] = Tissue.CAVITY

    def _parts(self, distance: torch.Tensor, reach: torch.Tensor) -> list[tuple[Tissue, torch.Tensor]]:
        """Parts from the outside in, each with its places ``[...]``; later ones lie over earlier ones."""
        whole, core, cyst = distance < reach, distance < self.core, distance < self.cyst
        often, seldom = self.chance < 0.6, self.chance < 0.3
        if self.kind == "diffuse":
            return [(Tissue.OEDEMA, whole)] + ([(Tissue.CORE, core)] if seldom else [])
        if self.kind == "solid":
            return [(Tissue.CORE, whole)] + ([(Tissue.RIM, core)] if seldom else [])
        if self.kind == "cystic":
            rim = [(Tissue.RIM, distance < self.cyst + 0.08)] if seldom else []
            return [(Tissue.OEDEMA if often else Tissue.CORE, whole), *rim, (Tissue.CYST, cyst)]
        middle = Tissue.NECROSIS if often else Tissue.CORE
        return [(Tissue.OEDEMA, whole), (Tissue.RIM, core), (middle, distance < self.core - self.rim)]


def _place(rng: np.random.Generator, anatomy: Anatomy) -> torch.Tensor:
    """A place ``[3]`` (mm) in grey or white matter."""
    places = torch.from_numpy(rng.uniform(-0.9, 0.9, (CANDIDATES, 3)) * SEMI_AXES).float()
    solid = torch.isin(anatomy(places), torch.tensor(SOLID))
    return places[int(solid.nonzero()[0])] if solid.any() else torch.zeros(3)
