"""MONAI Label app for the bundles of its parent folder. Its answers also hold the row or rows of a subject's table.

Start the server with ``--app <repository>/label_app``. Nothing is copied or downloaded (docs/monai_label.md).
"""

from __future__ import annotations

import atexit
import logging
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from fastapi import HTTPException
from monai.data import NibabelWriter
from monailabel.config import settings
from monailabel.interfaces.app import MONAILabelApp
from monailabel.tasks.activelearning.first import First
from monailabel.tasks.activelearning.random import Random
from monailabel.tasks.infer.bundle import BundleInferTask
from monailabel.tasks.train.bundle import BundleTrainTask

sys.path.append(str(Path(__file__).parent))  # MONAI Label imports this file by its path
from archive import Archive
from strategy import LeastExpectedDice

logger = logging.getLogger(__name__)
ROOT = Path(__file__).resolve().parents[1]
CHOICES = {
    "sampler": ("ddim", "ddpm", "dpm_solver", "unipc"),
    "fusion": ("mean", "majority", "staple"),
    "result_extension": (".nii.gz", ".nii", ".nrrd", ".seg.nrrd"),
    "logging": tuple(name for level in ("DEBUG", "INFO", "WARNING", "ERROR") for name in (level, level.lower())),
}
RANGES = {"num_inference_steps": (0, 1000), "num_samples": (1, 32), "sw_batch_size": (1, 32), "batch_size": (1, 64)}
SWITCHES = ("tta", "store")
SHARES = {"overlap": 0.9}  # from 0 to this
DEVICE = re.compile(r"cpu|mps|cuda(:\d+)?")
UPLOADS = tempfile.mkdtemp(prefix="medsegdiff_label_")  # MONAI Label writes what clients upload to the temporary folder
tempfile.tempdir = UPLOADS
atexit.register(shutil.rmtree, UPLOADS, ignore_errors=True)


class Infer(BundleInferTask):
    """Inference of a bundle. The answer also holds what its table says. Input errors are sent to the client.

    The option ``volume`` selects the volume of the answer, such as the uncertainty (bits).
    """

    def __init__(self, bundle: Path, volumes: dict[str, str], conf: dict[str, str], studies: str) -> None:
        super().__init__(str(bundle), conf)
        if "modalities" in conf and "modalities" in self.bundle_config.config:
            names = [name.strip() for name in conf["modalities"].split(",")]
            if wrong := [name for name in names if name.startswith(("$", "@", "%"))]:
                raise ValueError(f"--conf modalities: {wrong} start with '$', '@' or '%', which is refused")
            self.bundle_config["modalities"] = names
        self.volumes = volumes
        self._config["volume"] = list(volumes)
        self.store: Callable[[Sequence[Any]], None] | None = None
        objects = bundle / "configs" / "dicom_seg.yaml"
        self.objects = yaml.safe_load(objects.read_text())["+reports"][0] if objects.is_file() else None
        own = (
            settings.MONAI_LABEL_SESSION_PATH,
            settings.MONAI_LABEL_DATASTORE_CACHE_PATH,
            settings.MONAI_LABEL_DICOMWEB_CACHE_PATH,
        )
        folders = (studies, UPLOADS, Path.home() / ".cache" / "monailabel", *filter(None, own))
        self.folders = [Path(folder).resolve() for folder in folders]

    def offer_store(self, store: Callable[[Sequence[Any]], None]) -> None:
        """Offer clients the option ``store``, which puts segmentation and report into an archive."""
        if self.objects:
            self.store, self._config["store"] = store, False

    def __call__(self, request: dict[str, Any], callbacks: Any = None) -> tuple[Any, dict]:
        if not request.get("image"):
            raise HTTPException(404, "the studies folder has no image of this name")
        if not isinstance(request["image"], str):
            raise HTTPException(422, "image must be one name")
        weights = tuple(file.name for file in Path(self.bundle_path, "models").glob("*.pt"))
        choices = CHOICES | {"volume": tuple(self.volumes), "model_filename": weights}
        check_options(request, choices, self._config.get("device", []))
        check_path(request["image"], self.folders)
        try:
            return super().__call__(request, callbacks)
        except Exception as error:
            message = sys.modules["scripts.config"].explain(error)  # MONAI Label imports it again for each request
            if message is None:
                raise
            raise HTTPException(422, message) from error

    def inferer(self, data: Any = None) -> Any:
        """Function that returns all outputs of the inferer, not only the probability of the mask."""
        return super().inferer(data).predict

    def run_inferer(self, data: dict[str, Any], convert_to_batch: bool = True, device: str = "cuda") -> dict[str, Any]:
        """Put each output of the inferer under its own key of the item, as the bundle's postprocessing needs."""
        data = super().run_inferer(data, convert_to_batch, device)
        return data | data.pop(self.key_pred)

    def writer(self, data: dict[str, Any], extension: str | None = None, dtype: Any = None) -> tuple[Any, dict]:
        """File of the selected volume, and what the table of the bundle says of the subject."""
        name = data["volume"] if isinstance(data["volume"], str) else data["volume"][0]
        item = data | {"pred": data["pred"][None]}  # MONAI Label removed the axis of the label map
        answer = without_nan(self.bundle_config.get_parsed_content("table").answer(item))
        if data.get("store"):
            answer["stored"] = self.stored(item)
        if name != "mask":
            return write_volume(data[self.volumes[name]]), answer
        return super().writer(data | {self.output_json_key: answer}, extension, dtype)

    def stored(self, item: dict[str, Any]) -> dict[str, str]:
        """UIDs of the segmentation and of the report that are put into the archive; empty if nothing was found."""
        if self.store is None or self.objects is None:
            raise HTTPException(422, "store: the studies are no archive, or this model makes no DICOM segmentations")
        self.bundle_config["dicom_objects"] = {**self.objects, "output_dir": UPLOADS}
        found = self.bundle_config.get_parsed_content("dicom_objects").objects(item)
        self.store(list(found.values()))
        return {kind: str(one.SOPInstanceUID) for kind, one in found.items()}


def without_nan(value: Any) -> Any:
    """The value with None instead of NaN, which JSON does not have."""
    if isinstance(value, dict):
        return {key: without_nan(part) for key, part in value.items()}
    if isinstance(value, list):
        return [without_nan(part) for part in value]
    return None if value != value else value


def check_options(request: dict[str, Any], choices: Mapping[str, Sequence[str]], devices: Sequence[str]) -> None:
    """Answer 422 unless every option of a request has the right type and one of its values.

    MONAI Label writes options into the configuration, whose text is code, and into names of files.

    Args:
        request: of a client.
        choices: values of an option, by its name.
        devices: names that the server offers.
    """
    for name, allowed in choices.items():
        value = request.get(name, list(allowed))
        for choice in value if isinstance(value, list) and value else [value] * bool(allowed):
            if choice not in allowed:
                raise HTTPException(422, f"{name} '{choice}' is not one of {list(allowed)}")
    for name, (low, high) in RANGES.items():
        value = request.get(name, low)
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise HTTPException(422, f"{name}={value!r} must be a whole number from {low} to {high}")
    for name, largest in SHARES.items():
        value = request.get(name, 0)
        if not isinstance(value, (int, float)) or not 0 <= value <= largest:  # NaN is not
            raise HTTPException(422, f"{name}={value!r} must be a number from 0 to {largest}")
    for name in SWITCHES:
        if not isinstance(request.get(name, False), bool):
            raise HTTPException(422, f"{name}={request[name]!r} must be true or false")
    device = request.get("device", "cpu")
    for value in device if isinstance(device, list) else [device]:
        if value and value not in devices and not (isinstance(value, str) and DEVICE.fullmatch(value)):
            names = [*devices, "cpu", "mps", "cuda", "cuda:<number>"]
            raise HTTPException(422, f"device {value!r} is not one of {names}")
    for name, value in request.items():
        if isinstance(value, str) and name != "image" and value.startswith(("$", "@", "%")):
            raise HTTPException(422, f"{name}: text that starts with '$', '@' or '%' is refused")


def check_path(image: str, folders: list[Path]) -> None:
    """Answer 403 unless the file of a request lies in one of the folders, symbolic links resolved."""
    if not any(Path(image).resolve().is_relative_to(folder) for folder in folders):
        raise HTTPException(403, "the image is not in the studies folder")


def write_volume(volume: Any) -> str:
    """Write ``[R, H, W, S]`` as inference does, with one component per region. The server deletes the sent file."""
    writer = NibabelWriter(output_dtype=np.float32)
    writer.set_data_array(volume, channel_dim=0)
    writer.set_metadata({"affine": volume.affine}, resample=False)
    with tempfile.NamedTemporaryFile(suffix=".nii.gz", delete=False) as file:
        writer.write(file.name)
    return file.name


class TrainOnOneDevice(BundleTrainTask):
    """Training of the bundle on one device. With MONAI Label's multi-GPU default, nothing would be trained."""

    def __call__(self, request: dict[str, Any], datastore: Any) -> dict:
        return super().__call__(request | {"multi_gpu": False}, datastore)


class BundlesApp(MONAILabelApp):
    """App with a model for each bundle, which can segment and be trained."""

    def __init__(self, app_dir: str, studies: str, conf: dict[str, str]) -> None:
        self.bundles = {}
        self.series: dict[str, dict[str, str]] = {}  # patterns of SeriesDescription by model and modality
        for file in (ROOT / "configs" / "inference.yaml", *sorted(ROOT.glob("bundles/*/configs/inference.yaml"))):
            if served := yaml.safe_load(file.read_text(encoding="utf-8")).get("label_app"):
                self.bundles[served["model"]] = (file.parents[1], served["volumes"])
                self.series[served["model"]] = served.get("series", {})
        super().__init__(app_dir, studies, conf, "MedSegDiff", "Segmentation, grading and calibrated uncertainty")

    def _init_dicomweb_datastore(self) -> Archive:
        return Archive(self.studies, settings.MONAI_LABEL_DICOMWEB_CACHE_PATH)

    def infer(self, request: dict[str, Any], datastore: Any = None) -> dict:
        """Answer of a model; the reason of a refusal is also logged, because viewers only say that it failed."""
        try:
            return self._infer(request, datastore)
        except HTTPException as error:
            logger.warning(f"{request.get('model')}: {error.detail}")
            raise

    def _infer(self, request: dict[str, Any], datastore: Any) -> dict:
        """The image of an archive is a series. A model of several modalities finds the others of its study."""
        archive, image, model = self.datastore(), request.get("image"), str(request.get("model"))
        if not isinstance(archive, Archive) or not isinstance(image, str) or os.path.isabs(image):
            return super().infer(request, datastore)
        if patterns := self.series.get(model, {}):
            names = [name.strip() for name in self.conf["modalities"].split(",")] if "modalities" in self.conf else None
            folder, used = archive.subject(image, patterns, names)
        else:
            folder, used = Path(archive.get_image_uri(image)), {}
        result = super().infer({**request, "image": str(folder)}, datastore)
        result["params"] = {**(result.get("params") or {}), **({"series": used} if used else {})}
        return result

    def init_infers(self) -> dict:
        infers = {name: Infer(*bundle, self.conf, self.studies) for name, bundle in self.bundles.items()}
        if isinstance(archive := self.datastore(), Archive):
            for infer in infers.values():
                infer.offer_store(archive.store)
        return infers

    def init_trainers(self) -> dict:
        """Trainers of the bundles; none with an archive, whose labels are no masks that a training reads."""
        if isinstance(self.datastore(), Archive):
            return {}
        return {name: TrainOnOneDevice(str(folder), self.conf) for name, (folder, _) in self.bundles.items()}

    def init_strategies(self) -> dict:
        model, (folder, _) = next(iter(self.bundles.items()))
        modalities = list(self.series[model]) or ["ct"]
        own = LeastExpectedDice(self.infer, model, folder / "models" / "model.pt", modalities)
        return {"uncertainty": own, "random": Random(), "first": First()}
