"""Augmentation of what the discriminator sees, so that few images suffice (spec section 7). Twice differentiable.

Every transform fires with probability p for each image. Nothing is drawn here: draws come in.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hflow_rt.models.family import TensorSpec
from hflow_rt.models.inrgan.filters import band_filters, filtered, halved, twice, wavelet
from hflow_rt.models.inrgan.layers import by_pixel

__all__ = ["PIPES", "Augmenter"]

_BLIT = ("xflip", "rotate90", "xint")
_GEOM = ("scale", "rotate", "aniso", "xfrac")
_COLOUR = ("brightness", "contrast", "lumaflip", "hue", "saturation")
PIPES: dict[str, tuple[str, ...]] = {
    "none": (),
    "blit": _BLIT,
    "geom": _GEOM,
    "color": _COLOUR,
    "bg": _BLIT + _GEOM,
    "bgc": _BLIT + _GEOM + _COLOUR,
    "bgcf": (*_BLIT, *_GEOM, *_COLOUR, "imgfilter"),
    "bgcfn": (*_BLIT, *_GEOM, *_COLOUR, "imgfilter", "noise"),
    "bgcfnc": (*_BLIT, *_GEOM, *_COLOUR, "imgfilter", "noise", "cutout"),
}
_BANDS = 4
# how many numbers of each kind are drawn of a transform; `rotate` is done twice
_FIRE = dict.fromkeys(PIPES["bgcfnc"], 1) | {"rotate": 2, "imgfilter": _BANDS}
_UNIFORM = {"xflip": 1, "rotate90": 1, "xint": 2, "rotate": 2, "lumaflip": 1, "hue": 1, "cutout": 2}
_NORMAL = {
    "scale": 1, "aniso": 1, "xfrac": 2, "brightness": 1, "contrast": 1, "saturation": 1, "imgfilter": _BANDS,
    "noise": 1,
}  # fmt: skip
_KINDS = {"fire": _FIRE, "uniform": _UNIFORM, "normal": _NORMAL}


class _Drawn:
    """Draws of a batch by transform; what did not fire is as if it were not there."""

    def __init__(self, drawn: Mapping[str, Tensor], p: Tensor) -> None:
        self.p = p
        self.values: dict[str, dict[str, Tensor]] = {
            kind: dict(zip(sizes, torch.split(drawn[kind], list(sizes.values()), 1), strict=True))
            for kind, sizes in _KINDS.items()
        }

    def fired(self, name: str, index: int = 0, p: Tensor | None = None) -> Tensor:
        """`[B]`."""
        found: Tensor = self.values["fire"][name][:, index] < (self.p if p is None else p)
        return found

    def uniform(self, name: str, index: int = 0) -> Tensor:
        """`[B]` in [0, 1)."""
        return self.values["uniform"][name][:, index]

    def normal(self, name: str, index: int = 0) -> Tensor:
        """`[B]`."""
        return self.values["normal"][name][:, index]


class Augmenter(nn.Module):
    """The transforms of `names`."""

    taps: Tensor
    bands: Tensor

    def __init__(self, names: Sequence[str], channels: int, side: int) -> None:
        super().__init__()
        self.names, self.shape = frozenset(names), (channels, side, side)
        self.register_buffer("taps", wavelet(), persistent=False)
        self.register_buffer("bands", band_filters(), persistent=False)

    def draws(self) -> tuple[TensorSpec, ...]:
        """What is drawn for each image."""
        fire, uniform, normal = (sum(sizes.values()) for sizes in _KINDS.values())
        specs = (
            TensorSpec("fire", (fire,), "uniform", (0.0, 1.0)),
            TensorSpec("uniform", (uniform,), "uniform", (0.0, 1.0)),
            TensorSpec("normal", (normal,), "noise"),
        )
        return (*specs, TensorSpec("picture", self.shape, "noise")) if "noise" in self.names else specs

    def forward(self, images: Tensor, p: Tensor, draws: Mapping[str, Tensor]) -> Tensor:
        """`[B, C, R, R]` in [-1, 1] to the same. p: a number. draws: `[B, *shape]` of each of `draws()`."""
        drawn = _Drawn({kind: draws[kind].to(images) for kind in _KINDS}, p.to(images))
        if self.names & {*_BLIT, *_GEOM}:
            images = self._moved(images, self._geometry(images, drawn))
        if self.names & set(_COLOUR):
            images = _recoloured(images, self._colours(images, drawn))
        if "imgfilter" in self.names:
            images = filtered(images, _band_gains(drawn) @ self.bands.to(images))
        if "noise" in self.names:
            std = torch.where(drawn.fired("noise"), (0.1 * drawn.normal("noise")).abs(), 0)
            images = images + std[:, None, None, None] * draws["picture"].to(images)
        if "cutout" in self.names:
            images = images * _cut(images, drawn)
        return images

    def _geometry(self, images: Tensor, drawn: _Drawn) -> Tensor:
        """`[B, 3, 3]` from places in the output to places in the input, in pixels from the centre."""
        side = images.shape[-1]
        one = torch.ones_like(drawn.uniform("xflip"))
        matrix = _stacked([[one, 0 * one, 0 * one], [0 * one, one, 0 * one], [0 * one, 0 * one, one]])
        if "xflip" in self.names:
            flipped = torch.where(drawn.fired("xflip"), (2 * drawn.uniform("xflip")).floor(), 0)
            matrix = matrix @ _scaling(1 - 2 * flipped, one)
        if "rotate90" in self.names:
            turns = torch.where(drawn.fired("rotate90"), (4 * drawn.uniform("rotate90")).floor(), 0)
            matrix = matrix @ _rotation(turns * (math.pi / 2))
        if "xint" in self.names:
            moves = [((2 * drawn.uniform("xint", axis) - 1) * 0.125 * side).round() for axis in range(2)]
            matrix = matrix @ _shift(*(torch.where(drawn.fired("xint"), -move, 0) for move in moves))
        if "scale" in self.names:
            scale = torch.where(drawn.fired("scale"), (0.2 * drawn.normal("scale")).exp2(), 1)
            matrix = matrix @ _scaling(1 / scale, 1 / scale)
        # two rotations, of which at least one fires with probability p
        half = 1 - (1 - drawn.p).clamp(min=0).sqrt()
        angles = [
            torch.where(drawn.fired("rotate", k, half), (2 * drawn.uniform("rotate", k) - 1) * math.pi, 0)
            for k in range(2)
        ]
        if "rotate" in self.names:
            matrix = matrix @ _rotation(angles[0])
        if "aniso" in self.names:
            scale = torch.where(drawn.fired("aniso"), (0.2 * drawn.normal("aniso")).exp2(), 1)
            matrix = matrix @ _scaling(1 / scale, scale)
        if "rotate" in self.names:
            matrix = matrix @ _rotation(angles[1])
        if "xfrac" in self.names:
            moves = [0.125 * side * drawn.normal("xfrac", axis) for axis in range(2)]
            matrix = matrix @ _shift(*(torch.where(drawn.fired("xfrac"), -move, 0) for move in moves))
        return matrix

    def _moved(self, images: Tensor, matrix: Tensor) -> Tensor:
        """Reflected at the border, and sampled between pixels on a grid of twice the side."""
        side, taps = images.shape[-1], self.taps.to(images)
        extent, reach = (side - 1) / 2, len(taps) // 2
        corners = torch.tensor(
            [[x, y, 1.0] for x in (-extent, extent) for y in (-extent, extent)],
            dtype=images.dtype,
            device=images.device,
        )
        x, y = (matrix @ corners.T)[:, :2].detach().unbind(1)
        margins = torch.stack([(-x).max(), x.max(), (-y).max(), y.max()]) + (reach - extent)
        left, right, top, bottom = (int(margin) for margin in margins.clamp(0, side - 1).ceil())
        images = F.pad(images, (left, right, top, bottom), mode="reflect")
        one = torch.ones_like(matrix[:, 0, 0])
        matrix = _shift(one * (left - right) / 2, one * (top - bottom) / 2) @ matrix
        images = twice(images, taps)
        matrix = _shift(-one / 2, -one / 2) @ _scaling(2 * one, 2 * one) @ matrix @ _scaling(one / 2, one / 2)
        matrix = matrix @ _shift(one / 2, one / 2)
        height, width = images.shape[2:]
        size = 2 * (side + reach)
        matrix = _scaling(one * 2 / width, one * 2 / height) @ matrix @ _scaling(one * size / 2, one * size / 2)
        grid = F.affine_grid(matrix[:, :2], [len(images), images.shape[1], size, size], align_corners=False)
        images = F.grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
        return halved(images, taps)

    def _colours(self, images: Tensor, drawn: _Drawn) -> Tensor:
        """`[B, 4, 4]`, of colours and one."""
        eye = torch.eye(4, dtype=images.dtype, device=images.device)
        axis = torch.tensor([1.0, 1.0, 1.0, 0.0], dtype=images.dtype, device=images.device) / math.sqrt(3)
        luma = torch.outer(axis, axis)
        matrix = eye.expand(len(images), 4, 4)

        def wide(values: Tensor) -> Tensor:
            return values[:, None, None]

        if "brightness" in self.names:
            added = torch.where(drawn.fired("brightness"), 0.2 * drawn.normal("brightness"), 0)
            last = F.pad(torch.ones_like(axis[:3, None]), (3, 0, 0, 1))
            matrix = (eye + wide(added) * last) @ matrix
        if "contrast" in self.names:
            factor = torch.where(drawn.fired("contrast"), (0.5 * drawn.normal("contrast")).exp2(), 1)
            colours = torch.diag(torch.ceil(axis))
            matrix = (eye + wide(factor - 1) * colours) @ matrix
        if "lumaflip" in self.names:
            flipped = torch.where(drawn.fired("lumaflip"), (2 * drawn.uniform("lumaflip")).floor(), 0)
            matrix = (eye - 2 * wide(flipped) * luma) @ matrix
        if images.shape[1] == 1:
            return matrix
        if "hue" in self.names:
            angle = torch.where(drawn.fired("hue"), (2 * drawn.uniform("hue") - 1) * math.pi, 0)
            matrix = _about(axis, angle) @ matrix
        if "saturation" in self.names:
            factor = torch.where(drawn.fired("saturation"), drawn.normal("saturation").exp2(), 1)
            matrix = (luma + wide(factor) * (eye - luma)) @ matrix
        return matrix


def _stacked(rows: Sequence[Sequence[Tensor]]) -> Tensor:
    """Entries `[B]` to matrices `[B, rows, columns]`."""
    return torch.stack([torch.stack(list(row), 1) for row in rows], 1)


def _scaling(x: Tensor, y: Tensor) -> Tensor:
    zero, one = torch.zeros_like(x), torch.ones_like(x)
    return _stacked([[x, zero, zero], [zero, y, zero], [zero, zero, one]])


def _shift(x: Tensor, y: Tensor) -> Tensor:
    zero, one = torch.zeros_like(x), torch.ones_like(x)
    return _stacked([[one, zero, x], [zero, one, y], [zero, zero, one]])


def _rotation(angle: Tensor) -> Tensor:
    zero, one, sine, cosine = torch.zeros_like(angle), torch.ones_like(angle), angle.sin(), angle.cos()
    return _stacked([[cosine, -sine, zero], [sine, cosine, zero], [zero, zero, one]])


def _about(axis: Tensor, angle: Tensor) -> Tensor:
    """`[B, 4, 4]`, a right-handed rotation of colours about a unit vector `[4]` whose last number is zero."""
    x, y, z, zero = axis
    cross = torch.stack([
        torch.stack([zero, -z, y, zero]), torch.stack([z, zero, -x, zero]), torch.stack([-y, x, zero, zero]),
        zero.expand(4),
    ])  # fmt: skip
    sine, cosine = angle.sin()[:, None, None], angle.cos()[:, None, None]
    last = torch.zeros_like(cross)
    last[3, 3] = 1
    colours = torch.eye(4, dtype=axis.dtype, device=axis.device) - last
    return last + cosine * colours + sine * cross + (1 - cosine) * torch.outer(axis, axis)


def _recoloured(images: Tensor, matrix: Tensor) -> Tensor:
    linear, offset = matrix[:, :3, :3], matrix[:, :3, 3:]
    if images.shape[1] == 1:
        return images * linear.mean(1).sum(1)[:, None, None, None] + offset.mean((1, 2))[:, None, None, None]
    return by_pixel(linear, images) + offset[:, :, :, None]


def _band_gains(drawn: _Drawn) -> Tensor:
    """`[B, bands]`: each band in turn louder or softer, the whole as loud as a natural image was."""
    power = torch.tensor([10.0, 1.0, 1.0, 1.0], dtype=torch.float64) / 13
    total: Tensor | float = 1.0
    for band in range(_BANDS):
        own = torch.where(drawn.fired("imgfilter", band), drawn.normal("imgfilter", band).exp2(), 1)
        index = torch.arange(_BANDS, device=own.device)
        gains = torch.where(index == band, own[:, None], torch.ones_like(own)[:, None])
        total = total * gains / (power.to(gains) * gains.square()).sum(1, keepdim=True).sqrt()
    assert isinstance(total, Tensor)
    return total


def _cut(images: Tensor, drawn: _Drawn) -> Tensor:
    """`[B, 1, R, R]`: 0 in a square of half the side, else 1."""
    line = (torch.arange(images.shape[-1], device=images.device, dtype=images.dtype) + 0.5) / images.shape[-1]
    near_x, near_y = ((line - drawn.uniform("cutout", axis)[:, None]).abs() < 0.25 for axis in range(2))
    inside = near_x[:, None, :] & near_y[:, :, None] & drawn.fired("cutout")[:, None, None]
    return (~inside)[:, None].to(images)
