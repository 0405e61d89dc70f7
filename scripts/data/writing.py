"""Write predictions in the format of their input, and tables."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd
from monai.config import KeysCollection
from monai.data import NibabelWriter
from monai.transforms import SaveImaged

from scripts.config import atomic_path
from scripts.data.pictures import is_picture, write_picture


class LikeInputWriter(NibabelWriter):
    """Write NIfTI files for volumes and pictures for pictures. Each file is written in one step.

    For a picture, integers are saved in the input's format (as PNG for a JPEG, whose compression changes values), and
    several channels of them as the pages of a TIFF. Other numbers are saved as a float32 TIFF with a page per channel.
    """

    def set_data_array(self, data_array, channel_dim=0, squeeze_end_dims: bool = True, **kwargs) -> None:
        super().set_data_array(data_array, channel_dim, squeeze_end_dims=False, **kwargs)

    def set_metadata(self, meta_dict: Mapping | None, resample: bool = True, **options) -> None:
        # with the channel axis still there: MONAI would take three axes for a 2D image with channels
        super().set_metadata(meta_dict, resample, **options)
        if self.data_obj.shape[-1] == 1:  # a single channel loses its axis, a single slice keeps it
            self.data_obj = self.data_obj[..., 0]
        self.source = Path((meta_dict or {}).get("filename_or_obj", ""))

    def write(self, filename, verbose: bool = False, **obj_kwargs) -> None:
        if is_picture(self.source):
            kind = ".tif"
            if np.issubdtype(self.output_dtype, np.integer) and self.data_obj.ndim > 3:
                kind = ".tiff"
            elif np.issubdtype(self.output_dtype, np.integer):
                kind = self.source.suffix.lower().replace(".jpeg", ".png").replace(".jpg", ".png")
            write_picture(np.asarray(self.data_obj, self.output_dtype), str(filename).removesuffix(".nii.gz") + kind)
            return
        with atomic_path(filename) as path:
            super().write(path, verbose=verbose, **obj_kwargs)


def subject_name(metadict: Mapping, saver: object) -> dict:
    """``output_name_formatter`` of ``SaveImaged``. MONAI removes the extension of a name, so one is added here."""
    return {"subject": f"{metadict['subject']}.nii", "idx": None}


class SaveMapd(SaveImaged):
    """Save a mask or map of a subject as ``<output_dir>/<subject>_<postfix>`` in the format of its input.

    Args:
        keys: key of the map; an item without this key is skipped.
        postfix: end of the file name.
        output_dir: folder of the files.
        dtype: data type of the saved values.
        writer: class that writes the file.
    """

    def __init__(
        self,
        keys: KeysCollection,
        postfix: str,
        output_dir: str,
        dtype: str = "float32",
        writer: type[LikeInputWriter] | str = LikeInputWriter,
    ) -> None:
        super().__init__(
            keys,
            output_dir=output_dir,
            output_postfix=postfix,
            output_dtype=np.dtype(dtype).type,
            output_name_formatter=subject_name,
            writer=writer,
            separate_folder=False,
            resample=False,
            print_log=False,
            allow_missing_keys=True,
        )


def write_csv(table: pd.DataFrame, file: Path) -> None:
    """Write a table in one step, with six significant digits."""
    with atomic_path(file) as path:
        table.to_csv(path, index=False, float_format="%.6g")
