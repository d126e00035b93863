"""Latents of images by search: any space that leads to images, of any family."""

import copy
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hflow_rt.errors import ConfigError, DataError
from hflow_rt.evaluation.efficientnet import SIDE, EfficientNetLite0
from hflow_rt.models.family import LatentModel
from hflow_rt.models.registry import FAMILIES, Family, family
from hflow_rt.projection.likeness import unlikeness
from hflow_rt.projection.projecting import project, space_to_search

sys.path.insert(0, str(Path(__file__).parents[1] / "models"))  # the toys are found by name


class Pixels(torch.nn.Module):
    """In the place of a network that sees likeness."""

    def forward(self, images: torch.Tensor, return_lpips: bool = False) -> torch.Tensor:
        assert return_lpips
        return images.flatten(1) / 255


@pytest.fixture
def pixels(tmp_path: Path) -> str:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.save(torch.jit.script(Pixels()), str(tmp_path / "pixels.pt"))  # type: ignore[no-untyped-call]
    return str(tmp_path / "pixels.pt")


def last(steps: Any) -> Any:
    return list(steps)[-1]


@pytest.fixture
def generator(tiny: Callable[[Family], LatentModel]) -> Any:
    return copy.deepcopy(tiny(family("inrgan")))


def test_a_search_comes_nearer_and_nearest_with_a_w_a_slot(generator: Any, pixels: str) -> None:
    """One w for all slots, or one a slot, for two images that do not disturb each other."""
    w = generator.mapping(torch.randn(2, 8, generator=torch.Generator().manual_seed(5)), torch.eye(2))
    graph = generator.graphs()["synthesis"].module
    target = graph(generator.slots(w), torch.full((2,), 0.5), torch.full((2,), 7.0))[0].detach().numpy()
    found: dict[bool, Any] = {}
    for per_slot in (False, True):
        steps = list(project(generator, target, steps=150, features=pixels, per_slot=per_slot))
        assert len(steps) == 150
        found[per_slot] = steps[-1].values["w"]
        assert (steps[-1].distances < (0.3 if per_slot else 0.6) * steps[0].distances).all()  # far from any optimum
        np.testing.assert_array_equal(steps[0].values["w"][0], steps[0].values["w"][1])  # the rate is zero at first
    assert found[False].shape == found[True].shape == (2, 7, 8)
    assert np.ptp(found[False], axis=1).max() == 0
    assert np.ptp(found[True], axis=1).max() > 0.1
    alone = last(project(generator, target[:1], steps=150, features=pixels)).values["w"]
    np.testing.assert_allclose(alone, found[False][:1], atol=1e-2)


def test_other_families_and_their_own_latents(
    generator: Any, pixels: str, monkeypatch: pytest.MonkeyPatch, tiny: Callable[[Family], LatentModel]
) -> None:
    monkeypatch.setitem(FAMILIES, "toy-generator", "toy_generator")
    toy: Any = tiny(family("toy-generator"))
    given = {"z": torch.randn(1, 6), "contrast": torch.tensor([0.8]), "dither": torch.full((1, 3, 8, 8), 0.5)}
    target = toy.decode(given).detach().numpy()
    assert space_to_search(toy, None) == "w"
    for space, size in (("w", 5), ("z", 6)):
        step = last(project(toy, target, space=space, steps=120, features=pixels))
        assert step.values[space].shape == (1, size)
        assert step.distances[0] < 0.05
    with pytest.raises(ConfigError, match=r"space w of this model has no slots; omit --per-slot"):
        project(toy, target, per_slot=True, features=pixels)
    with pytest.raises(ConfigError, match=r"'y' cannot be searched; this model has w, z"):
        project(toy, target, space="y")
    with pytest.raises(ConfigError, match="no space of this model can be searched"):
        space_to_search(tiny(family("ihdm")), None)
    with pytest.raises(DataError, match=r"float32 \[B, 3, 16, 16\]; found \[1, 3, 8, 8\]"):
        project(generator, target)


def test_what_is_beyond_white_has_a_gradient(generator: Any) -> None:
    """The exported image is held to [0, 1]; the one that is searched is not, and the model stays as it was."""
    inputs = torch.zeros(1, 7, 8), torch.ones(1), torch.full((1,), 7.0)
    generator.synthesis.stages[0].colours.bias.data += 9.0
    assert generator.graphs()["synthesis"].module(*inputs)[0].max() == 1
    assert generator.unclamped("synthesis")(*inputs)[0].max() > 2
    assert generator.graphs()["synthesis"].module(*inputs)[0].max() == 1


def test_depths_are_of_the_network_that_measures_distances() -> None:
    torch.manual_seed(0)
    network = EfficientNetLite0().eval()
    images = 255 * torch.rand(1, 3, 24, 24)
    with torch.no_grad():
        maps = network.depths(images, SIDE)
        assert [x.shape[1:] for x in maps] == [(16, 112, 112), (24, 56, 56), (40, 28, 28), (112, 14, 14), (320, 7, 7)]
        torch.testing.assert_close(torch.nn.functional.relu6(network.head(maps[-1])).mean((2, 3)), network(images))


def test_files_that_see_no_likeness(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no feature network at"):
        unlikeness(str(tmp_path / "none.pt"), torch.zeros(1, 3, 8, 8))
    (tmp_path / "odd.pt").write_bytes(b"odd")
    with pytest.raises(DataError, match="is not a TorchScript file"):
        unlikeness(str(tmp_path / "odd.pt"), torch.zeros(1, 3, 8, 8))
