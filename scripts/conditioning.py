"""How the image reaches the denoiser: the modules of MedSegDiff V1 and V2, switched by ``conditioning``.

The image-only U-Net ("highway") gives features once per slice. What a module computes from them alone is its
``prepare``, done once as well; its ``forward`` is what each denoising step costs. V1 is Wu et al., MedSegDiff (MIDL
2023), V2 is Wu et al., MedSegDiff-V2 (AAAI 2024). In a fresh network FF-Parser, dynamic encoding and SS-Former change
nothing, and the anchor scales its features: training starts where it does without them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn.functional import conv2d, interpolate

from scripts.config import InputError

MODULES = ("highway", "ff_parser", "dynamic_encoding", "anchor", "ss_former")
NEED_HIGHWAY = ("dynamic_encoding", "anchor", "ss_former")
BLUR_RADIUS = 3


def check_conditioning(conditioning: Sequence[str]) -> list[str]:
    """The modules that are on, in the order of :data:`MODULES`.

    Raises:
        InputError: for an unknown module, or one that needs the highway's features without it.
    """
    unknown = [name for name in conditioning if name not in MODULES]
    if isinstance(conditioning, str) or unknown:
        raise InputError(f"conditioning={conditioning!r} must be a list of names from {list(MODULES)}")
    lonely = [name for name in NEED_HIGHWAY if name in conditioning]
    if lonely and "highway" not in conditioning:
        raise InputError(f"conditioning={list(conditioning)}: {lonely} use the features of 'highway'; add it")
    return [name for name in MODULES if name in conditioning]


class FFParser(nn.Module):
    """Feature Frequency Parser: learnable weights of the frequencies of a feature map (V1).

    .. math:: m' = F^{-1}(A \\otimes F(m))

    V1's A has the size of the feature map. Here it is a grid of frequencies, 0 to Nyquist, that is interpolated to the
    map's own, so that one network takes slices of any size. A is complex and starts as 1, that is, as identity.

    Args:
        channels: C.
        grid: frequencies from 0 to Nyquist are sampled at so many steps, along both axes.
    """

    def __init__(self, channels: int, grid: int = 8) -> None:
        super().__init__()
        weight = torch.zeros(2, channels, 2 * grid + 1, grid + 1)  # rows from -Nyquist to Nyquist
        weight[0] = 1
        self.weight = nn.Parameter(weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Filter ``[B, C, H, W]``; FFTs are in float32 also inside autocast, which has none of half precision."""
        height, width = x.shape[2:]
        with torch.autocast(x.device.type, enabled=False):
            rows = height + 1 - height % 2
            real, imaginary = interpolate(self.weight, (rows, width // 2 + 1), mode="bilinear", align_corners=True)
            weight = torch.fft.ifftshift(torch.complex(real, imaginary)[:, :height], dim=1)
            return torch.fft.irfft2(torch.fft.rfft2(x.float()) * weight, s=(height, width)).to(x.dtype)


class DynamicEncoding(nn.Module):
    """Dynamic conditional encoding by attentive fusion (V1).

    .. math:: A(m_I, m_x) = (LN(m_I) \\otimes LN(m_x)) \\otimes m_I

    V1 sends the result on through the image's encoder, which must then run at every step. Here it is added to the
    denoiser's features, through a convolution that starts at zero, and the image's part is computed once.

    Args:
        channels: C of the denoiser's features m_x.
        image_channels: C' of the image's features m_I.
    """

    def __init__(self, channels: int, image_channels: int) -> None:
        super().__init__()
        self.project = nn.Conv2d(image_channels, channels, 1)
        self.norm_image = nn.GroupNorm(1, channels)
        self.norm = nn.GroupNorm(1, channels)
        self.out = _zeroed(nn.Conv2d(channels, channels, 1))

    def prepare(self, image_features: torch.Tensor) -> torch.Tensor:
        """LN(m_I) x m_I ``[B, C, h, w]`` of the image's features ``[B, C', h, w]``."""
        m = self.project(image_features)
        return self.norm_image(m) * m

    def forward(self, x: torch.Tensor, prepared: torch.Tensor) -> torch.Tensor:
        """Fuse into the denoiser's features ``[B, C, h, w]``."""
        return x + self.out(self.norm(x) * _resized(prepared, x))


class UncertainSpatialAttention(nn.Module):
    """Anchor condition with uncertain spatial attention (V2).

    .. math:: f_{anc} = \\max(f_c * k_{Gauss}, f_c), \\quad f'_d = \\sigma(conv_{1x1}(f_{anc})) \\otimes f_d + f_d

    f_c are the last decoded features of the image-only U-Net, f_d the first of the denoiser. The Gaussian's width is
    learnt per channel (in pixels; it starts at 1), its kernel has 7 x 7 taps. All but the product is computed once.

    Args:
        channels: C of f_d.
        image_channels: C' of f_c.
    """

    def __init__(self, channels: int, image_channels: int) -> None:
        super().__init__()
        self.log_sigma = nn.Parameter(torch.zeros(image_channels))
        self.conv = _zeroed(nn.Conv2d(image_channels, channels, 1))

    def blur(self, x: torch.Tensor) -> torch.Tensor:
        """Convolve ``[B, C', H, W]`` with each channel's Gaussian, in two passes; beyond the border is 0."""
        offsets = torch.arange(-BLUR_RADIUS, BLUR_RADIUS + 1, device=x.device)
        kernel = (-0.5 * (offsets / self.log_sigma.exp()[:, None]) ** 2).softmax(dim=1).to(x.dtype)
        column, row = kernel[:, None, :, None], kernel[:, None, None]
        x = conv2d(x, column, padding=(BLUR_RADIUS, 0), groups=len(kernel))
        return conv2d(x, row, padding=(0, BLUR_RADIUS), groups=len(kernel))

    def prepare(self, decoded: torch.Tensor) -> torch.Tensor:
        """The gate ``[B, C, H, W]``, 0 to 1, of f_c ``[B, C', H, W]``."""
        return self.conv(torch.maximum(self.blur(decoded), decoded)).sigmoid()

    def forward(self, x: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        """Gate the denoiser's first features ``[B, C, H, W]``."""
        return x * gate + x


class BandPassFilter(nn.Module):
    """Neural band-pass filter (V2): how much of each pair of frequencies passes at this timestep.

    A perceptron maps the place in the affinity map, two coordinates from 0 to 1, to a weight of 0 to 1. Its hidden
    features are scaled and shifted by the timestep's embedding.

    Args:
        embedding: E, length of the timestep's embedding.
        hidden: features of the perceptron.
    """

    def __init__(self, embedding: int, hidden: int = 16) -> None:
        super().__init__()
        self.place = nn.Linear(2, hidden)
        self.time = nn.Linear(embedding, 2 * hidden)
        self.weight = nn.Linear(hidden, 1)

    def forward(self, n: int, emb: torch.Tensor) -> torch.Tensor:
        """Weights ``[B, n, n]`` for the embedding ``[B, E]``."""
        places = torch.linspace(0, 1, n, device=emb.device)
        grid = torch.stack(torch.meshgrid(places, places, indexing="ij"), dim=-1)
        scale, shift = self.time(emb)[:, None, None].chunk(2, dim=-1)
        return self.weight(nn.functional.silu(self.place(grid) * (1 + scale) + shift)).squeeze(-1).sigmoid()


class SpectrumAttention(nn.Module):
    """One cross-attention of the SS-Former (V2): affinities of frequencies, not of positions.

    .. math:: M = (F(x) W^q)(F(s) W^k)^T, \\quad f = F^{-1}(M \\otimes w(t)) (s W^v)

    followed by a perceptron whose output is scaled and shifted by the timestep. M is divided by the square root of C,
    f by that of the number of positions. The W are applied before F, with which they commute.

    Args:
        channels: C.
        embedding: E, length of the timestep's embedding.
    """

    def __init__(self, channels: int, embedding: int) -> None:
        super().__init__()
        self.norm, self.norm_source = nn.GroupNorm(1, channels), nn.GroupNorm(1, channels)
        self.query, self.key, self.value = (nn.Conv2d(channels, channels, 1, bias=False) for _ in range(3))
        self.band_pass = BandPassFilter(embedding)
        self.mlp = nn.Sequential(nn.Linear(channels, 2 * channels), nn.GELU(), nn.Linear(2 * channels, channels))
        self.time = nn.Linear(embedding, 2 * channels)
        _zeroed(self.mlp[-1])
        _zeroed(self.time)

    def forward(self, x: torch.Tensor, source: torch.Tensor, emb: torch.Tensor) -> torch.Tensor:
        """Update ``x [B, C, h, w]`` by ``source [B, C, h, w]`` at the timesteps embedded as ``[B, E]``."""
        with torch.autocast(x.device.type, enabled=False):
            emb, values = emb.float(), self.norm_source(source.float())
            query = torch.fft.fft2(self.query(self.norm(x.float())), norm="ortho").flatten(2)
            key = torch.fft.fft2(self.key(values), norm="ortho").flatten(2)
            positions = query.shape[2]
            affinity = query.transpose(1, 2) @ key / query.shape[1] ** 0.5
            passed = torch.fft.ifft2(affinity * self.band_pass(positions, emb), norm="ortho").real
            attended = passed @ self.value(values).flatten(2).transpose(1, 2) / positions**0.5
            scale, shift = self.time(emb)[:, None].chunk(2, dim=-1)
            update = self.mlp(attended) * (1 + scale) + shift
            return x + update.transpose(1, 2).unflatten(2, x.shape[2:]).to(x.dtype)


class SSFormer(nn.Module):
    """Semantic condition by a Spectrum-Space Transformer (V2): the image's deepest features meet the denoiser's.

    First the denoiser's are encoded into the image's, then the result into the denoiser's. V2 stacks such
    pairs; here it is one.

    Args:
        channels: C of the denoiser's deepest features.
        image_channels: C' of the image's deepest features.
        embedding: E, length of the timestep's embedding.
    """

    def __init__(self, channels: int, image_channels: int, embedding: int) -> None:
        super().__init__()
        self.project = nn.Conv2d(image_channels, channels, 1)
        self.into_image = SpectrumAttention(channels, embedding)
        self.into_noise = SpectrumAttention(channels, embedding)

    def prepare(self, deepest: torch.Tensor) -> torch.Tensor:
        """The image's embedding ``[B, C, h', w']`` of its deepest features ``[B, C', h', w']``."""
        return self.project(deepest)

    def forward(self, x: torch.Tensor, prepared: torch.Tensor, emb: torch.Tensor) -> torch.Tensor:
        """Update the denoiser's deepest features ``[B, C, h, w]``; ``emb [B, E]`` is of the timestep."""
        return self.into_noise(x, self.into_image(_resized(prepared, x), x, emb), emb)


def _resized(features: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Features on the grid of ``like``: the two U-Nets may differ in depth."""
    if features.shape[2:] == like.shape[2:]:
        return features
    return interpolate(features, like.shape[2:], mode="bilinear", align_corners=False)


def _zeroed(layer: nn.Module) -> nn.Module:
    """A layer that starts at zero."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer
