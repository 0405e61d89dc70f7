"""Files of synthetic CTs, which say what they are."""

from __future__ import annotations

import nibabel as nib

from scripts.data.writing import LikeInputWriter

DESCRIPTION = b"synthetic contrast CT; not for diagnosis"


class SyntheticWriter(LikeInputWriter):
    """Write a CT whose header says that it is synthetic."""

    @classmethod
    def create_backend_obj(cls, data_array, *args, **kwargs) -> nib.Nifti1Image:  # type: ignore[override]
        """MONAI's NIfTI image, with a description."""
        image = super().create_backend_obj(data_array, *args, **kwargs)
        image.header["descrip"] = DESCRIPTION
        return image
