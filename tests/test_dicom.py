"""DICOM series are found, checked and read, and give the same masks as the same volumes in NIfTI."""

from __future__ import annotations

import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
from dicom_phantom import AXIAL, OBLIQUE, SAGITTAL, SHAPE, write_series, write_subject

from conftest import MODALITIES, run_configs
from scripts.config import InputError
from scripts.data.dicom import ordered_series
from scripts.data.pictures import read_grid, read_volume
from scripts.data.subjects import find_subjects, subject_of
from scripts.data.transforms import LoadVolumesd
from scripts.streams.manifest import Manifest
from scripts.streams.storage import Disk
from scripts.streams.subjects import list_subjects

pydicom = pytest.importorskip("pydicom")

REGIONS = ["TC", "WT", "ET"]


@pytest.mark.parametrize("affine", [AXIAL, OBLIQUE, SAGITTAL], ids=["axial", "oblique", "sagittal"])
def test_a_series_is_the_volume_it_was_written_from(tmp_path, affine):
    images = write_subject(tmp_path / "case1", affine)
    (item,) = list_subjects(str(tmp_path), MODALITIES)
    assert item["subject"] == "case1"
    assert subject_of(str(tmp_path / "case1"), MODALITIES) == item  # MONAI Label gives the folder
    read = LoadVolumesd("image", MODALITIES)(item)["image"]
    for channel, (modality, file) in enumerate(zip(MODALITIES, item["image"], strict=True)):
        grid = read_grid(file)
        assert grid.shape == SHAPE
        np.testing.assert_allclose(grid.affine, affine, atol=1e-4)
        np.testing.assert_allclose(read.affine, grid.affine, atol=1e-9)
        np.testing.assert_array_equal(read_volume(file), images[modality])
        np.testing.assert_array_equal(read[channel], images[modality])


def infer(configs: list[str], data: Path, out: Path, model: Path) -> None:
    folders = {"dataset_dir": str(data), "output_dir": str(out), "ckpt_dir": str(model)}
    run_configs(configs, regions=REGIONS, num_samples=2, num_inference_steps=2, **folders)


@pytest.mark.parametrize("affine", [AXIAL, OBLIQUE, SAGITTAL], ids=["axial", "oblique", "sagittal"])
def test_inference_is_that_of_the_same_volumes_in_nifti(tmp_path, three_regions, make_subject_folder, affine):
    images = write_subject(tmp_path / "dicom" / "case1", affine)
    make_subject_folder(tmp_path / "nifti", "case1", images, affine)
    for kind in ("dicom", "nifti"):
        infer(["inference.yaml"], tmp_path / kind, tmp_path / "out" / kind, three_regions)
    ours, theirs = tmp_path / "out" / "dicom", tmp_path / "out" / "nifti"
    names = {path.name for path in theirs.iterdir()}
    assert {path.name for path in ours.iterdir()} == names
    volumes = {f"case1_{kind}.nii.gz" for kind in ("seg", "prob", "uncertainty", "variance")}
    assert names == volumes | {"case1_overlay.png", "grades.csv", "manifest", "report.html"}
    for name in volumes:
        one, other = nib.load(ours / name), nib.load(theirs / name)
        np.testing.assert_array_equal(one.get_fdata(), other.get_fdata())
        np.testing.assert_allclose(one.affine, affine, atol=1e-4)
    assert len(np.unique(nib.load(ours / "case1_seg.nii.gz").get_fdata())) > 1
    pd.testing.assert_frame_equal(*(pd.read_csv(folder / "grades.csv") for folder in (ours, theirs)), atol=1e-5)


def find(folder: Path, modalities: list[str] = MODALITIES) -> list[dict]:
    return list(list_subjects(str(folder), modalities))


def volume(slices: int = 6, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 1000, (8, 10, slices)).astype(np.int16)


def test_a_series_may_lie_anywhere(tmp_path):
    """Series in sub-folders, series in one folder (told apart by description), and a data set that is one subject."""
    write_subject(tmp_path / "a" / "case1", seed=1)
    for modality in MODALITIES:
        write_series(tmp_path / "a" / "case2", volume(), AXIAL, f"Sag_{modality}", "1.2.3.2")
        write_series(tmp_path / "a" / "case3" / "study" / modality.upper() / "DICOM", volume(), AXIAL, "t1")
    assert [item["subject"] for item in find(tmp_path / "a")] == ["case1", "case2", "case3"]
    for case, name, places in (
        ("case1", "case1", "ax_{0}/Ax{0}IM*"),
        ("case2", "case2", "Sag_{0}IM*"),
        ("case3", "study", "study/{1}/DICOM/t1IM*"),
    ):
        (item,) = find(tmp_path / "a" / case)
        assert item["subject"] == name
        for file, modality in zip(item["image"], MODALITIES, strict=True):
            assert Path(file) in (tmp_path / "a" / case).glob(places.format(modality, modality.upper()))


def test_the_only_series_of_the_only_modality(tmp_path):
    write_series(tmp_path / "case1" / "scan", volume(), AXIAL, "whatever", "1.2.3.1")
    write_series(tmp_path / "case2", volume(), AXIAL, "whatever", "1.2.3.2")
    assert [item["subject"] for item in find(tmp_path, ["flair"])] == ["case1", "case2"]


def test_nifti_and_dicom_subjects_side_by_side(tmp_path, make_subject_folder, volumes):
    make_subject_folder(tmp_path, "case2", volumes)
    write_subject(tmp_path / "case1")
    assert [item["subject"] for item in find(tmp_path)] == ["case1", "case2"]
    with pytest.raises(InputError, match="no subject found"):
        find_subjects(str(tmp_path / "case1"), MODALITIES)  # training needs labels


def test_each_slice_has_a_scale_of_its_own(tmp_path):
    content = volume()
    files = write_series(tmp_path / "case1", content, AXIAL)
    for index, file in enumerate(files[1:], start=1):
        edit(file, RescaleSlope=str(1 + index / 4), RescaleIntercept="0")
    (item,) = find(tmp_path, ["t1"])
    np.testing.assert_allclose(read_volume(item["image"][0]), content * (1 + np.arange(6) / 4), rtol=1e-6)


def test_rounding_between_series_is_no_obstacle(tmp_path):
    nudged = AXIAL.copy()
    nudged[0, 3] += 0.004
    for modality, affine in (("t1", AXIAL), ("flair", nudged)):
        write_series(tmp_path / "case1" / modality, volume(), affine)
    (item,) = find(tmp_path, ["t1", "flair"])
    np.testing.assert_allclose(LoadVolumesd("image")(item)["image"].affine, AXIAL, atol=1e-4)


def test_what_is_no_image_is_left_out_and_named(tmp_path, caplog):
    write_series(tmp_path / "case1" / "t1", volume(), AXIAL)
    for name in ("notes.txt", "DICOMDIR", "t1/.hidden", "t1/report.dcm"):
        content = b"\0" * 128 + b"DICM" + b"of 1.2.840.10008.5.1.4.1.1.4\0" * (name != "notes.txt")
        (tmp_path / "case1" / name).write_bytes(content)
    with caplog.at_level("WARNING"):
        find(tmp_path, ["t1"])
    (message,) = [record.message for record in caplog.records if "not DICOM images" in record.message]
    assert all(name in message for name in ("4 files", "notes.txt", "DICOMDIR", "t1/.hidden", "t1/report.dcm"))


def edit(file: Path, **attributes) -> None:
    image = pydicom.dcmread(file)
    for name, value in attributes.items():
        setattr(image, name, value)
    image.save_as(file)


def position(file: Path, offset: list[float]) -> None:
    edit(
        file,
        ImagePositionPatient=[a + b for a, b in zip(pydicom.dcmread(file).ImagePositionPatient, offset, strict=True)],
    )


def cut(files: list[Path]) -> None:
    files[2].write_bytes(files[2].read_bytes()[:-200])


def enhanced(files: list[Path]) -> None:
    edit(files[2], NumberOfFrames=2, PixelData=2 * pydicom.dcmread(files[2]).PixelData)


def other_size(files: list[Path]) -> None:
    edit(files[2], Columns=4, PixelData=pydicom.dcmread(files[2]).PixelData[:80])


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda files: files[2].unlink(), r"19.00 mm apart, but after 31.12 mm the next is at 69.12 mm"),
        (lambda files: shutil.copy(files[2], files[2].parent / "copy"), r"several images at 50.12 mm"),
        (lambda files: position(files[5], [0, 0, 3]), r"after 88.12 mm the next is at 110.12 mm"),
        (lambda files: [position(f, [0, 9.0 * i, 0]) for i, f in enumerate(files)], r"sideways by up to 45.00 mm"),
        (lambda files: edit(files[2], ImageOrientationPatient=[0, 1, 0, 0, 0, -1]), "different orientations"),
        (other_size, "different sizes"),
        (enhanced, "holds 2 frames"),
        (cut, "cannot read the DICOM image .*damaged"),
    ],
    ids=["gap", "twice", "uneven", "tilted", "orientations", "sizes", "frames", "cut"],
)
def test_bad_series_are_refused_by_their_headers(tmp_path, spoil, message):
    spoil(write_series(tmp_path / "case1" / "t1", volume(), AXIAL, "Ax T1"))
    with pytest.raises(InputError, match=message) as caught:
        find(tmp_path, ["t1"])
    assert "case1" in str(caught.value)
    assert "t1" in str(caught.value)


def test_series_are_missed_and_counted(tmp_path):
    for modality in ("t1", "flair"):
        write_series(tmp_path / "case1" / modality, volume(), AXIAL, f"Ax {modality}")
    with pytest.raises(InputError, match=r"'case1': no DICOM series for modality 't2' among \[.*Ax t1.*\(6 images\)"):
        find(tmp_path, ["t1", "t2"])
    write_series(tmp_path / "case1" / "more_t1", volume(), AXIAL)
    with pytest.raises(InputError, match="several DICOM series for modality 't1'"):
        find(tmp_path, ["t1", "flair"])


def test_series_on_two_grids_are_refused(tmp_path):
    write_series(tmp_path / "case1" / "t1", volume(6), AXIAL)
    write_series(tmp_path / "case1" / "flair", volume(5), AXIAL)
    with pytest.raises(InputError, match=r"'case1': the modality .* has shape \(8, 10, 5\)"):
        find(tmp_path, ["t1", "flair"])


def test_a_folder_of_anything_else_says_what_is_there(tmp_path):
    (tmp_path / "case1").mkdir()
    (tmp_path / "case1" / "notes.txt").write_text("x")
    with pytest.raises(InputError, match=r"no subject found in .*holds \['case1/notes.txt'\]: .* or DICOM series"):
        find(tmp_path)


def test_a_changed_file_is_read_anew(tmp_path):
    files = write_series(tmp_path / "case1", volume(), AXIAL)
    assert len(ordered_series(str(files[0]))) == 6
    files[5].unlink()
    assert [Path(image.file) for image in ordered_series(str(files[3]))] == files[:5]


def test_a_series_that_changed_is_not_finished(tmp_path):
    files = write_series(tmp_path / "case1", volume(), AXIAL)
    found = list_subjects(str(tmp_path), ["t1"])
    manifest, other = (Manifest(Disk(tmp_path / "out"), origin) for origin in ("digest", "other"))
    with found.opened(found.sources[0]) as (item, images):
        manifest.write(item["subject"], images, [[{"subject": "case1"}]])
    assert manifest.finished(found.names, found.is_unchanged) == {"case1"}
    assert other.finished(found.names, found.is_unchanged) == set()
    files[5].unlink()
    assert manifest.finished(found.names, found.is_unchanged) == set()


def test_no_output_among_the_images(tmp_path):
    write_subject(tmp_path / "case1")
    for folder in ("case1", "case1/ax_t1"):
        with pytest.raises(InputError, match="holds volumes of the subjects"):
            list_subjects(str(tmp_path), MODALITIES).check_output_dir(str(tmp_path / folder))
