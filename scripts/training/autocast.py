"""Forward pass in half precision on any device: MONAI's trainer autocasts only on a GPU."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from monai.inferers import Inferer
from torch import nn

from scripts.config import InputError

logger = logging.getLogger(__name__)
AMP_DTYPES = ("bfloat16", "float16")


class AutocastInferer(Inferer):
    """Call the network, with torch's autocast if ``amp`` is set.

    Args:
        amp: use autocast with ``amp_dtype``.
        amp_dtype: one of :data:`AMP_DTYPES`.

    Raises:
        InputError: for an unknown ``amp_dtype``.
    """

    def __init__(self, amp: bool = False, amp_dtype: str = "bfloat16") -> None:
        super().__init__()
        if amp_dtype not in AMP_DTYPES:
            raise InputError(f"amp_dtype '{amp_dtype}' is not one of {list(AMP_DTYPES)}")
        self.amp = amp
        self.amp_dtype = getattr(torch, amp_dtype)

    def __call__(self, inputs: torch.Tensor, network: nn.Module, *args, **kwargs) -> torch.Tensor:  # type: ignore[override]
        """Output of the network in float32."""
        with torch.autocast(inputs.device.type, self.amp_dtype, enabled=self.amp):
            return network(inputs, *args, **kwargs).float()


def has_bfloat16() -> bool:
    """Whether the processor has instructions for bfloat16, as far as torch knows; without, it is emulated."""
    known = torch.cpu.get_capabilities()
    return known.get("architecture") != "x86_64" or known["avx512_bf16"] or known["amx_bf16"]


def warn_of_slow_amp(amp: bool, device: torch.device, kwargs: Callable[[], dict[str, Any]]) -> None:
    """Warn of half precision that is emulated: on a processor it was 30 times slower than float32 (performance.md).

    Args:
        amp: whether half precision is used.
        device: that computes.
        kwargs: reads ``amp_kwargs`` of the evaluator, whose type training has, too. It is called only if it matters.
    """
    if amp and device.type == "cpu" and not has_bfloat16():
        logger.warning("amp=True is very slow on this processor, which has no bfloat16: leave it out, or use a GPU")
    # torch does not refuse bfloat16 on a GPU without it, such as Turing and Volta
    emulated = amp and device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False)
    if emulated and kwargs().get("dtype") == torch.bfloat16:
        logger.warning("this GPU has no bfloat16, which torch emulates: set float16 (docs/training.md)")
