"""Resampling modules and their folded forms."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hflow_rt.kernels.blur import blur_down, blur_up
from hflow_rt.layers import resample
from hflow_rt.layers.resample import (
    Bilinear,
    BlurDown,
    BlurUp,
    FoldedInstanceNorm,
    InstanceNorm,
    MeanDown,
    resample_norm,
)

X = torch.randn(2, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def test_blurs_are_the_kernels() -> None:
    assert torch.equal(BlurDown(3)(X), blur_down(X))
    assert torch.equal(BlurUp()(X), blur_up(X))
    assert (BlurDown(3).fold().double()(X) - blur_down(X)).abs().max() < 1e-15


def test_mean_down_is_bilinear_halving() -> None:
    expected = (X[..., ::2, ::2] + X[..., 1::2, ::2] + X[..., ::2, 1::2] + X[..., 1::2, 1::2]) / 4
    assert (MeanDown()(X) - expected).abs().max() < 1e-15
    assert (MeanDown()(X) - F.interpolate(X, scale_factor=0.5, mode="bilinear")).abs().max() < 1e-15


def test_bilinear_keeps_the_corners_it_is_told_to() -> None:
    small = X[..., :2, :2]
    doubled = Bilinear(2, align_corners=True)(small)
    assert doubled.shape == (2, 3, 4, 4)
    for corner in ((0, 0), (0, -1), (-1, 0), (-1, -1)):
        assert torch.equal(doubled[..., corner[0], corner[1]], small[..., corner[0], corner[1]])
    thirds = small[..., 0, 0] + (small[..., 0, 1] - small[..., 0, 0]) / 3
    assert (doubled[..., 0, 1] - thirds).abs().max() < 1e-15


@pytest.mark.parametrize(("factor", "side"), [(0.5, 1), (2, 4)])
def test_bilinear_sizes(factor: float, side: int) -> None:
    found = Bilinear(factor, align_corners=False)(X[..., :2, :2])
    assert found.shape[2:] == (side, side)
    if side == 1:
        assert (found[..., 0, 0] - X[..., :2, :2].mean((2, 3))).abs().max() < 1e-15


@pytest.mark.parametrize("norm", [InstanceNorm(), FoldedInstanceNorm()])
def test_style_follows_the_norm(norm: nn.Module) -> None:
    scale, shift = torch.randn(2, 2, 3, 1, 1, dtype=torch.float64).unbind()
    assert (norm(X, scale, shift) - (norm(X) * scale + shift)).abs().max() < 1e-14
    pixel = X[..., :1, :1]
    assert torch.equal(norm(pixel, scale, shift), pixel * scale + shift)


RESAMPLERS = {
    "down": (BlurDown(3), True),
    "down folded": (BlurDown(3).fold().double(), True),
    "up": (BlurUp(), True),
    "up twice": (nn.Sequential(BlurUp(), BlurUp()), True),
    "small, then up": (nn.Sequential(Bilinear(2, align_corners=True), BlurUp()), True),
    "mean": (MeanDown(), False),
    "ends small": (nn.Sequential(BlurDown(3), Bilinear(0.5, align_corners=True)), False),
}


@pytest.mark.parametrize("name", RESAMPLERS)
def test_a_norm_is_told_the_moments_where_the_kernels_run(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, blurred = RESAMPLERS[name]
    norm, told = InstanceNorm(), []
    expected = norm(layer(X))
    assert torch.equal(resample_norm(layer, norm, X), expected)

    def noted(x: Tensor, *style: Tensor, moments: Tensor | None) -> Tensor:
        told.append(moments)
        return resample.instance_norm(x)

    monkeypatch.setattr(resample, "takes", lambda x: True)
    monkeypatch.setattr(resample, "instance_norm_act", noted)
    assert (resample_norm(layer, norm, X) - expected).abs().max() < 1e-12
    assert [moments is not None for moments in told] == [blurred]
    if blurred:
        found = resample_norm(layer, nn.Identity(), X)
        variance, mean = torch.var_mean(found, dim=(2, 3))
        assert (told[0] - torch.stack([mean, (variance + resample.EPSILON).rsqrt()], 2)).abs().max() < 1e-12
