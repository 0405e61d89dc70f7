"""Package each bundle in the layout of MONAI's model zoo: ``python -m scripts.tools.release --output_dir dist``."""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import re
import shutil
import tempfile
import zipfile
from pathlib import Path

import yaml
from monai.bundle import ConfigParser

from scripts.config import BUNDLE_ROOT

BUNDLES = {  # folder of each bundle, by the name of its release, from which MONAI Label takes the kind of task
    "medsegdiff_segmentation": BUNDLE_ROOT,
    "ct_structures_segmentation": BUNDLE_ROOT / "bundles" / "organs",
    "ncct_to_cta_synthesis": BUNDLE_ROOT / "bundles" / "synthesis",
}
SHARED = ("LICENSE", "SECURITY.md")
# of bundles whose inference.yaml has this key
LABEL_APP = tuple(f"label_app/{name}" for name in ("main.py", "archive.py", "strategy.py", "requirements.txt"))
PARTS = (
    "configs/*.yaml",
    "configs/*.json",
    "configs/logging.conf",
    "docs/*.md",
    "docs/*.txt",
    "docs/images/*.png",
    "models/README.md",
    "models/model.pt",
)
WITH = (".html", ".css", ".js")  # of the modules
ALSO_AS_JSON = ("train", "inference")  # configurations that monai.bundle.load reads only as JSON
EPOCH = (1980, 1, 1, 0, 0, 0)  # a fixed time stamp, so that the same content gives the same archive


def build(source: Path, bundle: Path) -> None:
    """Copy the files of the bundle ``source`` to an empty folder; add JSON configurations and the list of large files.

    Of ``scripts/`` it gets the modules that the bundle uses.
    """
    served = "label_app" in yaml.safe_load((source / "configs" / "inference.yaml").read_text(encoding="utf-8"))
    files = {BUNDLE_ROOT / name: name for name in (*SHARED, *(LABEL_APP if served else ()))}
    files |= {path: str(path.relative_to(source)) for pattern in PARTS for path in source.glob(pattern)}
    files |= {path: str(path.relative_to(BUNDLE_ROOT)) for path in modules(source)}
    for path, name in sorted(files.items()):
        target = bundle / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
    for name in ALSO_AS_JSON:
        config = ConfigParser.load_config_file(str(bundle / "configs" / f"{name}.yaml"))
        ConfigParser.export_config_file(config, str(bundle / "configs" / f"{name}.json"), indent=2)
    digest = hashlib.sha256((bundle / "models" / "model.pt").read_bytes()).hexdigest()
    # the archive holds the file, so no URL is needed
    large = {"path": "models/model.pt", "url": "", "hash_val": digest, "hash_type": "sha256"}
    (bundle / "large_files.yml").write_text(yaml.safe_dump({"large_files": [large]}, sort_keys=False))


def modules(source: Path) -> set[Path]:
    """Files of ``scripts/`` that a bundle uses: what its configurations and documented commands name, and imports.

    Files beside a used module that are no Python, such as templates, belong to it.

    Args:
        source: folder of the bundle.
    """
    texts = [path.read_text(encoding="utf-8") for path in source.glob("configs/*.yaml")]
    names = [name for text in texts for name in re.findall(r"\bscripts(?:\.\w+)+", text)]
    for page in source.glob("docs/*.md"):
        names += re.findall(r"python -m (scripts(?:\.\w+)+)", page.read_text(encoding="utf-8"))
    new = {path for name in names for path in _files(name)}
    found: set[Path] = set()
    while new:
        found |= new
        new = {path for file in new for path in _imports(file)} - found
    return found | {path for file in found for path in file.parent.iterdir() if path.is_file() and path.suffix in WITH}


def _imports(file: Path) -> set[Path]:
    """Files of ``scripts/`` that a file imports when it runs, not only for its types, or names in its text."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    typing = [node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
    skipped = {id(node) for block in typing for node in ast.walk(block)}
    names: list[str] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and id(node) not in skipped:
            names += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            names += [node.value] if re.fullmatch(r"scripts(\.\w+)+", node.value) else []
    return {path for name in names for path in _files(name)}


def _files(name: str) -> set[Path]:
    """The module that a dotted name starts with, if it is one of ``scripts/``, and the packages it lies in."""
    parts, found = name.split("."), set()
    for end in range(1, len(parts) + 1) if parts[0] == "scripts" else ():
        path = BUNDLE_ROOT.joinpath(*parts[:end])
        found |= {file for file in (path / "__init__.py", path.with_name(f"{path.name}.py")) if file.is_file()}
    return found


def archive(bundle: Path, file: Path) -> None:
    """Zip the folder ``bundle`` to ``file``; the paths in the archive start with the folder's name."""
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as content:
        for path in sorted(path for path in bundle.rglob("*") if path.is_file()):
            entry = zipfile.ZipInfo(str(path.relative_to(bundle.parent)), EPOCH)
            entry.external_attr, entry.compress_type = 0o644 << 16, zipfile.ZIP_DEFLATED
            content.writestr(entry, path.read_bytes())


def main() -> None:
    """Write the folder ``<name>`` and the archive ``<name>_v<version>.zip`` of each bundle. Older ones are replaced."""
    parser = argparse.ArgumentParser(description=__doc__.split(":")[0])
    parser.add_argument("--output_dir", type=Path, default=BUNDLE_ROOT / "dist")
    output_dir = parser.parse_args().output_dir
    output_dir.mkdir(parents=True, exist_ok=True)
    for name, source in BUNDLES.items():
        print(release(name, source, output_dir))


def release(name: str, source: Path, output_dir: Path) -> Path:
    """Write the folder and the archive of one bundle; the file of the archive."""
    version = json.loads((source / "configs" / "metadata.json").read_text(encoding="utf-8"))["version"]
    file = output_dir / f"{name}_v{version}.zip"
    with tempfile.TemporaryDirectory(prefix=".partial_", dir=output_dir) as folder:
        bundle = Path(folder, name)
        build(source, bundle)
        archive(bundle, Path(folder, file.name))
        shutil.rmtree(output_dir / name, ignore_errors=True)
        bundle.rename(output_dir / name)
        Path(folder, file.name).replace(file)
    return file


if __name__ == "__main__":
    main()
