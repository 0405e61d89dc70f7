"""Files of ONNX: int8 against PyTorch, and what cannot be read."""

from __future__ import annotations

import pytest
import torch
from monai.networks.nets import BasicUNet

from scripts.config import InputError
from scripts.tools.onnx_files import INT8, OnnxImageNetwork, export_int8, write

pytest.importorskip("onnxruntime")

SETTINGS = {"structures": ["liver"], "windows": [[-160, 240]]}


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return BasicUNet(2, 3, 2, features=[16, 16, 32, 64, 64, 16], norm="batch").eval()


def images(count=4):
    generator = torch.Generator().manual_seed(1)
    return [torch.rand(2, 3, 32, 32, generator=generator) for _ in range(count)]


def test_int8_is_small_and_near_the_network_for_any_size(network, tmp_path):
    export_int8(network, images(), SETTINGS, str(tmp_path))
    found = OnnxImageNetwork(str(tmp_path / INT8))
    assert found.settings == SETTINGS
    weights = sum(tensor.numel() for tensor in network.state_dict().values()) * 4
    assert (tmp_path / INT8).stat().st_size < 0.5 * weights  # a small network: half of it is the graph
    image = torch.rand(1, 3, 48, 64)
    with torch.no_grad():
        expected = network(image)
    error = (found(image) - expected).abs().mean() / expected.abs().mean()
    assert 0 < error < 0.1
    assert [path.name for path in tmp_path.iterdir()] == [INT8]


def test_a_failed_export_leaves_the_file_of_before(network, tmp_path, monkeypatch):
    (tmp_path / INT8).write_bytes(b"before")
    monkeypatch.setattr("scripts.tools.onnx_files.check", lambda *_: (_ for _ in ()).throw(RuntimeError("differ")))
    with pytest.raises(RuntimeError, match="differ"):
        export_int8(network, images(), SETTINGS, str(tmp_path))
    assert (tmp_path / INT8).read_bytes() == b"before"


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "does not exist; export it first"), (b"text", "cannot be read as an export of this bundle")],
)
def test_files_that_cannot_be_read(content, message, tmp_path):
    if content:
        (tmp_path / INT8).write_bytes(content)
    with pytest.raises(InputError, match=message):
        OnnxImageNetwork(str(tmp_path / INT8))


def test_text_in_a_file_is_never_evaluated(network, tmp_path):
    from scripts.tools.onnx_files import ImageGraph

    settings = {"settings": {"structures": ["$__import__('os').abort()"]}}
    write(ImageGraph(network), {"image": images()[0]}, settings, tmp_path / INT8)
    with pytest.raises(InputError, match="text that starts with"):
        OnnxImageNetwork(str(tmp_path / INT8))
