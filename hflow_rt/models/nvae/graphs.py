"""The graphs of NVAE: noise of the priors to images, an image to that noise, the bound on its likelihood."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from hflow_rt.models.family import GraphSpec, Role, Space, TensorSpec
from hflow_rt.models.nvae.config import NVAEConfig
from hflow_rt.models.nvae.folded import folded, gains
from hflow_rt.models.nvae.inverse import forward, inverse
from hflow_rt.models.nvae.network import Network, packed, unpacked
from hflow_rt.models.nvae.objective import bound_parts, part_names
from hflow_rt.models.nvae.output import draw_specs, pixels

__all__ = ["SPACES", "feature_specs", "graphs", "noise_specs"]

# values: latents of the groups instead of noise of their priors, packed like these.
# pixels: parameters of the distribution of every pixel
SPACES = {"values": Space(into="values", decode="decode"), "pixels": Space(into="parameters", draw="pixel")}

# What cells add to the state is a tenth of what these compute; the state itself, samplers and head stay in float32.
_NETS = ("*.body.*",)


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


class _Values(_Graph):
    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        config = self.network.config
        made = self.network.generate(unpacked(config, "z", self.named(inputs)))
        return tuple(packed(config, "value", made.latents).values())


class _Decode(_Graph):
    def forward(self, *inputs: Tensor) -> tuple[Tensor]:
        config = self.network.config
        logits = self.network.decode(unpacked(config, "value", self.named(inputs)))
        return (self.network.crop(pixels(config, logits).mean()),)


class _Parameters(_Graph):
    def forward(self, *inputs: Tensor) -> tuple[Tensor]:
        made = self.network.generate(unpacked(self.network.config, "z", self.named(inputs)))
        return (self.network.crop(made.logits),)


class _Pixel(nn.Module):
    def __init__(self, config: NVAEConfig) -> None:
        super().__init__()
        self.config = config

    def forward(self, *inputs: Tensor) -> tuple[Tensor]:
        return (pixels(self.config, inputs[0]).at(inputs[1:]),)


class _Features(_Graph):
    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.network.bottom_up(self.network.pad(image)))


class _Bound(_Graph):
    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        return tuple(bound_parts(self.network, self.named(inputs)).values())


def noise_specs(config: NVAEConfig, default: float | None = None) -> tuple[TensorSpec, ...]:
    """Noise of the posteriors, coarse to fine. default: what it is unless somebody gives it; else it is drawn."""
    shapes = config.packed_shapes("noise")
    return tuple(TensorSpec(name, shape, "noise", default=default) for name, shape in shapes.items())


def feature_specs(config: NVAEConfig) -> tuple[TensorSpec, ...]:
    """What `Network.bottom_up` makes of an image."""
    shapes = ((config.encoder_channels(scale), config.side(scale), config.side(scale)) for scale in config.group_scales)
    return tuple(TensorSpec(f"feature{group}", shape, "value") for group, shape in enumerate(shapes))


def graphs(network: Network) -> dict[str, GraphSpec]:
    """Both routes and those of `SPACES`; of a model that gives levels probabilities, `features` and `bound` too."""
    config, plain = network.config, folded(network)

    def listed(name: str, role: Role) -> tuple[TensorSpec, ...]:
        return tuple(TensorSpec(packed, shape, role) for packed, shape in config.packed_shapes(name).items())

    latents, values = listed("z", "latent"), listed("value", "value")
    image = TensorSpec("image", config.image_shape, "image", (0.0, 1.0))
    parameters = TensorSpec("parameters", (config.head_channels, *config.image_shape[1:]), "value")
    groups = range(len(config.group_scales))
    scores = tuple(TensorSpec(name, (), "score") for name in (*(f"kl{group}" for group in groups), "log_q", "log_p"))
    made: dict[str, tuple[type[_Graph], tuple[TensorSpec, ...], tuple[TensorSpec, ...]]] = {
        "forward": (_Forward, latents, (image,)),
        "inverse": (_Inverse, (image, *noise_specs(config, default=0.0)), (*latents, *scores)),
        "values": (_Values, latents, values),
        "decode": (_Decode, values, (image,)),
        "parameters": (_Parameters, latents, (parameters,)),
    }
    if config.output != "normal":
        features = feature_specs(config)
        channels = TensorSpec("channels", (len(config.group_scales) * config.latent_channels,), "value")
        parts = (*(TensorSpec(name, (), "score") for name in part_names(config)), channels)
        made["features"] = (_Features, (image,), features)
        made["bound"] = (_Bound, (image, *features, *noise_specs(config)), parts)
    factors = tuple(gains(network))
    found = {
        name: GraphSpec(name, graph(plain, inputs), graph(network, inputs), inputs, outputs, _NETS, gains=factors)
        for name, (graph, inputs, outputs) in made.items()
    }
    drawing = _Pixel(config)
    return found | {"pixel": GraphSpec("pixel", drawing, drawing, (parameters, *draw_specs(config)), (image,), _NETS)}
