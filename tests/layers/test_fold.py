"""Folding: every layer with a `fold` is replaced, in a copy, and the map stays the same."""

import torch
from torch import nn

from hflow_rt.layers.equalized import EqualizedConv2d, EqualizedLinear
from hflow_rt.layers.fold import fold_children, folded_copy
from hflow_rt.layers.resample import BlurDown, InstanceNorm


def net() -> nn.Module:
    torch.manual_seed(0)
    trunk = nn.Sequential(
        EqualizedConv2d(3, 6, 3, activation="leaky"),
        InstanceNorm(),
        BlurDown(6),
        EqualizedConv2d(6, 4, activation="tanh", lr_scale=10),
    )
    return nn.Sequential(trunk, nn.Flatten(), EqualizedLinear(64, 5, lr_scale=0.1))


def test_the_folded_map_is_the_map() -> None:
    original = net().double()
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    expected = original(x)
    fold_children(original)
    assert (original(x) - expected).abs().max() < 1e-12
    kept = [type(module).__module__ for module in original.modules()]
    assert not any("equalized" in name for name in kept)


def test_a_folded_copy_is_float32_frozen_and_apart() -> None:
    original = net().train()
    before = {name: value.clone() for name, value in original.state_dict().items()}
    folded = folded_copy(original)
    assert not folded.training
    assert all(p.dtype == torch.float32 and not p.requires_grad for p in folded.parameters())
    assert original.training
    assert all(p.requires_grad for p in original.parameters())
    for parameter in folded.parameters():
        parameter.data.zero_()
    for name, value in original.state_dict().items():
        assert torch.equal(value, before[name])
    assert type(original[0][0]) is EqualizedConv2d  # type: ignore[index]


def test_a_function_folds_what_it_is_named_for_and_nothing_derived_from_it() -> None:
    class Wider(BlurDown):
        pass

    folded = folded_copy(nn.Sequential(BlurDown(6), Wider(6)), {BlurDown: lambda layer: nn.Identity()})
    assert type(folded[0]) is nn.Identity
    assert type(folded[1]) not in (nn.Identity, Wider)


def test_constants_are_computed_in_float64() -> None:
    """Rounding once: the folded float32 weight is the float64 product rounded, not a product of float32 numbers."""
    original = EqualizedConv2d(7, 3, 3, activation="leaky", lr_scale=0.3)
    folded = folded_copy(nn.Sequential(original))[0]
    exact = original.weight.detach().double() * original.weight_scale
    assert torch.equal(folded[0].weight, exact.float())  # type: ignore[index]
