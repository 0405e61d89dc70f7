"""Hostile input, case by case: each is refused with a message that names it, or is used like any other.

In both cases nothing is executed and nothing is written. ``acceptance/test_label.py`` has the hostile requests.
"""

from __future__ import annotations

import gzip
import io
import json
import os
import pickle
import re
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser
from PIL import Image

from conftest import MODALITIES, ROOT
from scripts.config import InputError
from scripts.data.caching import cached_dataset
from scripts.data.datalist import read_datalist
from scripts.data.subjects import load_subjects
from scripts.training.checkpoints import trained_settings
from scripts.training.weights import load_weights

MARKER = "executed"
GRADE_COLUMNS = {"subject_column": "image", "grade_column": "label", "grade_labels": {"benign": 0, "malignant": 1}}


class Code:
    """An object whose unpickling creates the marker."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.marker),)


def expression(folder: Path) -> str:
    """Text that creates the marker if MONAI's parser evaluates it; without a slash, so that it can name a file."""
    path = str(folder / MARKER).replace("/", "|")
    return f"$__import__('os').mkdir({path!r}.replace('|', chr(47)))"


@pytest.fixture
def data(tmp_path, volumes, make_subject_folder) -> Path:
    """Folder of two subjects; the tests spoil the first, ``s1``."""
    for name in ("s1", "s2"):
        make_subject_folder(tmp_path / "data", name, volumes)
    return tmp_path / "data"


@pytest.fixture(scope="module")
def preprocessing():
    """The transforms of validation with the label, as training caches them."""
    parser = ConfigParser()
    parser.read_config(str(ROOT / "configs" / "train.yaml"))
    parser.update({"image_size": 16})
    return parser.get_parsed_content("train::preprocessing")


def unharmed(tmp_path: Path) -> bool:
    """Whether nothing was executed and nothing half-written is left."""
    return not (tmp_path / MARKER).exists() and not list(tmp_path.rglob(".partial_*"))


def check(action: Callable[[], object], message: str | None, tmp_path: Path) -> object:
    """Run ``action``; it must be refused with ``message``, or go well if that is None."""
    before = sorted(tmp_path.rglob("*"))
    result = None
    if message is None:
        result = action()
    else:
        with pytest.raises(InputError, match=message):
            action()
    assert sorted(tmp_path.rglob("*")) == before
    assert unharmed(tmp_path)
    return result


NAMES = [
    "$__import__('os').mkdir('executed')", "$import os", "@device", "%train.yaml", "${HOME}", "$(touch executed)",
    "`touch executed`", "a; touch executed", "a|touch executed", "--help", "-rf", "a..b", "it's", 'say "hi"',
    "two\nlines", "a\ttab", " spaces ", "ünïcödé", "脳", "🧠", "\u202egnp.exe", "{{7*7}}", "{0}", "%(name)s", "a*?[b]",
    "<script>alert(1)<", "a,b", "a\\b", "None", "1e3", "x" * 200, "=cmd()", "\x1b[31mred",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_names(name, tmp_path, volumes, make_subject_folder, preprocessing):
    """A folder may be called anything: it is a subject like any other."""
    make_subject_folder(tmp_path / "data", name, volumes)

    def use():
        items = load_subjects(str(tmp_path / "data"), MODALITIES)
        return [item["subject"] for item in items], cached_dataset(items, preprocessing)[0]

    subjects, loaded = check(use, None, tmp_path)
    assert subjects == [name]
    assert loaded["image"].shape[0] == 4


def test_every_name_goes_through_inference(tmp_path, volumes, make_subject_folder, three_regions, run_bundle):
    """All of them at once, up to the files of masks, grades and overlays, which stay in their folder."""
    for name in NAMES:
        make_subject_folder(tmp_path / "data", name, volumes)
    folders = {"dataset_dir": str(tmp_path / "data"), "output_dir": str(tmp_path / "out")}
    run_bundle(["inference.yaml"], ckpt_dir=str(three_regions), **folders)
    masks = {path.name.removesuffix("_seg.nii.gz") for path in (tmp_path / "out").glob("*_seg.nii.gz")}
    assert masks == set(NAMES)
    assert {path.name for path in tmp_path.iterdir()} == {"data", "out"}
    assert unharmed(tmp_path)


def nifti(shape=(8, 8, 4), dtype=np.int16, affine=None, **header) -> bytes:
    """A NIfTI file of ones, in which fields of the header are overwritten: ``dim=[...]``."""
    image = nib.Nifti1Image(np.arange(1, 1 + np.prod(shape)).reshape(shape).astype(dtype), np.eye(4))
    content = bytearray(image.to_bytes())
    parsed = nib.Nifti1Header.from_fileobj(io.BytesIO(bytes(content)))
    if affine is not None:
        parsed.set_sform(affine, code=1)
    raw = parsed.structarr.copy()
    for field, value in header.items():
        raw[field] = value
    content[:348] = raw.tobytes()
    return bytes(content)


def png(size=(8, 8), mode="L") -> bytes:
    stream = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (*size, len(mode))).astype(np.uint8).squeeze()
    Image.fromarray(pixels, mode).save(stream, "PNG")
    return stream.getvalue()


def archive() -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as content:
        content.writestr("../../executed", "x")
    return stream.getvalue()


def values(fill: float) -> bytes:
    array = np.arange(256, dtype=np.float32).reshape(8, 8, 4)
    array[3, 3, 2] = fill
    return nib.Nifti1Image(array, np.eye(4)).to_bytes()


VOLUMES: dict[str, tuple[Callable[[], bytes], str | None]] = {
    "0 bytes": (lambda: b"", "cannot read .*s1_t1.nii.gz"),
    "1 byte": (lambda: b"\x00", "cannot read"),
    "gzip of nothing": (lambda: gzip.compress(b""), "cannot read"),
    "half a header": (lambda: gzip.compress(nifti()[:100]), "cannot read"),
    "no voxels": (lambda: gzip.compress(nifti()[:352]), "cannot read"),
    "half the voxels": (lambda: gzip.compress(nifti())[:-60], "cannot read"),
    "no gzip": (nifti, "cannot read"),
    "text": (lambda: b"not an image", "cannot read"),
    "swapped extension: PNG": (png, "cannot read"),
    "swapped extension: gzipped PNG": (lambda: gzip.compress(png()), "cannot read"),
    "swapped extension: ZIP with a path outside": (archive, "cannot read"),
    "swapped extension: pickle": (lambda: gzip.compress(pickle.dumps(Code(Path(MARKER)))), "cannot read"),
    "NaN": (lambda: gzip.compress(values(np.nan)), "'s1': modality 1 of 4 has NaN"),
    "infinity": (lambda: gzip.compress(values(np.inf)), "'s1': modality 1 of 4 has NaN or infinite"),
    "minus infinity": (lambda: gzip.compress(values(-np.inf)), "'s1': modality 1 of 4 has NaN or infinite"),
    "constant": (
        lambda: gzip.compress(nib.Nifti1Image(np.ones((8, 8, 4), np.int16), np.eye(4)).to_bytes()),
        "constant",
    ),
    "NaN as scale": (lambda: gzip.compress(nifti(scl_slope=np.nan)), None),
    "infinite scale": (lambda: gzip.compress(nifti(scl_slope=np.inf)), None),
    "a side of 0": (lambda: gzip.compress(nifti(dim=[3, 0, 8, 4, 1, 1, 1, 1])), "has shape|cannot read"),
    "a negative side": (lambda: gzip.compress(nifti(dim=[3, -8, 8, 4, 1, 1, 1, 1])), "has shape|cannot read"),
    "no dimension": (lambda: gzip.compress(nifti(dim=[0, 8, 8, 4, 1, 1, 1, 1])), "has shape|cannot read"),
    "nine dimensions": (lambda: gzip.compress(nifti(dim=[9, 8, 8, 4, 1, 1, 1, 1])), "has shape|cannot read"),
    "sides of 32767": (lambda: gzip.compress(nifti(dim=[3] + [32767] * 3 + [1] * 4)), "has shape .*32767"),
    "gzip bomb: 256 MB after the voxels": (lambda: gzip.compress(nifti() + bytes(2**28), 1), None),
    "unknown type of numbers": (lambda: gzip.compress(nifti(datatype=12345)), "cannot read"),
    "complex numbers": (lambda: gzip.compress(nifti(dtype=np.complex64)), "not real numbers"),
    "NaN in the affine": (lambda: gzip.compress(nifti(affine=np.full((4, 4), np.nan))), "affine"),
    "singular affine": (lambda: gzip.compress(nifti(affine=np.diag([0, 0, 0, 1]))), "affine"),
    "affine 2 mm off at a corner": (
        lambda: gzip.compress(nifti(affine=np.diag([1.3, 1, 1, 1]))),
        "'s1': the modality .* a corner is 2.10 mm off",
    ),
}


@pytest.mark.parametrize("case", VOLUMES)
def test_volumes(case, data, tmp_path, preprocessing):
    content, message = VOLUMES[case]
    (data / "s1" / "s1_t1.nii.gz").write_bytes(content())
    check(lambda: cached_dataset(load_subjects(str(data), MODALITIES), preprocessing), message, tmp_path)


def test_a_subject_whose_files_all_claim_to_be_huge(data, tmp_path, preprocessing):
    for file in (data / "s1").iterdir():
        file.write_bytes(gzip.compress(nifti(dim=[3] + [32767] * 3 + [1] * 4)))
    check(lambda: cached_dataset(load_subjects(str(data), MODALITIES), preprocessing), "'s1': cannot read", tmp_path)


LINKS = {
    "folder instead of a file": lambda file: file.mkdir(),
    "link to itself": lambda file: file.symlink_to(file),
    "link to nothing": lambda file: file.symlink_to(file.parent / "nothing"),
    "link to a device": lambda file: file.symlink_to("/dev/zero"),
}


@pytest.mark.parametrize("case", LINKS)
def test_links(case, data, tmp_path, preprocessing):
    file = data / "s1" / "s1_t1.nii.gz"
    file.unlink()
    LINKS[case](file)
    check(lambda: cached_dataset(load_subjects(str(data), MODALITIES), preprocessing), "s1_t1.nii.gz|'t1'", tmp_path)


def mask(value: float, dtype=np.float32) -> np.ndarray:
    array = np.zeros((8, 8, 4), dtype)
    array[2:4, 2:4, 1] = value
    return array


MASKS = {
    "unknown label": (mask(3), r"'s1': the segmentation has label values \[3"),
    "negative label": (mask(-1), r"label values \[-1"),
    "half a label": (mask(0.5), r"label values \[0.5"),
    "NaN": (mask(np.nan), r"label values \[nan"),
    "a label of 2^40": (mask(2**40, np.float64), r"label values \[1099511627776"),
    "other size": (mask(1)[:-1], "the mask .* has shape"),
    "four volumes": (np.stack([mask(1)] * 4, axis=-1), "holds 4 volumes"),
    "empty": (mask(0), None),
}


@pytest.mark.parametrize("case", MASKS)
def test_masks(case, data, tmp_path, preprocessing):
    array, message = MASKS[case]
    nib.save(nib.Nifti1Image(array, np.eye(4)), data / "s1" / "s1_seg.nii.gz")
    check(lambda: cached_dataset(load_subjects(str(data), MODALITIES), preprocessing), message, tmp_path)


TABLES = {
    "0 bytes": (b"", "cannot be read as a table"),
    "binary": (bytes(range(256)), "cannot be read as a table"),
    "UTF-16": ("image,label\ns1,benign\n".encode("utf-16"), "cannot be read as a table"),
    "no such column": (b"name,label\ns1,benign\n", "has no column 'image'"),
    "a subject twice": (b"image,label\ns1,benign\ns1,malignant\n", r"more than once: \['s1'\]"),
    "unknown grade": (b"image,label\ns1,=cmd()\n", "grade '=cmd\\(\\)', not one of"),
    "expression as grade": (b"image,label\ns1,$import os\n", "grade '\\$import os', not one of"),
    "expression as subject": (b"image,label\n$import os,benign\ns1,benign\n", None),
    "path as subject": (b"image,label\n../../etc/passwd,benign\ns1,benign\n", None),
    "open quote": (b'image,label\n"s1,benign\n', "cannot be read as a table"),
    "more cells than columns": (b"image,label\ns1,benign,1,2\ns2\n", "s1|cannot be read as a table|grade"),
    "a cell of a million letters": (b"image,label\n" + b"x" * 10**6 + b",benign\ns1,benign\n", None),
    "number as grade": (b"image,label\ns1,1e999\n", "grade '1e999', not one of"),
}


@pytest.mark.parametrize("case", TABLES)
def test_tables(case, data, tmp_path):
    content, message = TABLES[case]
    file = data.parent / "grades.csv"
    file.write_bytes(content)
    check(lambda: load_subjects(str(data), MODALITIES, grade_csv=str(file), **GRADE_COLUMNS), message, tmp_path)


def first(content: dict, **changes) -> dict:
    """The data list with changes of its first subject."""
    return content | {"training": [content["training"][0] | changes]}


LISTS = {
    "0 bytes": (lambda content: "", "is not a data list"),
    "no JSON": (lambda content: "{'training': []}", "is not a data list"),
    "a list": (lambda content: [], "is not a data list"),
    "nested 100,000 deep": (lambda content: "[" * 100_000, "is not a data list"),
    "no image": (lambda content: {**content, "training": [{"subject": "s1"}]}, "is not a data list"),
    "text as items": (lambda content: {**content, "training": "$import os"}, "is not a data list"),
    "a file outside": (lambda content: first(content, image=["../../etc/passwd"] * 4), "must have an image for each"),
    "expression as file": (lambda content: first(content, image=["$import os"] * 4), "must have an image for each"),
    "grade 10^30": (lambda content: first(content, grade=10**30), "a grade from"),
    "NaN as grade": (lambda content: first(content, grade=float("nan")), "is not a data list"),
    "expression as subject": (lambda content: first(content, subject="$import os"), None),
}


@pytest.mark.parametrize("case", LISTS)
def test_datalists(case, data, tmp_path):
    change, message = LISTS[case]
    items = [item | {"grade": 0} for item in load_subjects(str(data), MODALITIES)]
    content = change({"training": items[:1], "validation": items[1:], "test": items[1:]})
    file = tmp_path / "list.json"
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    check(lambda: read_datalist(str(file), str(data), MODALITIES), message, tmp_path)


def spoiled(change: Callable[[dict, Path], None]) -> Callable[[Path], None]:
    def write(file: Path) -> None:
        content = torch.load(ROOT / "models" / "model.pt", weights_only=True)
        change(content, file.parent / MARKER)
        torch.save(content, file)

    return write


def calibration_text(text: str) -> Callable[[Path], None]:
    state = torch.tensor(list(text.ljust(256).encode()), dtype=torch.uint8)
    return spoiled(lambda c, _: c["model"].update({"calibration._extra_state": state}))


CHECKPOINTS = {
    "0 bytes": (lambda file: file.write_bytes(b""), "cannot be read as a checkpoint"),
    "text": (lambda file: file.write_text("weights"), "cannot be read as a checkpoint"),
    "a plain pickle with code": (
        lambda file: file.write_bytes(pickle.dumps(Code(file.parent / MARKER))),
        "cannot be read as a checkpoint",
    ),
    "code beside the weights": (spoiled(lambda c, marker: c.update(x=Code(marker))), "cannot be read as a checkpoint"),
    "code among the settings": (
        spoiled(lambda c, marker: c["settings"].update(image_size=Code(marker))),
        "cannot be read as a checkpoint",
    ),
    "a ZIP with a path outside": (lambda file: file.write_bytes(archive()), "cannot be read as a checkpoint"),
    "a whole module": (lambda file: torch.save(torch.nn.Linear(1, 1), file), "cannot be read as a checkpoint"),
    "only a tensor": (lambda file: torch.save(torch.ones(3), file), "cannot be read as a checkpoint"),
    "half a file": (
        lambda file: file.write_bytes((ROOT / "models" / "model.pt").read_bytes()[:100_000]),
        "cannot be read as a checkpoint",
    ),
    "expression as setting": (
        spoiled(lambda c, marker: c["settings"].update(variant=expression(marker.parent))),
        "text that starts with",
    ),
    "reference as setting": (spoiled(lambda c, _: c["settings"].update(regions=["@device"])), "text that starts with"),
    "file as setting": (spoiled(lambda c, _: c["settings"].update(regions={"WT": ["%x"]})), "text that starts with"),
    "other settings": (spoiled(lambda c, _: c["settings"].update(image_size=96)), "was trained with image_size=96"),
    "no settings": (spoiled(lambda c, _: c.pop("settings")), "is older than version 0.7"),
    "a lineage of numbers": (
        spoiled(lambda c, _: c.update(lineage={"training": {"d": 1}, "validation": {"d": [1]}})),
        "is older than version 0.7",
    ),
    "weights of another shape": (
        spoiled(lambda c, _: c["model"].update({"denoiser.out.2.conv.weight": torch.ones(7, 7)})),
        "does not fit the configured network",
    ),
    "missing weights": (
        spoiled(lambda c, _: c["model"].pop(next(iter(c["model"])))),
        "does not fit the configured network",
    ),
    "text as weights": (
        spoiled(lambda c, _: c["model"].update({"denoiser.out.2.conv.weight": "$import os"})),
        "does not fit the configured network",
    ),
    "a calibration that is no JSON": (
        spoiled(lambda c, _: c["model"]["calibration._extra_state"].fill_(36)),
        "does not fit the configured network",
    ),
    "a calibration of no bytes": (
        spoiled(lambda c, _: c["model"].update({"calibration._extra_state": torch.ones(9)})),
        "does not fit the configured network",
    ),
    "a calibration that is a list": (calibration_text("[]"), "does not fit the configured network"),
    "a calibration with unknown volumes": (
        calibration_text('{"volumes_from": "$import os"}'),
        "'\\$import os' is not one of",
    ),
    "NaN among the weights": (
        spoiled(lambda c, _: c["model"]["denoiser.out.2.conv.weight"].fill_(torch.nan)),
        "holds NaN or infinite weights",
    ),
}


@pytest.mark.parametrize("case", CHECKPOINTS)
def test_checkpoints(case, tmp_path):
    from scripts.net import build

    write, message = CHECKPOINTS[case]
    file = tmp_path / "model.pt"
    write(file)
    original = trained_settings(str(ROOT / "models" / "model.pt"))

    def load():
        trained_settings(str(file))
        load_weights(build(original), str(file), original)

    check(load, message, tmp_path)


def exif() -> bytes:
    stream = io.BytesIO()
    image = Image.new("L", (8, 8))
    tags = image.getexif()
    tags[0x0112] = 6
    image.save(stream, "JPEG", exif=tags)
    return stream.getvalue()


def pages() -> bytes:
    stream = io.BytesIO()
    Image.new("L", (8, 8)).save(stream, "TIFF", save_all=True, append_images=[Image.new("L", (8, 8))])
    return stream.getvalue()


def huge() -> bytes:
    """A PNG whose header claims 50,000 x 50,000 pixels."""
    content = bytearray(png())
    content[16:24] = struct.pack(">II", 50_000, 50_000)
    content[29:33] = struct.pack(">I", zlib.crc32(bytes(content[12:29])))
    return bytes(content)


PICTURES = {
    "0 bytes": ("1.png", b"", "cannot read .*1.png"),
    "text": ("1.png", b"<svg onload='alert(1)'/>", "cannot read .*1.png"),
    "half a file": ("1.png", png()[:60], "cannot read .*1.png"),
    "a bomb of 2.5 gigapixels": ("1.png", huge(), "cannot read .*1.png"),
    "two pages": ("1.tif", pages(), "has 2 pages"),
    "turned by EXIF": ("1.jpg", exif(), "EXIF orientation"),
    "transparent": ("1.png", png(mode="RGBA"), "has shape|transparent"),
    "a volume as picture": ("1.png", nifti(), "cannot read .*1.png"),
}


@pytest.mark.parametrize("case", PICTURES)
def test_pictures(case, tmp_path):
    name, content, message = PICTURES[case]
    for folder in ("images", "masks"):
        (tmp_path / "data" / folder).mkdir(parents=True)
        array = np.random.default_rng(0).integers(0, 2, (8, 8)).astype(np.uint8) * 255
        for number in (1, 2) if folder == "masks" else (2,):
            Image.fromarray(array).save(tmp_path / "data" / folder / f"{number}.png")
    (tmp_path / "data" / "images" / name).write_bytes(content)
    parser = ConfigParser()
    parser.read_config([str(ROOT / "configs" / file) for file in ("train.yaml", "data_images.yaml", "data_ddti.yaml")])
    parser.update({"image_size": 16})
    folders = {"image_dir": "images", "mask_dir": "masks"}
    transform = parser.get_parsed_content("train::preprocessing")
    root = str(tmp_path / "data")
    check(lambda: cached_dataset(load_subjects(root, ["grey"], **folders), transform), message, tmp_path)


def test_the_number_of_cases_is_the_documented_one():
    tables = (NAMES, VOLUMES, LINKS, MASKS, TABLES, LISTS, CHECKPOINTS, PICTURES)
    count = sum(map(len, tables)) + 1  # and the huge subject
    documented = re.search(r"(\d+) hostile files and names", (ROOT / "SECURITY.md").read_text(encoding="utf-8"))
    assert documented is not None
    assert int(documented[1]) == count
