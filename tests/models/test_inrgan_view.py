"""Images of an INR-GAN at other pixels than those of training."""

from typing import Any

import pytest
import torch
from torch import Tensor

from hflow_rt.errors import ConfigError
from hflow_rt.models.checkpoint import parse_config, seen_at
from hflow_rt.models.inrgan.config import INRGANConfig
from hflow_rt.models.inrgan.model import INRGAN
from hflow_rt.models.inrgan.presets import TINY
from hflow_rt.models.registry import View
from hflow_rt.training.config import TrainingConfig

ONE_GRID: dict[str, Any] = {
    "input_side": 16, "extra_layers": {}, "embeddings": {16: {"const": 3, "random": 2}}
}  # fmt: skip


def model(view: dict[str, Any] | None, **changes: Any) -> INRGAN:
    """The same in float64, whatever the view."""
    torch.manual_seed(0)
    return INRGAN(INRGANConfig(**TINY["model"] | {"classes": (), "view": view} | changes)).double()


def image(made: INRGAN) -> Tensor:
    w = torch.randn(2, made.config.slots, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return made.public(w, torch.tensor([1.0, 0.7]).double(), torch.tensor([3.0, 7.0]).double())


@pytest.mark.parametrize("upsampling", ["nearest", "bilinear"])
@pytest.mark.parametrize("changes", [{}, ONE_GRID])
def test_a_view_has_the_pixels_of_the_image_and_a_part_is_of_the_whole(upsampling: str, changes: Any) -> None:
    changes = changes | {"upsampling": upsampling}
    plain = image(model(None, **changes))
    thrice = image(model({"resolution": 48}, **changes))
    torch.testing.assert_close(thrice[:, :, ::3, ::3], plain, rtol=0, atol=1e-12)
    assert (thrice[:, :, 1::3, 1::3] - plain).abs().max() > 1e-2  # it is not enlarged
    fourfold = image(model({"resolution": 64}, **changes))
    part = image(model({"resolution": 16, "region": (0.25, 0.5, 0.5, 0.75)}, **changes))
    torch.testing.assert_close(part, fourfold[:, :, 32:48, 16:32], rtol=0, atol=1e-12)


@pytest.mark.parametrize("upsampling", ["nearest", "bilinear"])
@pytest.mark.parametrize("changes", [{}, ONE_GRID])
def test_folding_a_view_is_exact(upsampling: str, changes: Any) -> None:
    made = model({"resolution": 32, "region": (0.1, 0.2, 0.7, 0.8)}, upsampling=upsampling, **changes)
    spec = made.graphs()["forward"]
    assert spec.outputs[0].shape == (3, 32, 32)
    given = torch.randn(2, 8, dtype=torch.float64), torch.ones(2).double(), torch.full((2,), 7.0).double()
    (expected,), (found,) = spec.reference(*given), spec.module(*(value.float() for value in given))
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-5)


def test_what_is_no_view() -> None:
    config = INRGANConfig(**TINY["model"])
    with pytest.raises(ConfigError, match=r"^resolution must be a multiple of the model's 16; found 40; choose 32$"):
        seen_at(config, View(resolution=40))
    for region, message in (
        ("0,0,1", "four numbers LEFT,TOP,RIGHT,BOTTOM; found 0,0,1"),
        ("0.5,0,0.25,1", r"must rise within 0 \.\. 1; found 0.5,0,0.25,1"),
        ("0,0,nan,1", r"must rise within 0 \.\. 1; found 0,0,nan,1"),
        ("0,0,1,1.5", r"must rise within 0 \.\. 1"),
        ("0,0,0.5,1", "as wide as high; found 0,0,0.5,1"),
    ):
        with pytest.raises(ConfigError, match=message):
            parse_config(View, {"resolution": 16, "region": region})
    with pytest.raises(ConfigError, match="train without model"):
        model({"resolution": 16}).plan(TrainingConfig(learning_rates={}))
