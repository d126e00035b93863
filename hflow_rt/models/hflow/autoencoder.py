"""The deterministic encoder and decoder between neighbouring levels (spec 2.7 and 2.8)."""

import itertools
import math

import torch
from torch import Tensor, nn

from hflow_rt.layers.equalized import EqualizedConv2d, EqualizedLinear
from hflow_rt.layers.resample import Bilinear, BlurDown, BlurUp, InstanceNorm, MeanDown, resample_norm
from hflow_rt.models.hflow.config import HFlowConfig, LevelConfig, unet_widths
from hflow_rt.models.hflow.flow import Theta

__all__ = ["Decoder", "Encoder", "EncoderBlock", "LogScaleHead", "RefineUNet"]

_HALF = math.sqrt(2)


class EncoderBlock(nn.Module):
    """One halving, with up to two 1x1 heads: `target` (normalised over space) and `trunk`."""

    def __init__(
        self,
        size: int,
        c_in: int,
        width: int,
        kernel: int,
        lr_scale: float,
        *,
        target: int,
        trunk: bool,
        blur: bool,
    ) -> None:
        super().__init__()
        kernel = kernel if size >= 4 else 1
        self.conv1 = EqualizedConv2d(c_in, width, kernel, activation="leaky", lr_scale=lr_scale)
        self.shrink = BlurDown(width) if blur and size > 4 else MeanDown()
        self.norm = InstanceNorm()
        self.conv2 = EqualizedConv2d(width, width, kernel, activation="leaky", lr_scale=lr_scale)
        self.target = EqualizedConv2d(width, target, lr_scale=lr_scale) if target else None
        self.trunk = EqualizedConv2d(width, width, lr_scale=lr_scale) if trunk else None

    def forward(self, x: Tensor) -> tuple[Tensor | None, Tensor]:
        """`[B, c_in, S, S]` to the target `[B, target, S/2, S/2]` and the trunk, which may be the target."""
        h = resample_norm(self.shrink, self.norm, self.conv1(x))
        h = self.norm(self.conv2(h))
        target = None if self.target is None else self.norm(self.target(h))
        trunk = target if self.trunk is None else self.trunk(h)
        assert trunk is not None
        return target, trunk


class Encoder(nn.Module):
    """Features of one level to the next coarser target and features; two blocks for a ratio of 4."""

    def __init__(self, config: HFlowConfig, level: int) -> None:
        super().__init__()
        own, ratio = config.levels[level], config.ratio(level)
        last = level + 1 == len(config.levels)
        c_in = 3 if level == 0 else config.levels[level - 1].encoder_channels
        width, kernel, lr = own.encoder_channels, own.encoder_kernel, config.encoder_lr_scale
        target = 0 if last else config.levels[level + 1].channels
        blocks, size = [], own.resolution
        if ratio == 4:
            blocks.append(EncoderBlock(size, c_in, width, kernel, lr, target=width, trunk=False, blur=not last))
            c_in, size = width, size // 2
        blocks.append(EncoderBlock(size, c_in, width, kernel, lr, target=target, trunk=True, blur=not last))
        self.blocks = nn.ModuleList(blocks)

    def forward(self, h: Tensor) -> tuple[Tensor | None, Tensor]:
        """Features at this level's resolution to the next coarser target (None at the last level) and features."""
        target: Tensor | None = None
        for block in self.blocks:
            target, h = block(h)
        return target, h


class RefineUNet(nn.Module):
    """UNet inside decoders; stages blur where the size is above 8, otherwise bilinear."""

    def __init__(self, resolution: int, c_in: int, c_out: int, growth: float, norm: bool) -> None:
        super().__init__()
        depth = max(1, min(4, int(math.log2(resolution)) - 2))
        widths = unet_widths(c_in, growth, depth)

        def leaky(a: int, b: int, kernel: int = 3) -> EqualizedConv2d:
            return EqualizedConv2d(a, b, kernel, activation="leaky")

        pairs = list(itertools.pairwise(widths))
        sizes = [resolution // 2**i for i in range(depth + 1)]
        self.start = leaky(c_in, c_in)
        self.down = nn.ModuleList(leaky(a, b) for a, b in pairs)
        self.down_b = nn.ModuleList(leaky(b, b) for _, b in pairs)
        self.shrink = nn.ModuleList(
            BlurDown(width) if size > 8 else MeanDown() for size, width in zip(sizes, widths[1:], strict=False)
        )
        self.bottom = leaky(widths[-1], widths[-1], 1)
        pairs.reverse()
        self.grow = nn.ModuleList(
            BlurUp() if size > 8 else Bilinear(2, align_corners=False) for size in reversed(sizes[1:])
        )
        self.up = nn.ModuleList(leaky(b, a) for a, b in pairs)
        self.up_b = nn.ModuleList(leaky(a, a) for a, _ in pairs)
        self.end_a = leaky(c_in, c_in)
        self.end_b = EqualizedConv2d(c_in, c_out, 3)
        self.norm = InstanceNorm() if norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """`[B, c_in, R, R]` to `[B, c_out, R, R]`."""
        h = self.start(x)
        skips = []
        for i, shrink in enumerate(self.shrink):
            skips.append(h)
            h = shrink(self.down_b[i](self.down[i](self.norm(h))))
        h = self.bottom(h)
        for i, grow in enumerate(self.grow):
            h = self.up_b[i](self.up[i](resample_norm(grow, self.norm, h)))
            h = (h + skips.pop()) / _HALF
        result: Tensor = self.end_b(self.end_a(h))
        return result


class Modulation(nn.Module):
    """Instance norm, then a scale and a shift that are linear in the style vector."""

    def __init__(self, style: int, width: int) -> None:
        super().__init__()
        self.norm = InstanceNorm()
        self.affine = EqualizedLinear(style, 2 * width)

    def forward(self, h: Tensor, style: Tensor, moments: Tensor | None = None) -> Tensor:
        """`[B, C, H, W]` and `[B, S]` to `[B, C, H, W]`; `moments` as an `InstanceNorm` takes them."""
        scale, shift = self.affine(style)[:, :, None, None].chunk(2, 1)
        result: Tensor = self.norm(h, scale, shift, moments)
        return result


class Predictor(nn.Module):
    """Refines the incoming target with the skip of the coarser decoder before the trunk sees it."""

    def __init__(self, resolution: int, skip: int, channels: int, width: int, norm: bool, lr_scale: float) -> None:
        super().__init__()
        self.unet = RefineUNet(resolution, skip + channels, channels, 2.0, norm)
        self.conv1 = EqualizedConv2d(channels, width, 3, activation="leaky", lr_scale=lr_scale)
        self.conv2 = EqualizedConv2d(width, width, 3, activation="leaky", lr_scale=lr_scale, bias=False)
        self.conv3 = EqualizedConv2d(width, channels, 3, lr_scale=lr_scale, bias=False)

    def forward(self, z: Tensor, skip: Tensor) -> Tensor:
        """Target `[B, C, S, S]` and skip `[B, K, S, S]` to `[B, K + C, S, S]`, the skip first."""
        z = (z + self.unet(torch.cat([skip, z], 1))) / _HALF
        w = self.conv1(z)
        w = self.conv3((w + self.conv2(w)) / _HALF)
        return torch.cat([skip, w], 1)


class DecoderBlock(nn.Module):
    """One doubling: four convolutions around a blur-up, with optional style or norm."""

    def __init__(self, c_in: int, level: LevelConfig, style: int, lr_scale: float) -> None:
        super().__init__()
        width = level.decoder_channels

        def leaky(a: int) -> EqualizedConv2d:
            return EqualizedConv2d(a, width, 3, activation="leaky", lr_scale=lr_scale)

        self.conv1, self.conv2, self.conv3, self.conv4 = leaky(c_in), leaky(width), leaky(width), leaky(width)
        self.grow = BlurUp()
        self.norm = InstanceNorm() if level.norm else nn.Identity()
        self.style1 = Modulation(style, width) if level.style else None
        self.style2 = Modulation(style, width) if level.style else None

    def forward(self, z: Tensor, style: Tensor) -> Tensor:
        """`[B, c_in, S, S]` to features `[B, D, 2S, 2S]`."""
        h = self.norm(self.conv1(z))
        h = (self.conv2(h) + h) / _HALF
        if self.style1 is None:
            h = resample_norm(self.grow, self.norm, h)
        else:
            h = resample_norm(self.grow, self.style1, h, style)
        h = (self.conv3(h) + h) / _HALF
        h = self.norm(h) if self.style2 is None else self.style2(h, style)
        result: Tensor = (self.conv4(h) + h) / _HALF
        return result


class LogScaleHead(nn.Module):
    """Features to a log-scale map in [-3, 3] that starts at 0."""

    def __init__(self, width: int, channels: int, lr_scale: float) -> None:
        super().__init__()
        self.conv = EqualizedConv2d(width, channels, 3, activation="leaky", lr_scale=lr_scale)
        self.out = EqualizedConv2d(channels, channels, lr_scale=lr_scale, zero=True)

    def forward(self, features: Tensor) -> Tensor:
        """`[B, D, R, R]` to `[B, C, R, R]`."""
        out: Tensor = self.out(self.conv(features))
        return out.clamp(-3, 3)


class ShiftHead(nn.Module):
    """Features to a shift map, refined by a UNet where the level asks for it and is larger than 8."""

    def __init__(self, level: LevelConfig, lr_scale: float) -> None:
        super().__init__()
        self.out = EqualizedConv2d(level.decoder_channels, level.channels, lr_scale=lr_scale)
        refine = level.refine and level.resolution > 8
        self.unet = RefineUNet(level.resolution, level.channels, level.channels, 1.5, level.norm) if refine else None

    def forward(self, features: Tensor) -> Tensor:
        """`[B, D, R, R]` to `[B, C, R, R]`."""
        shift: Tensor = self.out(features)
        return shift if self.unet is None else (self.unet(shift) + shift) / _HALF


class Decoder(nn.Module):
    """The next coarser target (or the 4x4 start) to features at this level and the affine maps of its flow."""

    def __init__(self, config: HFlowConfig, index: int) -> None:
        super().__init__()
        level, lr, style = config.levels[index], config.decoder_lr_scale, config.style_channels
        last = index + 1 == len(config.levels)
        c_in = config.input_channels(index)
        low = level.resolution // config.ratio(index)
        self.predict = None
        if not last:
            skip = config.levels[index + 1].skip_channels
            self.predict = Predictor(low, skip, c_in, level.decoder_channels, level.norm, lr)
            c_in += skip
        blocks = [DecoderBlock(c_in, level, style, lr)]
        if config.ratio(index) == 4:
            blocks.append(DecoderBlock(level.decoder_channels, level, style, lr))
        self.blocks = nn.ModuleList(blocks)  # coarse to fine
        self.between = InstanceNorm() if level.norm else nn.Identity()
        self.start_shift, self.end_shift = ShiftHead(level, lr), ShiftHead(level, lr)
        self.start_log_scale = LogScaleHead(level.decoder_channels, level.channels, lr)
        self.end_log_scale = LogScaleHead(level.decoder_channels, level.channels, lr)

    def forward(self, z: Tensor, style: Tensor, skip: Tensor | None) -> tuple[Theta, Tensor]:
        """`z` `[B, C, S, S]`, style `[B, G]`, skip `[B, K, S, S]` to the affine maps and features `[B, D, R, R]`."""
        if self.predict is not None:
            z = self.predict(z, skip)
        for i, block in enumerate(self.blocks):
            z = block(z if i == 0 else self.between(z), style)
        theta = Theta(self.start_shift(z), self.start_log_scale(z), self.end_shift(z), self.end_log_scale(z))
        return theta, z
