"""A large CT: reading its label map against 117 masks, and time and memory of inference with 118 classes.

The weights are fresh: the cost does not depend on them. With one voxel per pixel of the network, the logits of the
whole CT would take 35 GiB. With ``--synthesis``, a contrast CT is made of it instead.

Example:
    python benchmarks/ct.py --shape 512 512 300
    python benchmarks/ct.py --shape 512 512 300 --synthesis
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import torch
from monai.bundle import ConfigParser

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.tables import hardware, markdown  # noqa: E402
from scripts.organs.merge_structures import merge_subject  # noqa: E402
from scripts.organs.structures import LABEL_SUFFIX, catalogue  # noqa: E402
from scripts.tools.phantom_ct import make_pair, make_subject  # noqa: E402

CONFIGS = {name: ROOT / "bundles" / name / "configs" for name in ("organs", "synthesis")}
SPACING = 1.5  # mm, as the network expects it: the CT is not resampled


def main() -> None:
    """Draw the CT, and print one table for reading and one for inference."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", nargs=3, type=int, default=[512, 512, 300], help="voxels; multiples of 4")
    parser.add_argument("--features", nargs=6, type=int, default=[32, 64, 128, 256, 512, 32], help="of the U-Net")
    parser.add_argument("--amp", action="store_true", help="bfloat16")
    parser.add_argument("--synthesis", action="store_true", help="make a contrast CT instead of a label map")
    parser.add_argument("--refiner_width", type=int, default=64, help="of the refiner of synthesis")
    args = parser.parse_args()
    print(hardware())
    with tempfile.TemporaryDirectory() as name:
        if args.synthesis:
            write_native_ct(Path(name, "data", "s0001"), args.shape)
            print(markdown(synthesis(Path(name), args.features, args.refiner_width, args.amp)))
            return
        subject = Path(name, "data", "s0001")
        write_ct(subject, args.shape)
        print(markdown(reading(subject)), flush=True)
        print("\n" + markdown(inference(Path(name), args.features, args.amp)))


def write_native_ct(folder: Path, shape: list[int]) -> None:
    """A made-up native CT."""
    image = make_pair(np.random.default_rng(0), 0.0, tuple(n // 4 for n in shape), (6.0, 6.0, 6.0))["ncct"]
    folder.mkdir(parents=True)
    nib.save(nib.Nifti1Image(enlarged(image), np.diag([SPACING] * 3 + [1.0])), folder / "s0001_ncct.nii.gz")


def write_ct(folder: Path, shape: list[int]) -> None:
    """A made-up CT, and 117 masks: those of its structures, and empty ones, as TotalSegmentator publishes them."""
    image, masks = make_subject(np.random.default_rng(0), tuple(n // 4 for n in shape), (6.0, 6.0, 6.0))
    affine = np.diag([SPACING, SPACING, SPACING, 1.0])
    (folder / "segmentations").mkdir(parents=True)
    nib.save(nib.Nifti1Image(enlarged(image), affine), folder / "ct.nii.gz")
    for name in catalogue():
        mask = enlarged(masks.get(name, np.zeros(image.shape, bool))).astype(np.uint8)
        nib.save(nib.Nifti1Image(mask, affine), folder / "segmentations" / f"{name}.nii.gz")


def enlarged(volume: np.ndarray) -> np.ndarray:
    """Each voxel as 4 x 4 x 4 voxels."""
    for axis in range(3):
        volume = volume.repeat(4, axis)
    return volume


def reading(folder: Path) -> pd.DataFrame:
    """Seconds to read the masks of a subject, and its label map, which ``merge_structures`` makes of them once."""
    files = {"117 masks (s)": sorted(folder.glob("segmentations/*.nii.gz"))}
    merge_subject(folder)
    files["label map (s)"] = [folder / f"{LABEL_SUFFIX}.nii.gz"]
    seconds = {}
    for name, paths in files.items():
        start = time.perf_counter()
        for path in paths:
            np.asarray(nib.load(path).dataobj)
        seconds[name] = time.perf_counter() - start
    masks, merged = seconds.values()
    return pd.DataFrame([seconds | {"times faster": masks / merged}])


def inference(folder: Path, features: list[int], amp: bool) -> pd.DataFrame:
    """Time and memory of a label map."""
    settings, row = run(folder, "organs", amp, {"features": features, "spacing": SPACING})
    row["classes"] = len(settings["structures"]) + 1
    shape = nib.load(next((folder / "out").glob("*_seg.nii.gz"))).shape
    logits = np.prod(shape, dtype=float) * row["classes"] * 4 / 2**30
    return pd.DataFrame([{"shape": " x ".join(map(str, shape))} | row | {"logits alone (GiB)": logits}])


def synthesis(folder: Path, features: list[int], refiner_width: int, amp: bool) -> pd.DataFrame:
    """Time and memory of a contrast CT."""
    _, row = run(folder, "synthesis", amp, {"features": features, "refiner_width": refiner_width})
    shape = nib.load(next((folder / "out").glob("*_cta.nii.gz"))).shape
    return pd.DataFrame([{"shape": " x ".join(map(str, shape))} | row])


def run(folder: Path, bundle: str, amp: bool, changes: dict) -> tuple[dict, dict]:
    """Run ``inference.yaml`` in a process of its own: settings, seconds, and the largest memory that it held."""
    config = ConfigParser()
    config.read_config(str(CONFIGS[bundle] / "train.yaml"))
    config.update(changes | {"dataset_dir": str(folder / "data")})
    network, settings = config.get_parsed_content("network_def"), config.get_parsed_content("settings")
    content = {"model": network.state_dict(), "settings": settings, "lineage": {"training": {}, "validation": {}}}
    torch.save(content, folder / "model.pt")
    command = [sys.executable, "-W", "ignore", "-m", "monai.bundle", "run"]
    command += ["--config_file", str(CONFIGS[bundle] / "inference.yaml"), "--ckpt_path", str(folder / "model.pt")]
    command += ["--dataset_dir", str(folder / "data"), "--output_dir", str(folder / "out"), "--amp", str(amp)]
    start = time.perf_counter()
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    return settings, {"seconds": seconds, "peak memory (GiB)": peak}


if __name__ == "__main__":
    main()
