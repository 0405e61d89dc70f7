"""What a clinic has, on 127.0.0.1: an archive (Orthanc), a server of MONAI Label, and studies in DICOM."""

from __future__ import annotations

import contextlib
import http.server
import json
import os
import re
import socket
import subprocess
import time
from collections.abc import Iterator
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
def running(folder: Path, url: str, **options) -> Iterator[subprocess.Popen]:
    """A server, from when it answers at ``url`` until the end of the block; its log is ``<folder>/log``."""
    log = folder / "log"
    with log.open("w") as stream:
        process = subprocess.Popen(stdout=stream, stderr=stream, **options)
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


def documented(word: str) -> str:
    """The block of docs/clinic.md that holds a word."""
    text = (ROOT / "docs" / "clinic.md").read_text(encoding="utf-8")
    (block,) = [block for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL) if word in block]
    return block


class Archive:
    """A running Orthanc with DICOMweb, with the configuration of the docs but for port and folder."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.port = folder, free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.web = f"{self.url}/dicom-web"
        settings = json.loads(re.search(r"{.*}", documented("orthanc.json <<"), re.DOTALL)[0])
        ((user, password),) = settings["RegisteredUsers"].items()
        self.session = requests.Session()
        self.session.auth = self.auth = (user, password)
        folder.mkdir(parents=True)
        own = {"StorageDirectory": str(folder / "db"), "IndexDirectory": str(folder / "db"), "HttpPort": self.port}
        (folder / "orthanc.json").write_text(json.dumps(settings | own))

    def running(self) -> contextlib.AbstractContextManager[subprocess.Popen]:
        return running(self.folder, self.url, args=["Orthanc", str(self.folder / "orthanc.json")])

    def put_all(self, folder: Path) -> None:
        """Store the files below a folder."""
        for file in folder.rglob("*"):
            if file.is_file():
                self.session.post(f"{self.url}/instances", data=file.read_bytes(), timeout=30).raise_for_status()

    def series(self, **filters: str) -> dict[str, str]:
        """UIDs of series by their description."""
        found = self.session.get(
            f"{self.web}/series", params={"includefield": "0008103E", **filters}, timeout=30
        ).json()
        return {one["0008103E"]["Value"][0]: one["0020000E"]["Value"][0] for one in found}

    def instance(self, uid: str) -> pydicom.Dataset:
        """An object of the archive, by its SOPInstanceUID."""
        (found,) = self.session.get(f"{self.web}/instances", params={"SOPInstanceUID": uid}, timeout=30).json()
        parts = (found["0020000D"]["Value"][0], found["0020000E"]["Value"][0], uid)
        url = "{}/studies/{}/series/{}/instances/{}".format(self.web, *parts)
        answer = self.session.get(url, headers={"Accept": 'multipart/related; type="application/dicom"'}, timeout=30)
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


def write_ct(folder: Path, patient: str = "torso", slices: int = CT_SHAPE[2]) -> None:
    """A phantom CT as a series, or its lowest slices."""
    volume, _ = phantom_ct.make_subject(np.random.default_rng(1), CT_SHAPE, CT_SPACING)
    write_series(
        folder, volume[..., :slices].astype(np.int16), np.diag([*CT_SPACING, 1.0]), "CT phantom", generate_uid()
    )
    scaled = {"RescaleSlope": 1, "RescaleIntercept": 0, "FrameOfReferenceUID": generate_uid()}
    complete(folder, patient, SOPClassUID=CTImageStorage, Modality="CT", **scaled)


def write_brain(
    folder: Path, descriptions: dict[str, str] = DESCRIPTIONS, patient: str = "brain", slices: int = BRAIN_SHAPE[2]
) -> None:
    """A phantom brain as a study with a sub-folder for each series."""
    images, _ = phantom.make_subject("HGG", (*BRAIN_SHAPE[:2], slices), 5)
    study = generate_uid()
    for modality, description in descriptions.items():
        affine = np.diag([*BRAIN_SPACING, 1.0])
        write_series(folder / modality, images[modality], affine, description, study)
    complete(folder, patient)


def label_server(archive: str, auth: tuple[str, str], folder: Path, port: int, **environment: str) -> dict:
    """Arguments of ``Popen`` that start our app as the docs say, with other addresses and folders."""
    python = Path(os.environ.get("LABEL_PYTHON", ROOT / ".venv-label" / "bin" / "python"))
    line = documented("start_server").replace("\\\n", " ").splitlines()[-1]
    line = line.replace(".venv-label/bin/python", f"exec {python}").replace("8000", str(port))
    line = line.replace("http://127.0.0.1:8042/dicom-web", archive)
    line = re.sub(r"^((?:\w+=\S+ )+)", r"export \1; ", line)
    own = {"MONAI_LABEL_DICOMWEB_CACHE_PATH": str(folder / "cache"), "TMPDIR": str(folder)}
    own |= {"MONAI_LABEL_DICOMWEB_USERNAME": auth[0], "MONAI_LABEL_DICOMWEB_PASSWORD": auth[1]}
    return {"args": ["bash", "-euc", line], "env": {**os.environ, **own, **environment}, "cwd": ROOT}


class Proxy(http.server.ThreadingHTTPServer):
    """Passes requests on to an archive, and spoils the images that come back: ``fault`` is None, or

    - ``gone``: the connection ends without an answer,
    - ``truncated``: half of the bytes of the answer arrive,
    - ``no pixels``: the last image has half of its pixels,
    - ``path as UID``: the UID of the last image is a path,
    - ``slow``: the answer comes after five seconds for each image.
    """

    daemon_threads = True

    def __init__(self, archive: Archive) -> None:
        super().__init__(("127.0.0.1", 0), ProxyHandler)
        self.archive, self.fault = archive, None
        self.web = f"http://127.0.0.1:{self.server_port}/dicom-web"


class ProxyHandler(http.server.BaseHTTPRequestHandler):
    server: Proxy

    def do_GET(self) -> None:
        self.forward(b"")

    def do_POST(self) -> None:
        if self.headers["Transfer-Encoding"] != "chunked":
            return self.forward(self.rfile.read(int(self.headers["Content-Length"])))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return self.forward(body)

    def forward(self, body: bytes) -> None:
        fault = self.server.fault
        if fault == "gone":
            self.connection.close()
            return
        kept = {name: self.headers[name] for name in ("Accept", "Authorization", "Content-Type") if self.headers[name]}
        answer = requests.request(
            self.command, self.server.archive.url + self.path, data=body, headers=kept, timeout=60
        )
        content, kind = answer.content, answer.headers.get("Content-Type", "")
        if "multipart" in kind and fault == "slow":
            time.sleep(5 * content.count(b"Content-Type: application/dicom"))
        if "multipart" in kind and fault in ("no pixels", "path as UID"):
            content = with_spoiled_image(content, fault)
        self.send_response(answer.status_code)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        half = "multipart" in kind and fault == "truncated"
        self.wfile.write(content[: len(content) // 2] if half else content)
        if half:
            self.connection.close()

    def log_message(self, *arguments: object) -> None:
        pass


def with_spoiled_image(content: bytes, fault: str) -> bytes:
    """A multipart message whose last image has half of its pixels, or a path as its UID."""
    head, last = content.rsplit(b"\r\n\r\n", 1)
    image, end = last.rsplit(b"\r\n--", 1)
    read = pydicom.dcmread(pydicom.filebase.DicomBytesIO(image))
    if fault == "no pixels":
        read.PixelData = read.PixelData[: len(read.PixelData) // 4 * 2]
    else:
        read.SOPInstanceUID = read.file_meta.MediaStorageSOPInstanceUID = "../../../escaped"
    stream = pydicom.filebase.DicomBytesIO()
    read.save_as(stream, enforce_file_format=True)
    return head + b"\r\n\r\n" + stream.getvalue() + b"\r\n--" + end
