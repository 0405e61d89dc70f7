"""ONNX files of a module: written, checked against PyTorch, quantised to int8, and run with onnxruntime."""

from __future__ import annotations

import importlib
import json
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from scripts.config import InputError, atomic_path, check_plain
from scripts.training.checkpoints import check_settings

METADATA = "medsegdiff"
TOLERANCE = 1e-4  # absolute and relative
INT8 = "int8.onnx"


def check_packages() -> None:
    """Raise InputError if a package that writes ONNX files is missing."""
    for package in ("onnx", "onnxscript", "onnxruntime"):
        _import(package)


def write(graph: nn.Module, inputs: dict[str, torch.Tensor], metadata: Mapping[str, Any], file: Path) -> None:
    """Write a module from named tensors to named tensors; their batch, height and width are not fixed.

    Args:
        graph: takes and returns a dictionary.
        inputs: an example.
        metadata: plain data that are saved in the file.
        file: file to write.
    """
    dynamic_axes = {
        name: {0: "batch"} | ({2: f"{name}_height", 3: f"{name}_width"} if tensor.ndim == 4 else {})
        for name, tensor in inputs.items()
    }
    program = torch.onnx.export(
        graph,
        (inputs, {}),  # torch takes a dictionary in the last place for keyword arguments
        input_names=list(inputs),
        output_names=list(graph(inputs)),
        dynamic_shapes=(dynamic_axes,),
        dynamo=True,
        verbose=False,
    )
    assert program is not None
    program.model.metadata_props[METADATA] = json.dumps(metadata)
    program.save(file, external_data=False)


def check(graph: nn.Module, inputs: dict[str, torch.Tensor], file: Path) -> None:
    """Raise RuntimeError if the outputs of a file differ from those of its module."""
    found = run(_session(file, torch.device("cpu")), inputs)
    for name, expected in graph(inputs).items():
        if not torch.allclose(found[name], expected, rtol=TOLERANCE, atol=TOLERANCE):
            error = float((found[name] - expected).abs().max())
            raise RuntimeError(f"{name} of onnxruntime and PyTorch differ by up to {error:.1e}; nothing was exported")


class ImageGraph(nn.Module):
    """A network of images as a module of named tensors: ``image [B, C, H, W]`` to ``logits [B, K, H, W]``."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {"logits": self.network(inputs["image"])}


@torch.no_grad()
def export_int8(network: nn.Module, images: Iterable[torch.Tensor], settings: Mapping[str, Any], onnx_dir: str) -> None:
    """Write ``int8.onnx``: weights and activations of the convolutions have 8 bits (static quantisation, QDQ).

    Args:
        network: on the CPU, with its weights.
        images: batches ``[B, C, H, W]``, from whose activations the ranges are taken.
        settings: of the network, saved in the file.
        onnx_dir: folder of the file.

    Raises:
        InputError: if a package is missing.
    """
    check_packages()
    quantization = importlib.import_module("onnxruntime.quantization")
    graph = ImageGraph(network.eval())
    batches = [{"image": batch.float()} for batch in images]

    class Batches(quantization.CalibrationDataReader):  # type: ignore[name-defined, misc]
        def __init__(self) -> None:
            self.left = iter([{"image": batch["image"].numpy()} for batch in batches])

        def get_next(self) -> dict | None:
            return next(self.left, None)

    with tempfile.TemporaryDirectory() as folder, atomic_path(Path(onnx_dir, INT8)) as file:
        single, folded = Path(folder, "float32.onnx"), Path(folder, "folded.onnx")
        write(graph, batches[0], {"settings": dict(settings)}, single)
        check(graph, batches[-1], single)
        importlib.import_module("onnxruntime.quantization.shape_inference").quant_pre_process(
            single, folded, skip_symbolic_shape=True
        )
        quantization.quantize_static(
            folded, file, Batches(), per_channel=True, op_types_to_quantize=["Conv", "ConvTranspose"]
        )
        # onnxruntime drops the metadata
        onnx = importlib.import_module("onnx")
        model = onnx.load(file)
        onnx.helper.set_model_props(model, {METADATA: json.dumps({"settings": dict(settings)})})
        onnx.save(model, file)


class OnnxImageNetwork(nn.Module):
    """The network of an ONNX file that :func:`export_int8` wrote, for inference.

    Args:
        file: the file.
        device: device of the inputs.

    Raises:
        InputError: if onnxruntime or the file is missing, or the file is damaged.
    """

    def __init__(self, file: str, device: str | torch.device = "cpu") -> None:
        super().__init__()
        self.session, metadata = open_file(Path(file), torch.device(device))
        self.settings: dict[str, Any] = check_plain(metadata["settings"], f"'{file}'")

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Logits ``[B, K, H, W]`` of images ``[B, C, H, W]``."""
        return run(self.session, {"image": image.float()})["logits"]


def open_file(file: Path, device: torch.device) -> tuple[Any, dict[str, Any]]:
    """Session and metadata of an exported file."""
    _import("onnxruntime")
    if not file.is_file():
        raise InputError(f"'{file}' does not exist; export it first with configs/export_onnx.yaml, or set onnx_dir")
    try:
        session = _session(file, device)
        return session, json.loads(session.get_modelmeta().custom_metadata_map[METADATA])
    except Exception as error:  # onnxruntime's errors have no common class
        raise InputError(f"'{file}' cannot be read as an export of this bundle ({error}); export again") from error


def _session(file: Path, device: torch.device) -> Any:
    onnxruntime = _import("onnxruntime")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()  # onnxruntime's default ignores OMP_NUM_THREADS
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # spinning threads would slow torch down
    wanted = [f"{kind}ExecutionProvider" for kind in (["CUDA"] if device.type == "cuda" else []) + ["CPU"]]
    providers = [name for name in wanted if name in onnxruntime.get_available_providers()]
    return onnxruntime.InferenceSession(str(file), options, providers=providers)


def run(session: Any, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Outputs of a file by name, on the device of its input ``image``."""
    names = [output.name for output in session.get_outputs()]
    arrays = session.run(names, {name: tensor.numpy(force=True) for name, tensor in inputs.items()})
    return {name: torch.from_numpy(array).to(inputs["image"].device) for name, array in zip(names, arrays, strict=True)}


def _import(package: str) -> Any:
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise InputError(f"ONNX files need {package}: pip install -e '.[onnx]'") from error


def exported_network(network: OnnxImageNetwork, onnx_dir: str, settings: Mapping[str, Any]) -> OnnxImageNetwork:
    """The network, if it was exported with these settings; otherwise an InputError that names ``onnx_dir``."""
    check_settings(network.settings, settings, f"onnx_dir '{onnx_dir}'")
    return network
