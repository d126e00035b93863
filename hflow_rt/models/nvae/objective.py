"""What training lowers and evaluation tells (spec 5). Costs are in nats per image unless said otherwise."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from hflow_rt.models.nvae.config import NVAEConfig
from hflow_rt.models.nvae.network import Group, Inferred, Network, unpacked
from hflow_rt.models.nvae.output import pixels

__all__ = [
    "active_units",
    "balance",
    "balance_targets",
    "bits_per_dim",
    "bound_parts",
    "channel_divergence",
    "importance_bound",
    "kl_weight",
    "log_weight",
    "part_names",
    "reconstruction",
    "training_cost",
    "weight_penalty",
]

_ACTIVE = 0.1  # nats of a channel


def reconstruction(network: Network, inferred: Inferred, canvas: Tensor) -> Tensor:
    """`-log p(x | z)` of images on the canvas, `[B]`, of the pixels that are no padding."""
    log_prob = pixels(network.config, inferred.logits).log_prob(canvas)
    return -network.crop(log_prob).flatten(1).sum(1)


def bits_per_dim(config: NVAEConfig, nats: Tensor) -> Tensor:
    """Nats per image as bits per value of the image without padding."""
    return nats / (math.log(2) * math.prod(config.image_shape))


def kl_weight(config: NVAEConfig, done: int, total: int) -> float:
    """The weight of the divergences in the update that follows `done` updates of `total`, or so many images."""
    if not config.kl_warmup:
        return 1.0
    grown = (done - config.kl_constant * total) / (config.kl_warmup * max(total, 1))
    return min(1.0, max(config.kl_floor, grown))


def weight_penalty(config: NVAEConfig, kl: float) -> float:
    """The weight of the regularisers of weights, by that of the divergences."""
    if config.weight_penalty_start is None:
        return config.weight_penalty
    return math.exp((1 - kl) * math.log(config.weight_penalty_start) + kl * math.log(config.weight_penalty))


def balance_targets(config: NVAEConfig) -> list[float]:
    """How much divergence balancing wants in every group, top first, relative to the smallest."""
    depth = len(config.groups) - 1
    wanted = [4 ** (depth - scale) / config.groups[scale] for scale in config.group_scales]
    return [value / min(wanted) for value in wanted]


def balance(config: NVAEConfig, divergences: Tensor) -> Tensor:
    """Factors of the groups' divergences `[B, G]`, of mean 1, `[G]`: large where there is much divergence already.

    Used while the weight of the divergences is below 1; without gradient.
    """
    amount = divergences.detach().abs().mean(0) + 0.01
    relative = amount / amount.new_tensor(balance_targets(config))
    return relative / relative.mean()


@dataclass(frozen=True)
class TrainingCost:
    """Nats per image: reconstruction `[B]`, divergences `[B, G]`, and their sum as training weighs it, `[B]`."""

    reconstruction: Tensor
    divergences: Tensor
    balanced: Tensor


def training_cost(network: Network, inferred: Inferred, canvas: Tensor, weight: float) -> TrainingCost:
    """What images on the canvas cost, where divergences have this weight and below 1 are balanced."""
    divergences = inferred.by_group(Group.divergence)
    factors = weight * balance(network.config, divergences) if weight < 1 else 1.0
    balanced = (factors * divergences).sum(1)
    return TrainingCost(reconstruction(network, inferred, canvas), divergences, balanced)


def part_names(config: NVAEConfig) -> tuple[str, ...]:
    """What the parts of `bound_parts` are called: of the pixels, then of every scale's latents, coarse to fine."""
    return ("image.bits", *(f"{name}.divergence" for name in config.packed_shapes("z")))


def bound_parts(network: Network, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """One draw of the bound in bits per dimension, `[B]` each: minus the logarithm of its importance weight, in parts.

    Last the divergences of all latent channels in nats, `channels` `[B, G latent_channels]`, top group first.

    inputs: `image`, `[B, C, R, R]` in [0, 1] at levels, its features `feature0`, ..., and standard normal noise, as
    `NVAEConfig.packed_shapes("noise")`.
    """
    config, canvas = network.config, network.pad(inputs["image"])
    features = [inputs[f"feature{group}"] for group in range(len(config.group_scales))]
    inferred = network.infer(features, unpacked(config, "noise", inputs))
    groups = inferred.by_group(Group.log_ratio)
    counts = [config.groups[scale] for scale in reversed(range(len(config.groups)))]
    costs = (reconstruction(network, inferred, canvas), *(part.sum(1) for part in torch.split(groups, counts, 1)))
    parts = {name: bits_per_dim(config, cost) for name, cost in zip(part_names(config), costs, strict=True)}
    return parts | {"channels": torch.cat([group.divergence() for group in inferred.groups], 1)}


def log_weight(inferred: Inferred, cost: Tensor) -> Tensor:
    """Logarithm of the importance weight of one draw, `[B]`, given its `reconstruction` cost."""
    log_q = inferred.by_group(Group.log_q).sum(1)
    log_p = inferred.by_group(Group.log_p).sum(1)
    return log_p - log_q - cost


def importance_bound(log_weights: Tensor) -> Tensor:
    """Upper bound on `-log p(x)`, `[B]`, of the weights of K draws `[B, K]`."""
    return math.log(log_weights.shape[1]) - torch.logsumexp(log_weights, 1)


def channel_divergence(inferred: Inferred) -> Tensor:
    """Divergence of every latent channel, summed over positions and averaged over images, `[G, latent_channels]`."""
    return torch.stack([group.divergence().mean(0) for group in inferred.groups])


def active_units(by_channel: Tensor) -> Tensor:
    """How many channels of every group are used, of their divergences `[G, latent_channels]`."""
    return (by_channel > _ACTIVE).sum(1)
