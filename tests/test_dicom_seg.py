"""DICOM segmentations are read again and compared with the NIfTI masks."""

from __future__ import annotations

import sys

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import torch
from dicom_phantom import AXIAL, OBLIQUE, SAGITTAL, SPACING, write_series, write_subject
from monai.data import MetaTensor

from conftest import MODALITIES, ROOT
from scripts.config import InputError
from scripts.data.dicom import ordered_series
from scripts.data.regions import LabelToRegionsd, RegionCoding
from scripts.dicom.segmentation import DicomSegWriter
from scripts.report.tables import GradeTable
from test_dicom import REGIONS, find, infer

highdicom = pytest.importorskip("highdicom")
pydicom = pytest.importorskip("pydicom")

REGION_LABELS = {"TC": [1, 4], "WT": [1, 2, 4], "ET": [4]}
CONFIGS = ["inference.yaml", "dicom_seg.yaml"]


@pytest.mark.parametrize("affine", [AXIAL, OBLIQUE, SAGITTAL], ids=["axial", "oblique", "sagittal"])
def test_segments_are_the_regions_of_the_mask(tmp_path, three_regions, affine):
    write_subject(tmp_path / "data" / "case1", affine)
    infer(CONFIGS, tmp_path / "data", tmp_path / "out", three_regions)
    mask = nib.load(tmp_path / "out" / "case1_seg.nii.gz").get_fdata()
    series = ordered_series(str(next((tmp_path / "data" / "case1" / f"ax_{MODALITIES[0]}").iterdir())))
    sources = [pydicom.dcmread(image.file) for image in series]
    seg = highdicom.seg.segread(tmp_path / "out" / "case1_seg.dcm")
    uids = [source.SOPInstanceUID for source in sources]
    pixels = seg.get_pixels_by_source_instance(uids, assert_missing_frames_are_empty=True)
    for number, region in enumerate(REGIONS):
        truth = np.isin(mask, REGION_LABELS[region])
        np.testing.assert_array_equal(pixels[..., number].transpose(2, 1, 0), truth)
        assert seg.get_segment_description(number + 1).segment_label == region
    assert pixels.any()
    assert (pixels.sum(axis=-1) > 1).any()  # the regions overlap
    assert (seg.FrameOfReferenceUID, seg.StudyInstanceUID) == ("1.2.3.4", sources[0].StudyInstanceUID)
    assert {uid for *_, uid in seg.get_source_image_uids()} == set(uids)
    positions = {source.SOPInstanceUID: source.ImagePositionPatient for source in sources}
    for frame in seg.PerFrameFunctionalGroupsSequence:
        source = frame.DerivationImageSequence[0].SourceImageSequence[0].ReferencedSOPInstanceUID
        assert frame.PlanePositionSequence[0].ImagePositionPatient == positions[source]
    (row,) = pd.read_csv(tmp_path / "out" / "grades.csv").to_dict("records")
    report = highdicom.sr.srread(tmp_path / "out" / "case1_sr.dcm")
    assert report.StudyInstanceUID == seg.StudyInstanceUID
    for region, group in zip(REGIONS, report.content.get_volumetric_roi_measurement_groups(), strict=True):
        assert group.tracking_identifier == region
        volume, dice = group.get_measurements()
        assert (volume.unit.value, volume.value) == ("mL", pytest.approx(row[f"volume_expected_ml_{region}"], rel=1e-5))
        assert dice.value == pytest.approx(row[f"expected_dice_{region}"], rel=1e-5)
        (reference,) = [part for part in group[0].ContentSequence if part.ValueType == "IMAGE"][:1]
        assert reference.ReferencedSOPSequence[0].ReferencedSOPInstanceUID == seg.SOPInstanceUID


def writer(out, item, regions=("WT",), **settings) -> DicomSegWriter:
    to_regions = LabelToRegionsd("pred", RegionCoding(regions, REGION_LABELS))
    table = GradeTable(str(out), {"LGG": 0, "HGG": 1}, regions, MODALITIES, to_regions)
    return DicomSegWriter(str(out), str(ROOT), table, regions, to_regions, **settings)


def inferred(item, mask, **values):
    """An item of one region after inference: label map ``[1, H, W, S]``, and a volume of 2 to 4 ml without a margin."""
    pred = MetaTensor(mask, affine=AXIAL, meta={"filename_or_obj": item["image"][0]})
    prob = MetaTensor(mask.float(), affine=AXIAL)
    one = dict.fromkeys(("volume_temperature", "sample_dice", "expected_dice"), torch.ones(1))
    one |= {"volume_margin": torch.zeros(1), "volumes_from": torch.tensor(0)}
    return {"subject": "case1", "pred": pred, "prob": prob, **one, **values}


def test_an_empty_mask_of_an_anonymised_subject(tmp_path, evaluate_items):
    """No voxel is segmented, and attributes that DICOM requires are missing."""
    for file in write_series(tmp_path / "case1", np.ones((8, 10, 4), np.int16), AXIAL):
        image = pydicom.dcmread(file)
        del image.PatientName, image.PatientID
        image.save_as(file)
    (item,) = find(tmp_path, ["t1"])
    empty = inferred(item, torch.zeros(1, 8, 10, 4))
    evaluate_items(writer(tmp_path / "out", item, property_type="Lesion"), [empty])
    seg = highdicom.seg.segread(tmp_path / "out" / "case1_seg.dcm")
    assert seg.get_segment_description(1).segmented_property_type.meaning == "Lesion"
    assert not seg.pixel_array.any()
    assert seg.PatientName == ""


def test_a_report_has_the_interval_of_the_volume_and_the_grade(tmp_path, evaluate_items):
    write_series(tmp_path / "case1", np.ones((8, 10, 4), np.int16), AXIAL)
    (item,) = find(tmp_path, ["t1"])
    mask = torch.zeros(1, 8, 10, 4)
    mask[:, 2:5, 3:6, 1:3] = 1
    found = inferred(item, mask, volume_margin=torch.tensor([0.5]), grade_prob=torch.tensor([0.2, 0.8]))
    evaluate_items(writer(tmp_path / "out", item), [found | {"grade_prior": torch.tensor([0.5, 0.5])}])
    content = highdicom.sr.srread(tmp_path / "out" / "case1_sr.dcm").content
    (group,) = content.get_volumetric_roi_measurement_groups()
    volume, _ = group.get_measurements()
    expected = 18 * np.prod(SPACING) / 1000
    assert volume.value == pytest.approx(expected, rel=1e-3)
    bounds = {part.ConceptNameCodeSequence[0].CodeMeaning: part for part in volume[0].ContentSequence}
    distances = [float(part.MeasuredValueSequence[0].NumericValue) for part in bounds.values()]
    low, high = (np.cbrt(expected) - 0.5) ** 3, (np.cbrt(expected) + 0.5) ** 3
    assert sorted(distances) == pytest.approx(sorted([expected - low, high - expected]), rel=1e-3)
    (grade,) = content.get_image_measurement_groups()
    (evaluation,) = grade.get_qualitative_evaluations()
    (probability,) = grade.get_measurements()
    assert (evaluation.value.meaning, probability.value) == ("HGG", pytest.approx(0.8))


def test_subjects_of_nifti_are_refused_before_anything_is_written(
    tmp_path, three_regions, make_subject_folder, volumes
):
    make_subject_folder(tmp_path / "data", "case1", volumes)
    with pytest.raises(InputError, match="subject 'case1' is not DICOM"):
        infer(CONFIGS, tmp_path / "data", tmp_path / "out", three_regions)
    assert not (tmp_path / "out").exists()


def test_headers_that_cannot_be_referred_to(tmp_path):
    for file in write_series(tmp_path / "case1", np.ones((8, 10, 4), np.int16), AXIAL):
        image = pydicom.dcmread(file)
        del image.FrameOfReferenceUID
        image.save_as(file)
    (item,) = find(tmp_path, ["t1"])
    with pytest.raises(InputError, match=r"'case1': .* has no FrameOfReferenceUID"):
        writer(tmp_path, item).check(item)


def test_unknown_codes_and_a_missing_extra(tmp_path, monkeypatch):
    with pytest.raises(InputError, match="property_type='Nonsense'"):
        DicomSegWriter(str(tmp_path), str(ROOT), None, ["WT"], dict, property_type="Nonsense")
    monkeypatch.setitem(sys.modules, "highdicom", None)
    with pytest.raises(InputError, match=r"pip install -e '.\[dicom\]'"):
        writer(tmp_path, {})
