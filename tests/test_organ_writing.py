"""DICOM segmentations of structures are read again: only what was found, with its codes."""

from __future__ import annotations

import nibabel as nib
import numpy as np
import pytest
import torch
from dicom_phantom import OBLIQUE, write_series
from monai.data import MetaTensor

from conftest import ROOT
from scripts.config import InputError
from scripts.data.dicom import ordered_series
from scripts.data.transforms import LoadVolumesd
from scripts.organs.statistics import StatisticsTable
from scripts.organs.structures import catalogue
from scripts.organs.writing import StructureSegWriter
from test_dicom import find

highdicom = pytest.importorskip("highdicom")
pydicom = pytest.importorskip("pydicom")

BUNDLE = str(ROOT / "bundles" / "organs")
FOUND = ["kidney_left", "liver", "kidney_cyst_left"]  # a side, no side, and a side of the region


@pytest.fixture
def item(tmp_path):
    write_series(tmp_path / "data" / "case1", np.ones((8, 10, 4), np.int16), OBLIQUE)
    (item,) = find(tmp_path / "data", ["ct"])
    return item


def inferred(item, labels):
    meta = {"filename_or_obj": item["image"][0]}
    pred = MetaTensor(torch.as_tensor(labels)[None], affine=np.diag([10.0, 7.5, 19.0, 1.0]), meta=meta)
    return {"subject": "case1", "pred": pred, "structure_prob": torch.full((len(catalogue()),), 0.75)}


def writer(out, item):
    return StructureSegWriter(str(out), BUNDLE, StatisticsTable(str(out), list(catalogue())))


def test_segments_are_the_structures_that_were_found(tmp_path, item, evaluate_items):
    labels = np.random.default_rng(0).choice([0, *(catalogue()[name]["number"] for name in FOUND)], (8, 10, 4))
    evaluate_items(writer(tmp_path / "out", item), [inferred(item, labels.astype(np.uint8))])
    seg = highdicom.seg.segread(tmp_path / "out" / "case1_seg.dcm")
    assert list(seg.segment_numbers) == [1, 2, 3]
    segments = [seg.get_segment_description(number) for number in seg.segment_numbers]
    assert [segment.segment_label for segment in segments] == FOUND
    assert [segment.segmented_property_type.meaning for segment in segments] == ["Kidney", "Liver", "Cyst"]
    assert [segment.segmented_property_type.value for segment in segments] == ["64033007", "10200004", "367643001"]
    (kidney, liver, cyst) = (segment.SegmentedPropertyTypeCodeSequence[0] for segment in segments)
    assert kidney.SegmentedPropertyTypeModifierCodeSequence[0].CodeMeaning == "Left"
    assert "SegmentedPropertyTypeModifierCodeSequence" not in liver
    assert "SegmentedPropertyTypeModifierCodeSequence" not in cyst
    (region,) = segments[2].AnatomicRegionSequence
    assert (region.CodeMeaning, region.AnatomicRegionModifierSequence[0].CodeMeaning) == ("Kidney", "Left")
    uids = [pydicom.dcmread(image.file).SOPInstanceUID for image in ordered_series(item["image"][0])]
    pixels = seg.get_pixels_by_source_instance(uids, assert_missing_frames_are_empty=True)
    for number, name in enumerate(FOUND):
        truth = labels == catalogue()[name]["number"]
        assert truth.any()
        np.testing.assert_array_equal(pixels[..., number].transpose(2, 1, 0), truth)
    assert seg.SeriesDescription == "Structures of a CT"
    report = highdicom.sr.srread(tmp_path / "out" / "case1_sr.dcm")
    groups = report.content.get_volumetric_roi_measurement_groups()
    assert [group.tracking_identifier for group in groups] == FOUND
    for name, group in zip(FOUND, groups, strict=True):
        values = {one.name.meaning: (one.value, one.unit.value) for one in group.get_measurements()}
        count = (labels == catalogue()[name]["number"]).sum()
        assert values["Volume"] == (pytest.approx(count * 10 * 7.5 * 19), "mm3")
        assert values["Attenuation Coefficient"] == (1.0, "[hnsf'U]")
        assert values["Probability"] == (0.75, "1")


def test_nothing_found_writes_nothing_and_says_so(tmp_path, item, evaluate_items, caplog):
    evaluate_items(writer(tmp_path / "out", item), [inferred(item, np.zeros((8, 10, 4), np.uint8))])
    assert "subject 'case1': nothing was found, so no DICOM segmentation is written" in caplog.text
    assert not (tmp_path / "out").exists()


def test_the_label_map_of_real_slices(tmp_path, shared_data, evaluate_items):
    """20 slices of 512 x 512 with 31 structures; the UIDs of the published files are empty, so copies get new ones."""
    folder = shared_data / "totalsegmentator"
    (found,) = find(folder / "example_ct_dicom", ["ct"])
    with pytest.raises(InputError, match="has no SOPClassUID, SOPInstanceUID, SeriesInstanceUID, StudyInstanceUID"):
        writer(tmp_path, found).check(found)
    series, study = highdicom.UID(), highdicom.UID()
    (tmp_path / "case1").mkdir()
    for number, file in enumerate((folder / "example_ct_dicom").iterdir()):
        image = pydicom.dcmread(file)
        image.SOPInstanceUID = image.file_meta.MediaStorageSOPInstanceUID = highdicom.UID()
        image.SeriesInstanceUID, image.StudyInstanceUID = series, study
        image.SOPClassUID = image.file_meta.MediaStorageSOPClassUID = pydicom.uid.CTImageStorage
        image.save_as(tmp_path / "case1" / f"{number}.dcm")
    (item,) = find(tmp_path, ["ct"])
    volume = LoadVolumesd("image", ["ct"])(item)["image"]
    truth = nib.load(folder / "example_seg_dicom.nii.gz")
    turn = nib.orientations.ornt_transform(nib.io_orientation(truth.affine), nib.io_orientation(volume.affine))
    turned = truth.as_reoriented(turn)
    np.testing.assert_allclose(turned.affine, volume.affine, atol=1e-2)
    labels = np.asarray(turned.dataobj).astype(np.uint8)
    evaluate_items(writer(tmp_path / "out", item), [inferred(item, labels)])
    seg = highdicom.seg.segread(tmp_path / "out" / "case1_seg.dcm")
    names = {entry["number"]: entry["name"] for entry in catalogue().values()}
    present = [number for number in np.unique(labels) if number]
    assert len(present) == 31
    described = [seg.get_segment_description(number).segment_label for number in seg.segment_numbers]
    assert described == [names[number] for number in present]
    uids = [pydicom.dcmread(image.file).SOPInstanceUID for image in ordered_series(item["image"][0])]
    pixels = seg.get_pixels_by_source_instance(uids, combine_segments=True, assert_missing_frames_are_empty=True)
    assert np.array_equal(np.array([0, *present])[pixels].transpose(2, 1, 0), labels)
