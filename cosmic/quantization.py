"""Quantized weights that stay right under training."""

from __future__ import annotations

from torch import nn


def keep_differentiable(model: nn.Module) -> None:
    """Have bitsandbytes compute 4-bit products on the CPU in the way that has a gradient.

    On processors with AVX512-BF16 it would repack the weights at their first evaluation. The repacked product has no gradient,
    of which only a warning tells; it also rounds the scales and fails for widths that are no multiple of 64.
    """
    name = "support_avx512bf16_for_cpu"
    for module in model.modules():
        if hasattr(module, name):
            setattr(module, name, False)
