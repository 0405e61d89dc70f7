"""Samples where annotators disagree: distance to the known distribution of their masks, for each way of sampling.

Each network is trained on fresh pictures of scripts/tools/phantom_pictures.py, with one annotator per picture.

Example:
    python benchmarks/annotators.py --kinds places nested --seeds 0 1 2
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.tables import hardware, markdown  # noqa: E402
from scripts.calibration.volumes import COVERAGE, conformal_margin  # noqa: E402
from scripts.diffusion.schedule import GaussianDiffusion  # noqa: E402
from scripts.net import MedSegDiff  # noqa: E402
from scripts.networks.unets import ImageUNet  # noqa: E402
from scripts.report.annotators import crps, energy_distance, mean_distance, quantile_coverage  # noqa: E402
from scripts.report.uncertainty import LEVELS, nonconformity  # noqa: E402
from scripts.sampling.inferer import VolumeInferer  # noqa: E402
from scripts.tools.phantom_pictures import GREY, KINDS, draw_masks, make_picture  # noqa: E402
from scripts.training.autocast import has_bfloat16  # noqa: E402
from scripts.training.losses import MultiTaskLoss  # noqa: E402
from scripts.training.steps import DenoisingInferer, DrawNoise  # noqa: E402

SIZE, BATCH, SAMPLES, DRAWN = 32, 16, 16, 64
CHANNELS = [16, 32, 64]
LEARNING_RATE = 1e-3
STEPS = 1200
PLAIN_STEPS = 9  # of the U-Net take as long as one of the diffusion network
PICTURES = 60
CALIBRATED = 30  # further pictures, to which the intervals of the area are fitted


def main() -> None:
    """Print one table per kind of picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=["places", "nested"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=STEPS, help="of each training, of 16 pictures")
    parser.add_argument("--pictures", type=int, default=PICTURES, help="that are judged, with 64 annotators each")
    parser.add_argument("--plot", type=Path, help="PNG of three pictures of the last training")
    args = parser.parse_args()
    print(hardware())
    for kind in args.kinds:
        rows: list[dict] = []
        for seed in args.seeds:
            network = train_network(kind, seed, args.steps)
            plain = {
                f"U-Net, cross entropy, as many {unit}": train_plain(kind, seed, factor * args.steps)
                for unit, factor in {"steps": 1, "minutes": PLAIN_STEPS}.items()
            }
            rows += judge(kind, seed, args.pictures + CALIBRATED, network, plain)
        table = pd.DataFrame(rows)
        print(f"\n{kind}\n{markdown(summary(table[table['picture'] < args.pictures]))}")
        print(intervals(table, args.pictures), flush=True)
    if args.plot:
        plot(kind, network, args.plot)


def summary(rows: pd.DataFrame) -> pd.DataFrame:
    """Means of each method, and the difference of its distance to that of the level sets with its standard error."""
    means = rows.groupby("method", sort=False).mean(numeric_only=True).drop(columns=["picture", "seed"])
    ged = rows.pivot(index=["seed", "picture"], columns="method", values="ged")
    against = ged.sub(ged["level sets"], axis=0)
    means["ged - level sets"], means["standard error"] = against.mean(), against.sem()
    return means.reset_index()


def intervals(rows: pd.DataFrame, pictures: int) -> str:
    """How many areas lie in their 90 % interval, which is chosen and widened as ``calibrate.yaml`` does it.

    Both are fitted to the pictures from number ``pictures`` on, by one annotator each, and judged on the others.
    """
    sources = rows[rows["method"].isin(["level sets", "1 evaluations"])]
    fitted = sources[sources["picture"] >= pictures]
    held = fitted.groupby("method")["outside"].agg(lambda found: np.mean([values[0] <= 0 for values in found]))
    chosen = (held - COVERAGE).abs().idxmin()
    shares = []
    for _, found in sources[sources["method"] == chosen].groupby("seed"):
        calibrated = found[found["picture"] >= pictures]
        scores = [values[0] for values in calibrated["outside"]]
        margin = conformal_margin(scores, [str(picture) for picture in calibrated["picture"]])
        judged = np.stack(found[found["picture"] < pictures]["outside"])
        shares.append((judged <= margin).mean())
    return f"calibrated 90 % interval of the area, from {chosen}: holds {np.mean(shares):.3f} ({np.round(shares, 3)})"


def judge(kind: str, seed: int, pictures: int, network: MedSegDiff, plain: Mapping[str, ImageUNet]) -> list[dict]:
    """One row per method and picture."""
    rng = np.random.default_rng(10_000)
    rows = []
    for index in range(pictures):
        image, parts, probability = make_picture(kind, SIZE, rng)
        truth = draw_masks(kind, parts, probability, DRAWN, rng).reshape(DRAWN, -1)
        floor = draw_masks(kind, parts, probability, SAMPLES, rng).reshape(SAMPLES, -1)
        for name, masks, prob in methods(network, plain, torch.as_tensor(normalised(image)), index, seed):
            rows.append({"method": name, "picture": index, "seed": seed, **scores(masks, prob, truth)})
        rows.append(
            {"method": "the annotators themselves", "picture": index, "seed": seed, **scores(floor, None, truth)}
        )
    return rows


@torch.no_grad()
def plot(kind: str, network: MedSegDiff, file: Path) -> None:
    """Draw three pictures, each with four annotators, the calibrated map, the one mask and four of 16 samples."""
    rng, count = np.random.default_rng(10_000), 4
    titles = ["picture", *["annotator"] * count, "probability", "mask", *["sample"] * count]
    figure = Figure(figsize=(1.3 * len(titles), 4.4), layout="constrained")
    for index, row in enumerate(figure.subplots(3, len(titles))):
        image, parts, probability = make_picture(kind, SIZE, rng)
        inputs = torch.as_tensor(normalised(image))[None, None]
        samples, mask, calib, _ = VolumeInferer(num_samples=SAMPLES).sample(inputs, network, [index])
        annotators = draw_masks(kind, parts, probability, count, rng)
        assert calib is not None
        shown = [image, *annotators, calib[0, 0], mask[0, 0] > 0.5, *(samples[0, :: SAMPLES // count, 0] > 0.5)]
        for axes, title, panel in zip(row, titles, shown, strict=True):
            axes.imshow(panel, cmap="gray", vmin=0, vmax=255 if title == "picture" else 1)
            axes.set_axis_off()
            if index == 0:
                axes.set_title(title, fontsize="medium")
    FigureCanvasAgg(figure).print_figure(file, dpi=100)


@torch.no_grad()
def methods(
    network: MedSegDiff, plain: Mapping[str, ImageUNet], image: torch.Tensor, index: int, seed: int
) -> list[tuple]:
    """Name, masks ``[n, V]`` and perhaps probability ``[V]`` of each method."""
    image = image[None, None]
    levels = (np.arange(SAMPLES) + 0.5) / SAMPLES

    def sampled(count: int, **options: int) -> tuple[np.ndarray, np.ndarray]:
        inferer = VolumeInferer(num_samples=count, seed=seed, **options)  # type: ignore[arg-type]
        prob, _, calib, _ = inferer.sample(image, network, [index])
        assert calib is not None
        return prob[0].flatten(1).numpy() > 0.5, calib.flatten().numpy()

    mask, calib = sampled(1)
    found = [("one mask", mask, None), ("level sets", calib > levels[:, None], calib)]
    for name, unet in plain.items():
        prob = unet(image)[0].sigmoid().flatten().numpy()
        found.append((f"level sets of a {name}", prob > levels[:, None], prob))
    found.append(("image branch alone", sampled(SAMPLES, num_inference_steps=0)[0], None))
    for steps in (1, 2, 10):
        found.append((f"{steps} evaluations", sampled(SAMPLES, num_inference_steps=steps)[0], None))
    for steps in (1, 10):
        options = {"num_inference_steps": steps, "start_timestep": 999}
        found.append((f"from noise, {steps} evaluations", sampled(SAMPLES, **options)[0], None))
    return found


def scores(masks: np.ndarray, prob: np.ndarray | None, truth: np.ndarray) -> dict[str, Any]:
    """Scores of masks ``[n, V]``, and of a probability ``[V]``, against drawn annotators ``[m, V]``."""
    volumes, expected = masks.sum(axis=1).astype(float), truth.sum(axis=1).astype(float)
    bounds = np.quantile(volumes, LEVELS[::-1])
    return {
        "ged": energy_distance(masks, truth),
        "diversity": mean_distance(masks),
        "crps of the area": crps(volumes, expected),
        "90 % interval holds": quantile_coverage(volumes, expected),
        "sd of the area": float(volumes.std()),
        "outside": [nonconformity(*bounds, area) for area in expected],
        "brier": np.nan if prob is None else float(np.square(prob - truth.mean(axis=0)).mean()),
    }


def normalised(image: np.ndarray) -> np.ndarray:
    return ((image - GREY[0]) / GREY[1]).astype(np.float32)


def batch(kind: str, rng: np.random.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Pictures and the masks of one annotator each ``[B, 1, H, W]``."""
    images, masks = [], []
    for _ in range(BATCH):
        image, parts, probability = make_picture(kind, SIZE, rng)
        images.append(normalised(image))
        masks.append(draw_masks(kind, parts, probability, 1, rng))
    return torch.as_tensor(np.stack(images))[:, None], torch.as_tensor(np.stack(masks)).float()


def train(parameters: list, kind: str, seed: int, steps: int, step: Callable) -> None:
    """Minimise ``step(image, label)``."""
    rng = np.random.default_rng(seed)
    optimizer = torch.optim.AdamW(parameters, LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    start = time.process_time()
    for _ in range(steps):
        optimizer.zero_grad()
        step(*batch(kind, rng)).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
    print(f"{kind}, seed {seed}: {time.process_time() - start:.0f} CPU seconds", file=sys.stderr, flush=True)


def train_network(kind: str, seed: int, steps: int) -> MedSegDiff:
    """The diffusion network, with the losses of the bundle."""
    torch.manual_seed(seed)
    diffusion = GaussianDiffusion()
    widths = {"channels": CHANNELS, "calib_channels": CHANNELS}
    network = MedSegDiff(diffusion, 1, conditioning=["highway", "stochastic"], use_cls_head=False, **widths)
    loss = MultiTaskLoss(diffusion, tasks=["segmentation"], stochastic=True)
    inferer = DenoisingInferer(amp=has_bfloat16())
    draw_noise = DrawNoise(diffusion.num_train_timesteps)

    def step(image: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        unknown = {"grade": torch.full((len(image),), -1), "empty": torch.zeros(len(image)), "subject": None}
        image, targets, _, noise = draw_noise({"image": image, "label": label, **unknown})
        return loss(inferer(image, network, **noise), targets)

    train(list(network.parameters()), kind, seed, steps, step)
    return network.eval()


def train_plain(kind: str, seed: int, steps: int) -> ImageUNet:
    """A U-Net of the image-only branch's size, trained with cross entropy."""
    torch.manual_seed(seed)
    network = ImageUNet(1, 1, CHANNELS)

    def step(image: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=has_bfloat16()):
            logits = network(image)[0]
        return torch.nn.functional.binary_cross_entropy_with_logits(logits.float(), label)

    train(list(network.parameters()), kind, seed, steps, step)
    return network.eval()


if __name__ == "__main__":
    main()
