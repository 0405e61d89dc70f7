"""Save masks as DICOM segmentations, and what was measured of them as structured reports."""

from __future__ import annotations

import importlib
import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from scripts.config import InputError, atomic_path
from scripts.data.dicom import is_dicom, ordered_series
from scripts.dicom.report import EXPECTED_DICE, VOLUME, Measured, structured_report
from scripts.sampling.report import Report

logger = logging.getLogger(__name__)

UIDS = ("SOPClassUID", "SOPInstanceUID", "SeriesInstanceUID", "StudyInstanceUID", "FrameOfReferenceUID")
Code = tuple[str, str]  # value and meaning of a concept of SNOMED CT
TISSUE: Code = ("85756007", "Tissue")  # only for the check of headers
SERIES_NUMBER = 900  # higher than the series numbers of scanners
# type 2 attributes: required but possibly empty, and often removed by anonymisers
TYPE_2 = (
    "PatientID", "PatientName", "PatientBirthDate", "PatientSex",
    "AccessionNumber", "StudyID", "StudyDate", "StudyTime",
)  # fmt: skip


class SegmentationWriter(Report):
    """Report of an inference that writes ``<subject>_seg.dcm`` and ``<subject>_sr.dcm`` on the first image.

    A subclass says what the segments are and what was measured of them.

    Args:
        output_dir: folder of the files.
        bundle_root: folder of the bundle, whose name and version are written.
        table: report whose ``answer`` to an item says what was measured.

    Raises:
        InputError: if highdicom is not installed. Of a subject (which the message names), if it is not DICOM or has
            headers to which no segmentation can refer.
    """

    def __init__(self, output_dir: str, bundle_root: str, table: Any) -> None:
        try:
            self.highdicom, self.pydicom = (importlib.import_module(name) for name in ("highdicom", "pydicom"))
        except ImportError as error:
            raise InputError("DICOM segmentations need highdicom: pip install -e '.[dicom]'") from error
        self.output_dir, self.table = Path(output_dir), table
        metadata = json.loads(Path(bundle_root, "configs", "metadata.json").read_text(encoding="utf-8"))
        self.name, self.version = metadata["name"], metadata["version"]

    def check(self, item: Mapping[str, Any]) -> None:
        file = item["image"][0]
        if not is_dicom(file):
            raise InputError(
                f"subject '{item['subject']}' is not DICOM ({file}), so no DICOM segmentation can refer to it; run "
                "inference without configs/dicom_seg.yaml"
            )
        header = self._read(file)
        if absent := [name for name in UIDS if not header.get(name)]:
            raise InputError(
                f"subject '{item['subject']}': {file} has no {', '.join(absent)}, so no DICOM segmentation can refer "
                "to it; give the files new UIDs, or run inference without configs/dicom_seg.yaml"
            )
        anything = self.segment(1, "test", TISSUE, TISSUE)
        self._segmentation(item["subject"], [header], np.zeros((1, header.Rows, header.Columns)), [anything])

    def rows_of(self, item: Mapping[str, Any]) -> list[dict[str, Any]]:
        objects = self.objects(item)
        if not objects:
            logger.warning(f"subject '{item['subject']}': nothing was found, so no DICOM segmentation is written")
        for kind, found in objects.items():
            with atomic_path(self.output_dir / f"{item['subject']}_{kind}.dcm") as path:
                found.save_as(path)
        return []

    def write(self, rows: list[dict[str, Any]]) -> None:
        """Nothing is written of all subjects together."""

    def objects(self, item: Mapping[str, Any]) -> dict[str, Any]:
        """The segmentation ``seg`` and the report ``sr`` of an inferred item; none if nothing was found."""
        masks, segments = self.describe(item)
        if not segments:
            return {}
        headers = [self._read(image.file) for image in ordered_series(item["pred"].meta["filename_or_obj"])]
        segmentation = self._segmentation(item["subject"], headers, masks.swapaxes(0, 2), segments)
        answer = self.table.answer(item)
        labels = {segment.segment_label: segment.segment_number for segment in segments}
        found = {labels[label]: values for label, values in self.measured(answer).items() if label in labels}
        report = structured_report(
            self.highdicom, segmentation, headers, found, self.grade(answer), self.name, self.version
        )
        return {"seg": segmentation, "sr": report}

    def describe(self, item: Mapping[str, Any]) -> tuple[np.ndarray, list]:
        """Masks and segments of an inferred item, as the subclass defines them.

        Returns:
            Numbers of the segments ``[H, W, S]``, or a binary mask for each segment ``[H, W, S, N]``, and the segments
            from number 1 on.
        """
        raise NotImplementedError

    def measured(self, answer: Mapping[str, Any]) -> dict[str, list[Measured]]:
        """Measurements of each segment, by its label, from the answer of the table."""
        raise NotImplementedError

    def grade(self, answer: Mapping[str, Any]) -> dict[str, float]:
        """Probability of each grade; empty without grades."""
        return {}

    def segment(self, number: int, label: str, category: Code, kind: Code, **options: Any) -> Any:
        """Description of a segment, with its name, codes of its category and type, and options of highdicom."""
        algorithm = self.highdicom.AlgorithmIdentificationSequence(
            name=self.name, version=self.version, family=self.code("123109", "Artificial Intelligence", "DCM")
        )
        return self.highdicom.seg.SegmentDescription(
            segment_number=number,
            segment_label=label,
            segmented_property_category=self.code(*category),
            segmented_property_type=self.code(*kind),
            algorithm_type="AUTOMATIC",
            algorithm_identification=algorithm,
            **options,
        )

    def code(self, value: str, meaning: str, scheme: str = "SCT") -> Any:
        """A concept of SNOMED CT, or of another coding scheme."""
        return self.highdicom.sr.CodedConcept(value, scheme, meaning)

    def _read(self, file: str) -> Any:
        """Header of an image. Missing type 2 attributes are added, with empty values."""
        header = self.pydicom.dcmread(file, stop_before_pixels=True)
        for name in TYPE_2:
            if name not in header:
                setattr(header, name, None)
        return header

    def _segmentation(self, subject: str, headers: Sequence[Any], masks: np.ndarray, segments: Sequence[Any]) -> Any:
        """DICOM segmentation of the masks ``[S, rows, columns]`` or ``[S, rows, columns, N]`` on these slices."""
        try:
            return self.highdicom.seg.Segmentation(
                source_images=headers,
                pixel_array=masks.astype(np.uint8),
                segmentation_type="BINARY",
                segment_descriptions=segments,
                series_instance_uid=self.highdicom.UID(),
                series_number=SERIES_NUMBER,
                series_description=self.name,
                sop_instance_uid=self.highdicom.UID(),
                instance_number=1,
                manufacturer=self.name,
                manufacturer_model_name=self.name,
                software_versions=self.version,
                device_serial_number="none",
            )
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise InputError(
                f"subject '{subject}': no DICOM segmentation can refer to its headers ({error}); repair them, or run "
                "inference without configs/dicom_seg.yaml"
            ) from error


class DicomSegWriter(SegmentationWriter):
    """One binary segment per region, which may overlap.

    Args:
        output_dir: see :class:`SegmentationWriter`.
        bundle_root: likewise.
        table: likewise.
        regions: names of the region channels.
        to_regions: transform that converts the label map ``pred`` of an item to region channels.
        property_type: type of the segments, as a name in pydicom's SNOMED codes (``codes.SCT``).
        property_category: category of the segments, likewise, such as ``AnatomicalStructure`` for organs.

    Raises:
        InputError: also if ``property_type`` or ``property_category`` is unknown.
    """

    def __init__(
        self,
        output_dir: str,
        bundle_root: str,
        table: Any,
        regions: Sequence[str],
        to_regions: Callable[[Mapping[str, Any]], dict[str, Any]],
        property_type: str = "Neoplasm",
        property_category: str = "MorphologicallyAbnormalStructure",
    ) -> None:
        super().__init__(output_dir, bundle_root, table)
        self.to_regions = to_regions
        codes = importlib.import_module("pydicom.sr.codedict").codes
        found = {}
        for key, name in (("property_type", property_type), ("property_category", property_category)):
            try:
                code = getattr(codes.SCT, name)
            except AttributeError as error:
                raise InputError(
                    f"{key}='{name}' is not a name in pydicom's codes.SCT; set it to one such as Neoplasm"
                ) from error
            found[key] = (code.value, code.meaning)
        self.segments = [
            self.segment(number, region, found["property_category"], found["property_type"])
            for number, region in enumerate(regions, start=1)
        ]

    def describe(self, item: Mapping[str, Any]) -> tuple[np.ndarray, list]:
        """One binary mask for each region, also where it is empty."""
        return np.moveaxis(torch.as_tensor(self.to_regions(item)["pred"]).cpu().numpy(), 0, -1), self.segments

    def measured(self, answer: Mapping[str, Any]) -> dict[str, list[Measured]]:
        """Expected volume of each region with its 90 % interval (ml), and the expected Dice of its mask."""
        found = {}
        for segment in self.segments:
            region = segment.segment_label
            volume, low, high = (answer[f"volume_{kind}_ml_{region}"] for kind in ("expected", "low", "high"))
            interval = (None, None) if math.isnan(low) else (low, high)
            found[region] = [Measured(VOLUME, volume, "mL", *interval)]
            found[region].append(Measured(EXPECTED_DICE, answer[f"expected_dice_{region}"], "1"))
        return found

    def grade(self, answer: Mapping[str, Any]) -> dict[str, float]:
        """Probability of each grade, unless the network does not grade."""
        prob = {key.removeprefix("prob_"): value for key, value in answer.items() if key.startswith("prob_")}
        return {} if any(map(math.isnan, prob.values())) else prob
