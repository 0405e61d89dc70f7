"""What a clinic has, on 127.0.0.1: an archive (Orthanc), a server of MONAI Label, and studies in DICOM."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pydicom
import requests
from dicom_phantom import write_series
from pydicom.uid import CTImageStorage, generate_uid

from conftest import ROOT
from scripts.tools import phantom, phantom_ct

CT_SHAPE, CT_SPACING = (128, 128, 64), (3.0, 3.0, 8.0)
BRAIN_SHAPE, BRAIN_SPACING = (64, 64, 32), (3.0, 3.0, 4.0)
DESCRIPTIONS = {"t1": "Ax T1", "t1ce": "Ax T1 post Gd", "t2": "Ax T2 TSE", "flair": "Ax T2 FLAIR"}
PLUGIN = "/usr/share/orthanc/plugins/libOrthancDicomWeb.so"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def running(command: Sequence[str], folder: Path, url: str, **options) -> Iterator[subprocess.Popen]:
    """A server, from when it answers at ``url`` until the end of the block; its log is ``<folder>/log``."""
    log = folder / "log"
    with log.open("w") as stream:
        process = subprocess.Popen(command, stdout=stream, stderr=stream, **options)
    try:
        end = time.monotonic() + 180
        while not answers(url):
            assert process.poll() is None, log.read_text()[-3000:]
            assert time.monotonic() < end, f"{url} does not answer"
            time.sleep(0.5)
        yield process
    finally:
        process.terminate()
        process.wait(30)


def answers(url: str, **options) -> bool:
    try:
        return requests.get(url, timeout=5, **options).status_code < 500
    except requests.ConnectionError:
        return False


class Archive:
    """A running Orthanc with DICOMweb."""

    def __init__(self, folder: Path, **settings) -> None:
        self.folder, self.port = folder, free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.web = f"{self.url}/dicom-web"
        own = {"StorageDirectory": str(folder / "db"), "IndexDirectory": str(folder / "db"), "Plugins": [PLUGIN]}
        own |= {"HttpPort": self.port, "HttpBindAddresses": ["127.0.0.1"], "DicomServerEnabled": False}
        own |= {"RemoteAccessAllowed": False, "AuthenticationEnabled": False, **settings}
        folder.mkdir(parents=True)
        (folder / "orthanc.json").write_text(json.dumps(own))

    def running(self) -> contextlib.AbstractContextManager[subprocess.Popen]:
        return running([shutil.which("Orthanc") or "Orthanc", str(self.folder / "orthanc.json")], self.folder, self.url)

    def put(self, file: Path) -> None:
        requests.post(f"{self.url}/instances", data=file.read_bytes(), timeout=30).raise_for_status()

    def series(self, **filters: str) -> dict[str, str]:
        """UIDs of series by their description."""
        found = requests.get(f"{self.web}/series", params={"includefield": "0008103E", **filters}, timeout=30).json()
        return {one["0008103E"]["Value"][0]: one["0020000E"]["Value"][0] for one in found}

    def instance(self, uid: str) -> pydicom.Dataset:
        """An object of the archive, by its SOPInstanceUID."""
        (found,) = requests.get(f"{self.web}/instances", params={"SOPInstanceUID": uid}, timeout=30).json()
        parts = (found["0020000D"]["Value"][0], found["0020000E"]["Value"][0], uid)
        url = "{}/studies/{}/series/{}/instances/{}".format(self.web, *parts)
        answer = requests.get(url, headers={"Accept": 'multipart/related; type="application/dicom"'}, timeout=30)
        body = answer.content.split(b"\r\n\r\n", 1)[1]
        return pydicom.dcmread(pydicom.filebase.DicomBytesIO(body))


def complete(folder: Path, patient: str, **values) -> None:
    """Give the files of a study the attributes that viewers ask for, and others."""
    own = {"PatientID": patient, "PatientName": f"{patient}^Phantom", "StudyDate": "20260101", "StudyTime": "120000"}
    own |= dict.fromkeys(("AccessionNumber", "PatientBirthDate", "PatientSex"), "") | {"StudyID": "1"}
    for file in folder.rglob("*"):
        if file.is_file():
            image = pydicom.dcmread(file)
            for name, value in (own | values).items():
                setattr(image, name, value)
            image.file_meta.MediaStorageSOPClassUID = image.SOPClassUID
            image.save_as(file)


def write_ct(folder: Path) -> None:
    """A phantom CT as a series."""
    volume, _ = phantom_ct.make_subject(np.random.default_rng(1), CT_SHAPE, CT_SPACING)
    write_series(folder, volume.astype(np.int16), np.diag([*CT_SPACING, 1.0]), "CT phantom", generate_uid())
    scaled = {"RescaleSlope": 1, "RescaleIntercept": 0, "FrameOfReferenceUID": generate_uid()}
    complete(folder, "torso", SOPClassUID=CTImageStorage, Modality="CT", **scaled)


def write_brain(folder: Path, descriptions: dict[str, str] = DESCRIPTIONS, patient: str = "brain") -> None:
    """A phantom brain as a study with a sub-folder for each series."""
    images, _ = phantom.make_subject("HGG", BRAIN_SHAPE, 5)
    study = generate_uid()
    for modality, description in descriptions.items():
        affine = np.diag([*BRAIN_SPACING, 1.0])
        write_series(folder / modality, images[modality], affine, description, study)
    complete(folder, patient)


def label_server(archive: str, folder: Path, port: int, **environment: str) -> tuple[list[str], dict[str, str]]:
    """Command and environment of our app of MONAI Label with an archive as its studies."""
    python = Path(os.environ.get("LABEL_PYTHON", ROOT / ".venv-label" / "bin" / "python"))
    command = [str(python), "-m", "monailabel.main", "start_server", "--app", str(ROOT / "label_app")]
    command += ["--studies", archive, "--host", "127.0.0.1", "--port", str(port)]
    own = {"MONAI_ZOO_SOURCE": "local", "MONAI_LABEL_DICOMWEB_CACHE_PATH": str(folder / "cache")}
    return command, {**os.environ, "OMP_WAIT_POLICY": "PASSIVE", "TMPDIR": str(folder), **own, **environment}
