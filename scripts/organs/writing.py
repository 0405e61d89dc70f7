"""Label maps with the names of their structures in the NIfTI header, as TotalSegmentator writes them."""

from __future__ import annotations

from xml.etree import ElementTree

import nibabel as nib
import numpy as np

from scripts.data.writing import LikeInputWriter
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
