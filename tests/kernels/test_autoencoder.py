"""The operators of hierarchies of latents and of mixtures on a CPU: what they compute, and their gradients."""

from typing import Any

import pytest
import torch
from torch import Tensor, distributions

from hflow_rt.kernels import batch_norm, logistic_mixture, mixture_image, residual_normal, squeeze_excite


def draw(*size: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(sum(size) + seed)
    return torch.randn(size, dtype=torch.float64, generator=generator).requires_grad_()


def test_batch_norm_and_its_gradients() -> None:
    inputs = (draw(3, 2, 2, 3), draw(2), draw(2, seed=1))
    assert torch.autograd.gradcheck(lambda *tensors: batch_norm._norm(*tensors)[0], inputs)
    found, mean, variance = batch_norm.batch_norm_silu(*inputs)
    torch.testing.assert_close(found, batch_norm.batch_norm_silu_reference(*inputs))
    for channel, plane in enumerate(inputs[0].unbind(1)):
        torch.testing.assert_close(mean[channel], plane.mean())
        torch.testing.assert_close(variance[channel], plane.var(correction=0))


@pytest.mark.parametrize("relative", [False, True])
def test_residual_normals_and_their_gradients(relative: bool) -> None:
    raw, prior, noise, z = draw(2, 4, 2, 3), draw(2, 4, 2, 3, seed=1), draw(2, 2, 2, 3).detach(), draw(2, 2, 2, 3)

    def normal(of: Tensor) -> distributions.Normal:
        mean, log_std = (5 * torch.tanh(part / 5) for part in of.chunk(2, 1))
        return distributions.Normal(mean, log_std.exp() + 0.01)

    posterior, other = normal(raw + prior if relative else raw), normal(prior)
    value, cost = residual_normal.residual_normal(raw, prior, noise, relative)
    torch.testing.assert_close(value, posterior.loc + posterior.scale * noise)
    torch.testing.assert_close(cost, distributions.kl_divergence(posterior, other).sum((2, 3)))
    found = residual_normal.normal_divergence(raw, prior, noise, z, relative)
    torch.testing.assert_close(found, (posterior.log_prob(value) - other.log_prob(z)).sum((2, 3)))
    for moved in (None, z):

        def both(raw: Tensor, prior: Tensor, z: Tensor | None) -> Any:
            return residual_normal._residual(raw, prior, noise, z, relative)[1 if z is not None else slice(None)]

        assert torch.autograd.gradcheck(both, (raw, prior, moved))


def test_squeeze_excite_and_its_gradients() -> None:
    inputs = (draw(2, 3, 2, 2), draw(2, 3, 2, 2, seed=1), draw(4, 3), draw(4), draw(3, 4), draw(3))
    assert torch.autograd.gradcheck(lambda *tensors: squeeze_excite._excite(*tensors, 0.1)[0], inputs)
    plain = squeeze_excite.squeeze_excite_reference(*inputs, 0.1)
    torch.testing.assert_close(squeeze_excite._excite(*inputs, 0.1)[0], plain)


@pytest.mark.parametrize("published", [False, True])
def test_the_gradients_of_a_mixture(published: bool) -> None:
    image = torch.tensor([0, 3, 128, 254, 255, 17]).double().view(1, 3, 1, 2) / 255
    logits = draw(1, 20, 1, 2)
    assert torch.autograd.gradcheck(lambda x: logistic_mixture._log_prob(x, image, 8, published)[0], logits)


def test_an_image_as_bytes_is_the_rounded_image() -> None:
    logits, uniform = draw(2, 20, 3, 4).detach(), torch.rand(2, 5, 3, 4, dtype=torch.float64)
    for draws in (None, (uniform[:, :2], uniform[:, 2:])):
        image = mixture_image.mixture_image(logits, 3, draws)
        found = mixture_image.mixture_image(logits, 3, draws, as_bytes=True)
        assert found.dtype == torch.uint8
        assert torch.equal(found, (255 * image).round().permute(0, 2, 3, 1).to(torch.uint8))
