"""Write phantoms as DICOM series with pydicom."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from scripts.tools.phantom import make_subject

LPS = np.diag([-1.0, -1.0, 1.0, 1.0])
SHAPE = (24, 32, 8)
SPACING = (10.0, 7.5, 19.0)


def rotation(axis: int, degrees: float) -> np.ndarray:
    cos, sin = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    return np.roll(np.array([[1, 0, 0], [0, cos, -sin], [0, sin, cos]]), (axis, axis), (0, 1))


def affine_of(direction: np.ndarray) -> np.ndarray:
    """NIfTI affine of slices whose axes are the columns of ``direction``, in DICOM's coordinates."""
    affine = np.eye(4)
    affine[:3, :3] = direction * SPACING
    affine[:3, 3] = [-101.5, -87.25, 12.125]
    return LPS @ affine


AXIAL = affine_of(np.eye(3))
OBLIQUE = affine_of(rotation(0, 20) @ rotation(2, -13))
SAGITTAL = affine_of(np.array([[0.0, 0, 1], [1, 0, 0], [0, -1, 0]]) @ np.diag([1, 1, -1.0]))


def write_series(
    folder: Path, volume: np.ndarray, affine: np.ndarray, description: str = "", study: str = "1.2.3"
) -> list[Path]:
    """Write ``[H, W, S]`` with a NIfTI affine as MR slices. File names and instance numbers are in random order."""
    from pydicom.dataset import FileDataset, FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian, MRImageStorage, generate_uid

    folder.mkdir(parents=True, exist_ok=True)
    lps = LPS @ affine
    spacing = np.linalg.norm(lps[:3, :3], axis=0)
    axes = lps[:3, :3] / spacing
    series, files = generate_uid(), []
    names = np.random.default_rng(len(description)).permutation(volume.shape[2])
    for index, name in enumerate(names):
        meta = FileMetaDataset()
        meta.TransferSyntaxUID, meta.MediaStorageSOPClassUID = ExplicitVRLittleEndian, MRImageStorage
        meta.MediaStorageSOPInstanceUID = generate_uid()
        file = folder / f"{description.replace(' ', '')}IM{name:03d}"
        image = FileDataset(file, {}, file_meta=meta, preamble=b"\0" * 128)
        image.SOPClassUID, image.SOPInstanceUID = MRImageStorage, meta.MediaStorageSOPInstanceUID
        image.StudyInstanceUID, image.SeriesInstanceUID, image.FrameOfReferenceUID = study, series, "1.2.3.4"
        image.PatientID, image.PatientName, image.Modality, image.SeriesDescription = "p", "A^B", "MR", description
        image.SeriesNumber, image.InstanceNumber = 1, int(name) + 1
        image.ImagePositionPatient = [f"{value:.6f}" for value in lps[:3] @ [0, 0, index, 1]]
        image.ImageOrientationPatient = [f"{value:.9f}" for value in [*axes[:, 0], *axes[:, 1]]]
        image.PixelSpacing = [f"{spacing[1]:.6f}", f"{spacing[0]:.6f}"]  # between rows, between columns
        image.SliceThickness = f"{spacing[2]:.6f}"
        image.SamplesPerPixel, image.PhotometricInterpretation = 1, "MONOCHROME2"
        image.Columns, image.Rows = volume.shape[:2]
        image.BitsAllocated, image.BitsStored, image.HighBit = 16, 16, 15
        image.PixelRepresentation = int(volume.min() < 0)
        image.PixelData = volume[:, :, index].T.astype(np.int16 if volume.min() < 0 else np.uint16).tobytes()
        image.save_as(file, enforce_file_format=True)
        files.append(file)
    return files


def write_subject(folder: Path, affine: np.ndarray = AXIAL, seed: int = 5) -> dict[str, np.ndarray]:
    """Write a phantom with one sub-folder per series, and return its volumes."""
    images, _ = make_subject("HGG", SHAPE, seed)
    for modality, volume in images.items():
        write_series(folder / f"ax_{modality}", volume, affine, f"Ax {modality}", f"1.2.3.{seed}")
    return images
