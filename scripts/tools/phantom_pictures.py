"""Synthetic pictures that several annotators outline differently, with a known distribution of their masks.

Each picture has a bright disc that every annotator counts, and structures that each annotator counts at random. How
bright a structure is shows how likely it is counted, so that the probability can be learned from the picture.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from scripts.data.pictures import write_picture

KINDS = ("places", "nested", "presence")
NOISE = 0.3  # standard deviation, relative to the disc's brightness of 1.5
GREY = (90, 40)  # mean grey level, and grey levels per unit of brightness


def make_pictures(
    output_dir: str | Path, kind: str, num_pictures: int = 400, annotators: int = 4, size: int = 32, seed: int = 0
) -> None:
    """Write ``images/<number>.png`` and ``masks/<number>_<annotator>.png``. The same seed gives the same files.

    Args:
        output_dir: folder of the data set.
        kind: one of :data:`KINDS`, see :func:`make_picture`.
        num_pictures: number of pictures.
        annotators: masks of each picture.
        size: sides of a picture (pixels).
        seed: seed of all random numbers.
    """
    for number, picture_seed in enumerate(np.random.default_rng(seed).integers(2**31, size=num_pictures)):
        rng = np.random.default_rng(picture_seed)
        image, parts, probability = make_picture(kind, size, rng)
        write_picture(image[..., None], Path(output_dir, "images", f"{number:04d}.png"))
        for annotator, mask in enumerate(draw_masks(kind, parts, probability, annotators, rng), start=1):
            file = Path(output_dir, "masks", f"{number:04d}_{annotator}.png")
            write_picture(255 * mask[..., None].astype(np.uint8), file)


def make_picture(kind: str, size: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """One picture.

    - ``places``: exactly one of four discs around the central one is counted.
    - ``nested``: a ring around the central disc is counted or not.
    - ``presence``: the central disc itself is counted or not.

    Returns:
        The picture ``[size, size]`` as uint8; its parts ``[1 + n, size, size]``, first the one that is always counted;
        and the probability of each other part ``[n]``.
    """
    grid = np.stack(np.meshgrid(np.arange(size), np.arange(size), indexing="ij"), axis=-1) / size

    def disc(centre: np.ndarray, radius: float) -> np.ndarray:
        return np.linalg.norm(grid - centre, axis=-1) < radius

    centre, radius = rng.uniform(0.4, 0.6, 2), rng.uniform(0.06, 0.1)
    core = disc(centre, radius)
    if kind == "places":
        angles = rng.uniform(0, np.pi / 2) + np.arange(4) * np.pi / 2
        directions = np.stack([np.sin(angles), np.cos(angles)], axis=-1)
        parts = [core, *(disc(centre + 0.24 * direction, 0.11) & ~core for direction in directions)]
        probability = rng.dirichlet(np.full(4, 1.5))
    elif kind == "nested":
        parts, probability = [core, disc(centre, radius + 0.1) & ~core], rng.uniform(0, 1, 1)
    else:
        parts, probability = [np.zeros_like(core), disc(centre, 0.15)], rng.uniform(0, 1, 1)
    brightness = 1.5 * parts[0] + sum((0.3 + p) * part for p, part in zip(probability, parts[1:], strict=True))
    noisy = GREY[0] + GREY[1] * (brightness + rng.normal(0, NOISE, core.shape))
    return noisy.round().clip(0, 255).astype(np.uint8), np.stack(parts), probability


def draw_masks(
    kind: str, parts: np.ndarray, probability: np.ndarray, count: int, rng: np.random.Generator
) -> np.ndarray:
    """Draw ``count`` masks ``[count, size, size]`` of a picture from the distribution of its annotators."""
    if kind == "places":
        counted = np.eye(len(probability), dtype=bool)[rng.choice(len(probability), count, p=probability)]
    else:
        counted = rng.uniform(size=(count, len(probability))) < probability
    return parts[0] | np.einsum("an,nhw->ahw", counted, parts[1:])


def main() -> None:
    """Command line: ``python -m scripts.tools.phantom_pictures --output_dir demo/places --kind places``."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output_dir", required=True)
    parser.add_argument("--kind", choices=KINDS, required=True)
    parser.add_argument("--num_pictures", type=int, default=400)
    parser.add_argument("--annotators", type=int, default=4)
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    make_pictures(**vars(args))
    print(f"{args.num_pictures} pictures with {args.annotators} masks each written to {args.output_dir}")


if __name__ == "__main__":
    main()
