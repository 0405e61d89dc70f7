"""A healthy head whose tissue is a function of the place, so that any slice of it can be computed alone."""

from __future__ import annotations

import numpy as np
import torch

from scripts.brains.fields import SmoothField, length, radius
from scripts.brains.tissues import Tissue

SEMI_AXES = np.array([68.0, 84.0, 62.0])  # of the brain: right-left, back-front, down-up (mm)
SIDES = (-1, 1)
# centres and semi-axes of the deep grey nuclei of the right side (mm): thalamus, lentiform, caudate
NUCLEI = (((13, -14, 6), (8, 15, 11)), ((26, 6, 3), (6, 16, 11)), ((14, 14, 10), (5, 13, 8)))


class Anatomy:
    """A healthy head. Points are in mm, ``(right, front, up)`` from the middle of the brain.

    The cerebrum is a tapered ellipsoid with a flat underside. Its sulci are the surfaces where a smooth random field is
    0; the cortex follows them. Everything is warped by further fields.

    Args:
        rng: draws the head.
        shape: 0 gives every head the same proportions, 1 those of people and a little more.
        mimics: 0 leaves out what looks like a tumour and is none, 1 has it as often as in the elderly.
    """

    def __init__(self, rng: np.random.Generator, shape: float = 1.0, mimics: float = 1.0) -> None:
        def between(low: float, high: float) -> float:
            return (low + high) / 2 + shape * (high - low) * (rng.random() - 0.5)

        self.size = 1 + 0.05 * shape * rng.standard_normal()
        self.semi_axes = SEMI_AXES * self.size * (1 + 0.03 * shape * rng.standard_normal(3))
        self.warp, self.warp_mm = SmoothField(rng, 90, count=3), between(0, 8) * min(shape, 1)
        self.folds, self.folia = SmoothField(rng, between(14, 22)), SmoothField(rng, 8)
        self.sulcus_mm, self.cortex_mm = between(0.15, 1), between(2.2, 3.8)
        self.ventricles = between(0.6, 1.9)
        self.gap_mm, self.skull_mm, self.scalp_mm = between(1, 5), between(4, 9), between(3, 10)
        self.face, self.neck_mm = SmoothField(rng, between(9, 25)), between(50, 72)
        self.vessels = SmoothField(rng, 30, count=2) if rng.random() < mimics else None
        self.white_lesions = SmoothField(rng, 10) if rng.random() < 0.35 * mimics else None
        self.has_choroid = rng.random() < mimics

    def __call__(self, points: torch.Tensor) -> torch.Tensor:
        """Tissue ``[...]``, a number of :class:`Tissue`, at points ``[..., 3]``."""
        warped = points + self.warp_mm * self.warp(points).movedim(0, -1)
        right, front, up = warped.unbind(-1)
        x, y, z = (axis / half for axis, half in zip((right, front, up), self.semi_axes, strict=True))
        taper = 1 - 0.12 * y.clamp(0, 1)
        inside = (1 - length(torch.stack([x / taper, y, z], dim=-1))) * float(
            self.semi_axes.mean()
        )  # mm under the surface
        underside = -0.42 * self.semi_axes[2] + 0.075 * (front + 20).clamp(min=0)
        tissue = self._head(points, warped, inside, up < underside - 3)
        self._neck(tissue, points, warped, inside)
        depth = torch.minimum(inside, up - underside)
        tissue = torch.where(depth > 0, self._cortex(warped, depth), tissue)
        self._deep(tissue, warped, depth)
        self._mimics(tissue, points, warped, inside, depth)
        return tissue

    def _head(
        self, points: torch.Tensor, warped: torch.Tensor, inside: torch.Tensor, low: torch.Tensor
    ) -> torch.Tensor:
        """Tissue outside the cerebrum: shells of the head, face, eyes, cerebellum, stem."""
        tissue = torch.full(inside.shape, int(Tissue.AIR))
        gap, skull = self.gap_mm, self.gap_mm + self.skull_mm
        tissue[inside > -skull - self.scalp_mm] = Tissue.SCALP
        tissue[inside > -skull] = Tissue.SKULL
        tissue[inside > -gap] = Tissue.MENINGES
        right, front, up = warped.unbind(-1)
        under = (inside > -skull) & low & (front > -20)
        face = self.face(points, under)
        tissue[under] = Tissue.MUSCLE
        face = torch.where((right.abs() < 12) & (front > 25), face + 0.8, face)  # the nose
        tissue[under & (face > 0.7)] = Tissue.MUCOSA  # it lines the air of the sinuses
        tissue[under & (face > 0.9)] = Tissue.AIR
        tissue[under & (face < -0.8)] = Tissue.SCALP
        lengths = self.semi_axes
        for side in SIDES:
            eye = radius(warped, (32 * side * self.size, 0.82 * lengths[1], -0.55 * lengths[2]), (12, 12, 12))
            tissue[(eye < 1.5) & low] = Tissue.SCALP
            tissue[eye < 1] = Tissue.EYE
        cerebellum = radius(warped, lengths * (0, -0.52, -0.62), lengths * (0.72, 0.38, 0.34))
        folia = self.folia(warped * warped.new_tensor([0.6, 1.0, 2.0]), cerebellum < 0.93).abs() > 0.55
        tissue[cerebellum < 1] = Tissue.GREY
        tissue[folia] = Tissue.WHITE
        stem = torch.hypot(right, front + 18 - 0.15 * up) < 15
        tissue[stem & (up < 0) & (up > -1.3 * lengths[2]) & (inside > -30)] = Tissue.STEM
        return tissue

    def _neck(self, tissue: torch.Tensor, points: torch.Tensor, warped: torch.Tensor, inside: torch.Tensor) -> None:
        """Add what lies below the skull: skin, muscles, glands, jaw, throat, spine with the cord."""
        right, front, up = warped.unbind(-1)
        jaw = radius(warped, (0, 35, -78), (48, 50, 38))
        skin = torch.minimum(torch.hypot(right, front + 15) / self.neck_mm, jaw)
        below = (inside < -self.gap_mm - self.skull_mm) & (up < -0.4 * self.semi_axes[2]) & (skin < 1)
        tissue[below] = Tissue.SCALP
        flesh = below & (skin < 1 - self.scalp_mm / self.neck_mm)
        tissue[flesh] = Tissue.MUSCLE
        face = self.face(points, flesh)
        tissue[flesh & (face < -0.8)] = Tissue.SCALP
        tissue[flesh & (face > 0.8)] = Tissue.MUCOSA
        tissue[flesh & (jaw > 0.7) & (jaw < 0.85) & (front > 20)] = Tissue.SKULL
        throat = torch.hypot(right / 11, (front - 6) / 8)
        tissue[flesh & (throat < 1.25)] = Tissue.MUCOSA
        tissue[flesh & (throat < 1)] = Tissue.AIR
        spine = torch.hypot(right, front + 30)
        tissue[flesh & ((spine < 14) | (torch.hypot(right, front + 12) < 12))] = Tissue.SKULL
        tissue[flesh & (spine < 9)] = Tissue.MENINGES
        tissue[flesh & (spine < 5.5)] = Tissue.CORD

    def _cortex(self, warped: torch.Tensor, depth: torch.Tensor) -> torch.Tensor:
        """Fluid, grey and white matter of the cerebrum by the distance to its surface and its sulci (mm)."""
        right, _, up = warped.unbind(-1)
        folds = self.folds(warped, (depth > 0) & (depth < 27)).abs()
        sulci = 5 * folds + (depth - 22).clamp(min=0) + 0.5  # they end 22 mm under the surface
        fissure = right.abs() + 0.35 * (18 - up).clamp(min=0)
        distance = torch.minimum(torch.minimum(depth, sulci), fissure)
        tissue = torch.full(depth.shape, int(Tissue.WHITE))
        tissue[distance < self.sulcus_mm + self.cortex_mm] = Tissue.GREY
        tissue[distance < self.sulcus_mm] = Tissue.CSF
        return tissue

    def _deep(self, tissue: torch.Tensor, warped: torch.Tensor, depth: torch.Tensor) -> None:
        """Add nuclei and ventricles."""
        inside, wide = depth > 8, self.ventricles
        places, found = warped[inside], tissue[inside]
        for side in SIDES:
            for centre, semi_axes in NUCLEI:
                found[radius(places, (side * centre[0], *centre[1:]), semi_axes) < 1] = Tissue.NUCLEUS
        found[self._ventricle(places) < 1] = Tissue.VENTRICLE
        found[radius(places, (0, -4, 3), (1.5 + 1.5 * wide, 13, 10)) < 1] = Tissue.VENTRICLE  # the third
        tissue[inside] = found

    def _ventricle(self, warped: torch.Tensor) -> torch.Tensor:
        """Distance ``[...]`` from the lateral ventricles, 1 on their surface: body, posterior and temporal horn."""
        wide, found = self.ventricles, []
        for side in SIDES:
            found += [
                radius(warped, (side * (7 + 3 * wide), -2, 18), (4.5 * wide + 2, 30, 5 * wide + 3)),
                radius(warped, (side * (15 + 4 * wide), -38, 8), (5 * wide + 1, 20, 7 * wide + 3)),
                radius(warped, (side * 32, -15, -16), (3 * wide, 20, 3 * wide)),
            ]
        return torch.stack(found).amin(dim=0)

    def _mimics(
        self,
        tissue: torch.Tensor,
        points: torch.Tensor,
        warped: torch.Tensor,
        inside: torch.Tensor,
        depth: torch.Tensor,
    ) -> None:
        """Add vessels, choroid plexus, and white-matter lesions beside the ventricles and elsewhere."""
        if self.vessels is not None:  # two surfaces cross in curves
            curve = torch.hypot(*self.vessels(points, depth > 0))
            tissue[(depth > 0) & (curve < 0.12)] = Tissue.VESSEL
            sinus = (warped[..., 0].abs() < 4) & (inside > -self.gap_mm) & (inside < 6) & (warped[..., 2] > 0)
            tissue[sinus] = Tissue.VESSEL
        if self.has_choroid:
            for side in SIDES:
                plexus = radius(warped, (side * (15 + 4 * self.ventricles), -32, 9), (3, 7, 3))
                tissue[(tissue == Tissue.VENTRICLE) & (plexus < 1)] = Tissue.CHOROID
        if self.white_lesions is not None:
            white = tissue == Tissue.WHITE
            spots = self.white_lesions(points, white)
            near = (self._ventricle(warped) < 1.6) & (spots > 0.6)
            tissue[white & (near | (spots > 2.1))] = Tissue.WHITE_LESION
