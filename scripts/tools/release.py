"""Package the bundle in the layout of MONAI's model zoo: ``python -m scripts.tools.release --output_dir dist``."""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import tempfile
import zipfile
from pathlib import Path

import yaml
from monai.bundle import ConfigParser

from scripts.config import BUNDLE_ROOT

NAME = "medsegdiff_segmentation"  # MONAI Label takes the kind of task from the folder name
PARTS = (
    "LICENSE",
    "SECURITY.md",
    "configs/*.yaml",
    "configs/metadata.json",
    "configs/logging.conf",
    "scripts/**/*.py",
    "label_app/main.py",
    "label_app/requirements.txt",
    "docs/*.md",
    "docs/*.txt",
    "docs/images/*.png",
    "models/README.md",
    "models/model.pt",
)
ALSO_AS_JSON = ("train", "inference")  # configurations that monai.bundle.load reads only as JSON
EPOCH = (1980, 1, 1, 0, 0, 0)  # a fixed time stamp, so that the same content gives the same archive


def build(bundle: Path) -> None:
    """Copy the files of the bundle to an empty folder, and add the JSON configurations and the list of large files."""
    for pattern in PARTS:
        for source in sorted(BUNDLE_ROOT.glob(pattern)):
            target = bundle / source.relative_to(BUNDLE_ROOT)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)
    for name in ALSO_AS_JSON:
        config = ConfigParser.load_config_file(str(bundle / "configs" / f"{name}.yaml"))
        ConfigParser.export_config_file(config, str(bundle / "configs" / f"{name}.json"), indent=2)
    digest = hashlib.sha256((bundle / "models" / "model.pt").read_bytes()).hexdigest()
    # the archive holds the file, so no URL is needed
    large = {"path": "models/model.pt", "url": "", "hash_val": digest, "hash_type": "sha256"}
    (bundle / "large_files.yml").write_text(yaml.safe_dump({"large_files": [large]}, sort_keys=False))


def archive(bundle: Path, file: Path) -> None:
    """Zip the folder ``bundle`` to ``file``; the paths in the archive start with the folder's name."""
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as content:
        for path in sorted(path for path in bundle.rglob("*") if path.is_file()):
            entry = zipfile.ZipInfo(str(path.relative_to(bundle.parent)), EPOCH)
            entry.external_attr, entry.compress_type = 0o644 << 16, zipfile.ZIP_DEFLATED
            content.writestr(entry, path.read_bytes())


def main() -> None:
    """Write ``<output_dir>/<name>/`` and ``<output_dir>/<name>_v<version>.zip``. Older ones are replaced."""
    parser = argparse.ArgumentParser(description=__doc__.split(":")[0])
    parser.add_argument("--output_dir", type=Path, default=BUNDLE_ROOT / "dist")
    output_dir = parser.parse_args().output_dir
    output_dir.mkdir(parents=True, exist_ok=True)
    version = json.loads((BUNDLE_ROOT / "configs" / "metadata.json").read_text())["version"]
    name = f"{NAME}_v{version}.zip"
    with tempfile.TemporaryDirectory(prefix=".partial_", dir=output_dir) as folder:
        bundle = Path(folder, NAME)
        build(bundle)
        archive(bundle, Path(folder, name))
        shutil.rmtree(output_dir / NAME, ignore_errors=True)
        bundle.rename(output_dir / NAME)
        Path(folder, name).replace(output_dir / name)
    print(output_dir / name)


if __name__ == "__main__":
    main()
