"""Which positions a coupling net sees, counted out position by position."""

import pytest
import torch

from hflow_rt.layers.masks import PERIODS, Split, seen_mask, split_steps, transformed


def plain(split: Split, row: int, column: int, side: int, step: int) -> float:
    """1 where the net sees the position, on an odd step; even steps swap."""
    if split == "vhalfs":
        seen = column >= side // 2
    elif split == "hhalfs":
        seen = row >= side // 2
    elif split == "spatial":
        seen = (row + column) % 2 == 1
    else:
        cell = {"blocks": 2, "lblocks": 4, "hblocks": 8}[split]
        seen = (row // cell + column // cell) % 2 == 0
    return float(seen == (step % 2 == 1))


@pytest.mark.parametrize("side", [16, 32])
@pytest.mark.parametrize("split", PERIODS)
def test_spatial_masks(split: Split, side: int) -> None:
    masks = [seen_mask(split, 3, side, step) for step in range(3)]
    for step, mask in enumerate(masks):
        assert mask.shape == (1, 1, side, side)
        expected = [[plain(split, r, c, side, step) for c in range(side)] for r in range(side)]
        assert mask[0, 0].tolist() == expected
        assert mask.mean() == 0.5
    assert torch.equal(masks[0] + masks[1], torch.ones(1, 1, side, side))
    assert torch.equal(masks[0], masks[2])


@pytest.mark.parametrize(("channels", "seen"), [(2, 1), (3, 1), (8, 4), (508, 254)])
def test_channel_masks(channels: int, seen: int) -> None:
    for step in range(2):  # never swapped: mixing moves the channels
        mask = seen_mask("channels", channels, 8, step)
        assert mask.shape == (1, channels, 1, 1)
        assert mask.flatten().tolist() == [1.0] * seen + [0.0] * (channels - seen)
        assert seen_mask("channels", channels, 1, step).shape == (1, channels)


@pytest.mark.parametrize("split", ["channels", *PERIODS])
def test_what_is_not_seen_is_transformed(split: Split) -> None:
    for step, side, channels in ((0, 16, 3), (1, 16, 5), (2, 32, 8)):
        region = transformed(split, channels, side, step)
        found = torch.zeros(1, channels, side, side)
        cells = region.cells(found)
        found[:, region.low : region.high] = 1 if cells is None else cells.float()
        assert torch.equal(found, (1 - seen_mask(split, channels, side, step)).expand_as(found))


def test_composite_splits() -> None:
    assert split_steps("spatial", 2) == ["spatial", "spatial"]
    assert split_steps("blocks-channels", 4) == ["blocks", "blocks", "channels", "channels"]
    expected = ["hblocks", "hblocks", "lblocks", "lblocks", "blocks", "blocks", "channels", "channels"]
    assert split_steps("hblocks-lblocks-blocks-channels", 8) == expected


@pytest.mark.parametrize("name", ["checker", "channels-blocks", "blocks-spatial", ""])
def test_unknown_splits(name: str) -> None:
    with pytest.raises(ValueError, match=f"unknown split '{name}'; known: channels, spatial"):
        split_steps(name, 4)


def test_steps_that_do_not_divide() -> None:
    with pytest.raises(ValueError, match="divisible by 2, not 3"):
        split_steps("blocks-channels", 3)
