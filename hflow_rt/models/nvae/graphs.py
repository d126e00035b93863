"""The graphs of NVAE: noise of the priors to the mean image, an image to that noise, the bound on its likelihood."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from hflow_rt.models.family import GraphSpec, TensorSpec
from hflow_rt.models.nvae.config import NVAEConfig
from hflow_rt.models.nvae.folded import folded
from hflow_rt.models.nvae.inverse import forward, inverse
from hflow_rt.models.nvae.network import Network
from hflow_rt.models.nvae.objective import bound_parts, part_names

__all__ = ["graphs", "noise_specs"]


class _Graph(nn.Module):
    def __init__(self, network: Network, inputs: Sequence[TensorSpec]) -> None:
        super().__init__()
        self.network, self.names = network, [spec.name for spec in inputs]

    def named(self, inputs: Sequence[Tensor]) -> dict[str, Tensor]:
        return dict(zip(self.names, inputs, strict=True))


class _Forward(_Graph):
    def forward(self, *inputs: Tensor) -> tuple[Tensor]:
        return (forward(self.network, self.named(inputs)),)


class _Inverse(_Graph):
    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        given = self.named(inputs)
        found = inverse(self.network, given.pop("image"), given)
        return (*found.latents.values(), *found.divergences.unbind(1), found.log_q, found.log_p)


class _Bound(_Graph):
    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        given = self.named(inputs)
        return tuple(bound_parts(self.network, given.pop("image"), given).values())


def noise_specs(config: NVAEConfig, default: float | None = None) -> tuple[TensorSpec, ...]:
    """Noise of the posteriors, coarse to fine. default: what it is unless somebody gives it; else it is drawn."""
    shapes = config.packed_shapes("noise")
    return tuple(TensorSpec(name, shape, "noise", default=default) for name, shape in shapes.items())


def graphs(network: Network) -> dict[str, GraphSpec]:
    """`forward`, `inverse`, and `bound` of a model that gives levels probabilities."""
    config, plain = network.config, folded(network)
    latents = tuple(TensorSpec(name, shape, "latent") for name, shape in config.packed_shapes("z").items())
    image = TensorSpec("image", config.image_shape, "image", (0.0, 1.0))
    groups = range(len(config.group_scales))
    scores = tuple(TensorSpec(name, (), "score") for name in (*(f"kl{group}" for group in groups), "log_q", "log_p"))
    made: dict[str, tuple[type[_Graph], tuple[TensorSpec, ...], tuple[TensorSpec, ...]]] = {
        "forward": (_Forward, latents, (image,)),
        "inverse": (_Inverse, (image, *noise_specs(config, default=0.0)), (*latents, *scores)),
    }
    if config.output != "normal":
        parts = tuple(TensorSpec(name, (), "score") for name in part_names(config))
        made["bound"] = (_Bound, (image, *noise_specs(config)), parts)
    return {
        name: GraphSpec(name, graph(plain, inputs), graph(network, inputs), inputs, outputs)
        for name, (graph, inputs, outputs) in made.items()
    }
