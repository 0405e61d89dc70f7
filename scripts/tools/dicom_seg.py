"""Save masks as DICOM segmentation objects with highdicom (the extra ``dicom``)."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ignite.engine import Events
from monai.engines.workflow import Workflow

from scripts.config import BUNDLE_ROOT, InputError, atomic_path
from scripts.data.dicom import is_dicom, ordered_series

SERIES_NUMBER = 900  # higher than the series numbers of scanners
# type 2 attributes: required but possibly empty, and often removed by anonymisers
TYPE_2 = (
    "PatientID", "PatientName", "PatientBirthDate", "PatientSex",
    "AccessionNumber", "StudyID", "StudyDate", "StudyTime",
)  # fmt: skip


class DicomSegWriter:
    """Inference handler that writes ``<subject>_seg.dcm``: one binary segment per region, on the first modality.

    Args:
        output_dir: folder of the files.
        regions: names of the region channels.
        to_regions: transform that converts the label map ``pred`` of an item to region channels, which may overlap.
        data: all items of the run; their headers are checked before inference starts.
        property_type: type of the segments, as a name in pydicom's SNOMED codes (``codes.SCT``).
        property_category: category of the segments, likewise, such as ``AnatomicalStructure`` for organs.

    Raises:
        InputError: if highdicom is not installed, ``property_type`` is unknown, or a subject (which the message names)
            is not DICOM or has headers to which no segmentation can refer.
    """

    def __init__(
        self,
        output_dir: str,
        regions: Sequence[str],
        to_regions: Callable[[Mapping[str, Any]], dict[str, Any]],
        data: Sequence[Mapping[str, Any]],
        property_type: str = "Neoplasm",
        property_category: str = "MorphologicallyAbnormalStructure",
    ) -> None:
        try:
            self.highdicom, self.pydicom = (importlib.import_module(name) for name in ("highdicom", "pydicom"))
        except ImportError as error:
            raise InputError("DICOM segmentations need highdicom: pip install -e '.[dicom]'") from error
        self.output_dir = Path(output_dir)
        self.to_regions = to_regions
        self.segments = self._describe(regions, property_type, property_category)
        for item in data:
            file = item["image"][0]
            if not is_dicom(file):
                raise InputError(
                    f"subject '{item['subject']}' is not DICOM ({file}), so no DICOM segmentation can refer to it; run "
                    "inference without configs/dicom_seg.yaml"
                )
            header = self._read(file)
            self._segmentation(item["subject"], [header], np.zeros((1, header.Rows, header.Columns, len(regions))))

    def attach(self, engine: Workflow) -> None:
        """Attach to the evaluator."""
        engine.add_event_handler(Events.ITERATION_COMPLETED, self.iteration_completed)

    def iteration_completed(self, engine: Workflow) -> None:
        for item in engine.state.output:
            series = ordered_series(item["pred"].meta["filename_or_obj"])
            regions = torch.as_tensor(self.to_regions(item)["pred"]).cpu().numpy()
            headers = [self._read(image.file) for image in series]
            segmentation = self._segmentation(item["subject"], headers, regions.transpose(3, 2, 1, 0))
            with atomic_path(self.output_dir / f"{item['subject']}_seg.dcm") as path:
                segmentation.save_as(path)

    def _describe(self, regions: Sequence[str], property_type: str, property_category: str) -> list:
        codes = importlib.import_module("pydicom.sr.codedict").codes
        metadata = json.loads((BUNDLE_ROOT / "configs" / "metadata.json").read_text(encoding="utf-8"))
        self.name, self.version = metadata["name"], metadata["version"]
        found = {}
        for key, name in (("property_type", property_type), ("property_category", property_category)):
            try:
                found[key] = getattr(codes.SCT, name)
            except AttributeError as error:
                raise InputError(
                    f"{key}='{name}' is not a name in pydicom's codes.SCT; set it to one such as Neoplasm"
                ) from error
        algorithm = self.highdicom.AlgorithmIdentificationSequence(
            name=self.name, version=self.version, family=codes.DCM.ArtificialIntelligence
        )
        return [
            self.highdicom.seg.SegmentDescription(
                segment_number=number,
                segment_label=region,
                segmented_property_category=found["property_category"],
                segmented_property_type=found["property_type"],
                algorithm_type="AUTOMATIC",
                algorithm_identification=algorithm,
            )
            for number, region in enumerate(regions, start=1)
        ]

    def _read(self, file: str) -> Any:
        """Header of an image. Missing type 2 attributes are added, with empty values."""
        header = self.pydicom.dcmread(file, stop_before_pixels=True)
        for name in TYPE_2:
            if name not in header:
                setattr(header, name, None)
        return header

    def _segmentation(self, subject: str, headers: Sequence[Any], masks: np.ndarray) -> Any:
        """DICOM segmentation of the binary masks ``[S, rows, columns, R]`` on the slices with these headers."""
        try:
            return self.highdicom.seg.Segmentation(
                source_images=headers,
                pixel_array=masks.astype(np.uint8),
                segmentation_type="BINARY",
                segment_descriptions=self.segments,
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
