"""Count the size of the configuration and of the code, the figures of docs/design.md.

Example:
    python benchmarks/structure.py
"""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import yaml

ROOT = Path(__file__).resolve().parents[1]


def public_keys(text: str) -> list[str]:
    """Keys of ``train.yaml`` that users set: those before the first component, ``subjects``."""
    keys = list(yaml.safe_load(text))
    return keys[keys.index("bundle_root") : keys.index("subjects")]


def counts() -> dict[str, int]:
    """Each figure by its name."""
    files = {name: (ROOT / "configs" / f"{name}.yaml").read_text(encoding="utf-8") for name in ("train", "inference")}
    train = yaml.safe_load(files["train"])
    packages: dict[Path, list[Path]] = {}
    for file in (ROOT / "scripts").rglob("*.py"):
        packages.setdefault(file.parent, []).append(file)
    return {
        "lines of train.yaml": len(files["train"].splitlines()),
        "public keys of train.yaml": len(public_keys(files["train"])),
        "imports of train.yaml": len(train["imports"]),
        "expressions in run of train.yaml": len(train["run"]),
        "lines of inference.yaml": len(files["inference"].splitlines()),
        "lines of configs/": sum(len(file.read_text().splitlines()) for file in (ROOT / "configs").glob("*.yaml")),
        "longest line of configs/": max(
            len(line) for file in (ROOT / "configs").glob("*.yaml") for line in file.read_text().splitlines()
        ),
        "most files of a package in scripts/, without __init__.py": max(
            sum(file.name != "__init__.py" for file in files) for files in packages.values()
        ),
        "lines of scripts/": sum(len(file.read_text().splitlines()) for files in packages.values() for file in files),
        "lines of the longest file in scripts/": max(
            len(file.read_text().splitlines()) for files in packages.values() for file in files
        ),
    }


if __name__ == "__main__":
    print(pd.DataFrame(counts().items(), columns=["figure", "value"]).to_string(index=False))
