"""The forms of affine coupling in plain torch (hflow spec 2.5-2.11, glow spec 2.6; Dinh et al. 2017, eq. 7-8).

Latent to image `u = x e^s + b`, image to latent `u = (x - b) e^-s`; the log-determinant is the sum of s, or minus it.
What the net gives raw, r (`log_scale`) and t (`shift`), becomes s and b by the form of coupling:

    clipped        s = clip(r, +-3)          b = clip(t, +-5)
    additive       s = 0, there is no r      b = -t               as the next, image to latent: hence the signs
    sigmoid        s = -logsigmoid(r + 2)    b = -t
    exp_sigmoid    s = -sigmoid(r + 2)       b = -t

`coupling_forward` and `coupling_inverse` are the clipped form by itself; `coupling_reference` is all that `coupling`
does, and `gradients_from_result` its gradient without the input, as the kernels make it.
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from hflow_rt.kernels.channels import Elementwise, channel_map, element_map

__all__ = [
    "LOG_SCALE_BOUND",
    "SHIFT_BOUND",
    "Form",
    "Region",
    "clipped",
    "coupling_forward",
    "coupling_inverse",
    "coupling_reference",
    "gradients_from_result",
    "log_det_of",
    "moved",
]

LOG_SCALE_BOUND = 3.0
SHIFT_BOUND = 5.0
Form = Literal["clipped", "additive", "sigmoid", "exp_sigmoid"]


class Region(NamedTuple):
    """What a coupling transforms of `[B, C, H, W]`: channels `low` to `high`, everywhere or on a checkerboard.

    Of cells `cell_height` x `cell_width` (0 for everywhere), those where the sum of a cell's two indices has `parity`.
    """

    low: int
    high: int
    cell_height: int = 0
    cell_width: int = 0
    parity: int = 0

    def cells(self, x: Tensor) -> Tensor | None:
        """True in the transformed cells, `[H, W]`; None for everywhere."""
        if not self.cell_height:
            return None
        rows, columns = (torch.arange(side, device=x.device) for side in x.shape[2:])
        return (rows[:, None] // self.cell_height + columns // self.cell_width) % 2 == self.parity

    def first(self, net: Tensor) -> int:
        """The channel that the first of the net's output belongs to: it gives all channels, or just these."""
        return self.low if net.shape[1] == self.high - self.low else 0


def clipped(log_scale: Tensor, shift: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Mask (1 where transformed; None means everywhere) and clip the raw outputs of a coupling net."""
    if mask is not None:
        log_scale, shift = log_scale * mask, shift * mask
    return log_scale.clamp(-LOG_SCALE_BOUND, LOG_SCALE_BOUND), shift.clamp(-SHIFT_BOUND, SHIFT_BOUND)


def coupling_forward(x: Tensor, log_scale: Tensor, shift: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Latent to data, `x * exp(s) + b`: returns the result and its log-determinant `[B]`, the sum of `s`.

    Masked, then clipped, so that positions the net has seen pass unchanged and both directions apply bit-identical
    numbers.
    """
    s, b = clipped(log_scale, shift, mask)
    return x * torch.exp(s) + b, s.flatten(1).sum(1)


def coupling_inverse(x: Tensor, log_scale: Tensor, shift: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Data to latent, `(x - b) * exp(-s)`: returns the result and its log-determinant `[B]`, minus the sum of `s`."""
    s, b = clipped(log_scale, shift, mask)
    return (x - b) * torch.exp(-s), -s.flatten(1).sum(1)


def _terms(
    log_scale: Tensor | None, shift: Tensor, inverse: bool, form: str
) -> tuple[Tensor | None, Tensor, Tensor | None]:
    """e^s (where `inverse` e^-s), -b and -s, as nets from image to latent do; None for ones and zeros."""
    if log_scale is None:
        return None, shift, None
    if form == "clipped":
        s, b = clipped(log_scale, shift, None)
        return torch.exp(-s if inverse else s), -b, -s
    logits = log_scale + 2
    if form == "sigmoid":
        factor = torch.sigmoid(logits) if inverse else 1 + torch.exp(-2 - log_scale)
        return factor, shift, F.logsigmoid(logits)
    minus_s = torch.sigmoid(logits)
    return torch.exp(minus_s if inverse else -minus_s), shift, minus_s


def moved(
    x: Tensor, log_scale: Tensor | None, shift: Tensor, *, inverse: bool, form: Form
) -> tuple[Tensor, Tensor | None]:
    """`x`, all of it, as the form couples it with a net's output of the same shape and type; with -s, None for zeros.

    Latent to image, or where `inverse` image to latent.
    """
    factor, minus_b, minus_s = _terms(log_scale, shift, inverse, form)
    if factor is None:
        return x + minus_b if inverse else x - minus_b, None
    return (x + minus_b) * factor if inverse else x * factor - minus_b, minus_s


def log_det_of(x: Tensor, minus_s: Tensor | None, inverse: bool) -> Tensor:
    """The log-determinant `[B]` for the -s of `moved`, `[B, ...]` as `x`."""
    if minus_s is None:
        return x.new_zeros(x.shape[0])
    total = minus_s.flatten(1).sum(1)
    return total if inverse else -total


def _slopes(log_scale: Tensor | None, shift: Tensor, form: str) -> tuple[Tensor, Tensor]:
    """Derivatives of s by r and of b by t."""
    if log_scale is None:
        return torch.zeros_like(shift), -torch.ones_like(shift)
    if form == "clipped":
        return (log_scale.abs() <= LOG_SCALE_BOUND).to(shift.dtype), (shift.abs() <= SHIFT_BOUND).to(shift.dtype)
    rest = torch.sigmoid(-2 - log_scale)
    return -rest if form == "sigmoid" else -rest * torch.sigmoid(log_scale + 2), -torch.ones_like(shift)


def _within(x: Tensor, net: Tensor | None, region: Region) -> Tensor | None:
    """The region's channels of what a net gave, in the precision of `x`."""
    if net is None:
        return None
    first = region.first(net)
    return net[:, region.low - first : region.high - first].to(x.dtype)


def coupling_reference(
    x: Tensor,
    log_scale: Tensor | None,
    shift: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    region: Region,
    *,
    inverse: bool,
    form: Form,
    post: Elementwise | None = None,
) -> tuple[Tensor, Tensor]:
    """`coupling` in plain torch, differentiable any number of times."""
    r, t = _within(x, log_scale, region), _within(x, shift, region)
    assert t is not None
    old = x[:, region.low : region.high]
    new, minus_s = moved(old, r, t, inverse=inverse, form=form)
    cells = region.cells(x)
    if cells is not None:
        new = torch.where(cells, new, old)
        minus_s = None if minus_s is None else torch.where(cells, minus_s, 0)
    u = torch.cat([x[:, : region.low], new, x[:, region.high :]], 1)
    return element_map(channel_map(u, weight, bias), post, inverse), log_det_of(u, minus_s, inverse)


def gradients_from_result(
    g: Tensor,
    g_log_det: Tensor,
    y: Tensor,
    log_scale: Tensor | None,
    shift: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    undo: Tensor | None,
    region: Region,
    *,
    inverse: bool,
    form: Form,
    post: Elementwise | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `coupling_reference` by x, log_scale, shift, weight, bias and the maps of `post`, from those by its
    results and the result `y` alone. Of what is None, they are empty."""
    v, d_post_shift, d_post_log_scale = element_map(y, post, not inverse), y.new_empty(0), y.new_empty(0)
    if post is not None:
        scale = torch.exp(post.log_scale.to(y.dtype))
        d_post_log_scale = -g * y if inverse else g * (y - post.shift)
        d_post_shift = -g / scale if inverse else g.clone()
        g = g / scale if inverse else g * scale
    ones = y.new_ones(y.shape[1])
    u = channel_map(v if bias is None else v - bias.view(-1, 1, 1), ones if undo is None else undo, None)
    if weight is not None and weight.dim() == 2:
        d_weight, d_u = torch.einsum("bohw,bihw->oi", g, u), channel_map(g, weight.mT, None)
    else:
        d_weight, d_u = (g * u).sum((0, 2, 3)), channel_map(g, ones if weight is None else weight, None)
    d_bias = g.sum((0, 2, 3))

    r, t = _within(y, log_scale, region), _within(y, shift, region)
    assert t is not None
    channels, cells = slice(region.low, region.high), region.cells(y)
    factor, minus_b, _ = _terms(r, t, inverse, form)
    by_s, by_b = _slopes(r, t, form)
    above, total = d_u[:, channels], g_log_det.to(y.dtype).view(-1, 1, 1, 1)
    d_x = above if factor is None else above * factor
    d_r = (-above * u[:, channels] - total if inverse else above * (u[:, channels] + minus_b) + total) * by_s
    d_t = (-d_x if inverse else above) * by_b
    if cells is not None:
        d_x, d_r, d_t = torch.where(cells, d_x, above), torch.where(cells, d_r, 0), torch.where(cells, d_t, 0)
    gradients = (
        torch.cat([d_u[:, : region.low], d_x, d_u[:, region.high :]], 1),
        y.new_empty(0) if log_scale is None else _among(d_r, log_scale, region),
        _among(d_t, shift, region),
        y.new_empty(0) if weight is None else d_weight,
        y.new_empty(0) if bias is None else d_bias,
        d_post_shift if post is None else d_post_shift.to(post.shift.dtype),
        d_post_log_scale if post is None else d_post_log_scale.to(post.log_scale.dtype),
    )
    return tuple(values.contiguous() for values in gradients)  # type: ignore[return-value]


def _among(gradient: Tensor, net: Tensor, region: Region) -> Tensor:
    """The region's gradient among zeros for what else the net gave."""
    whole = torch.zeros_like(net, memory_format=torch.contiguous_format)
    first = region.first(net)
    whole[:, region.low - first : region.high - first] = gradient
    return whole
