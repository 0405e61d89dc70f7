"""Export of the network to ONNX files, checked against PyTorch, and a network that samples from these files.

There are two graphs, because the condition needs the image alone and is computed once per slice, while the denoiser
runs at every step:

    condition.onnx  from image to the named tensors of ``network.condition(image)``; not written if there are none
    denoiser.onnx   from image, x_t, timesteps, the tensors above and, with self-conditioning, estimate to the logits

The metadata of the files holds settings and calibration. Batch size, height and width are not fixed.
"""

from __future__ import annotations

import contextlib
import inspect
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from scripts.config import InputError, atomic_path, check_plain
from scripts.diffusion.schedule import GaussianDiffusion
from scripts.networks.base import Outputs, SegmentationNetwork
from scripts.networks.conditioning import ConditioningModule
from scripts.networks.stochastic import DISTRIBUTION
from scripts.tools.onnx_files import check, check_packages, open_file, run, write
from scripts.training.checkpoints import of_this_version

CONDITION, DENOISER = "condition.onnx", "denoiser.onnx"


class ConditionGraph(nn.Module):
    """``network.condition`` as a module from named tensors to named tensors, as the exporter needs it."""

    def __init__(self, network: SegmentationNetwork) -> None:
        super().__init__()
        self.network = network

    def forward(self, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return self.network.condition(inputs["image"])


class DenoiserGraph(ConditionGraph):
    """``network.forward`` as a module from named tensors to named tensors."""

    def forward(self, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        seg_logits, cls_logits, _ = self.network(
            inputs["image"], inputs["x_t"], inputs["timesteps"], inputs, inputs.get("estimate")
        )
        return {"seg_logits": seg_logits} | ({} if cls_logits is None else {"cls_logits": cls_logits})


@torch.no_grad()
def export_onnx(network: SegmentationNetwork, onnx_dir: str, settings: Mapping[str, Any]) -> None:
    """Write both graphs of a network. Each is checked against the network with another batch and image size.

    Args:
        network: network on the CPU with its weights loaded.
        onnx_dir: folder of both files. Files of an earlier export are replaced after both new files are checked.
        settings: settings of the network (:func:`scripts.training.checkpoints.trained_settings`), saved in the files.

    Raises:
        InputError: if a package is missing, or a conditioning module cannot be exported.
        RuntimeError: if the outputs of a graph differ from those of the network.
    """
    check_packages()
    unsupported = [
        type(module).__name__
        for module in network.modules()
        if isinstance(module, ConditioningModule) and not module.exports_to_onnx
    ]
    if unsupported:
        raise InputError(
            f"conditioning modules {sorted(set(unsupported))} cannot be exported to ONNX; train without them"
        )
    network.eval()
    channels, side = len(settings["modalities"]), 4 * network.divisor
    traced, checked = _inputs(network, (2, channels, side, side)), _inputs(network, (3, channels, side // 2, 2 * side))
    metadata = {
        "export": uuid.uuid4().hex,  # the same in both files
        "settings": dict(settings),
        "out_channels": network.out_channels,
        "divisor": network.divisor,
        "self_conditioning": network.self_conditioning,
        "has_calib_map": network.has_calib_map,
        "is_stochastic": network.is_stochastic,
        "calibration": {name: tensor.tolist() for name, tensor in network.calibration.state_dict().items()},
    }
    graphs = {CONDITION: ConditionGraph(network)} if network.has_calib_map else {}
    graphs[DENOISER] = DenoiserGraph(network)
    folder = Path(onnx_dir)
    with contextlib.ExitStack() as files:
        for name, graph in graphs.items():
            file = files.enter_context(atomic_path(folder / name))
            write(graph, traced[name], metadata, file)
            check(graph, checked[name], file)
    if CONDITION not in graphs:
        (folder / CONDITION).unlink(missing_ok=True)


def _inputs(network: SegmentationNetwork, shape: tuple[int, ...]) -> dict[str, dict[str, torch.Tensor]]:
    """Random inputs of each graph, by file name, for images of shape ``[B, M, H, W]``."""
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(shape, generator=generator)
    x_t, estimate = torch.randn(2, shape[0], network.out_channels, *shape[2:], generator=generator)
    timesteps = torch.randint(network.diffusion.num_train_timesteps, shape[:1], generator=generator)
    inputs = {"image": image, "x_t": x_t, "timesteps": timesteps, **_denoiser_inputs(network.condition(image))}
    if network.self_conditioning:
        inputs["estimate"] = estimate.tanh()
    return {CONDITION: {"image": image}, DENOISER: inputs}


def _denoiser_inputs(condition: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What the denoiser needs of the condition: all but the distribution that masks are drawn from."""
    return {name: tensor for name, tensor in condition.items() if name not in DISTRIBUTION}


class OnnxNetwork(SegmentationNetwork):
    """A network for sampling that runs the files of :func:`export_onnx`.

    Args:
        onnx_dir: folder of the files.
        device: device of the inputs. onnxruntime uses it too if it has a provider for it.

    Raises:
        InputError: if onnxruntime or a file is missing, a file is damaged or not of this bundle, or the files come from
            different exports.
    """

    def __init__(self, onnx_dir: str, device: str | torch.device = "cpu") -> None:
        denoiser, metadata = open_file(Path(onnx_dir, DENOISER), torch.device(device))
        settings = of_this_version(check_plain(metadata["settings"], f"onnx_dir '{onnx_dir}'"))
        diffusion = {name: settings[name] for name in inspect.signature(GaussianDiffusion).parameters}
        num_grades = len(metadata["calibration"]["grade_prior"])
        sizes = (len(settings["modalities"]), metadata["out_channels"], num_grades, metadata["divisor"])
        super().__init__(GaussianDiffusion(**diffusion), *sizes)
        self.settings: dict[str, Any] = settings
        self.self_conditioning = metadata["self_conditioning"]
        self.has_calib_map = metadata["has_calib_map"]
        self.is_stochastic = metadata["is_stochastic"]
        self.denoiser, self.conditioner = denoiser, None
        if self.has_calib_map:
            self.conditioner, condition_metadata = open_file(Path(onnx_dir, CONDITION), torch.device(device))
            if condition_metadata["export"] != metadata["export"]:
                raise InputError(
                    f"onnx_dir '{onnx_dir}': its files come from different exports; export again with "
                    "configs/export_onnx.yaml"
                )
        calibration = {name: torch.tensor(values) for name, values in metadata["calibration"].items()}
        self.calibration.load_state_dict(self.calibration.state_dict() | calibration)  # older files have fewer numbers

    def condition(self, image: torch.Tensor) -> dict[str, torch.Tensor]:
        """See :meth:`SegmentationNetwork.condition`."""
        self.check_image_size(image.shape[2:])
        return {} if self.conditioner is None else run(self.conditioner, {"image": image})

    def forward(  # type: ignore[override]
        self,
        image: torch.Tensor,
        x_t: torch.Tensor,
        timesteps: torch.Tensor,
        condition: dict[str, torch.Tensor],
        estimate: torch.Tensor | None = None,
    ) -> Outputs:
        """See :meth:`SegmentationNetwork.forward`."""
        inputs = {"image": image, "x_t": x_t, "timesteps": timesteps, **_denoiser_inputs(condition)}
        if self.self_conditioning:
            inputs["estimate"] = torch.zeros_like(x_t) if estimate is None else estimate
        outputs = run(self.denoiser, inputs)
        return outputs["seg_logits"], outputs.get("cls_logits"), condition.get("calib_map")
