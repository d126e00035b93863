"""Both ways between an image and the noise of the priors, without anything random (spec 11).

Noise is packed by scale: `z0` holds all groups of the finest scale along channels, top first, and so `noise0`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from hflow_rt.models.nvae.network import Group, Network, packed, unpacked
from hflow_rt.models.nvae.output import pixels

__all__ = ["InversePass", "forward", "inverse"]


@dataclass(frozen=True)
class InversePass:
    """What an image is to the model.

    latents: noise of the priors, `[B, groups n, side, side]` by scale, from which `forward` makes the reconstruction.
    divergences: of every group, top first, nats `[B, G]`. log_q, log_p: log densities of all groups' latents under
    posterior and prior, `[B]`. logits: parameters of the distribution of pixels on the canvas.
    """

    latents: dict[str, Tensor]
    divergences: Tensor
    log_q: Tensor
    log_p: Tensor
    logits: Tensor


def inverse(network: Network, image: Tensor, noise: Mapping[str, Tensor] | None = None) -> InversePass:
    """Of images `[B, C, R, R]` in [0, 1], at levels that `bits` leave.

    noise: standard normal, of the posteriors, as `NVAEConfig.packed_shapes("noise")`; by default their means are taken.
    """
    config, batch = network.config, image.shape[0]
    if noise is None:
        shapes = config.packed_shapes("noise")
        noise = {name: image.new_zeros(batch, *shape) for name, shape in shapes.items()}
    features = network.bottom_up(network.pad(image))
    inferred = network.infer(features, unpacked(config, "noise", noise))
    return InversePass(
        latents=packed(config, "z", [group.prior.noise(group.z) for group in inferred.groups]),
        divergences=inferred.by_group(Group.divergence),
        log_q=inferred.by_group(Group.log_q).sum(1),
        log_p=inferred.by_group(Group.log_p).sum(1),
        logits=inferred.logits,
    )


def forward(network: Network, latents: Mapping[str, Tensor]) -> Tensor:
    """The mean image `[B, C, R, R]` in [0, 1] of noise of the priors, as `NVAEConfig.packed_shapes("z")`.

    A temperature multiplies the noise.
    """
    made = network.generate(unpacked(network.config, "z", latents))
    return network.crop(pixels(network.config, made.logits).mean())
