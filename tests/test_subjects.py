from __future__ import annotations

import logging

import nibabel as nib
import numpy as np
import pytest

from conftest import MODALITIES
from scripts.config import InputError
from scripts.data import subjects
from scripts.streams.subjects import list_subjects


def write_csv(path, text):
    path.write_text(text, encoding="utf-8")
    return str(path)


@pytest.mark.parametrize(
    ("name", "modalities", "extension"),
    [
        ("BraTS20_Training_001", ["t1", "t1ce", "t2", "flair"], ".nii"),
        ("BraTS20_Training_001", ["t1", "t1ce", "t2", "flair"], ".nii.gz"),
        ("BraTS2021_00000", ["t1", "t1ce", "t2", "flair"], ".nii.gz"),
        ("BraTS-GLI-00005-100", ["t1n", "t1c", "t2w", "t2f"], ".nii.gz"),
        ("patient7", ["adc", "dwi"], ".nii.gz"),
    ],
)
def test_finds_each_naming_scheme_in_channel_order(tmp_path, make_subject_folder, volumes, name, modalities, extension):
    files = dict(zip(modalities, volumes.values(), strict=False)) | {"seg": volumes["seg"]}
    make_subject_folder(tmp_path, name, files, extension=extension)
    (item,) = subjects.find_subjects(str(tmp_path), modalities)
    assert item["subject"] == name
    for modality, file in zip(modalities, item["image"], strict=True):
        assert file.endswith(f"{modality}{extension}")
    assert item["label"][0].endswith(f"seg{extension}")


def test_a_single_subject_folder_can_be_given(tmp_path, make_subject_folder, volumes):
    folder = make_subject_folder(tmp_path, "BraTS2021_00000", volumes)
    assert [item["subject"] for item in subjects.find_subjects(str(folder), MODALITIES)] == ["BraTS2021_00000"]


def test_odd_segmentation_name_of_subject_355(tmp_path, make_subject_folder, volumes):
    folder = make_subject_folder(tmp_path, "BraTS20_Training_355", volumes)
    (folder / "BraTS20_Training_355_seg.nii.gz").rename(folder / "W39_1998.09.19_Segm.nii.gz")
    (item,) = subjects.find_subjects(str(tmp_path), MODALITIES)
    assert item["label"][0].endswith("W39_1998.09.19_Segm.nii.gz")


def test_uppercase_files_are_found_and_hidden_ones_are_not(tmp_path, make_subject_folder, volumes, caplog):
    folder = make_subject_folder(tmp_path, "s1", volumes)
    for file in list(folder.iterdir()):
        file.rename(folder / file.name.replace(".nii.gz", ".NII.GZ"))
    (folder / "._s1_t1.nii.gz").write_bytes(b"resource fork")
    make_subject_folder(tmp_path, ".cache", volumes)
    (tmp_path / "notes").mkdir()
    with caplog.at_level(logging.WARNING):
        assert [item["subject"] for item in subjects.find_subjects(str(tmp_path), MODALITIES)] == ["s1"]
    assert "['notes']" in caplog.text


def test_another_segmentation_is_not_taken_for_the_truth(tmp_path, make_subject_folder, volumes):
    folder = make_subject_folder(tmp_path, "s1", volumes)
    (folder / "s1_seg.nii.gz").rename(folder / "s1_unet_segmentation_pred.nii.gz")
    with pytest.raises(InputError, match="no segmentation"):
        subjects.find_subjects(str(tmp_path), MODALITIES)


def test_output_may_not_go_among_the_volumes(tmp_path, make_subject_folder, volumes):
    folder = make_subject_folder(tmp_path, "s1", volumes)
    for root in (folder, tmp_path):
        found = list_subjects(str(root), MODALITIES)
        found.check_output_dir(str(tmp_path / "out"))
        with pytest.raises(InputError, match="holds volumes of the subjects"):
            found.check_output_dir(str(folder))


def test_inference_needs_no_segmentation(tmp_path, make_subject_folder, volumes):
    del volumes["seg"]
    make_subject_folder(tmp_path, "a", volumes)
    (item,) = list_subjects(str(tmp_path), MODALITIES)
    assert "label" not in item
    with pytest.raises(InputError, match="'a': no segmentation"):
        subjects.find_subjects(str(tmp_path), MODALITIES)


def test_missing_modality_names_subject_and_modality(tmp_path, make_subject_folder, volumes):
    del volumes["t2"]
    make_subject_folder(tmp_path, "BraTS20_Training_004", volumes)
    with pytest.raises(InputError, match="'BraTS20_Training_004': no file for modality 't2'"):
        subjects.find_subjects(str(tmp_path), MODALITIES)


@pytest.mark.parametrize(("suffix", "kind"), [("flair", "modality"), ("seg", "mask")])
def test_other_shape_names_the_file(tmp_path, make_subject_folder, volumes, suffix, kind):
    volumes[suffix] = volumes[suffix][:, :, :3]
    make_subject_folder(tmp_path, "a", volumes)
    with pytest.raises(InputError, match=rf"'a': the {kind} .*a_{suffix}.nii.gz has shape \(8, 8, 3\)"):
        subjects.find_subjects(str(tmp_path), MODALITIES)


def test_other_affine_names_the_file(tmp_path, make_subject_folder, volumes):
    make_subject_folder(tmp_path, "a", volumes)
    make_subject_folder(tmp_path, "a", {"t1ce": volumes["t1ce"]}, affine=np.diag([2.0, 1, 1, 1]))
    with pytest.raises(InputError, match="a_t1ce.nii.gz and .* different affines"):
        subjects.find_subjects(str(tmp_path), MODALITIES)


def test_unreadable_header_names_the_file(tmp_path, make_subject_folder, volumes):
    folder = make_subject_folder(tmp_path, "a", volumes)
    (folder / "a_t2.nii.gz").write_bytes(b"not a volume")
    with pytest.raises(InputError, match="'a': cannot read .*a_t2.nii.gz"):
        subjects.find_subjects(str(tmp_path), MODALITIES)


def test_empty_and_absent_folders(tmp_path):
    with pytest.raises(InputError, match="no subject found"):
        subjects.find_subjects(str(tmp_path), MODALITIES)
    with pytest.raises(InputError, match="is not a folder"):
        subjects.find_subjects(str(tmp_path / "absent"), MODALITIES)


def test_csv_and_disk_that_differ_are_warned_about(tmp_path, make_subject_folder, volumes, caplog):
    make_subject_folder(tmp_path, "s1", volumes)
    make_subject_folder(tmp_path, "s2", volumes)
    write_csv(tmp_path / "name_mapping.csv", "ID,Grade\ns1,HGG\ns9,LGG\n")
    with caplog.at_level(logging.WARNING):
        items = subjects.load_subjects(str(tmp_path), MODALITIES, subject_column="ID")
    assert [item["grade"] for item in items] == [1, -1]
    assert "['s9']" in caplog.text
    assert "['s2']" in caplog.text


def test_named_csv_must_exist_but_the_default_need_not(tmp_path, make_subject_folder, volumes):
    make_subject_folder(tmp_path, "s1", volumes)
    assert subjects.load_subjects(str(tmp_path), MODALITIES)[0]["grade"] == -1
    with pytest.raises(InputError, match="does not exist"):
        subjects.load_subjects(str(tmp_path), MODALITIES, grade_csv=str(tmp_path / "typo.csv"))


def test_real_tcga_lgg_keeps_the_subject_without_a_grade(shared_data):
    items = subjects.load_subjects(
        str(shared_data / "tcga_lgg"),
        ["t1", "t1ce", "flair"],
        subject_column="subject_ID",
        grade_labels={"G2": 0, "G3": 1},
    )
    assert len(items) == 65
    assert [item["subject"] for item in items if item["grade"] == -1] == ["TCGA_HT_A61B"]


def test_one_of_four_files_stands_for_its_subject(tmp_path, make_subject_folder, volumes):
    folder = make_subject_folder(tmp_path, "BraTS20_1", volumes)
    (folder / "BraTS20_1_t2.nii.gz").rename(folder / "BraTS20_1_T2.nii.gz")
    make_subject_folder(tmp_path, "BraTS20_10", volumes)
    for file in (tmp_path / "BraTS20_10").iterdir():
        file.rename(folder / file.name)  # all in one folder, as in MONAI Label
    item = subjects.subject_of(str(folder / "BraTS20_1_t1ce.nii.gz"), MODALITIES)
    assert item["subject"] == "BraTS20_1"
    assert [file.rsplit("/", 1)[1] for file in item["image"]] == [
        f"BraTS20_1_{name}.nii.gz" for name in ("t1", "t1ce", "T2", "flair")
    ]


def save_4d(file, volumes, modalities=MODALITIES):
    file.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(np.stack([volumes[name] for name in modalities], axis=-1), np.eye(4)), file)
    return str(file)


def test_a_4d_file_is_a_subject(tmp_path, volumes):
    file = save_4d(tmp_path / "BRATS_001.nii.gz", volumes)
    assert subjects.subject_of(file, MODALITIES) == {"subject": "BRATS_001", "image": [file]}


def test_a_file_that_is_only_called_like_its_modality_belongs_to_its_folder(tmp_path, monkeypatch):
    folder = tmp_path / "s0001"
    folder.mkdir()
    nib.save(nib.Nifti1Image(np.zeros((4, 4, 4), np.int16), np.eye(4)), folder / "ct.nii.gz")
    assert subjects.subject_of(str(folder / "ct.nii.gz"), ["ct"])["subject"] == "s0001"
    assert list_subjects(str(tmp_path), ["ct"])[0]["subject"] == "s0001"
    (folder / "segmentations").mkdir()
    nib.save(nib.Nifti1Image(np.zeros((4, 4, 4), np.uint8), np.eye(4)), folder / "segmentations" / "liver.nii.gz")
    assert list_subjects(str(folder), ["ct"])[0]["subject"] == "s0001"
    monkeypatch.chdir(folder)
    assert subjects.subject_of("ct.nii.gz", ["ct"])["subject"] == "s0001"


def test_4d_files_in_one_folder_are_subjects(tmp_path, volumes):
    """The layout of the Medical Segmentation Decathlon."""
    names = ["BRATS_001", "BRATS_002"]
    for name in names:
        save_4d(tmp_path / "imagesTr" / f"{name}.nii.gz", volumes)
        (tmp_path / "labelsTr").mkdir(exist_ok=True)
        nib.save(nib.Nifti1Image(volumes["seg"], np.eye(4)), tmp_path / "labelsTr" / f"{name}.nii.gz")
    folders = {"image_dir": "imagesTr", "mask_dir": "labelsTr"}
    assert [i["subject"] for i in subjects.find_subjects(str(tmp_path), MODALITIES, **folders)] == [
        "BRATS_001",
        "BRATS_002",
    ]
    with pytest.raises(InputError, match="BRATS_001.nii.gz holds 4 volumes, expected 2"):
        subjects.find_subjects(str(tmp_path), ["t1", "t2"], **folders)


@pytest.mark.parametrize(
    ("name", "modalities", "message"),
    [
        (
            "s_flair.nii.gz",
            ["t1", "t1ce", "adc", "flair"],
            r"no file for \['adc'\] beside it; add s_adc.nii.gz",
        ),
        ("s_seg.nii.gz", MODALITIES, "s_seg.nii.gz holds 1 of 4 modalities: give one 4D file"),
        ("three.nii.gz", MODALITIES, "three.nii.gz holds 3 of 4 modalities"),
        ("notes.nii.gz", MODALITIES, "cannot read"),
        ("absent.nii.gz", MODALITIES, "absent.nii.gz' is not a file"),
    ],
)
def test_a_file_that_stands_for_no_subject(name, modalities, message, tmp_path, make_subject_folder, volumes):
    folder = make_subject_folder(tmp_path, "s", volumes)
    save_4d(folder / "three.nii.gz", volumes, MODALITIES[:3])
    (folder / "notes.nii.gz").write_text("no volume")
    with pytest.raises(InputError, match=message):
        subjects.subject_of(str(folder / name), modalities)


def test_no_name_is_not_the_current_folder():
    with pytest.raises(InputError, match="'' is not a file"):
        subjects.subject_of("", MODALITIES)
