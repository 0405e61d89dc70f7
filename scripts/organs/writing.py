"""Files of label maps: NIfTI with the names of the structures, as TotalSegmentator has it, and DICOM segmentations."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from xml.etree import ElementTree

import nibabel as nib
import numpy as np
import torch

from scripts.data.writing import LikeInputWriter
from scripts.dicom.report import MEAN_HU, PROBABILITY, VOLUME, Measured
from scripts.dicom.segmentation import SegmentationWriter
from scripts.organs.structures import catalogue


class LabelMapWriter(LikeInputWriter):
    """Write a label map with a table of its structures: number, name and colour."""

    @classmethod
    def create_backend_obj(cls, data_array, *args, **kwargs) -> nib.Nifti1Image:  # type: ignore[override]
        """MONAI's NIfTI image, with the table as an extension of its header."""
        image = super().create_backend_obj(data_array, *args, **kwargs)
        present = set(np.unique(np.asarray(data_array)).tolist())
        image.header.extensions.append(nib.nifti1.Nifti1Extension(0, label_table(present)))
        return image


def label_table(present: set[int]) -> bytes:
    """XML of Connectome Workbench with the structures of these numbers."""
    root = ElementTree.Element("CaretExtension")
    volume = ElementTree.SubElement(root, "VolumeInformation", Index="0")
    table = ElementTree.SubElement(volume, "LabelTable")
    for name, entry in catalogue().items():
        if entry["number"] in present:
            red, green, blue = (f"{value / 255:.4g}" for value in entry["colour"])
            attributes = {"Key": str(entry["number"]), "Red": red, "Green": green, "Blue": blue, "Alpha": "1"}
            ElementTree.SubElement(table, "Label", attributes).text = name
    kind = ElementTree.SubElement(volume, "VolumeType")
    kind.text = "Label"
    return ElementTree.tostring(root, encoding="UTF-8", xml_declaration=True)


class StructureSegWriter(SegmentationWriter):
    """One binary segment per structure that was found, with its name, colour and SNOMED codes."""

    def describe(self, item: Mapping[str, Any]) -> tuple[np.ndarray, list]:
        """Numbers of the segments ``[H, W, S]``, and the segments, in the order of the structures."""
        labels = torch.as_tensor(item["pred"])[0].cpu().numpy().astype(np.uint8)
        present = set(np.unique(labels).tolist())
        found = [entry for entry in catalogue().values() if entry["number"] in present]
        order = np.zeros(256, np.uint8)
        order[[entry["number"] for entry in found]] = np.arange(1, len(found) + 1)
        return order[labels], [self._describe(number, entry) for number, entry in enumerate(found, start=1)]

    def _describe(self, number: int, entry: Mapping[str, Any]) -> Any:
        options: dict[str, Any] = {"display_color": self.highdicom.color.CIELabColor.from_rgb(*entry["colour"])}
        if "region" in entry:
            options["anatomic_regions"] = [self.code(*entry["region"])]
        segment = self.segment(number, entry["name"], entry["category"], entry["type"], **options)
        if "modifier" in entry:  # the side; highdicom has no arguments for modifiers
            (kind,) = segment.SegmentedPropertyTypeCodeSequence
            kind.SegmentedPropertyTypeModifierCodeSequence = [self.code(*entry["modifier"])]
        if "region_modifier" in entry:
            (region,) = segment.AnatomicRegionSequence
            region.AnatomicRegionModifierSequence = [self.code(*entry["region_modifier"])]
        return segment

    def measured(self, answer: Mapping[str, Any]) -> dict[str, list[Measured]]:
        """Volume (mm3), mean HU and mean probability of each structure."""
        return {
            row["structure"]: [
                Measured(VOLUME, row["volume_mm3"], "mm3"),
                Measured(MEAN_HU, row["mean_hu"], "[hnsf'U]"),
                Measured(PROBABILITY, row["probability"], "1"),
            ]
            for row in answer["structures"]
        }
