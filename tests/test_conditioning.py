from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter

from scripts.networks.conditioning import (
    BandPassFilter,
    DynamicEncoding,
    FFParser,
    SpectrumAttention,
    SSFormer,
    UncertainSpatialAttention,
    check_conditioning,
)


def randomise(module):
    torch.manual_seed(1)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return module


def test_modules_come_in_one_order():
    assert check_conditioning(["ss_former", "highway"]) == ["highway", "ss_former"]


@pytest.mark.parametrize("size", [(16, 16), (8, 12), (5, 7), (1, 1), (2, 3)])
def test_a_fresh_ff_parser_is_identity_at_any_size(size):
    x = torch.randn(2, 3, *size)
    assert torch.allclose(FFParser(3)(x), x, atol=1e-5)


def test_ff_parser_multiplies_the_spectrum():
    """At the size of the module's own grid, the weights multiply the spectrum. These weights keep only the mean."""
    parser, x = FFParser(2, grid=8), torch.randn(1, 2, 16, 16)
    with torch.no_grad():
        parser.weight.zero_()
        parser.weight[0, :, 8, 0] = 1  # rows run from -Nyquist to Nyquist: row 8 is frequency 0
    assert torch.allclose(parser(x), x.mean(dim=(2, 3), keepdim=True).expand_as(x), atol=1e-5)


@pytest.mark.parametrize("size", [8, 16, 31, 64])
def test_ff_parser_is_the_same_filter_at_every_size(size):
    """A low-pass filter with its cutoff at half the Nyquist frequency removes a fast wave and keeps a slow one."""
    parser = FFParser(1, grid=8)
    rows, columns = torch.arange(17) - 8, torch.arange(9)
    with torch.no_grad():
        parser.weight[0, 0] = ((rows.abs()[:, None] <= 4) & (columns[None] <= 4)).float()
    n = torch.arange(size)

    def wave(cycles):
        return torch.cos(2 * torch.pi * cycles * n / size)[None, None, :, None].expand(1, 1, size, size)

    slow, fast = wave(max(1, size // 8)), wave(size // 2 - 1)
    assert torch.allclose(parser(slow), slow, atol=1e-4)
    assert parser(fast).abs().max() < 0.02


@pytest.mark.parametrize("module", ["ff_parser", "ss_former"])
def test_spectra_are_computed_in_float32_inside_autocast(module):
    x, source, emb = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8), torch.randn(2, 16)
    layer = randomise(FFParser(4) if module == "ff_parser" else SpectrumAttention(4, 16))
    arguments = (x,) if module == "ff_parser" else (x, source, emb)
    expected = layer(*(a.bfloat16().float() for a in arguments))
    with torch.autocast("cpu", torch.bfloat16):
        given = layer(*(a.bfloat16() for a in arguments))
    assert given.dtype == torch.bfloat16
    assert torch.allclose(given.float(), expected, atol=0.02, rtol=0.01)


def test_dynamic_encoding_is_the_published_product():
    encoding, x, m = randomise(DynamicEncoding(3, 5)), torch.randn(2, 3, 4, 4), torch.randn(2, 5, 4, 4)
    m_image = encoding.project(m)
    fused = encoding.norm_image(m_image) * encoding.norm(x) * m_image
    assert torch.allclose(encoding(x, encoding.prepare(m)), x + encoding.out(fused), atol=1e-5)


def test_a_fresh_dynamic_encoding_changes_nothing():
    encoding, x = DynamicEncoding(3, 5), torch.randn(2, 3, 4, 4)
    assert torch.equal(encoding(x, encoding.prepare(torch.randn(2, 5, 4, 4))), x)


def test_anchor_blurs_like_scipy():
    attention, x = UncertainSpatialAttention(2, 3), torch.randn(1, 3, 20, 24)
    with torch.no_grad():
        attention.log_sigma.copy_(torch.tensor([0.5, 1.0, 1.4]).log())
    blurred = attention.blur(x).detach().numpy()
    for channel, sigma in enumerate((0.5, 1.0, 1.4)):
        expected = gaussian_filter(x[0, channel].numpy(), sigma, radius=3, mode="constant")
        assert np.allclose(blurred[0, channel], expected, atol=1e-5)


def test_anchor_takes_the_maximum_and_gates():
    attention, x, decoded = randomise(UncertainSpatialAttention(2, 3)), torch.randn(1, 2, 8, 8), torch.randn(1, 3, 8, 8)
    gate = attention.conv(torch.maximum(attention.blur(decoded), decoded)).sigmoid()
    assert torch.allclose(attention(x, attention.prepare(decoded)), x * gate + x)


def test_the_widths_of_the_gaussians_are_learnt():
    attention = randomise(UncertainSpatialAttention(2, 3))
    attention.prepare(torch.randn(1, 3, 8, 8)).sum().backward()
    assert (attention.log_sigma.grad != 0).all()


def test_band_pass_depends_on_place_and_time():
    band_pass = randomise(BandPassFilter(16))
    weights = band_pass(5, torch.randn(2, 16))
    assert weights.shape == (2, 5, 5)
    assert (weights > 0).all()
    assert (weights < 1).all()
    assert not torch.allclose(weights[0], weights[1])
    assert weights[0].std() > 1e-3


def test_spectrum_attention_is_the_published_formula():
    layer = randomise(SpectrumAttention(4, 16))
    x, source, emb = torch.randn(1, 4, 2, 3), torch.randn(1, 4, 2, 3), torch.randn(1, 16)
    normed, values = layer.norm(x), layer.norm_source(source)
    spectrum = torch.fft.fft2(normed, norm="ortho").flatten(2)[0].T  # F(x) [n, C]
    source_spectrum = torch.fft.fft2(values, norm="ortho").flatten(2)[0].T
    query, key, value = (part.weight.detach()[..., 0, 0].T for part in (layer.query, layer.key, layer.value))
    affinity = (spectrum @ query.cfloat()) @ (source_spectrum @ key.cfloat()).T / 2
    passed = torch.fft.ifft2(affinity * layer.band_pass(6, emb)[0], norm="ortho").real
    attended = passed @ (values.flatten(2)[0].T @ value) / 6**0.5
    scale, shift = layer.time(emb).chunk(2, dim=-1)
    expected = x + (layer.mlp(attended) * (1 + scale) + shift).T.reshape(1, 4, 2, 3)
    assert torch.allclose(layer(x, source, emb), expected, atol=1e-5)


def test_a_fresh_ss_former_changes_nothing():
    former, x = SSFormer(4, 6, 16), torch.randn(2, 4, 3, 3)
    assert torch.equal(former(x, former.prepare(torch.randn(2, 6, 6, 6)), torch.randn(2, 16)), x)
