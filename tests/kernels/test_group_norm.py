"""Group norm and SiLU of one tensor or two, and a sampler's update: their formulas and their operators on a CPU."""

import pytest
import torch
from torch import Tensor

from hflow_rt.kernels import group_norm, sampler_update
from hflow_rt.kernels.group_norm import group_norm_silu


def draw(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(size, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(size) + seed))


@pytest.mark.parametrize("levels", [(), (2,)])
def test_it_is_its_formula(levels: tuple[int, ...]) -> None:
    x, skip, weight, bias, level = draw(2, 5, 3, 4), draw(2, 3, 3, 4), draw(8), draw(8, seed=1), draw(*levels, 8)
    found = group_norm_silu(x, weight, bias, 4, skip=skip, level=level)
    whole = torch.cat([x, skip], 1) + level.expand(2, 8)[:, :, None, None]
    for b in range(2):
        for c in range(8):
            group = whole[b, c // 2 * 2 : c // 2 * 2 + 2]
            rate = ((group - group.mean()).square().mean() + 1e-5).rsqrt()
            z = (whole[b, c] - group.mean()) * rate * weight[c] + bias[c]
            torch.testing.assert_close(found[b, c], z / (1 + torch.exp(-z)), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("more", "level"), [(0, draw(2, 6)), (2, None), (2, draw(8))])
def test_group_norms_operator_and_its_gradients(more: int, level: Tensor | None) -> None:
    x, skip = draw(2, 6, 2, 3).requires_grad_(), draw(2, more, 2, 3).requires_grad_() if more else None
    weight, bias = draw(6 + more).requires_grad_(), draw(6 + more, seed=1).requires_grad_()
    level = None if level is None else level.requires_grad_()
    inputs = (x, skip, level, weight, bias, 2)
    torch.library.opcheck(group_norm._norm, inputs)
    assert torch.autograd.gradcheck(lambda *tensors: group_norm._norm(*tensors, 2)[0], inputs[:-1])
    plain = group_norm.group_norm_silu_reference(*inputs)
    torch.testing.assert_close(group_norm._norm(*inputs)[0], plain, rtol=1e-10, atol=1e-10)
    moments = group_norm._norm(*inputs)[1].detach()
    known = [None if t is None else t.detach() for t in inputs[:-1]]
    torch.library.opcheck(group_norm._backward, (plain.detach(), *known, moments))


def test_an_updates_operator_and_its_gradients() -> None:
    tensors = [draw(2, 3, 2, 2, seed=seed).requires_grad_() for seed in range(4)]
    inputs = (*tensors, draw(2).requires_grad_(), draw(2, seed=1).requires_grad_())
    torch.library.opcheck(sampler_update._update, inputs)
    assert torch.autograd.gradcheck(sampler_update._update, inputs)
    made, image = sampler_update.sampler_update(*inputs)
    expected = (
        inputs[0] + inputs[1] + torch.stack([inputs[4][b] * inputs[2][b] + inputs[5][b] * inputs[3][b] for b in (0, 1)])
    )
    torch.testing.assert_close(made, expected)
    assert torch.equal(image, made.clamp(0, 1))
    assert 0 < int((image == made).sum()) < made.numel()
