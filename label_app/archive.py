"""A DICOMweb archive (PACS) as the studies of MONAI Label: series are folders of DICOM files."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import requests
from dicomweb_client.session_utils import create_session_from_user_pass
from fastapi import HTTPException
from monailabel.config import settings
from monailabel.datastore.dicom import DICOMwebClientX, DICOMWebDatastore
from pydicom.dataset import Dataset

UID = re.compile(r"(?=.{1,64}$)[0-9]+(\.[0-9]+)*")
SCANS = ("CT", "MR")  # DICOM modalities that are listed
AS_STORED = (("application/dicom", "*"),)  # archives cannot decompress all that they hold
FIELDS = ("SeriesDescription", "NumberOfSeriesRelatedInstances")


class Archive(DICOMWebDatastore):
    """Series of an archive, downloaded whole when they are first needed.

    MONAI Label's own datastore converts series with SimpleITK, and needs programs of dcmqi that it downloads from
    GitHub. This one keeps them as DICOM, which the bundles read.

    Args:
        url: of the archive's DICOMweb server.
        cache_path: folder of the downloaded series; empty for MONAI Label's default.
    """

    def __init__(self, url: str, cache_path: str) -> None:
        user, password = settings.MONAI_LABEL_DICOMWEB_USERNAME, settings.MONAI_LABEL_DICOMWEB_PASSWORD
        client = DICOMwebClientX(url=url, session=create_session_from_user_pass(user, password) if user else None)
        self.referenced: dict[str, str] = {}  # series that each segmentation refers to
        client.set_http_retry_params(max_attempts=3)  # the default waits for half a minute
        super().__init__(client, {}, cache_path or None, convert_to_nifti=False)

    @property
    def folder(self) -> Path:
        """Where downloads are kept."""
        return Path(self._datastore_path)

    def list_images(self) -> list[str]:
        """UIDs of the CT and MR series of the archive."""
        return list(self.studies())

    def studies(self) -> dict[str, str]:
        """UID of the study of each CT and MR series."""
        found = [series for scan in SCANS for series in self._search(search_filters={"Modality": scan})]
        return {str(series.SeriesInstanceUID): str(series.StudyInstanceUID) for series in found}

    def get_labeled_images(self, label_tag: str | None = None, labels: Any = None) -> list[str]:
        """Series that a segmentation refers to, now: MONAI Label remembers them for two hours.

        What a segmentation refers to does not change, so it is asked once.
        """
        segmentations = self._search(search_filters={"Modality": "SEG"})
        for series in segmentations:
            uid = str(series.SeriesInstanceUID)
            if uid not in self.referenced:
                found = self._ask(self._client.retrieve_series_metadata, str(series.StudyInstanceUID), uid)
                sequence = self._ask(Dataset.from_json, found[0]).get("ReferencedSeriesSequence")
                self.referenced[uid] = str(sequence[0].SeriesInstanceUID) if sequence else ""
        now = {self.referenced[str(series.SeriesInstanceUID)] for series in segmentations}
        return sorted(now & self.studies().keys())

    def get_image_uri(self, image_id: str) -> str:
        """Folder of a series."""
        return str(self.fetch(self.series(image_id)))

    def get_image_info(self, image_id: str) -> dict[str, Any]:
        """Patient, study and date of a series, which the viewer needs to open it."""
        return self._ask(self._dicom_info, image_id)

    def series(self, uid: str) -> Dataset:
        """What the archive knows of a series.

        Raises:
            HTTPException: 404 if there is no such series.
        """
        known = self._search(search_filters={"SeriesInstanceUID": uid}) if UID.fullmatch(uid) else []
        found = [series for series in known if series.SeriesInstanceUID == uid]
        if not found:
            raise HTTPException(404, f"the archive has no series '{uid}'")
        return found[0]

    def subject(
        self, uid: str, patterns: Mapping[str, str], modalities: Sequence[str] | None = None
    ) -> tuple[Path, dict[str, str]]:
        """Folder with one sub-folder for each modality, of the study that a series belongs to.

        A series belongs to the first modality whose pattern its SeriesDescription matches, whatever the case. The asked
        series is preferred to others of its modality.

        Args:
            uid: SeriesInstanceUID.
            patterns: a regular expression for each modality.
            modalities: those that are needed; None needs all.

        Returns:
            The folder, and the description of the series that was taken for each modality.

        Raises:
            HTTPException: 404 without such a series, 422 for a modality with no series or several.
        """
        asked = self.series(uid)
        siblings = self._search(str(asked.StudyInstanceUID), search_filters={"Modality": str(asked.Modality)})
        found: dict[str, list[Dataset]] = {modality: [] for modality in patterns}
        for sibling in siblings:
            text = str(sibling.get("SeriesDescription", ""))
            matched = [name for name, pattern in patterns.items() if re.search(pattern, text, re.IGNORECASE)]
            if matched:
                found[matched[0]].append(sibling)
        wanted = {name: found[name] for name in patterns if modalities is None or name in modalities}
        chosen = {name: [s for s in series if s.SeriesInstanceUID == uid] or series for name, series in wanted.items()}
        for modality, series in chosen.items():
            if len(series) != 1:
                names = [str(one.get("SeriesDescription", "")) for one in series or siblings]
                number = "several" if series else "no"
                raise HTTPException(422, f"the study has {number} series for modality '{modality}' among {names}")
        folder = self.folder / "subjects" / uid
        shutil.rmtree(folder, ignore_errors=True)
        for modality, (one,) in chosen.items():
            target = folder / modality
            target.mkdir(parents=True)
            for file in self.fetch(one).iterdir():
                os.link(file, target / file.name)
        return folder, {name: str(one.get("SeriesDescription", "")) for name, (one,) in chosen.items()}

    def fetch(self, series: Dataset) -> Path:
        """Folder of the files of a series, downloaded unless they are there.

        Raises:
            HTTPException: 502 if the archive cannot be reached, or does not give all of the series.
        """
        uid = _name(series.SeriesInstanceUID)
        target = self.folder / "series" / uid
        if target.is_dir():
            return target
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".partial_", dir=target.parent) as folder:
            partial = Path(folder, "series")
            partial.mkdir()
            study = str(series.StudyInstanceUID)
            instances = self._ask(self._client.retrieve_series, study, uid, media_types=AS_STORED)
            for instance in instances:
                self._ask(_check_whole, instance)
                instance.save_as(partial / f"{_name(instance.SOPInstanceUID)}.dcm", enforce_file_format=True)
            expected = int(series.get("NumberOfSeriesRelatedInstances", len(instances)))
            if len(instances) != expected or not instances:
                raise HTTPException(502, f"the archive gave {len(instances)} of {expected} images of series '{uid}'")
            partial.rename(target)
        return target

    def save_label(
        self, image_id: str, label_filename: str, label_tag: str, label_info: Any, label_id: str = ""
    ) -> str:
        """Refuse a corrected mask: MONAI Label would convert it by programs that it downloads.

        Raises:
            HTTPException: 422.
        """
        raise HTTPException(422, "an archive takes no corrected masks; use a folder of studies (docs/monai_label.md)")

    def store(self, objects: Sequence[Dataset]) -> None:
        """Put DICOM objects into the archive.

        Raises:
            HTTPException: 502 if it does not take them.
        """
        if objects:
            self._ask(self._client.store_instances, objects)

    def _search(self, *study: str, **filters: Any) -> list[Dataset]:
        answer = self._ask(self._client.search_for_series, *study, fields=FIELDS, **filters)
        return [self._ask(Dataset.from_json, series) for series in answer]

    def _ask(self, function: Any, *arguments: Any, **options: Any) -> Any:
        """Call the archive, or read what it sent; failures are sent to the client with their reason."""
        try:
            return function(*arguments, **options)
        except HTTPException:
            raise
        except requests.RequestException as error:
            raise HTTPException(502, f"the archive {self._client.base_url} does not answer: {error}") from error
        except Exception as error:  # pydicom raises many kinds for damaged files
            raise HTTPException(502, f"the archive {self._client.base_url} sent damaged data: {error!r}") from error


def _name(uid: Any) -> str:
    """The UID as the name of a file; HTTPException (502) for text that is none, such as a path."""
    if not UID.fullmatch(str(uid)):
        raise HTTPException(502, f"the archive sent {str(uid)!r}, which is no UID")
    return str(uid)


def _check_whole(instance: Dataset) -> None:
    """Raise HTTPException (502) for an image whose pixels are missing or truncated."""
    pixels = instance.get("PixelData", b"")
    expected = 0
    if not instance.file_meta.TransferSyntaxUID.is_compressed:
        expected = instance.Rows * instance.Columns * instance.BitsAllocated * instance.SamplesPerPixel // 8
    if not pixels or len(pixels) < expected:
        counts = f"{instance.SOPInstanceUID} has {len(pixels)} of {expected} bytes"
        raise HTTPException(502, f"the archive sent an image without all of its pixels: {counts}")
