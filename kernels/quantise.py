"""Images in [0, 1] as bytes, pixel by pixel, as files have them: clamp, round, and channels last, in one pass."""

import torch
from torch import Tensor

from hflow_rt.kernels.dispatch import jit, launch, operator, takes, tl

__all__ = ["quantise", "quantise_reference"]


def quantise(images: Tensor) -> Tensor:
    """uint8 `[B, H, W, C]` of images `[B, C, H, W]`: 255 times what is held to [0, 1], rounded, half to even."""
    if takes(images):
        made: Tensor = _quantise(images)
        return made
    return quantise_reference(images)


def quantise_reference(images: Tensor) -> Tensor:
    """`quantise` in plain torch."""
    wide = images if images.dtype == torch.float64 else images.float()
    return (255 * wide.clamp(0, 1)).round().permute(0, 2, 3, 1).to(torch.uint8, memory_format=torch.contiguous_format)


@jit
def _quantise_kernel(images, made, many, channels, NUMBERS: tl.constexpr):
    """A program makes `NUMBERS` pixels of the `many` of an image."""
    image = tl.program_id(1).to(tl.int64)
    pixel = tl.program_id(0) * NUMBERS + tl.arange(0, NUMBERS)
    inside = pixel < many
    for channel in range(channels):
        value = tl.load(images + (image * channels + channel) * many + pixel, inside, 0.0).to(tl.float32)
        value = 255.0 * tl.minimum(tl.maximum(value, 0.0), 1.0)
        # 2^23 more is a number without a fraction, rounded as the processor rounds: half to even
        whole = (value + 8388608.0) - 8388608.0
        tl.store(made + (image * many + pixel) * channels + channel, whole.to(tl.uint8), inside)


def _check(images: Tensor) -> None:
    if images.dim() != 4:
        raise ValueError(f"images must be [B, C, H, W], not {list(images.shape)}")


def _quantise_triton(images: Tensor) -> Tensor:
    _check(images)
    batch, channels, height, width = images.shape
    made = torch.empty(batch, height, width, channels, dtype=torch.uint8, device=images.device)
    launch(
        _quantise_kernel, (-(-height * width // 1024), batch), 4, images=images.contiguous(), made=made,
        many=height * width, channels=channels, NUMBERS=1024,
    )  # fmt: skip
    return made


_quantise = operator("quantise", _quantise_triton, quantise_reference)


@_quantise.register_fake
def _(images: Tensor) -> Tensor:
    _check(images)
    batch, channels, height, width = images.shape
    return images.new_empty(batch, height, width, channels, dtype=torch.uint8)
