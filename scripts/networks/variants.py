"""Named variants of the network: width, depth, attention and conditioning."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from scripts.config import InputError
from scripts.networks.conditioning import check_conditioning


@dataclass(frozen=True)
class Variant:
    """Width, depth, attention and conditioning of the diffusion network.

    Args:
        channels: channels of each level of the denoiser. There is one down-sampling between two levels.
        num_res_blocks: residual blocks per level of the denoiser.
        conditioning: names from :data:`scripts.networks.conditioning.CONDITIONING`.
        attention: levels of the denoiser with self-attention, in addition to its middle block.
        calib_channels: channels of each level of the image-only U-Net; None means twice ``channels``.
    """

    channels: tuple[int, ...]
    num_res_blocks: int = 1
    conditioning: tuple[str, ...] = ("highway",)
    attention: tuple[int, ...] = ()
    calib_channels: tuple[int, ...] | None = None


OFFICIAL_HIGHWAY = (32, 64, 128, 256, 424, 424)  # 15.5 M parameters; the official one has 15.7 M

# 4, 5, 6 and 6 down-samplings as in MedSegDiff V1; attention at 1/16 of what the denoiser sees, as in guided-diffusion
VARIANTS: dict[str, Variant] = {
    "S": Variant((16, 32, 32, 64, 64)),  # 1/16 is the resolution of the middle block, which always has attention
    "B": Variant((32, 32, 64, 64, 128, 128), attention=(4,)),
    "L": Variant((64, 64, 128, 128, 256, 256, 256), attention=(4,)),
    "++": Variant((96, 96, 192, 192, 384, 384, 384), attention=(4,)),
    "v2": Variant(
        (128, 128, 256, 256, 512, 512),
        num_res_blocks=2,
        conditioning=("highway", "anchor", "ss_former"),
        attention=(4,),
        calib_channels=OFFICIAL_HIGHWAY,
    ),
}


def resolve_variant(
    variant: str,
    channels: Sequence[int] | None,
    calib_channels: Sequence[int] | None,
    conditioning: Sequence[str] | None,
) -> Variant:
    """The named variant, with its settings replaced by the arguments that are not None.

    If ``channels`` is given, the levels have no attention and ``calib_channels`` defaults to twice ``channels``.

    Raises:
        InputError: for an unknown variant or module, or invalid channels.
    """
    if variant not in VARIANTS:
        raise InputError(f"variant '{variant}' is not one of {list(VARIANTS)}")
    named = VARIANTS[variant]
    widths = check_channels("channels", channels or named.channels)
    calib = calib_channels or (None if channels else named.calib_channels) or [2 * width for width in widths]
    return Variant(
        channels=widths,
        num_res_blocks=named.num_res_blocks,
        conditioning=tuple(check_conditioning(named.conditioning if conditioning is None else conditioning)),
        attention=() if channels else named.attention,
        calib_channels=check_channels("calib_channels", calib),
    )


def check_channels(name: str, channels: Sequence[int]) -> tuple[int, ...]:
    """Channels of a U-Net's levels as a tuple. Raises InputError unless there are three or more, all positive."""
    widths = tuple(int(width) for width in channels) if isinstance(channels, Sequence) else ()
    if len(widths) < 3 or min(widths) < 1:
        raise InputError(f"{name}={channels!r} must list three or more positive numbers, one per level")
    return widths
