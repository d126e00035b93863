"""The coupling's Triton kernels against plain torch in float64."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from hflow_rt.kernels import coupling as coupling_file
from hflow_rt.kernels import coupling_kernels, dispatch
from hflow_rt.kernels.channels import Elementwise
from hflow_rt.kernels.coupling import Region, coupling, coupling_reference
from hflow_rt.kernels.mixing import mixing
from hflow_rt.layers.masks import PERIODS, transformed

AsGood = Callable[..., None]
FORMS = ["clipped", "additive", "sigmoid", "exp_sigmoid"]
# size, what is transformed, the map after, whether the outer map follows: either half, every kind of board, one pixel
CASES: list[tuple[tuple[int, ...], Region, str, bool]] = [
    ((1, 1, 3, 5), Region(0, 1, 1, 1, 0), "full", True),
    ((5, 2, 1, 1), Region(1, 2), "full", False),
    ((2, 3, 7, 9), Region(1, 3), "full", True),
    ((1, 4, 6, 10), Region(0, 4, 2, 2, 1), "diagonal", True),
    ((2, 5, 8, 1), Region(0, 2), "none", True),
    ((1, 8, 5, 4), Region(4, 8), "full", False),
]


def draw(size: tuple[int, ...], region: Region, form: str, kind: str, post: bool, device: str = "cpu") -> list[Any]:
    """x, log-scale and shift (some beyond their bounds), weight, bias, its inverse, and the outer map's two."""
    generator = torch.Generator().manual_seed(sum(size) + len(form))
    normal = lambda *sides: torch.randn(*sides, generator=generator).to(device)  # noqa: E731
    channels = size[1]
    net = (size[0], region.high - region.low, *size[2:])
    weight: Tensor | None = None
    if kind == "full":  # as far from orthogonal as training goes
        weight = torch.linalg.qr(normal(channels, channels))[0] * torch.exp(0.3 * normal(channels))
    elif kind == "diagonal":
        weight = torch.exp(0.3 * normal(channels))
    bias = None if weight is None else normal(channels)
    undo = None if weight is None else 1 / weight if kind == "diagonal" else torch.linalg.inv(weight.double()).float()
    log_scale = None if form == "additive" else 2 * normal(*net)
    outer = (normal(*size), 0.5 * normal(*size)) if post else (None, None)
    return [normal(*size), log_scale, 4 * normal(*net), weight, bias, undo, *outer]


def everything(
    f: Callable[..., Any], tensors: list[Any], region: Region, inverse: bool, form: str
) -> list[tuple[str, Tensor]]:
    """Result and log-determinant, then the gradients by all that took part."""
    names = ["x", "log_scale", "shift", "weight", "bias", "undo", "post_shift", "post_log_scale"]
    given = {
        n: None if t is None else t.detach().requires_grad_(n != "undo") for n, t in zip(names, tensors, strict=True)
    }
    post = None if tensors[-1] is None else Elementwise(given["post_shift"], given["post_log_scale"])
    options = {"undo": given["undo"]} if f is coupling else {}
    y, log_det = f(
        *(given[name] for name in names[:5]), region, inverse=inverse, form=form, post=post, **options
    )  # fmt: skip
    above = (1 + torch.arange(y.numel(), dtype=torch.float64).sin()).view(y.shape).to(y)
    along = torch.linspace(-1, 2, len(y), dtype=torch.float64).to(y)
    used = {name: t for name, t in given.items() if t is not None and name != "undo"}
    weighted = (y * above).sum() + (log_det * along).sum()
    gradients = torch.autograd.grad(weighted, list(used.values()), allow_unused=True)
    found = [("y", y.detach()), ("log_det", log_det.detach())]
    return found + [(n, g) for n, g in zip(used, gradients, strict=True) if g is not None]


def wide(tensors: list[Any]) -> list[Any]:
    return [None if t is None else t.double() for t in tensors]


def compare(tensors: list[Any], region: Region, inverse: bool, form: str, as_good: AsGood) -> None:
    assert dispatch.takes(tensors[0])
    found = everything(coupling, tensors, region, inverse, form)
    truth = dict(everything(coupling_reference, wide(tensors), region, inverse, form))
    plain = dict(everything(coupling_reference, tensors, region, inverse, form))
    assert [name for name, _ in found] == list(truth)
    for name, mine in found:
        assert mine.dtype == plain[name].dtype
        # gradients are made of a recomputed input, which holds the rounding of the result and of its map's inverse;
        # those of the channel map sum all pixels, whose terms cancel
        as_good(mine, truth[name], plain[name], ulps={"y": 1, "weight": 64, "bias": 64}.get(name, 8))


@pytest.mark.parametrize("case", range(len(CASES)))
@pytest.mark.parametrize("form", FORMS)
def test_result_and_gradients(form: str, case: int, device: str, as_good: AsGood) -> None:
    """Every form on every case, three of them in either direction."""
    size, region, kind, post = CASES[case]
    inverse = (case + FORMS.index(form)) % 2 == 1
    compare(draw(size, region, form, kind, post, device), region, inverse, form, as_good)


@pytest.mark.parametrize("form", ["clipped", "sigmoid"])
@pytest.mark.parametrize("inverse", [False, True])
def test_many_tiles(inverse: bool, form: str, device: str, as_good: AsGood, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coupling_kernels, "LANES", 16)
    monkeypatch.setattr(coupling_kernels, "LANES_BACKWARD", 8)
    region = Region(0, 3, 2, 2, 0)
    for kind in ("full", "diagonal"):
        compare(draw((2, 3, 5, 6), region, form, kind, True, device), region, inverse, form, as_good)


@pytest.mark.parametrize("split", [*PERIODS, "channels"])
def test_every_split(split: Any, device: str, as_good: AsGood) -> None:
    for step, inverse in ((0, False), (1, True)):
        region = transformed(split, 3, 16, step)
        tensors = draw((1, 3, 16, 16), region, "clipped", "full", False, device)
        compare(tensors, region, inverse, "clipped", as_good)


@pytest.mark.parametrize(
    ("channels", "form"),
    [*zip([1, 2, 3, 5, 8, 13, 16], itertools.cycle(["clipped", "sigmoid"])), (24, "clipped"), (24, "sigmoid")],
)
def test_forward_undoes_inverse(channels: int, form: str, device: str) -> None:
    """Through both kernels and the map between, more channels than a lane holds included."""
    region = Region(channels // 2, channels)
    x, log_scale, shift, weight, bias, undo, *_ = draw((2, channels, 5, 7), region, form, "full", False, device)
    options: Any = {"form": form}
    with torch.no_grad():
        y, down = coupling(x, log_scale, shift, weight, bias, region, inverse=True, **options)
        expected, _ = coupling_reference(*wide([x, log_scale, shift, weight, bias]), region, inverse=True, **options)
        back, up = coupling(
            mixing(y, undo, -undo @ bias), log_scale, shift, None, None, region, inverse=False, **options
        )  # fmt: skip
    assert (y - expected).abs().max() <= 4e-6 * expected.abs().max()
    assert torch.allclose(up, -down, rtol=1e-6)  # summed by other tiles
    grown = (
        float(torch.exp(-log_scale.clamp(-3, 3)).max()) if form == "clipped" else float(1 + torch.exp(-log_scale).max())
    )
    assert (back - x).abs().max() <= 1e-6 * grown * float(x.abs().max() + 5)


@pytest.mark.parametrize("channels", [13, 24])
def test_gradients_of_more_channels_than_a_program_sums(channels: int, device: str, as_good: AsGood) -> None:
    region = Region(0, channels // 2)
    compare(draw((2, channels, 3, 5), region, "sigmoid", "full", True, device), region, True, "sigmoid", as_good)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("form", FORMS)
def test_nets_of_half_precision(form: str, dtype: torch.dtype, device: str, as_good: AsGood) -> None:
    region = Region(0, 3, 2, 2, 1)
    tensors = draw((2, 3, 4, 6), region, form, "full", True, device)
    for at in (1, 2, 6, 7):
        tensors[at] = None if tensors[at] is None else tensors[at].to(dtype)
    compare(tensors, region, False, form, as_good)
    compare(tensors, region, True, form, as_good)


def test_nets_that_give_all_channels(device: str) -> None:
    """What they give for the seen ones counts for nothing, even NaN, and gets no gradient."""
    region = Region(1, 3)
    tensors = draw((2, 4, 3, 5), region, "clipped", "full", True, device)
    found = dict(everything(coupling, tensors, region, False, "clipped"))
    for at in (1, 2):
        around = torch.full((2, 4, 3, 5), torch.nan, device=device)
        around[:, 1:3] = tensors[at]
        tensors[at] = around
    for name, more in everything(coupling, tensors, region, False, "clipped"):
        if name in ("log_scale", "shift"):
            assert (more[:, [0, 3]] == 0).all()
            more = more[:, 1:3]
        assert torch.equal(more, found[name])


def test_the_seen_half_passes_bit_for_bit(device: str) -> None:
    region = Region(0, 3, 2, 2, 0)
    x, log_scale, shift, *_ = draw((2, 3, 6, 8), region, "clipped", "none", False, device)
    seen = ~region.cells(x)  # type: ignore[operator]
    for form, inverse in itertools.product(FORMS, (False, True)):
        r = None if form == "additive" else log_scale
        y, _ = coupling(x, r, shift, None, None, region, inverse=inverse, form=form)  # type: ignore[arg-type]
        assert torch.equal(y[:, :, seen], x[:, :, seen])
        assert (y[:, :, ~seen] != x[:, :, ~seen]).float().mean() > 0.99


def test_strided_inputs_and_gradients(laid_out: Callable[[Tensor], Tensor], device: str) -> None:
    region = Region(0, 4, 1, 1, 0)
    tensors = draw((2, 4, 5, 6), region, "clipped", "full", True, device)
    above = draw((2, 4, 5, 6), region, "clipped", "none", False, device)[2]

    def run(lay: Callable[[Tensor], Tensor], nets: tuple[Tensor, Tensor]) -> list[Tensor]:
        x, shift, log_scale = (lay(tensors[at]).detach().requires_grad_() for at in (0, 6, 7))
        r, t = (net.detach().requires_grad_() for net in nets)
        post = Elementwise(shift, log_scale)
        y, log_det = coupling(x, r, t, *tensors[3:5], region, inverse=True, form="clipped", post=post)
        return [y.detach(), log_det.detach(), *torch.autograd.grad(y, [x, r, t, shift, log_scale], lay(above))]

    packed = run(torch.Tensor.contiguous, (tensors[1], tensors[2]))
    halves = torch.cat(tensors[1:3], 1).chunk(2, 1)
    interleaved = torch.stack(tensors[1:3], 2).flatten(1, 2)
    for nets in (halves, (interleaved[:, 0::2], interleaved[:, 1::2]), tuple(map(laid_out, tensors[1:3]))):
        for found, expected in zip(run(laid_out, nets), packed, strict=True):  # type: ignore[arg-type]
            assert torch.equal(found, expected)


def test_what_is_no_number_stays_none(device: str) -> None:
    """A net that broke must not look like one that hit its bound."""
    x = torch.ones(1, 2, 1, 4, device=device)
    broken = torch.full_like(x, torch.nan)
    for pair in ((broken, x), (x, broken)):
        y, log_det = coupling(x, *pair, None, None, Region(0, 2), inverse=False, form="clipped")
        assert y.isnan().all()
        assert bool(log_det.isnan()) == (pair[0] is broken)


def test_bounds_stop_the_gradient(device: str) -> None:
    raw = torch.tensor([-3.1, -2.9, 0.5, 3.0, 3.1], device=device).view(1, 1, 1, 5)
    x = torch.ones_like(raw)
    for inverse in (False, True):
        r, t = raw.clone().requires_grad_(), (raw * 5 / 3).requires_grad_()
        y, log_det = coupling(x, r, t, None, None, Region(0, 1), inverse=inverse, form="clipped")
        by_r, by_t = torch.autograd.grad(y.sum() + 3 * log_det.sum(), [r, t])
        for gradient in (by_r, by_t):
            assert (gradient.flatten() != 0).tolist() == [False, True, True, True, False]


def test_two_runs_agree_bit_for_bit(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coupling_kernels, "LANES", 16)
    monkeypatch.setattr(coupling_kernels, "LANES_BACKWARD", 16)
    region = Region(0, 3, 1, 1, 0)
    tensors = draw((2, 3, 7, 9), region, "clipped", "full", True, device)
    runs = [everything(coupling, tensors, region, True, "clipped") for _ in range(2)]
    assert all(torch.equal(one, two) for (_, one), (_, two) in zip(*runs, strict=True))


def test_operators_keep_their_promises(device: str) -> None:
    region = Region(1, 3)
    tensors = draw((2, 3, 3, 5), region, "clipped", "full", True, device)
    rest = (list(region), False, "clipped")
    torch.library.opcheck(coupling_file._coupling_backward, (tensors[0], tensors[0][:, 0, 0, 0], *tensors, *rest))
    leaves = [None if t is None else t.requires_grad_(at != 5) for at, t in enumerate(tensors)]
    torch.library.opcheck(coupling_file._coupling, (*leaves, *rest))
