"""The architecture: a package imports only from lower layers, and files stay within their bounds."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from benchmarks.structure import counts
from conftest import ROOT
from scripts.tools.release import modules

LAYERS = [  # a module may import from its own package and from the layers above its line
    {"config"},
    {"distributed", "cluster"},
    {"data", "diffusion"},
    {"networks", "brains", "streams"},
    {"net"},
    {"training", "sampling"},
    {"report"},
    {"calibration", "page", "dicom"},
    {"tools", "adversarial"},
    {"workflow", "organs", "synthesis"},
]
FILES = sorted(path for path in (ROOT / "scripts").rglob("*.py") if path.name != "__init__.py")


def imported(file: Path) -> set[str]:
    """Modules and packages of ``scripts`` that a file imports."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        modules += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names |= {module.split(".")[1] for module in modules if module.startswith("scripts.")}
    return names


@pytest.mark.parametrize("file", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_downwards(file):
    package = file.relative_to(ROOT / "scripts").parts[0].removesuffix(".py")
    (level,) = [index for index, layer in enumerate(LAYERS) if package in layer]
    allowed = set().union(*LAYERS[:level], {package} if file.parent.name == package else set())
    assert imported(file) <= allowed


@pytest.mark.parametrize(("bundle", "others"), [("organs", "synthesis"), ("synthesis", "organs")])
def test_further_bundles_need_no_diffusion(bundle, others):
    """No file that they use knows masks with noise, or the other bundle."""
    packages = {path.relative_to(ROOT / "scripts").parts[0] for path in modules(ROOT / "bundles" / bundle)}
    assert {bundle, "data", "training"} <= packages
    assert not packages & {"diffusion", "networks", "net.py", "workflow.py", others}


def test_every_file_belongs_to_a_layer():
    packages = {path.relative_to(ROOT / "scripts").parts[0].removesuffix(".py") for path in FILES}
    assert packages == set().union(*LAYERS)


@pytest.mark.parametrize(
    ("figure", "bound"),
    [
        ("lines of train.yaml", 320),
        ("public keys of train.yaml", 50),
        ("imports of train.yaml", 6),
        ("expressions in run of train.yaml", 1),
        ("lines of inference.yaml", 120),
        ("longest line of configs/", 120),
        ("most files of a package in scripts/, without __init__.py", 10),
    ],
)
def test_bounds(figure, bound):
    assert 0 < counts()[figure] <= bound


def test_settings_of_the_network_are_named_once():
    """Inference does not repeat settings that it reads from the checkpoint."""
    text = (ROOT / "configs" / "inference.yaml").read_text()
    for name in ("variant", "channels", "conditioning", "use_cls_head", "prediction_type", "denoiser_stride"):
        assert f"{name}:" not in text


@pytest.mark.parametrize("word", ["LGG", "HGG", "hgg", "tumour"])
def test_general_code_knows_no_tumours(word):
    """Exceptions are the default names of the grades, and what makes brains."""
    exceptions = {"scripts/data/grades.py", "scripts/tools/phantom.py"}
    general = [file for file in FILES if file.parent.name != "brains"]
    code = {str(file.relative_to(ROOT)): ast.parse(file.read_text()) for file in general}
    found = {
        name
        for name, tree in code.items()
        for node in ast.walk(tree)
        if (isinstance(node, ast.Name) and word in node.id)
        or (isinstance(node, ast.Constant) and isinstance(node.value, str) and word == node.value)
    }
    assert found <= exceptions
