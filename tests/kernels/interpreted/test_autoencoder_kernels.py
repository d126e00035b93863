"""The kernels of hierarchies of latents and of mixtures against plain torch in float64, and NVAE on them."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from hflow_rt.kernels import (
    batch_norm,
    dispatch,
    group_norm,
    logistic_mixture,
    mixture_image,
    mixture_kernels,
    residual_normal,
    squeeze_excite,
)
from hflow_rt.models.nvae.batch_norm import BatchNorm, standing_still
from hflow_rt.models.nvae.cells import Cell, InvertedResidual
from hflow_rt.models.nvae.config import NVAEConfig
from hflow_rt.models.nvae.model import NVAE
from hflow_rt.models.nvae.network import unpacked
from hflow_rt.models.nvae.output import pixels as pixels_of
from hflow_rt.models.nvae.plan import NVAEPlan
from hflow_rt.models.nvae.presets import TINY
from hflow_rt.models.plan import Batch, Place, draw

AsGood = Callable[..., None]
Size = tuple[int, ...]
SIZES: list[Size] = [(3, 6, 5, 3), (1, 4, 1, 7), (2, 3, 8, 8)]


@pytest.fixture
def normal(device: str, request: pytest.FixtureRequest) -> Callable[..., Tensor]:
    """Normal numbers of a size, other ones in every test."""
    generator = torch.Generator().manual_seed(len(request.node.name))
    return lambda *size: torch.randn(size, generator=generator).to(device)


def everything(f: Callable[..., Any], tensors: list[Any], *rest: Any) -> list[Tensor]:
    """All results, then the gradients by all tensors that have one."""
    leaves = [None if t is None else t.detach().requires_grad_(t.is_leaf and t.requires_grad) for t in tensors]
    made = f(*leaves, *rest)
    results = [y for y in (made if isinstance(made, tuple) else (made,)) if y.numel()]
    weighted = [(y * (1 + torch.arange(y.numel()).sin()).view(y.shape).to(y)).sum() for y in results if y.requires_grad]
    used = [t for t in leaves if t is not None and t.requires_grad]
    return [*(y.detach() for y in results), *torch.autograd.grad(torch.stack(weighted).sum(), used)]


def compare(kernel: Any, reference: Any, tensors: list[Any], *rest: Any, as_good: AsGood) -> None:
    """Half types are the proofs' (test_proof.py)."""
    wide = [None if t is None else t.detach().double().requires_grad_(t.requires_grad) for t in tensors]
    found, plain = everything(kernel, tensors, *rest), everything(reference, tensors, *rest)
    truth = everything(reference, wide, *rest)
    assert len(found) == len(truth)
    for mine, right, torchs in zip(found, truth, plain, strict=True):
        as_good(mine, right, torchs, ulps=12)


def wanting(*tensors: Tensor) -> list[Tensor]:
    return [t.requires_grad_() for t in tensors]


@pytest.fixture
def in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planes of several parts, whose moments are pooled in several turns."""
    monkeypatch.setattr(group_norm, "PART", 32)
    monkeypatch.setattr(residual_normal, "TILE", 32)
    monkeypatch.setattr(batch_norm, "PARTS", 8)


def normed(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return batch_norm._norm(x, weight, bias)[0]


@pytest.mark.usefixtures("in_parts")
@pytest.mark.parametrize(("size", "mean"), [*((size, 2.0) for size in SIZES), (SIZES[2], 1000.0)])
def test_batch_norm(size: Size, mean: float, normal: Callable[..., Tensor], as_good: AsGood) -> None:
    tensors = wanting(mean + normal(*size), 1 + 0.3 * normal(size[1]), normal(size[1]))
    compare(normed, batch_norm.batch_norm_silu_reference, tensors, as_good=as_good)
    _, found, variance = batch_norm.batch_norm_silu(*tensors)
    truth = torch.var_mean(tensors[0].detach().double(), (0, 2, 3), correction=0)
    torch.testing.assert_close(found.double(), truth[1], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(variance.double(), truth[0], rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("in_parts")
@pytest.mark.parametrize("moved", [False, True])
@pytest.mark.parametrize("size", SIZES)
def test_residual_normals(size: Size, moved: bool, normal: Callable[..., Tensor], as_good: AsGood) -> None:
    """With a prior of every pixel, and with one for all that the posterior is told relative to."""
    raw, noise = 2 * normal(size[0], 2 * size[1], *size[2:]), normal(*size)
    z = normal(*size).requires_grad_() if moved else None
    for relative in (False, True):
        prior = normal(1, 2 * size[1], 1, 1) if relative else 2 * normal(*raw.shape)
        tensors = [*wanting(raw, prior), noise, z]
        compare(
            residual_normal._residual, residual_normal.residual_normal_reference, tensors, relative, as_good=as_good
        )


@pytest.mark.usefixtures("in_parts")
@pytest.mark.parametrize("size", SIZES)
def test_squeeze_excite(size: Size, normal: Callable[..., Tensor], as_good: AsGood) -> None:
    channels = size[1]
    layers = (normal(4, channels), normal(4), normal(channels, 4), normal(channels))
    tensors = wanting(normal(*size), 1 + normal(*size), *layers)

    def excited(*inputs: Any) -> Tensor:
        return squeeze_excite._excite(*inputs)[0]

    compare(excited, squeeze_excite.squeeze_excite_reference, tensors, 0.1, as_good=as_good)


def mixture(normal: Callable[..., Tensor], channels: int, count: int, *sides: int) -> tuple[Tensor, Tensor]:
    """Logits and an image with all edges; scales from beyond the narrowest to wide ones."""
    logits = normal(2, count * mixture_kernels.parameters_of(channels), *sides)
    torch.unflatten(logits[:, count:], 1, (channels, -1, count))[:, :, 1].mul_(2).sub_(2)
    image = (127.5 + 127.5 * normal(2, channels, *sides)).round().clamp(0, 255) / 255
    return logits, image


def counted(*inputs: Any) -> Tensor:
    return logistic_mixture._log_prob(*inputs)[0]


@pytest.mark.parametrize("published", [False, True])
@pytest.mark.parametrize(("channels", "count", "side", "bits"), [(3, 2, 12, 8), (1, 3, 5, 8), (3, 1, 2, 5)])
def test_log_probabilities(
    channels: int, count: int, side: int, bits: int, published: bool, normal: Callable[..., Tensor], as_good: AsGood
) -> None:
    logits, image = mixture(normal, channels, count, side, side + 1)
    image = (image * (2**bits - 1)).round() / (2**bits - 1)
    compare(
        counted, logistic_mixture.mixture_log_prob_reference,
        [logits.requires_grad_(), image], bits, published, as_good=as_good,
    )  # fmt: skip


@pytest.mark.parametrize("as_bytes", [False, True])
@pytest.mark.parametrize("drawn", [False, True])
@pytest.mark.parametrize(("channels", "count", "side"), [(3, 2, 12), (1, 3, 5)])
def test_images(
    channels: int, count: int, side: int, drawn: bool, as_bytes: bool, normal: Callable[..., Tensor]
) -> None:
    """Bytes are the rounded numbers, and a draw chooses the same logistics as plain torch."""
    logits, _ = mixture(normal, channels, count, side, side + 1)
    uniform = [normal(2, many, side, side + 1).abs().remainder(1) for many in (count, channels)]
    draws = (uniform[0], uniform[1]) if drawn else None
    found = mixture_image.mixture_image(logits, channels, draws, as_bytes)
    with dispatch.using("reference"):
        truth = mixture_image.mixture_image(
            logits.double(), channels, (draws[0].double(), draws[1].double()) if draws else None
        )
    if as_bytes:
        assert found.dtype == torch.uint8
        levels = 255 * truth.permute(0, 2, 3, 1)
        assert (found - levels).abs().max() < 0.501
    else:
        assert (found - truth).abs().max() < 1e-5


def check(operator: Any, *inputs: Any) -> None:
    """What compilers take for granted; compiling itself is tested of other operators."""
    promises = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(operator, inputs, test_utils=promises)


def test_operators_keep_their_promises(normal: Callable[..., Tensor]) -> None:
    x, weight = wanting(normal(2, 3, 3, 5), normal(3))
    check(batch_norm._norm, x, weight, weight)
    layers = wanting(normal(4, 3), normal(4), normal(3, 4), normal(3))
    check(squeeze_excite._excite, x, x, *layers, 0.1)
    raw = normal(2, 6, 3, 5).requires_grad_()
    noise = normal(2, 3, 3, 5)
    check(residual_normal._residual, raw, raw, noise, None, True)
    check(residual_normal._residual, raw, raw, noise, x, False)
    logits, image = mixture(normal, 3, 2, 3, 4)
    check(logistic_mixture._log_prob, logits.requires_grad_(), image, 8, True)
    check(mixture_image._image, logits.detach(), None, None, None, 3, True)


def test_wrong_shapes_are_refused(device: str) -> None:
    x = torch.zeros(2, 20, 3, 3, device=device)
    with pytest.raises(ValueError, match=r"logits must be \[B, 10 M, H, W\] for 3 channels of 1 or 3, not \[2, 19"):
        logistic_mixture.mixture_log_prob(x[:, 1:], x[:, :3], 8)
    with pytest.raises(ValueError, match=r"must be of the pixels of \[2, 20, 3, 3\], not \[1, 3, 3, 3\]"):
        logistic_mixture.mixture_log_prob(x, x[:1, :3], 8)
    with pytest.raises(ValueError, match=r"draws must be of 2 logistics and 3 channels, not \[3, 2\]"):
        mixture_image.mixture_image(x, 3, (x[:, :3], x[:, :2]))
    with pytest.raises(ValueError, match=r"the prior must be like \[2, 20, 3, 3\], or \[1, 20, 1, 1\], not \[1, 20, 3"):
        residual_normal.residual_normal(x, x[:1], x[:, :10], True)
    with pytest.raises(ValueError, match=r"noise and latents must be \[2, 10, 3, 3\], not \[2, 9, 3, 3\]"):
        residual_normal.residual_normal(x, x, x[:, :9], True)
    with pytest.raises(ValueError, match=r"weight and bias must be \[20\], not \[19\]"):
        batch_norm.batch_norm_silu(x, x[0, :19, 0, 0], x[0, :, 0, 0])
    with pytest.raises(ValueError, match=r"the gate's layers must be \[\(3, 20\), \(3,\), .*\], not \[\(3, 19\)"):
        squeeze_excite.squeeze_excite(x, x, (x[0, 1:, :, 0].T, x[0, 0, 0]), (x[0, :, 0], x[0, :, 0, 0]), 0.1)


def test_running_statistics_move_once(normal: Callable[..., Tensor]) -> None:
    """And stay where they are while activations are computed again."""
    norm, x = BatchNorm(3).to(normal(1).device).train(), 5 + normal(4, 3, 2, 5)
    norm.swish(x)
    moved = [buffer.clone() for buffer in norm.buffers()]
    torch.testing.assert_close(moved[0], 0.05 * x.mean((0, 2, 3)))
    torch.testing.assert_close(moved[1], 0.95 + 0.05 * x.var((0, 2, 3)))
    with standing_still(norm):
        norm.swish(x)
    assert all(torch.equal(one, other) for one, other in zip(norm.buffers(), moved, strict=True))


def test_nvae_trains_on_the_kernels(device: str, launched_by: Callable[..., list[str]]) -> None:
    """Every norm that swish follows, every cell's gate, every group and the pixels; calibration as well."""
    launched = launched_by(batch_norm, mixture_kernels, mixture_image, residual_normal, squeeze_excite)
    pixels = torch.randint(256, (4, 3, 8, 8), generator=torch.Generator().manual_seed(3), dtype=torch.uint8).to(device)

    def run() -> tuple[NVAE, list[Tensor], list[Tensor]]:
        torch.manual_seed(1)
        model = NVAE(NVAEConfig(**TINY["model"] | {"groups": (1, 1), "blocks": 0})).train().to(device)
        plan = NVAEPlan(model).to(device)
        plan.start(pixels, torch.Generator().manual_seed(2))
        draws = draw(plan.draws("network"), 4, torch.Generator().manual_seed(4))
        noise = {name: value.to(device) for name, value in draws.items()}
        loss = plan.loss("network", Batch(pixels, noise, {}), Place(10, 1000, 2000)).loss
        slopes = list(torch.autograd.grad(loss, list(model.parameters())))
        with torch.no_grad():
            image = pixels_of(model.config, model.generate(unpacked(model.config, "noise", noise)).logits).mean()
        return model, [loss.detach(), image, *model.buffers()], slopes

    model, found, slopes = run()
    cells = [module for module in model.modules() if isinstance(module, Cell)]
    of_decoder = sum(isinstance(cell.body, InvertedResidual) for cell in cells)
    assert launched.count("_gather_channel") == 2 * len(cells) + 2 * of_decoder
    assert launched.count("_norm_silu_gradient") == 2 * 2 * len(cells)
    assert launched.count("_gated") == 2 * len(cells) + of_decoder
    assert launched.count("_residual_gradient") == 2 * len(model.config.group_scales)  # before and after flows
    assert launched.count("_log_prob_gradient") == launched.count("_mean_kernel") == 1
    launched.clear()
    with dispatch.using("reference"):
        _, expected, torchs = run()
    assert launched == []
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    size = torch.stack([slope.norm() for slope in torchs]).norm()
    off = torch.stack([(one - other).norm() for one, other in zip(slopes, torchs, strict=True)]).norm()
    assert off < 1e-4 * size
