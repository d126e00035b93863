"""The generator with its constants folded, built of a float64 copy (spec sections 12, 14 and 15).

Embeddings are constants. A stage's first layer maps features before they are enlarged, which is the same, because a
1x1 map commutes with resampling: `W [up(x); e] = up(W_x x) + W_e e`. The bilinear variant's division by the spread
goes into the columns of the next weights.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from hflow_rt.kernels.bias_act import GAIN, bias_act
from hflow_rt.kernels.modulated_weights import modulated_weights, reciprocal
from hflow_rt.kernels.split_act import enlarged, split_act
from hflow_rt.models.inrgan.layers import ModulatedLayer, ToColours, phi
from hflow_rt.models.inrgan.network import Mapping, Stage, shortening
from hflow_rt.models.inrgan.view import Pixels, first_seen

if TYPE_CHECKING:
    from hflow_rt.models.inrgan.model import INRGAN

__all__ = ["FoldedForward", "FoldedMapping", "FoldedSynthesis"]

_LARGE = 1e8  # 1 / 1e-8


def _affine(layer: ModulatedLayer | ToColours) -> tuple[Tensor, Tensor]:
    """Weight and bias of what w becomes, with the factor of the low-rank product in its left half."""
    weight, bias = layer.affine.effective()
    gain = torch.ones_like(bias)
    if isinstance(layer, ModulatedLayer):
        gain[: len(layer.weight) * layer.rank] /= math.sqrt(layer.rank)
    return weight * gain[:, None], bias * gain


def _normalized(x: Tensor) -> Tensor:
    """`layers.normalized`, written as `reciprocal` is."""
    return x * (math.sqrt(_LARGE) * (_LARGE * x.square().mean(1, keepdim=True) + 1).rsqrt())


def _reciprocal_spread(x: Tensor) -> Tensor:
    """GAIN / (unbiased standard deviation of GAIN x, and a little more), `[B, C]`. x: `[B, C, P]`, over P."""
    pixels = x.shape[2]
    off = x - x.mean(2, keepdim=True)
    return GAIN * reciprocal(((off * off).mean(2) * (GAIN**2 * pixels / (pixels - 1))).sqrt())


def _square(x: Tensor) -> Tensor:
    """`[B, C, n n]` as `[B, C, n, n]`."""
    side = math.isqrt(x.shape[2])
    return x.reshape(*x.shape[:2], side, side)


class _Layer(nn.Module):
    """`ModulatedLayer` of what its affine map yields."""

    def __init__(self, layer: ModulatedLayer) -> None:
        super().__init__()
        self.rank = layer.rank
        self.weight, self.bias = nn.Parameter(layer.weight.clone()), nn.Parameter(layer.bias.clone())

    def weights(self, style: Tensor, columns: Tensor | None = None) -> Tensor:
        """`[B, (C_out + C_in) rank]` to `[B, C_out, C_in]`; columns: what multiplies them, `[B, C_in]`."""
        return modulated_weights(style, self.weight, self.rank, columns=columns)


class _Colours(nn.Module):
    """`ToColours` of what its affine map yields."""

    def __init__(self, layer: ToColours) -> None:
        super().__init__()
        self.weight = nn.Parameter(layer.weight / math.sqrt(layer.weight.shape[1]))
        self.bias = nn.Parameter(layer.bias[:, None].clone())

    def forward(self, x: Tensor, style: Tensor) -> Tensor:
        return (self.weight * style[:, None]) @ x + self.bias


class _Stage(nn.Module):
    """A stage on flat pixels `[B, C, P]`: of its grid, or of a view, with the layers of the stage on its grid."""

    embedding: Tensor | None
    layers: nn.ModuleList
    colours: _Colours

    def __init__(self, stage: Stage, pixels: Pixels | None = None, like: _Stage | None = None) -> None:
        super().__init__()
        self.upsampling = stage.upsampling
        self.doubles = stage.doubles
        # [E, P], for runtimes pack a constant matrix
        embedding = None if stage.embedding is None else stage.embedding(pixels)[0].flatten(1)
        self.register_buffer("embedding", embedding, persistent=False)
        self.reader = pixels.reader(pixels.side // 2) if pixels is not None and stage.doubles else None
        self.layers = nn.ModuleList(_Layer(layer) for layer in stage.own_layers()) if like is None else like.layers
        self.colours = _Colours(stage.colours) if like is None else like.colours

    def own_layers(self) -> list[_Layer]:
        """The first first."""
        return cast("list[_Layer]", list(self.layers))

    def enlarge(self, x: Tensor) -> Tensor:
        """`[B, C, P]` of the stage before on this stage's pixels."""
        if not self.doubles:
            return x
        x = _square(x)
        return (enlarged(x, self.upsampling) if self.reader is None else self.reader(x)).flatten(2)

    def enter(self, x: Tensor | None, style: Tensor, gain: float) -> Tensor:
        """The first layer."""
        first = self.own_layers()[0]
        weights = first.weights(style)
        parts: list[Tensor] = []
        if x is not None:
            parts.append(weights[:, :, : x.shape[1]] @ x)
        if self.embedding is not None:
            parts.append(weights[:, :, weights.shape[2] - len(self.embedding) :] @ self.embedding)
        if len(parts) == 1:
            return bias_act(parts[0], first.bias, gain=gain)
        low, high = parts
        if self.reader is not None:
            return bias_act(self.enlarge(low) + high, first.bias, gain=gain)
        return split_act(_square(high), _square(low), first.bias, self.upsampling, gain).flatten(2)

    def forward(
        self, x: Tensor | None, styles: Sequence[Tensor], factors: Sequence[Tensor] | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        """Features, and by layer after the first the reciprocal spreads that they had, or had to have.

        What is divided by its spread gets its gain with that, which saves passing over the features once more.
        """
        divides, layers = self.upsampling == "bilinear", self.own_layers()
        gains = [1.0 if divides else GAIN] * (len(layers) - 1) + [GAIN]
        x = self.enter(x, styles[0], gains[0])
        used: list[Tensor] = []
        for index, (layer, style) in enumerate(zip(layers[1:], styles[1:], strict=True)):
            if divides:
                used.append(_reciprocal_spread(x) if factors is None else factors[index])
            x = bias_act(layer.weights(style, used[-1] if used else None) @ x, layer.bias, gain=gains[index + 1])
        return x, used

    def summed(self, image: Tensor | None, x: Tensor, style: Tensor) -> Tensor:
        """The image of the stage before with the colours of this one."""
        colours: Tensor = self.colours(x, style)
        return colours if image is None else self.enlarge(image) + colours


class _Painter(nn.Module):
    """Styles of all layers, in order, to an image in [0, 1], or to the view of it that the settings say."""

    def __init__(self, model: INRGAN) -> None:
        super().__init__()
        self.side, self.clamps = model.resolution, True
        stages = model.synthesis.own_stages()
        self.bilinear = model.config.upsampling == "bilinear"
        self.stages = nn.ModuleList(_Stage(stage) for stage in stages)
        self.seen = nn.ModuleList()
        if model.config.view is not None:
            pixels, first = Pixels(model.config), first_seen(model.synthesis)
            same = cast("list[_Stage]", list(self.stages))
            self.seen.extend(_Stage(stages[i], pixels, same[i]) for i in range(first, len(stages)))

    def forward(self, styles: Sequence[Tensor]) -> Tensor:
        """Each `[B, N_layer]`, to `[B, channels, R, R]`."""
        stages, seen = (cast("list[_Stage]", list(found)) for found in (self.stages, self.seen))
        x: Tensor | None = None
        image: Tensor | None = None
        trained: Tensor | None = None  # x of the stages that a view has a copy of
        at, first = 0, len(stages) - len(seen)
        for index, stage in enumerate(stages):
            end = at + len(stage.layers)
            factors = None
            if index >= first and self.bilinear:
                trained, factors = stage(x if index == first else trained, styles[at:end])
            shown = stage if index < first else seen[index - first]
            x, _ = shown(x, styles[at:end], factors)
            image = shown.summed(image, x, styles[end])
            at = end + 1
        assert image is not None
        image = image * 0.5 + 0.5
        image = image.clamp(0, 1) if self.clamps else image
        return image.reshape(*image.shape[:2], self.side, self.side)


def _styled(model: INRGAN) -> list[tuple[int, Tensor, Tensor]]:
    """By layer, in order: its slot, and weight and bias of its affine map."""
    found, slot = [], 0
    for stage in model.synthesis.own_stages():
        for layer in stage.own_layers():
            found.append((slot, *_affine(layer)))
            slot += 1
        found.append((slot, *_affine(stage.colours)))
    return found


class FoldedMapping(nn.Module):
    """z, and labels, to the same w in every slot."""

    def __init__(self, mapping: Mapping, slots: int) -> None:
        super().__init__()
        self.slots = slots
        embed: Any = mapping.embed
        self.embed = None if embed is None else embed.fold()
        self.layers = nn.ModuleList(cast("Any", layer).fold() for layer in mapping.layers)

    def w(self, z: Tensor, labels: Tensor | None = None) -> Tensor:
        """`[B, W]`."""
        x = _normalized(z)
        if self.embed is not None:
            x = torch.cat([x, _normalized(self.embed(labels))], 1)
        for layer in self.layers:
            x = phi(layer(x))
        return x

    def forward(self, z: Tensor, labels: Tensor | None = None) -> tuple[Tensor]:
        """`[B, S, W]`."""
        return (self.w(z, labels)[:, None].repeat(1, self.slots, 1),)


class FoldedSynthesis(nn.Module):
    """One w a slot to an image."""

    centre: Tensor

    def __init__(self, model: INRGAN) -> None:
        super().__init__()
        self.register_buffer("centre", model.w_avg.clone(), persistent=False)
        styled = _styled(model)
        self.slots = [slot for slot, _, _ in styled]
        self.affines = nn.ModuleList(_linear(weight, bias) for _, weight, bias in styled)
        self.painter = _Painter(model)

    def forward(self, w: Tensor, psi: Tensor, cutoff: Tensor) -> tuple[Tensor]:
        """`[B, S, W]`, `[B]` and `[B]` to `[B, channels, R, R]`."""
        slots = torch.arange(w.shape[1], device=w.device, dtype=w.dtype)
        w = w + shortening(slots, psi, cutoff)[:, :, None] * (self.centre - w)
        own = w.unbind(1)
        affines = cast("list[nn.Linear]", list(self.affines))
        return (self.painter([layer(own[slot]) for slot, layer in zip(self.slots, affines, strict=True)]),)


class FoldedForward(nn.Module):
    """z to an image. One product makes the styles of all layers; truncation, which is linear, moves the styles."""

    centre: Tensor
    row_slots: Tensor

    def __init__(self, model: INRGAN) -> None:
        super().__init__()
        self.mapping = FoldedMapping(model.mapping, model.config.slots)
        slots, weights, biases = zip(*_styled(model), strict=True)
        self.sizes = [len(bias) for bias in biases]
        self.affine = _linear(torch.cat(weights), torch.cat(biases))
        rows = torch.repeat_interleave(torch.tensor(slots), torch.tensor(self.sizes))
        self.register_buffer("row_slots", rows.to(model.w_avg.dtype), persistent=False)
        self.register_buffer("centre", self.affine(model.w_avg).detach(), persistent=False)
        self.painter = _Painter(model)

    def forward(self, z: Tensor, psi: Tensor, cutoff: Tensor, labels: Tensor | None = None) -> tuple[Tensor]:
        """`[B, Z]`, `[B]` and `[B]` to `[B, channels, R, R]`."""
        styles = self.affine(self.mapping.w(z, labels))
        styles = styles + shortening(self.row_slots, psi, cutoff) * (self.centre - styles)
        return (self.painter(styles.split(self.sizes, 1)),)


def _linear(weight: Tensor, bias: Tensor) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
    linear.weight, linear.bias = nn.Parameter(weight.detach().clone()), nn.Parameter(bias.detach().clone())
    return linear
