"""The training loss, the published bound and the strict bound (spec section 3)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hflow_rt.errors import ConfigError, DataError
from hflow_rt.models.bins import public_levels, to_model
from hflow_rt.models.family import LossTerms
from hflow_rt.models.hflow.flow import FlowResult

if TYPE_CHECKING:
    from hflow_rt.models.hflow.network import Encoded, HFlow

__all__ = [
    "BoundTerm",
    "bound_inputs",
    "bound_shapes",
    "bound_terms",
    "dataset_spreads",
    "evaluate",
    "finest_trained",
    "noise_shapes",
    "terms",
    "training_loss",
]


@dataclass(frozen=True)
class BoundTerm:
    """One flow's share of the bound, nats: log_prior `[B]`, log_det `[B]`, entropy and constant scalars."""

    log_prior: Tensor
    log_det: Tensor
    entropy: Tensor
    constant: float
    dimensions: int
    weight: float

    @property
    def log_likelihood(self) -> Tensor:
        """log N(z) + log-determinant + entropy of the posterior (+ D log 4 for the image), `[B]`."""
        return self.log_prior + self.log_det + self.entropy + self.constant

    @property
    def bits(self) -> Tensor:
        """Bits per dimension of this flow's own target, `[B]`."""
        return -self.log_likelihood / (self.dimensions * math.log(2))


def terms(model: HFlow, encoded: Encoded, spreads: Mapping[str, Tensor]) -> dict[str, BoundTerm]:
    """Every flow's term by latent name, coarse to fine; `spreads` sets the posteriors' entropies."""
    relative = model.noised()
    result: dict[str, BoundTerm] = {}

    def add(name: str, run: FlowResult, prior_std: float, weight: float, constant: float) -> None:
        dimensions = run.value[0].numel()
        squares = run.value.flatten(1).square().sum(1)
        log_prior = -0.5 * (squares / prior_std**2 + dimensions * math.log(2 * math.pi * prior_std**2))
        entropy = run.value.new_zeros(())
        if name in relative:
            std = relative[name] * spreads[name].detach()
            entropy = dimensions * (0.5 * torch.log(2 * math.pi * std.square()) + 0.5)
        result[name] = BoundTerm(log_prior, run.log_det, entropy, constant, dimensions, weight)

    for i, run in enumerate(encoded.end):
        add(f"end{i}", run, 1.0, 1.0, 0.0)
    absent = len(model.config.levels) - len(encoded.levels)
    for index in range(len(model.config.levels) - 1, absent - 1, -1):
        level, run = model.config.levels[index], encoded.levels[index - absent]
        constant = run.value[0].numel() * math.log(4) if index == 0 else 0.0
        add(f"z{index}", run, level.prior_std, level.loss_weight, constant)
    return result


def noise_shapes(model: HFlow) -> dict[str, tuple[int, ...]]:
    """Draws of one training loss in the order of use.

    `NAME.flow` noises what the flow of NAME is evaluated at, `NAME.seen` what the decoders see of it.
    """
    shapes, relative = model.latent_shapes(), model.noised()
    ends = [name for name in relative if name.startswith("end")]
    names = [f"{name}.flow" for name in ends] + [f"{name}.seen" for name in ends]
    for index in model.coarse_to_fine():
        if f"z{index + 1}" in relative:
            names.append(f"z{index + 1}.seen")
        if f"z{index}" in relative:
            names.append(f"z{index}.flow")
    return {
        name: shapes[base][:1] if base.startswith("end") else shapes[base]
        for name in names
        for base in [name.partition(".")[0]]
    }


def evaluate(
    model: HFlow, x: Tensor, noise: Mapping[str, Tensor], *, batch_spread: bool, noise_decoders: bool
) -> dict[str, BoundTerm]:
    """The original's bound at images in [-0.5, 0.5], one term a flow (spec 3.1).

    batch_spread: posteriors scale with this batch's spread (needs 2 images) instead of the running one.
    noise_decoders: decoders see noised level targets (training) instead of clean ones.
    """
    targets = model.targets(x)
    relative = model.noised()
    if batch_spread:
        spreads = model.batch_spreads(targets)
        if model.training:
            model.update_spreads({name: value.detach() for name, value in spreads.items()})
    else:
        spreads = model.running_spreads()

    def noised(name: str, target: Tensor, use: str, scale: float = 1.0) -> Tensor:
        if name not in relative:
            return target
        return target + relative[name] * scale * spreads[name] * noise[f"{name}.{use}"].to(target)

    parts = model.split_end(targets.end)
    seen_levels = [
        noised(f"z{index}", target, "seen") if noise_decoders else target for index, target in enumerate(targets.levels)
    ]
    seen_end = [noised(f"end{i}", u, "seen", model.config.end.style_noise_scale) for i, u in enumerate(parts)]
    encoded = model.encode_targets(
        targets,
        flow_end=[noised(f"end{i}", u, "flow").detach() for i, u in enumerate(parts)],
        flow_levels=[noised(f"z{index}", y, "flow").detach() for index, y in enumerate(targets.levels)],
        seen_end=torch.cat(seen_end, 1),
        seen_levels=seen_levels,
        finest=finest_trained(model) if model.training else 0,
    )
    return terms(model, encoded, spreads)


def finest_trained(model: HFlow) -> int:
    """Index of the finest level with a loss weight; the number of levels if only the end vector has one."""
    weights = [level.loss_weight for level in model.config.levels]
    return next((index for index, weight in enumerate(weights) if weight > 0), len(weights))


def dataset_spreads(model: HFlow, batches: Iterable[Tensor]) -> tuple[int, dict[str, Tensor]]:
    """Number of uint8 images in `batches` and the spread of each noised target over all of them.

    As `HFlow.batch_spreads` of one large batch, in the memory of a small one. Raises `DataError`.
    """
    count = 0
    sums: dict[str, Tensor] = {}
    squares: dict[str, Tensor] = {}
    for pixels in batches:
        targets = model.named_targets(model.targets(model.dequantize(pixels, None).to(next(model.parameters()))))
        for name in model.noised():
            value = targets[name].double()
            sums[name] = sums.get(name, 0) + value.sum(0)
            squares[name] = squares.get(name, 0) + value.square().sum(0)
        count += len(pixels)
    if count < 2:
        raise DataError(f"a spread needs at least 2 images, not {count}; give more")
    variances = {name: (squares[name] - sums[name].square() / count) / (count - 1) for name in sums}
    return count, {name: variance.clamp_min(1e-24).sqrt().mean() for name, variance in variances.items()}


def training_loss(model: HFlow, x: Tensor, noise: Mapping[str, Tensor] | None) -> LossTerms:
    """Weighted sum of every flow's bits per own dimension; a single image uses the running spreads."""
    if noise is None:
        noise = {
            name: torch.randn(x.shape[0], *shape, dtype=x.dtype, device=x.device)
            for name, shape in noise_shapes(model).items()
        }
    found = evaluate(model, x, noise, batch_spread=model.training and x.shape[0] > 1, noise_decoders=model.training)
    loss = torch.stack([term.bits * term.weight for term in found.values()]).sum(0).mean()
    bits = None
    if "z0" in found:
        total = torch.stack([term.log_likelihood for term in found.values()]).sum(0).mean().detach()
        bits = -total / (x[0].numel() * math.log(2)) + model.config.bits
    return LossTerms(loss, bits, {name: term.bits.mean().detach() for name, term in found.items()})


def bound_shapes(model: HFlow) -> dict[str, tuple[int, ...]]:
    """Noises of `bound_terms`, in units of each posterior's std: shapes without batch, by `NAME.USE`.

    `flow` moves what the flow of NAME is evaluated at, `seen` what the decoders see of it, and `known`, of end parts
    that have later ones, what conditions these.
    """
    shapes = {name: shape[:1] if name.startswith("end") else shape for name, shape in model.latent_shapes().items()}
    parts = [f"end{i}" for i in range(len(model.config.end.channels))]
    return {
        f"{name}.{use}": shapes[name]
        for name in model.noised()
        for use in ("flow", "seen", *(["known"] if name in parts[:-1] else []))
    }


def bound_inputs(model: HFlow, bound: str, pixels: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
    """`image`, `uniform` and the noises of `bound_shapes` that make `bound_terms` either of the two bounds.

    strict: everything that depends on a target sees one and the same draw of its posterior; without a posterior its
    density under a deterministic encoder bounds nothing, which raises `ConfigError`. paper: flows get draws of
    their own, decoders larger ones of end parts and none of levels, and end parts are conditioned on clean ones.
    """
    shapes, relative = bound_shapes(model), model.noised()
    missing = [name for name in model.latent_shapes() if name not in relative and name != "z0"]
    if bound == "strict" and missing:
        raise ConfigError(f"{', '.join(missing)} has no posterior noise in this configuration")
    inputs = {
        "image": public_levels(pixels, model.config.bits),
        "uniform": torch.rand(pixels.shape, generator=generator),
    }

    def draw(shape: tuple[int, ...]) -> Tensor:
        return torch.randn(len(pixels), *shape, generator=generator)

    ends = [name for name in relative if name.startswith("end")]
    if bound == "strict":
        fine_to_coarse = [name for name in reversed(relative) if name not in ends]
        one = {name: draw(shapes[f"{name}.flow"]) for name in (*ends, *fine_to_coarse)}
        inputs |= {name: one[name.partition(".")[0]] for name in shapes}
    else:
        own = {name: draw(shape) for name, shape in noise_shapes(model).items()}
        scale = model.config.end.style_noise_scale
        inputs |= {name: torch.zeros(len(pixels), *shape) for name, shape in shapes.items()}
        inputs |= {f"{name}.flow": own[f"{name}.flow"] for name in relative}
        inputs |= {f"{name}.seen": own[f"{name}.seen"] * scale for name in ends}
    return {name: value.to(pixels.device) for name, value in inputs.items()}


def bound_terms(model: HFlow, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Parts of the bound at `bound_inputs`: `NAME.prior`, `.log_det`, `.entropy` and, for the image, `.bins`.

    All `[B]` in bits per image dimension. `bins` is the width of a bin in units of the flow's target, which turns
    the density into a probability.
    """
    like, bits = next(model.parameters()), model.config.bits
    image, uniform = inputs["image"].to(like), inputs["uniform"].to(like)
    targets = model.targets(to_model(image, bits) + (uniform - 0.5) / (1 << bits))
    relative, spreads, shapes = model.noised(), model.running_spreads(), bound_shapes(model)

    def noised(target: Tensor, name: str, use: str) -> Tensor:
        if f"{name}.{use}" not in shapes:
            return target
        return target + relative[name] * spreads[name] * inputs[f"{name}.{use}"].to(target)

    end = {
        use: [noised(part, f"end{i}", use) for i, part in enumerate(model.split_end(targets.end))]
        for use in ("flow", "seen", "known")
    }
    levels = {use: [noised(y, f"z{i}", use) for i, y in enumerate(targets.levels)] for use in ("flow", "seen")}
    encoded = model.encode_targets(
        targets,
        flow_end=end["flow"],
        known_end=end["known"],
        seen_end=torch.cat(end["seen"], 1),
        flow_levels=levels["flow"],
        seen_levels=levels["seen"],
    )
    unit = -1 / (image[0].numel() * math.log(2))
    parts: dict[str, Tensor] = {}
    for name, term in terms(model, encoded, spreads).items():
        parts[f"{name}.prior"] = term.log_prior * unit
        parts[f"{name}.log_det"] = term.log_det * unit
        if name == "z0":
            parts[f"{name}.bins"] = torch.full_like(term.log_prior, term.constant * unit + bits)
        else:
            parts[f"{name}.entropy"] = (term.entropy * unit).expand_as(term.log_prior)
    return parts
