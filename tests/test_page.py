from __future__ import annotations

import base64
import hashlib
import io
import json
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from monai.data import MetaTensor
from PIL import Image

from conftest import run_configs
from scripts.page.handler import MAX_BYTES, ReportPage, summary_columns
from scripts.page.layers import layers_of
from scripts.page.origin import _quoted, origin

SHAPE, REGIONS = (20, 30, 7), ["TC", "WT"]


def make_item(subject: str = "s1", shape: tuple[int, ...] = SHAPE, spacing=(2.0, 1.0, 3.0), noise: int = 0) -> dict:
    rng, affine = np.random.default_rng(noise), np.diag([*spacing, 1.0])
    pred = torch.zeros(2, *shape)
    pred[1, 4:15, 6:20, 2:5] = 1
    pred[0, 8:12, 9:14, 3] = 1
    return {
        "subject": subject,
        "pred": MetaTensor(pred, affine=affine, meta={"filename_or_obj": "image.nii.gz"}),
        "label": MetaTensor(pred.flip(2), affine=affine),
        "uncertainty": torch.from_numpy(rng.random((2, *shape), np.float32)),
    }


def cut(layers: dict, name: str) -> np.ndarray:
    """Slices ``[S, rows, columns]`` of a picture."""
    data = base64.b64decode(layers["pictures"][name].removeprefix("data:image/webp;base64,"))
    picture = np.asarray(Image.open(io.BytesIO(data)).convert("L"))
    height, width, columns = layers["height"], layers["width"], layers["columns"]
    places = [divmod(index, columns) for index in range(layers["slices"])]
    return np.stack([picture[y * height : (y + 1) * height, x * width : (x + 1) * width] for y, x in places])


def masks_of(item: dict) -> dict:
    return {name: [np.asarray(mask) > 0 for mask in item[key]] for name, key in (("mask", "pred"), ("truth", "label"))}


def test_masks_are_kept_voxel_by_voxel_in_the_radiological_convention():
    item = make_item()
    layers = layers_of(item, np.ones(SHAPE), masks_of(item), 10**6)
    for name, key in (("mask", "pred"), ("truth", "label")):
        found = cut(layers, name)
        for bit, mask in enumerate(item[key].numpy() > 0):
            # rows from anterior to posterior, columns from the patient's right to the left
            assert np.array_equal((found >> bit) & 1, mask[::-1, ::-1].transpose(2, 1, 0))
    assert layers["first"] == 2
    assert layers["aspect"] == pytest.approx(20 * 2.0 / 30)


def test_other_orientations_show_the_same():
    item, other = make_item(), make_item()
    affine = np.diag([-2.0, 1.0, 3.0, 1.0])
    affine[0, 3] = 2.0 * (SHAPE[0] - 1)
    for key in ("pred", "label"):
        other[key] = other[key].flip(1)
        other[key].affine = torch.from_numpy(affine)
    other["uncertainty"] = item["uncertainty"].flip(1)
    image = np.arange(np.prod(SHAPE), dtype=float).reshape(SHAPE)
    one = layers_of(item, image, masks_of(item), 10**6)
    assert layers_of(other, image[::-1], masks_of(other), 10**6) == one


def test_pictures_stay_within_their_size():
    item = make_item(shape=(200, 200, 40), noise=1)
    image = np.random.default_rng(0).random((200, 200, 40))
    free = layers_of(item, image, masks_of(item), 10**8)
    assert free["height"] == 200
    small = layers_of(item, image, masks_of(item), 60_000)
    assert 32 <= small["height"] < 200
    assert sum(len(base64.b64decode(url.split(",")[1])) for url in small["pictures"].values()) <= 60_000


def page_of(folder: Path) -> tuple[str, dict]:
    text = (folder / "report.html").read_text(encoding="utf-8")
    return text, json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)[1])


@pytest.fixture
def handler(tmp_path, monkeypatch):
    monkeypatch.setattr("scripts.page.handler.read_background", lambda item: np.ones(SHAPE))
    root = str(Path(__file__).parents[1])
    grades = {"low": 0, "high": 1}
    return ReportPage(str(tmp_path), "subjects.csv", 2, REGIONS, grades, root, "none.pt", "cpu", {"sampler": "ddim"})


def test_names_are_text_and_never_code(handler, tmp_path):
    name = "</script><script>alert(1)</script>"
    table = pd.DataFrame({"subject": [name, "x"], "patient": ["a", "<b>"], "grade": [1, -1], "dice_WT": [0.5, np.nan]})
    table.to_csv(tmp_path / "subjects.csv", index=False)
    handler.write(handler.rows_of(make_item(name) | {"order": 0}))
    text, data = page_of(tmp_path)
    assert "alert(1)</script>" not in text
    assert [subject["name"] for subject in data["subjects"]] == [name, "x"]
    assert data["subjects"][0]["layers"]["slices"] == SHAPE[2]
    assert data["subjects"][1]["layers"] is None
    assert data["columns"] == ["true grade", "Dice WT"]
    assert [subject["cells"] for subject in data["subjects"]] == [["high", 0.5], [None, None]]
    assert "NaN" not in text


def test_the_page_fetches_nothing(handler, tmp_path):
    pd.DataFrame({"subject": ["s1"]}).to_csv(tmp_path / "subjects.csv", index=False)
    handler.write(handler.rows_of(make_item() | {"order": 0}))
    text, _ = page_of(tmp_path)
    assert "default-src 'none'" in text
    text = re.sub(r"data:image/\w+;base64,[\w+/=]*", "", text)
    assert set(re.findall(r"(?:https?:)?//[^\s\"'<>]+", text)) <= {"http://www.w3.org/2000/svg"}


def test_volumes_come_with_their_interval():
    table = pd.DataFrame(
        {"subject": ["a"], "volume_expected_ml_WT": [2.0], "volume_low_ml_WT": [1.0], "volume_high_ml_WT": [np.nan]}
    )
    assert summary_columns(table, ["WT"], []) == (["volume WT (ml)"], [[[2.0, 1.0, None]]])
    assert summary_columns(table[["subject"]], ["WT"], []) == ([], [[]])


def test_origin_says_what_ran(tmp_path):
    file = tmp_path / "model.pt"
    file.write_bytes(b"weights")
    found = origin(str(Path(__file__).parents[1]), str(file), "cpu", {"num_samples": 3})
    assert found["weights"] == f"model.pt, SHA-256 {hashlib.sha256(b'weights').hexdigest()}"
    assert found["num_samples"] == "3"
    assert "torch 2.13" in found["libraries"]
    assert _quoted("['a.yaml']") == "\"['a.yaml']\""
    assert _quoted("a $(b)'") == "'a $(b)'\"'\"''"


def test_training_evaluation_and_inference_end_with_a_page(phantoms, tmp_path):
    own = {"dataset_dir": str(phantoms), "ckpt_dir": str(tmp_path)}
    run_configs(["train.yaml"], output_dir=str(tmp_path), **own)
    folders = {name: str(tmp_path / name) for name in ("evaluate", "inference")}
    run_configs(["train.yaml", "evaluate.yaml"], output_dir=folders["evaluate"], num_samples=2, **own)
    text, data = page_of(tmp_path / "evaluate")
    assert {row["split"] for row in data["history"]} == {"train", "validation"}
    assert set(data["subjects"][0]["layers"]["pictures"]) == {"image", "uncertainty", "mask", "truth", "samples"}
    assert "Reliability" in text
    assert "WT dice mean" in text
    run_configs(["inference.yaml"], output_dir=folders["inference"], **own)
    text, data = page_of(tmp_path / "inference")
    assert len(data["subjects"]) == 10
    assert set(data["subjects"][0]["layers"]["pictures"]) == {"image", "uncertainty", "mask"}
    assert len(text) < MAX_BYTES
