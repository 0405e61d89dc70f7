"""Conditioning modules of MedSegDiff V1 and V2: how the image's features reach the denoiser.

The image-only U-Net ("highway") computes features once per slice. Each module splits its work in two: ``prepare``
depends on these features alone and is also computed once per slice; ``forward`` runs at every denoising step.
V1 is Wu et al., MedSegDiff (MIDL 2023). V2 is Wu et al., MedSegDiff-V2 (AAAI 2024). In a fresh network FF-Parser,
dynamic encoding and SS-Former are the identity and the anchor scales its features, so that training starts where it
would start without them.

A new module is a subclass of :class:`ConditioningModule` and an entry in :data:`MODULES`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import nn
from torch.nn.functional import conv2d, interpolate

from scripts.config import InputError

HIGHWAY = "highway"  # the image-only U-Net itself
STOCHASTIC = "stochastic"  # it draws masks (scripts/networks/stochastic.py)
SELF = "self_conditioning"  # the denoiser also sees its estimate of the step before (Chen et al. 2023, Analog Bits)
BLUR_RADIUS = 3


class ConditioningModule(nn.Module):
    """Base class: where the module acts and what it needs.

    Every module is constructed as ``module(channels, image_channels, embedding)``: C of the denoiser's features, C' of
    the image's features, and E, the length of the timestep's embedding.

    Attributes:
        place: ``stem`` (after the first convolution), ``level`` (the two middle levels) or ``bottom``.
        needs_highway: whether it uses the image's features.
        exports_to_onnx: whether ``torch.onnx`` can export it for any size of slice.
    """

    place: ClassVar[str]
    needs_highway: ClassVar[bool] = True
    exports_to_onnx: ClassVar[bool] = True

    def prepare(self, image_features: torch.Tensor) -> torch.Tensor | None:
        """What depends on the image's features ``[B, C', h', w']`` alone; None if there is nothing."""
        return None

    def forward(self, x: torch.Tensor, prepared: torch.Tensor | None, emb: torch.Tensor) -> torch.Tensor:
        """Update the denoiser's features.

        Args:
            x: ``[B, C, h, w]``.
            prepared: result of :meth:`prepare`.
            emb: embedding of the timesteps ``[B, E]``.
        """
        raise NotImplementedError


class FFParser(ConditioningModule):
    """Feature Frequency Parser: learnable weights of the frequencies of a feature map (V1).

    .. math:: m' = F^{-1}(A \\otimes F(m))

    In V1 A has the size of the feature map. Here A is sampled on a fixed grid of frequencies and interpolated to the
    frequencies of the map, so that one network accepts slices of any size. A is complex and starts at 1 (identity).

    Args:
        channels: C.
        image_channels: not used.
        embedding: not used.
        grid: number of steps from frequency 0 to Nyquist, along both axes.
    """

    place = "level"
    needs_highway = False
    exports_to_onnx = False  # its Fourier transform has no fixed size

    def __init__(self, channels: int, image_channels: int = 0, embedding: int = 0, grid: int = 8) -> None:
        super().__init__()
        weight = torch.zeros(2, channels, 2 * grid + 1, grid + 1)  # rows from -Nyquist to Nyquist
        weight[0] = 1
        self.weight = nn.Parameter(weight)

    def forward(
        self, x: torch.Tensor, prepared: torch.Tensor | None = None, emb: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Filter ``[B, C, H, W]``, always in float32: torch has no half-precision FFT on every device."""
        height, width = x.shape[2:]
        with torch.autocast(x.device.type, enabled=False):
            rows = height + 1 - height % 2
            real, imaginary = interpolate(self.weight, (rows, width // 2 + 1), mode="bilinear", align_corners=True)
            weight = torch.fft.ifftshift(torch.complex(real, imaginary)[:, :height], dim=1)
            return torch.fft.irfft2(torch.fft.rfft2(x.float()) * weight, s=(height, width)).to(x.dtype)


class DynamicEncoding(ConditioningModule):
    """Dynamic conditional encoding by attentive fusion (V1).

    .. math:: A(m_I, m_x) = (LN(m_I) \\otimes LN(m_x)) \\otimes m_I

    V1 passes the result on through the image's encoder, which then runs at every step. Here the result is added to the
    denoiser's features through a convolution that starts at zero, and the image's part is computed once.

    Args:
        channels: C of the denoiser's features m_x.
        image_channels: C' of the image's features m_I.
        embedding: not used.
    """

    place = "level"

    def __init__(self, channels: int, image_channels: int, embedding: int = 0) -> None:
        super().__init__()
        self.project = nn.Conv2d(image_channels, channels, 1)
        self.norm_image = nn.GroupNorm(1, channels)
        self.norm = nn.GroupNorm(1, channels)
        self.out = _zeroed(nn.Conv2d(channels, channels, 1))

    def prepare(self, image_features: torch.Tensor) -> torch.Tensor:
        """LN(m_I) x m_I ``[B, C, h, w]`` of the image's features ``[B, C', h, w]``."""
        m = self.project(image_features)
        return self.norm_image(m) * m

    def forward(  # type: ignore[override]
        self, x: torch.Tensor, prepared: torch.Tensor, emb: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Fuse into the denoiser's features ``[B, C, h, w]``."""
        return x + self.out(self.norm(x) * _resized(prepared, x))


class UncertainSpatialAttention(ConditioningModule):
    """Anchor condition with uncertain spatial attention (V2).

    .. math:: f_{anc} = \\max(f_c * k_{Gauss}, f_c), \\quad f'_d = \\sigma(conv_{1x1}(f_{anc})) \\otimes f_d + f_d

    f_c are the last decoded features of the image-only U-Net, f_d the first features of the denoiser. Each channel has
    its own Gaussian with a learnt width (in pixels, 1 at the start) and 7 x 7 taps. Only the product is computed at
    every step.

    Args:
        channels: C of f_d.
        image_channels: C' of f_c.
        embedding: not used.
    """

    place = "stem"

    def __init__(self, channels: int, image_channels: int, embedding: int = 0) -> None:
        super().__init__()
        self.log_sigma = nn.Parameter(torch.zeros(image_channels))
        self.conv = _zeroed(nn.Conv2d(image_channels, channels, 1))

    def blur(self, x: torch.Tensor) -> torch.Tensor:
        """Convolve ``[B, C', H, W]`` with each channel's Gaussian, one axis after the other; padded with 0."""
        offsets = torch.arange(-BLUR_RADIUS, BLUR_RADIUS + 1, device=x.device)
        kernel = (-0.5 * (offsets / self.log_sigma.exp()[:, None]) ** 2).softmax(dim=1).to(x.dtype)
        column, row = kernel[:, None, :, None], kernel[:, None, None]
        x = conv2d(x, column, padding=(BLUR_RADIUS, 0), groups=len(kernel))
        return conv2d(x, row, padding=(0, BLUR_RADIUS), groups=len(kernel))

    def prepare(self, decoded: torch.Tensor) -> torch.Tensor:
        """The gate ``[B, C, H, W]``, 0 to 1, of f_c ``[B, C', H, W]``."""
        return self.conv(torch.maximum(self.blur(decoded), decoded)).sigmoid()

    def forward(  # type: ignore[override]
        self, x: torch.Tensor, prepared: torch.Tensor, emb: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Multiply the denoiser's first features ``[B, C, H, W]`` by 1 + gate."""
        return x * _resized(prepared, x) + x


class BandPassFilter(nn.Module):
    """Neural band-pass filter (V2): the share of each pair of frequencies that passes at this timestep.

    A perceptron maps the position in the affinity map (two coordinates from 0 to 1) to a weight from 0 to 1. The
    timestep's embedding scales and shifts its hidden features.

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
    """One cross-attention of the SS-Former (V2). Its affinities are between frequencies, not positions.

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


class SSFormer(ConditioningModule):
    """Semantic condition by a Spectrum-Space Transformer (V2), between the deepest features of both U-Nets.

    The first attention updates the image's features by the denoiser's, the second updates the denoiser's features by
    the result. V2 stacks several such pairs; here it is one.

    Args:
        channels: C of the denoiser's deepest features.
        image_channels: C' of the image's deepest features.
        embedding: E, length of the timestep's embedding.
    """

    place = "bottom"
    exports_to_onnx = False  # its Fourier transform has no fixed size

    def __init__(self, channels: int, image_channels: int, embedding: int) -> None:
        super().__init__()
        self.project = nn.Conv2d(image_channels, channels, 1)
        self.into_image = SpectrumAttention(channels, embedding)
        self.into_noise = SpectrumAttention(channels, embedding)

    def prepare(self, deepest: torch.Tensor) -> torch.Tensor:
        """The image's embedding ``[B, C, h', w']`` of its deepest features ``[B, C', h', w']``."""
        return self.project(deepest)

    def forward(self, x: torch.Tensor, prepared: torch.Tensor, emb: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        """Update the denoiser's deepest features ``[B, C, h, w]`` at the timesteps embedded as ``[B, E]``."""
        return self.into_noise(x, self.into_image(_resized(prepared, x), x, emb), emb)


def _resized(features: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Features resized to the grid of ``like``: the two U-Nets may differ in depth and resolution."""
    if features.shape[2:] == like.shape[2:]:
        return features
    return interpolate(features, like.shape[2:], mode="bilinear", align_corners=False)


def _zeroed(layer: nn.Module) -> nn.Module:
    """The layer with all its parameters set to zero."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


MODULES: dict[str, type[ConditioningModule]] = {  # in the order in which they act at one place
    "ff_parser": FFParser,
    "dynamic_encoding": DynamicEncoding,
    "anchor": UncertainSpatialAttention,
    "ss_former": SSFormer,
}
CONDITIONING = (HIGHWAY, STOCHASTIC, SELF, *MODULES)


def check_conditioning(conditioning: Sequence[str]) -> list[str]:
    """The chosen names in the order of :data:`CONDITIONING`.

    Raises:
        InputError: for an unknown name, or a module that needs the highway without it.
    """
    if isinstance(conditioning, str) or not set(conditioning) <= set(CONDITIONING):
        raise InputError(f"conditioning={conditioning!r} must be a list of names from {list(CONDITIONING)}")
    alone = [HIGHWAY, SELF, *(name for name, module in MODULES.items() if not module.needs_highway)]
    needing = [name for name in conditioning if name not in alone]
    if needing and HIGHWAY not in conditioning:
        raise InputError(f"conditioning={list(conditioning)}: {needing} need the features of 'highway'; add it")
    return [name for name in CONDITIONING if name in conditioning]
