"""Data sets of pictures: synthetic ones in the layouts of public data sets, end to end; conversions and refusals."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import torch
from monai.bundle import ConfigParser
from monai.transforms import SaveImage
from PIL import Image

from conftest import ROOT, settings_of
from scripts.config import InputError
from scripts.data.datalist import describe, read_datalist
from scripts.data.pictures import read_grid, read_picture
from scripts.data.regions import LabelToRegionsd, RegionCoding
from scripts.data.split import split
from scripts.data.subjects import find_subjects, load_subjects
from scripts.data.transforms import LoadVolumesd
from scripts.data.writing import LikeInputWriter, subject_name
from scripts.streams.subjects import list_subjects

RGB = ["red", "green", "blue"]
DISC_CUP = {"disc": [128, 0], "cup": [0]}


def ellipses(rng, values, shape=(40, 32)) -> np.ndarray:
    """Nested ellipses ``[H, W]`` away from the centre. ``values`` go from the background to the innermost ellipse."""
    rows, columns = np.indices(shape)
    centre, size = np.array(shape) * rng.uniform(0.3, 0.5, 2), np.array(shape) * rng.uniform(0.25, 0.3, 2)
    radius = ((rows - centre[0]) / size[0]) ** 2 + ((columns - centre[1]) / size[1]) ** 2
    mask = np.full(shape, values[0], np.uint8)
    for share, value in zip((1.0, 0.4), values[1:], strict=False):
        mask[radius < share] = value
    return mask


def picture(rng, mask, channels) -> np.ndarray:
    """A noisy picture ``[H, W]`` or ``[H, W, 3]`` that shows its mask."""
    noise = rng.uniform(40, 80, (*mask.shape, channels)) + 0.4 * mask[..., None]
    return noise.squeeze().astype(np.uint8)


def save(pixels, file: Path, **options) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(file, **options)
    return file


def make_refuge2(root: Path, numbers, mask_format="png") -> None:
    rng = np.random.default_rng(0)
    for name in (f"T{number:04d}" for number in numbers):
        mask = ellipses(rng, (255, 128, 0))
        save(picture(rng, 255 - mask, 3), root / "Disc_Cup_Fovea_Illustration" / f"{name}.jpg")
        if mask_format == "png":
            mask = np.dstack([mask] * 3 + [np.full_like(mask, 255)])
        save(mask, root / "Disc_Cup_Masks" / f"{name}.{mask_format}")


def make_ddti(root: Path, names) -> None:
    rng = np.random.default_rng(1)
    for name in names:
        mask = ellipses(rng, (0, 255))
        save(picture(rng, mask, 1), root / "images" / f"{name}.PNG")
        save(mask, root / "masks" / f"{name}.PNG")


def make_own(root: Path) -> None:
    rng = np.random.default_rng(2)
    for i, kind in enumerate(("png", "bmp", "tif", "jpeg", "png", "nii.gz")):
        mask = ellipses(rng, (0, 255))
        grey = picture(rng, mask, 1)
        if kind == "nii.gz":
            nib.save(nib.Nifti1Image(grey, np.eye(4)), root / "images" / f"{i}.nii.gz")
            nib.save(nib.Nifti1Image(mask[..., None], np.eye(4)), root / "masks" / f"{i}_mask.nii.gz")
        else:
            save(grey, root / "images" / f"{i}.{kind}")
            save(mask, root / "masks" / f"{i}_mask.png")
    (root / "labels.csv").write_text(
        "image,label\n" + "".join(f"{i},{'malignant' if i % 2 else 'benign'}\n" for i in range(6))
    )


def train_evaluate_infer(run_bundle, overlays, root: Path, out: Path, **keys) -> pd.DataFrame:
    """Train an epoch on ``Train``, evaluate and infer ``Test``, and return the table of the evaluation."""
    keys = {"ckpt_dir": str(out / "model"), **keys}
    train = {"dataset_dir": str(root / "Train"), "max_epochs": 1, "num_folds": 2}
    augmented = [*overlays, "augment.yaml", "augment_pictures.yaml"]
    run_bundle(["train.yaml", *augmented], output_dir=str(out / "train"), **train, **keys)
    test = {"dataset_dir": str(root / "Test"), **keys}
    run_bundle(["train.yaml", *overlays, "evaluate.yaml"], output_dir=str(out / "eval"), subset="all", **test)
    run_bundle(["inference.yaml", *overlays], output_dir=str(out / "pred"), **test)
    return pd.read_csv(out / "eval" / "subjects.csv", dtype={"subject": str}).set_index("subject")


def dice(pred, truth) -> float:
    return 2 * float((pred & truth).sum()) / max(float(pred.sum() + truth.sum()), 1)


def test_refuge2_end_to_end(run_bundle, tmp_path):
    make_refuge2(tmp_path / "Train", range(1, 5))
    make_refuge2(tmp_path / "Test", [5, 6], "bmp")
    overlays = ["data_images.yaml", "data_refuge2.yaml"]
    table = train_evaluate_infer(run_bundle, overlays, tmp_path, tmp_path / "out", learning_rate=0.01)
    pred = tmp_path / "out" / "pred"
    names = {f"T000{i}_{end}" for i in (5, 6) for end in ("seg.png", "prob.tif", "uncertainty.tif", "overlay.png")}
    assert {path.name for path in pred.iterdir()} == names | {"grades.csv", "manifest", "report.html"}
    for name, row in table.iterrows():
        truth = np.asarray(Image.open(tmp_path / "Test" / "Disc_Cup_Masks" / f"{name}.bmp"))
        with Image.open(pred / f"{name}_seg.png") as image:
            assert (image.mode, image.size) == ("L", (32, 40))
            seg = np.asarray(image)
        assert set(np.unique(seg)) <= {0, 128, 255}
        with Image.open(pred / f"{name}_prob.tif") as image:
            assert (image.mode, image.size, image.n_frames) == ("F", (32, 40), 2)
            assert np.array_equal(seg < 255, (np.asarray(image) >= 0.5) | (seg == 0))
        assert row["dice_cup"] == pytest.approx(dice(seg == 0, truth == 0), abs=1e-5)
        assert row["dice_disc"] == pytest.approx(dice(seg < 255, truth < 255), abs=1e-5)
    content = json.loads((tmp_path / "out" / "eval" / "evaluation_results.json").read_text())
    (result,) = content["results"].values()
    assert (content["dataset"], content["evaluation_models"]) == ("Test", ["MedSegDiff-S"])
    assert content["gt_dir"] == str(tmp_path / "Test" / "Disc_Cup_Masks")
    assert result["dice"] == pytest.approx(table[["dice_disc", "dice_cup"]].to_numpy().mean(), abs=1e-5)
    assert result["num_samples"] == 2


def test_ddti_end_to_end(run_bundle, tmp_path):
    make_ddti(tmp_path / "Train", ["1_1", "1_2", "2_1(1)", "3_1", "4_1", "4_2", "5_1"])
    make_ddti(tmp_path / "Test", ["7_1", "8_1"])
    out = tmp_path / "out"
    table = train_evaluate_infer(run_bundle, ["data_images.yaml", "data_ddti.yaml"], tmp_path, out, image_size=16)
    parts = json.loads((out / "train" / "datalist.json").read_text())
    sides = [{item["subject"].split("_")[0] for item in items} for items in parts.values()]
    assert not sides[0] & sides[1]
    assert parts["training"][0]["image"][0].startswith("images/")
    for name, value in table["dice_nodule"].items():
        seg = np.asarray(Image.open(out / "pred" / f"{name}_seg.png"))
        assert set(np.unique(seg)) <= {0, 255}
        truth = np.asarray(Image.open(tmp_path / "Test" / "masks" / f"{name}.PNG")) > 0
        assert value == pytest.approx(dice(seg > 0, truth), abs=1e-5)


def test_own_images_end_to_end(run_bundle, tmp_path):
    for part in ("Train", "Test"):
        make_own(tmp_path / part)
    keys = {"modalities": ["grey"], "cache_dir": str(tmp_path / "cache")}
    out = tmp_path / "out"
    table = train_evaluate_infer(run_bundle, ["data_images.yaml"], tmp_path, out, **keys)
    assert table["grade"].tolist() == [0, 1] * 3
    assert pd.read_csv(out / "train" / "metrics.csv")["L_cls"].notna().all()
    kinds = ("png", "bmp", "tif", "png", "png", "nii.gz")
    assert {path.name for path in (out / "pred").glob("*_seg*")} == {f"{i}_seg.{k}" for i, k in enumerate(kinds)}
    assert nib.load(out / "pred" / "5_seg.nii.gz").shape == (40, 32, 1)
    assert set(pd.read_csv(out / "pred" / "grades.csv")["grade"]) <= {"benign", "malignant"}


def test_brats2021_files_may_have_another_prefix_than_their_folder(tmp_path, make_subject_folder, volumes):
    folder = make_subject_folder(tmp_path, "BraTS2021_01201", volumes)
    folder.rename(tmp_path / "BraTS2021_00001")
    (item,) = load_subjects(str(tmp_path), ["flair", "t1"])
    assert item["subject"] == "BraTS2021_00001"
    assert item["image"][0].endswith("BraTS2021_01201_flair.nii.gz")


@pytest.mark.parametrize(("suffix", "saved"), [("png", "png"), ("bmp", "bmp"), ("tiff", "tiff"), ("jpg", "png")])
def test_a_mask_comes_back_pixel_by_pixel(tmp_path, suffix, saved):
    levels = ellipses(np.random.default_rng(0), (255, 128, 0))
    file = save(levels, tmp_path / f"a.b.{suffix}", **({"quality": 100} if suffix == "jpg" else {}))
    volume = LoadVolumesd("image")({"image": [str(file)], "subject": "a.b"})["image"]
    assert volume.shape == (1, 32, 40, 1)
    options = {"writer": LikeInputWriter, "output_name_formatter": subject_name, "separate_folder": False}
    SaveImage(tmp_path / "out", "seg", output_dtype=np.uint8, print_log=False, **options)(volume)
    assert np.array_equal(np.asarray(Image.open(tmp_path / "out" / f"a.b_seg.{saved}")), np.asarray(Image.open(file)))


def test_inference_saves_a_mask_where_the_picture_shows_it(tmp_path):
    """Only the transforms of inference are run. The prediction on the network's grid is the bright ellipse."""
    mask = ellipses(np.random.default_rng(0), (0, 255), (32, 32))
    file = save(np.where(mask, 200, 50).astype(np.uint8), tmp_path / "images" / "a.bmp")
    parser = ConfigParser()
    parser.read_config([str(ROOT / "configs" / name) for name in ("inference.yaml", "data_images.yaml")])
    settings = settings_of("train.yaml", "data_images.yaml", image_size=32, modalities=["grey"])
    parser.update({"settings": settings, "modalities": ["grey"], "output_dir": str(tmp_path / "out")})
    item = parser.get_parsed_content("preprocessing")({"image": [str(file)], "subject": "a"})
    bright = (item["image"] > 0).float()
    predicted = {key: bright.clone() for key in ("pred", "prob", "uncertainty")}
    parser.get_parsed_content("postprocessing")(item | predicted)
    assert np.array_equal(np.asarray(Image.open(tmp_path / "out" / "a_seg.bmp")), mask)
    assert np.array_equal(np.asarray(Image.open(tmp_path / "out" / "a_prob.tif")), mask > 0)


def test_training_does_not_shift_masks(tmp_path):
    mask = ellipses(np.random.default_rng(0), (0, 255), (120, 90))
    files = {
        key: str(save(mask // 2 + 50 if key == "image" else mask, tmp_path / f"{key}.png"))
        for key in ("image", "label")
    }
    parser = ConfigParser()
    parser.read_config([str(ROOT / "configs" / name) for name in ("train.yaml", "data_images.yaml", "data_ddti.yaml")])
    parser.update({"image_size": 32})
    item = parser.get_parsed_content("train::preprocessing")(files | {"subject": "a"})
    centre = (np.argwhere(item["label"][0, :, :, 0].numpy()) + 0.5).mean(axis=0) / 32
    true = 1 - (np.argwhere(mask.T) + 0.5).mean(axis=0) / mask.T.shape  # the label's axes are R, A, S
    assert np.abs(centre - true).max() < 0.2 / 32


@pytest.mark.parametrize("name", ["train::preprocessing", "validate::preprocessing"])
def test_black_is_the_darkest_grey(name, tmp_path):
    """Z-scores of the non-zero pixels alone would map black to 0 and the darkest grey far below it."""
    pixels = np.zeros((16, 16), np.uint8)
    pixels[:, 8:] = np.arange(1, 129).reshape(16, 8)
    mask = np.where(pixels > 60, 255, 0).astype(np.uint8)
    files = {key: str(save(array, tmp_path / f"{key}.png")) for key, array in (("image", pixels), ("label", mask))}
    parser = ConfigParser()
    parser.read_config([str(ROOT / "configs" / file) for file in ("train.yaml", "data_images.yaml", "data_ddti.yaml")])
    parser.update({"image_size": 16})
    image = torch.as_tensor(parser.get_parsed_content(name)(files | {"subject": "a"})["image"]).flatten()
    values = image.sort().values
    assert values[:128].unique().numel() == 1  # all black pixels, and nothing is darker
    assert values[128] > values[0]
    assert image.mean().abs() < 1e-4
    assert image.std(correction=0).item() == pytest.approx(1, abs=1e-3)


def test_overlays_show_a_picture_upright(tmp_path):
    affine = read_grid(str(save(np.zeros((4, 6), np.uint8), tmp_path / "a.png"))).affine
    assert nib.aff2axcodes(affine) == ("L", "P", "S")  # an overlay shows left at its right and back at its bottom


@pytest.mark.parametrize("kind", ["png", "tif"])
def test_sixteen_bits_are_kept(tmp_path, kind):
    deep = (np.arange(48).reshape(6, 8) * 1000).astype(np.uint16)
    assert np.array_equal(read_picture(str(save(deep, tmp_path / f"a.{kind}")), 1)[0, :, :, 0].T, deep)


@pytest.mark.parametrize("mode", ["L", "LA", "RGB", "RGBA", "P", "1"])
def test_modes_that_hold_grey_become_one_channel(tmp_path, mode):
    grey = np.array([[0, 255, 0], [255, 255, 0]], np.uint8)
    Image.fromarray(grey).convert(mode).save(tmp_path / "a.png")
    assert np.array_equal(read_picture(str(tmp_path / "a.png"), 1)[0, :, :, 0].T, grey)


def test_palettes_become_their_colours(tmp_path):
    colours = np.random.default_rng(0).integers(0, 2, (6, 8, 3)).astype(np.uint8) * 255
    Image.fromarray(colours).quantize(8).save(tmp_path / "a.png")
    assert np.array_equal(read_picture(str(tmp_path / "a.png"), 3)[..., 0].T, colours)


GREY, COLOUR = np.arange(48, dtype=np.uint8).reshape(6, 8), np.arange(144, dtype=np.uint8).reshape(6, 8, 3)


def turned() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


@pytest.mark.parametrize(
    ("image", "name", "options", "channels", "message"),
    [
        (Image.fromarray(COLOUR), "a.png", {}, 1, "a.png has colours where one grey channel"),
        (Image.fromarray(GREY), "a.png", {}, 3, "a.png is grey, but 3 channels .* set modalities to \\[grey\\]"),
        (Image.fromarray(np.dstack([COLOUR, GREY])), "a.png", {}, 3, "a.png is transparent in places"),
        (Image.fromarray(COLOUR).convert("CMYK"), "a.jpg", {}, 3, "a.jpg has colour mode CMYK"),
        (Image.fromarray(COLOUR), "a.jpg", {"exif": turned()}, 3, "a.jpg has an EXIF orientation"),
        (Image.fromarray(GREY), "a.tif", {"save_all": True, "append_images": [Image.fromarray(GREY)]}, 1, "2 pages"),
    ],
)  # fmt: skip
def test_pictures_that_are_refused(tmp_path, image, name, options, channels, message):
    image.save(tmp_path / name, **options)
    with pytest.raises(InputError, match=message):
        read_picture(str(tmp_path / name), channels)


@pytest.mark.parametrize("kind", ["png", "jpg", "bmp", "tif"])
@pytest.mark.parametrize("share", [0.0, 0.02, 0.6])
def test_truncated_pictures_are_named(tmp_path, kind, share):
    file = save(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8), tmp_path / f"a.{kind}")
    file.write_bytes(file.read_bytes()[: int(share * file.stat().st_size)])
    with pytest.raises(InputError, match=f"cannot read .*a.{kind}"):
        read_picture(str(file))


@pytest.fixture
def ddti(tmp_path) -> Path:
    make_ddti(tmp_path / "data", ["1", "2", "3"])
    return tmp_path / "data"


def test_a_picture_that_breaks_off_stops_before_anything_is_written(ddti, run_bundle, tmp_path):
    file = ddti / "images" / "2.PNG"
    file.write_bytes(file.read_bytes()[:-300])
    keys = {"dataset_dir": str(ddti), "output_dir": str(tmp_path / "out"), "ckpt_dir": str(tmp_path / "out")}
    with pytest.raises(InputError, match="cannot read .*2.PNG"):
        run_bundle(["train.yaml", "data_images.yaml", "data_ddti.yaml"], num_folds=3, validation_share=0, **keys)
    assert not (tmp_path / "out").exists()


def find(root: Path, modalities=("grey",), image_dir="images", mask_dir="masks", **options):
    return find_subjects(str(root), list(modalities), image_dir=image_dir, mask_dir=mask_dir, **options)


def remove_mask(root):
    (root / "masks" / "2.PNG").unlink()


def crop_mask(root):
    save(np.zeros((40, 31), np.uint8), root / "masks" / "2.PNG")


def double_image(root):
    save(GREY, root / "images" / "2.jpg")


def double_mask(root):
    save(GREY, root / "masks" / "2_seg.png")


def empty_images(root):
    shutil.rmtree(root / "images")
    (root / "images").mkdir()


def break_image(root):
    (root / "images" / "2.PNG").write_bytes(b"no picture")


def stack_image(root):
    (root / "images" / "2.PNG").unlink()
    nib.save(nib.Nifti1Image(np.zeros((4, 4, 2, 2), np.float32), np.eye(4)), root / "images" / "2.nii")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (remove_mask, r"1 of 3 images in images have no mask in .*masks: \['2'\]"),
        (crop_mask, r"'2': the mask .*2.PNG has shape \(31, 40, 1\), but .* has \(32, 40, 1\)"),
        (double_image, "has both 2.PNG and 2.jpg"),
        (double_mask, r"image '2' has several masks: \['2.PNG', '2_seg.png'\]"),
        (empty_images, "image_dir: '.*images' has no file with extension"),
        (lambda root: shutil.rmtree(root / "masks"), "mask_dir: '.*masks' is not a folder"),
        (break_image, "'2': cannot read .*2.PNG"),
        (stack_image, "2.nii holds 2 volumes, expected 1"),
    ],
)
def test_folders_that_are_refused(ddti, spoil, message):
    spoil(ddti)
    with pytest.raises(InputError, match=message):
        find(ddti)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"modalities": RGB}, "1.PNG is grey, but modalities="),
        ({"modalities": ["t1", "t2"]}, r"must be \[grey\] or \[red, green, blue\]"),
        ({"mask_dir": None}, "needs mask_dir"),
        ({"mask_dir": "images"}, "different folders"),
        ({"image_dir": "pictures"}, "image_dir: .*pictures' is not a folder"),
    ],
)
def test_keys_that_are_refused(ddti, keys, message):
    with pytest.raises(InputError, match=message):
        find(ddti, **keys)


def test_masks_are_found_by_stem(ddti, caplog):
    for old, new in (("1.PNG", "1_mask.png"), ("2.PNG", "2_segmentation.PNG")):
        (ddti / "masks" / old).rename(ddti / "masks" / new)
    save(GREY, ddti / "masks" / "9.png")
    (ddti / "images" / "notes.txt").write_text("")
    with caplog.at_level(logging.WARNING):
        items = find(ddti)
    assert [Path(item["label"][0]).name for item in items] == ["1_mask.png", "2_segmentation.PNG", "3.PNG"]
    assert "without an image are left out: ['9']" in caplog.text
    assert "label" not in list_subjects(str(ddti), ["grey"], "images")[0]
    assert "subjects=3 patients=3 slices=3" in describe({"all": items})


def test_further_lesions_are_united(ddti, tmp_path):
    """BUSI names the masks of further lesions `_mask_1`, `_mask_2`; without them the truth would be incomplete."""
    masks = ddti / "masks"
    (masks / "1.PNG").rename(masks / "1_mask.PNG")
    first = np.asarray(Image.open(masks / "1_mask.PNG"))
    further = np.zeros_like(first)
    further[:5, :5] = 255
    Image.fromarray(further).save(masks / "1_mask_1.png")
    item = find(ddti)[0]
    assert [Path(file).name for file in item["label"]] == ["1_mask.PNG", "1_mask_1.png"]
    loaded = LoadVolumesd("label")({"label": item["label"], "subject": "1"})
    regions = LabelToRegionsd("label", RegionCoding(["nodule"], {"nodule": [255]}))(loaded)["label"]
    assert regions.shape == (1, *first.T.shape, 1)
    assert np.array_equal(regions[0, ..., 0].numpy() > 0, ((first > 0) | (further > 0)).T)
    assert [Path(file).name for file in find(ddti)[1]["label"]] == ["2.PNG"]
    Image.fromarray(further[:-1]).save(masks / "1_mask_1.png")
    with pytest.raises(InputError, match="the mask .*1_mask_1.png has shape"):
        find(ddti)


def test_output_goes_neither_among_images_nor_masks(ddti):
    found = list_subjects(str(ddti), ["grey"], "images")
    for folder in ("images", "masks"):
        with pytest.raises(InputError, match="choose another"):
            found.check_output_dir(str(ddti / folder), "masks")
    found.check_output_dir(str(ddti / "out"), "masks")


def test_a_data_list_is_of_pictures(ddti):
    item = {"subject": "1", "image": ["images/1.PNG"], "label": "masks/1.PNG"}
    (ddti / "list.json").write_text(json.dumps({"training": [item], "validation": []}))
    assert read_datalist(str(ddti / "list.json"), str(ddti), ["grey"], "images")["training"][0]["grade"] == -1
    with pytest.raises(InputError, match="1.PNG is grey"):
        read_datalist(str(ddti / "list.json"), str(ddti), RGB, "images")


@pytest.mark.parametrize("pattern", ["(", r"\d+_\d+"])
def test_a_pattern_without_a_patient(pattern):
    with pytest.raises(InputError, match="patient_pattern="):
        split([{"subject": "1_1", "grade": 0}], 0, 2, 0, patient_pattern=pattern)


def regions_of(mask, file, **options) -> torch.Tensor:
    item = LoadVolumesd("label")({"label": str(save(mask, file, **options)), "subject": "s"})
    return LabelToRegionsd("label", RegionCoding(["disc", "cup"], DISC_CUP, 255))(item)["label"]


def test_smeared_levels_of_jpeg_masks_are_taken_for_the_nearest(tmp_path):
    mask = ellipses(np.random.default_rng(0), (255, 128, 0), (64, 64))
    with pytest.warns(UserWarning, match="nearest of \\[0, 128, 255\\]"):
        disc, cup = regions_of(mask, tmp_path / "a.jpg", quality=75)[..., 0].numpy()
    assert len(np.unique(Image.open(tmp_path / "a.jpg"))) > 3
    assert np.array_equal(disc.T, mask < 255)
    assert np.array_equal(cup.T, mask == 0)


@pytest.mark.parametrize("name", ["a.png", "a.jpg"])
def test_levels_that_no_region_has_are_listed(tmp_path, name):
    mask = ellipses(np.random.default_rng(0), (255, 128, 64))
    with pytest.raises(InputError, match="'s': the segmentation has label values .*6.*outside \\[0, 128, 255\\]"):
        regions_of(mask, tmp_path / name, **({"quality": 95} if name == "a.jpg" else {}))


def test_real_pairs_have_the_formats_that_the_overlays_say(shared_data):
    """The disc contains the cup and covers 0.5 to 5 % of a fundus photograph."""
    folders = {"image_dir": "Disc_Cup_Fovea_Illustration", "mask_dir": "Disc_Cup_Masks"}
    (item,) = find(shared_data / "refuge2" / "Train", RGB, **folders)
    item = LoadVolumesd("image", ["red", "green", "blue"])(LoadVolumesd("label")(item))
    disc, cup = LabelToRegionsd("label", RegionCoding(["disc", "cup"], DISC_CUP, 255))(item)["label"]
    assert item["image"].shape == (3, *disc.shape)
    assert not (cup > disc).any()
    assert 0.005 < disc.mean() < 0.05
    (item,) = find(shared_data / "ddti" / "Train")
    item = LoadVolumesd(["image", "label"])(item)
    assert item["image"].shape == item["label"].shape == (1, 560, 360, 1)
    assert item["label"].unique().tolist() == [0, 255]
