"""The operators that `kernels.py` measures, an entry each: what is called, on what, and how often memory is touched."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from hflow_rt.kernels.batch_norm import batch_norm_silu, batch_norm_silu_reference
from hflow_rt.kernels.bias_act import bias_act
from hflow_rt.kernels.blur import blur_down, blur_down_moments, blur_up, blur_up_moments
from hflow_rt.kernels.coupling import Form, Region, coupling
from hflow_rt.kernels.dispatch import takes
from hflow_rt.kernels.instance_norm import instance_norm_act
from hflow_rt.kernels.logistic_mixture import mixture_log_prob
from hflow_rt.kernels.mixing import mixing
from hflow_rt.kernels.modulated_weights import modulated_weights
from hflow_rt.kernels.moments import moments_reference
from hflow_rt.kernels.split_act import split_act
from hflow_rt.kernels.squeeze_excite import squeeze_excite

__all__ = ["OPS", "Op", "Size"]

Call = Callable[..., Tensor]


@dataclass(frozen=True)
class Size:
    """Where tensors are made and how large: as many images as `bytes` hold, with sides of at most `cap`."""

    device: str
    bytes: int
    cap: int
    dtype: torch.dtype = torch.float32

    def of(self, dtype: torch.dtype) -> "Size":
        """The same size in another type."""
        return replace(self, dtype=dtype)

    def images(self, channels: int, side: int, dtype: torch.dtype | None = None) -> Tensor:
        """Random `[B, C, S, S]`, seeded by its channels."""
        dtype, side = dtype or self.dtype, min(side, self.cap)
        batch = max(1, self.bytes // (channels * side * side * dtype.itemsize))
        generator = torch.Generator(self.device).manual_seed(channels)
        return torch.randn(batch, channels, side, side, generator=generator, device=self.device).to(dtype)


@dataclass(frozen=True)
class Op:
    """An operator on tensors that it is differentiated by.

    The least that a result moves is its inputs and itself; a gradient moves the one above, those below, and the first
    `kept` of the inputs (or the result in their place). `again` is how often more than that the kernels read the
    first input, in the result and in the gradient.
    """

    name: str
    make: Callable[[Size], tuple[Call, list[Tensor]]]
    kept: int
    again: tuple[int, int] = (0, 0)

    def moved(self, f: Call, inputs: list[Tensor], target: str) -> int:
        """Bytes that the kernels read and write."""
        with torch.no_grad():
            result = f(*inputs).nbytes
        taken = sum(x.nbytes for x in inputs)
        if target == "result":
            return taken + result + self.again[0] * inputs[0].nbytes
        kept = sum(x.nbytes for x in inputs[: self.kept])
        return kept + result + taken + self.again[1] * inputs[0].nbytes


def _norm(side: int, style: bool = False, residual: bool = False, known: bool = False) -> Callable[[Size], Any]:
    def make(size: Size) -> tuple[Call, list[Tensor]]:
        x, more = size.images(32, side), size.images(32, side)
        moments = moments_reference(x) if known else None
        scale, shift = torch.linspace(0.5, 2, 64, device=x.device, dtype=x.dtype).expand(len(x), 64).chunk(2, 1)

        def f(x: Tensor, more: Tensor | None = None) -> Tensor:
            styled = (scale, shift) if style else ()
            return instance_norm_act(x, *styled, residual=more, moments=moments, leaky=residual)

        return f, [x, more] if residual else [x]

    return make


def _maps(size: Size, channels: int) -> tuple[Tensor, Tensor, Tensor]:
    """A rotation of the channels, its inverse and a shift, float32."""
    turned = torch.linalg.qr(torch.randn(channels, channels, generator=torch.Generator().manual_seed(0)))[0]
    return turned.to(size.device), turned.T.contiguous().to(size.device), torch.ones(channels, device=size.device)


def _coupling(channels: int, form: Form, inverse: bool) -> Callable[[Size], Any]:
    """A step boundary: the net's output is halves of one tensor, of the type of the net; the state is float32."""

    def make(size: Size) -> tuple[Call, list[Tensor]]:
        x = size.images(channels, 256, torch.float32)
        net = 0.5 * torch.cat([x.flip(0), x.flip(1)], 1).to(size.dtype)
        weight, undo, bias = _maps(size, channels)
        region = Region(0, channels, 2, 2)

        def f(x: Tensor, shift: Tensor, log_scale: Tensor | None = None) -> Tensor:
            return coupling(
                x, log_scale, shift, weight, bias, region, inverse=inverse, form=form, undo=undo
            )[0]  # fmt: skip

        log_scale, shift = net.chunk(2, 1)
        return f, [x, shift] if form == "additive" else [x, shift, log_scale]

    return make


def _mixing(channels: int, inverse: bool) -> Callable[[Size], Any]:
    def make(size: Size) -> tuple[Call, list[Tensor]]:
        weight, _, bias = _maps(size, channels)
        return lambda x: mixing(x, weight, bias, inverse=inverse), [size.images(channels, 256, torch.float32)]

    return make


def _bent(size: Size) -> tuple[Tensor, Tensor]:
    """Images and a bias whose sum is not about zero, where rounding would decide which slope an activation has."""
    x = size.images(128, 256)
    return x + x.sign(), torch.linspace(-0.25, 0.25, 128, device=size.device, dtype=size.dtype)


def _act(size: Size) -> tuple[Call, list[Tensor]]:
    x, bias = _bent(size)
    return lambda x: bias_act(x, bias), [x]


def _split(mode: str) -> Callable[[Size], Any]:
    def make(size: Size) -> tuple[Call, list[Tensor]]:
        high, bias = _bent(size)
        low = 0.25 * high[:, :, ::2, ::2].sign()
        return lambda high, low: split_act(high, low, bias, mode), [high, low]

    return make


def _weights(size: Size) -> tuple[Call, list[Tensor]]:
    """As many images as the weights of one wide layer fill the size for."""
    wide, rank = min(512, 8 * size.cap), 10
    shared = torch.randn(wide, wide, generator=torch.Generator().manual_seed(0)).to(size.device)
    images = max(1, size.bytes // (4 * wide * wide))
    style = torch.randn(images, 2 * wide * rank, generator=torch.Generator().manual_seed(1)).to(size.device)
    return lambda style: modulated_weights(style, shared, rank), [style.to(size.dtype)]


def _batch_norm(size: Size) -> tuple[Call, list[Tensor]]:
    x, line = size.images(128, 16), torch.linspace(0.5, 2, 128, device=size.device)

    def f(x: Tensor) -> Tensor:
        return batch_norm_silu(x, line, line)[0] if takes(x) else batch_norm_silu_reference(x, line, line)

    return f, [x]


def _squeeze_excite(size: Size) -> tuple[Call, list[Tensor]]:
    skip, y = size.images(128, 16), size.images(128, 16).flip(0)
    weight = torch.linspace(-0.1, 0.1, 8 * 128, device=y.device).view(8, 128)
    reduce, expand = (weight, weight[:, 0]), (weight.T.contiguous(), weight[0])
    return lambda y, skip: squeeze_excite(skip, y, reduce, expand, 0.1), [y, skip]


def _mixture(size: Size) -> tuple[Call, list[Tensor]]:
    logits = size.images(100, 32)
    image = (logits[:, :3].float().sigmoid() * 255).round() / 255
    return lambda logits: mixture_log_prob(logits, image, 8), [logits]


OPS = [
    Op("bias_act 256x256", _act, kept=1),
    Op("split_act 256x256, nearest", _split("nearest"), kept=1, again=(0, 1)),
    Op("split_act 256x256, bilinear", _split("bilinear"), kept=1, again=(0, 1)),
    Op("modulated_weights 512x512", _weights, kept=1),
    Op("blur_down", lambda size: (blur_down, [size.images(32, 256)]), kept=0),
    Op("blur_down with moments", lambda size: (lambda x: blur_down_moments(x)[0], [size.images(32, 256)]), kept=0),
    Op("blur_up", lambda size: (blur_up, [size.images(32, 128)]), kept=0),
    Op("blur_up with moments", lambda size: (lambda x: blur_up_moments(x)[0], [size.images(32, 128)]), kept=0),
    Op("instance_norm_act 64x64", _norm(64), kept=1),
    Op("instance_norm_act 256x256", _norm(256), kept=1, again=(1, 2)),
    Op("instance_norm_act 256x256, moments known", _norm(256, known=True), kept=1, again=(0, 2)),
    Op("instance_norm_act 64x64 with style, leaky, residual", _norm(64, style=True, residual=True), kept=1),
    Op("coupling forward, C = 4", _coupling(4, "clipped", False), kept=3),
    Op("coupling inverse, C = 4", _coupling(4, "clipped", True), kept=3),
    Op("coupling forward, C = 3", _coupling(3, "clipped", False), kept=3),
    Op("coupling inverse, C = 12, sigmoid", _coupling(12, "sigmoid", True), kept=3),
    Op("coupling forward, C = 12, additive", _coupling(12, "additive", False), kept=2),
    Op("mixing forward, C = 4", _mixing(4, False), kept=0),
    Op("mixing inverse, C = 12", _mixing(12, True), kept=0),
    Op("batch_norm_silu 16x16", _batch_norm, kept=1, again=(1, 2)),
    Op("squeeze_excite 16x16", _squeeze_excite, kept=1, again=(1, 0)),
    Op("mixture_log_prob of 10", _mixture, kept=1),
]
