"""A golden NVAE case: its network, what it lists, and how far a value may be off."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from golden_cases import Case as Listing
from golden_cases import GoldenCase
from torch import Tensor
from torch.nn import functional as F

from hflow_rt.models.bins import public_levels
from hflow_rt.models.checkpoint import load_state
from hflow_rt.models.nvae.config import NVAEConfig
from hflow_rt.models.nvae.convolution import convolutions
from hflow_rt.models.nvae.model import NVAE
from hflow_rt.models.nvae.network import Network
from hflow_rt.models.nvae.published_settings import settings_of_options
from hflow_rt.models.nvae.regularisers import Shape, by_shape
from hflow_rt.models.nvae.weights import from_original, our_names


class Case(Listing):
    """A network built from a golden case's settings and weights, and the means to compute what it lists."""

    def __init__(self, golden: GoldenCase) -> None:
        super().__init__(golden)
        self.train = self.described["train"]
        self.steps = self.train["epochs"] * self.train["iterations_per_epoch"]
        self.weights = golden.weights()
        self.names = our_names(self.weights)

    def config(self) -> NVAEConfig:
        values = settings_of_options(self.description["original_args"], str(self.golden))
        return NVAEConfig(**values, likelihood="published")

    def network(self) -> NVAE:
        network = NVAE(self.config())
        load_state(network, from_original(self.weights), "golden weights")
        return network.to(self.dtype).eval()

    def groups(self, name: str, index: int | None = None) -> list[Tensor]:
        found = [self[f"{name}.{group}"] for group in range(self.described["G"])]
        return found if index is None else [tensor[index] for tensor in found]

    def images(self, prefix: str = "", index: int | None = None) -> Tensor:
        """On the canvas, float32 as the original made them, widened."""
        pixels, config = self.stored[f"{prefix}x_u8"], self.config()
        if config.output == "bernoulli":
            uniform = self.stored[f"{prefix}x_bin_u"]
            found = (uniform < F.pad(pixels, (config.padding,) * 4) / 255).float()
        else:
            found = public_levels(pixels, config.bits)
        return (found if index is None else found[index]).to(self.dtype)

    def left_vectors(self) -> dict[Shape, Tensor]:
        """Where power iteration starts, by shape."""
        starts = {}
        for shape in self.description["sr_groups"]:
            u = self[f"sr.u0.{shape}"]
            rows, columns = shape.split("x")
            starts[int(rows), int(columns)] = u / u.norm(dim=1, keepdim=True)
        return starts

    def in_order(self, network: Network, values: dict[Shape, Tensor]) -> Tensor:
        """Values by shape as one vector in the order of all convolutions."""
        groups = by_shape(network)
        by_conv = {
            conv: value for shape, convs in groups.items() for conv, value in zip(convs, values[shape], strict=True)
        }
        return torch.stack([by_conv[conv] for conv in convolutions(network).values()])

    def statistics(self, network: Network, name: str) -> Tensor:
        state = network.state_dict()
        return torch.cat([state[self.names[f"{norm}.{name}"]] for norm in self.description["bns"]])

    def parameters(self, network: Network) -> dict[str, Tensor]:
        """Under published names, sorted."""
        ours = dict(network.named_parameters())
        return {name: ours[self.names[name]] for name in sorted(self.description["parameter_order"])}


def rms(value: Tensor) -> Tensor:
    return value.square().flatten(1).mean(1).sqrt()


@contextmanager
def sizes(case: Case, network: Network) -> Iterator[dict[str, Tensor]]:
    """Root mean squares of what modules yield, by published name."""
    found: dict[str, Tensor] = {}
    hooks = []
    for name in (*case.description["enc_stages"], *case.description["dec_stages"]):
        ours = our_names([f"{name}.x"])[f"{name}.x"].removesuffix(".x")
        module = network.get_submodule(ours)
        hooks.append(module.register_forward_hook(lambda _, args, out, name=name: found.__setitem__(name, rms(out))))
    yield found
    for hook in hooks:
        hook.remove()


def bound(case: Case, entry: dict[str, Any], name: str) -> tuple[Tensor, float]:
    """What an output must be, and how far it may be off (README of the golden cases)."""
    expected = case.stored[name].double()
    if entry["dtype"] == "float64":
        return expected, 1e-10 * entry["max_value"]
    if "max_abs_err" not in entry:  # integers, and the image itself
        return expected, 0.0
    if case.dtype == torch.float64 and f"{name}.f64" in case.stored:
        return case.stored[f"{name}.f64"], 1e-10 * max(1.0, entry["max_value"])
    return expected, 4 * max(entry["max_abs_err"], entry["rerun_max_abs"]) + 2e-6 * entry["max_value"]
