"""Bits latent by latent: they add up to the bounds, and to what the formulas of the bounds say."""

import json
import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from tiny_networks import selection

from hflow_rt.errors import BundleError, ConfigError, DataError
from hflow_rt.evaluation.bits import bits_figures, bits_per_dim, open_reference
from hflow_rt.models.checkpoint import build_model
from hflow_rt.models.family import Bound, LatentModel, NoiseScale
from hflow_rt.models.plan import Batch, Place, draw
from hflow_rt.streams import generator

PIXELS = np.random.default_rng(5).integers(0, 256, (7, 3, 16, 16), dtype=np.uint8)
D = 3 * 16 * 16


def test_totals_are_the_bounds(tiny_model: Any) -> None:
    """Of the model's own bounds, over the same draws: of each image, of which strict takes two, paper one."""
    found = bits_per_dim(tiny_model, PIXELS, seed=2, draws=2, batch=3)
    assert list(found.bounds) == list(found.claims) == ["strict", "paper"]
    found_strict, found_paper = (bound.total for bound in found.bounds.values())
    plan = tiny_model.plan(SimpleNamespace(added_noise_std=0))
    images = torch.from_numpy(PIXELS).split(1)
    with torch.no_grad():
        draws = [
            [
                sum(tiny_model.bound_terms(tiny_model.bound_inputs("strict", one, generator(2, 0, draw, i))).values())
                for i, one in enumerate(images)
            ]
            for draw in (0, 1)
        ]
        batches = [Batch(one, draw(plan.draws("flow"), 1, generator(2, 1, 0, i)), {}) for i, one in enumerate(images)]
        losses = [plan.loss("flow", batch, Place()) for batch in batches]
    strict = torch.stack([torch.cat(draw) for draw in draws]).mean(0)
    assert found_strict.mean == pytest.approx(float(strict.mean()), rel=1e-6)
    assert found_strict.standard_error == pytest.approx(float(strict.std()) / math.sqrt(7), rel=1e-5)
    paper = np.mean([float(loss.bits_per_dim) for loss in losses])
    assert found_paper.mean == pytest.approx(paper, rel=1e-6)
    assert found.reasons == {}
    short = bits_figures(tiny_model, PIXELS, 5, seed=2, draws=2, batch=3)
    assert [figure.estimate for figure in short.figures.values()] == [found_strict, found_paper]
    assert (short.reasons, short.reason) == ({}, None)


def test_a_selection_is_read_batch_by_batch(tiny_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen, read = selection(PIXELS), []

    def pixels(indices: NDArray[np.int64]) -> NDArray[np.uint8]:
        read.append(len(indices))
        return PIXELS[indices]

    monkeypatch.setattr(chosen.images, "pixels", pixels)
    assert bits_per_dim(tiny_model, chosen, seed=2, batch=3) == bits_per_dim(tiny_model, PIXELS, seed=2, batch=3)
    assert max(read) == 3
    with pytest.raises(DataError, match=r"found uint8 \[7, 3, 8, 8\]"):
        bits_per_dim(tiny_model, selection(PIXELS[:, :, :8, :8]))
    with pytest.raises(DataError, match=r"found uint8 \[0, 3, 16, 16\]"):
        bits_per_dim(tiny_model, selection(PIXELS[:0]))


def test_latents_add_up_and_parts_to_each(tiny_model: Any) -> None:
    found = bits_per_dim(tiny_model, PIXELS)
    for bound in found.bounds.values():
        assert [latent.name for latent in bound.latents] == list(tiny_model.latent_shapes())
        assert sum(latent.total.mean for latent in bound.latents) == pytest.approx(bound.total.mean, rel=1e-9)
        for latent in bound.latents:
            assert sum(part.mean for part in latent.parts.values()) == pytest.approx(latent.total.mean, rel=1e-9)
            assert latent.dimensions == math.prod(tiny_model.latent_shapes()[latent.name])
            assert latent.own.mean == pytest.approx(latent.total.mean * D / latent.dimensions, rel=1e-9)
            assert latent.own.standard_error == pytest.approx(latent.total.standard_error * D / latent.dimensions)
            assert {part.n for part in latent.parts.values()} == {len(PIXELS)}


def test_parts_are_what_they_are_called(tiny_model: Any) -> None:
    """The prior is that of the latents, the entropy that of the running noise, the bins 8 bits less log2 of 4."""
    found = bits_per_dim(tiny_model, PIXELS)
    latents = {latent.name: latent for latent in found.bounds["strict"].latents}
    assert latents["z0"].parts["bins"] == (6.0, 0.0, len(PIXELS))
    assert set(latents["z0"].parts) == {"prior", "log_det", "bins"}
    for name, relative in (("end0", 0.05), ("end1", 0.05), ("z1", 0.2)):
        scale = found.noise[name]
        assert scale == NoiseScale(relative, float(getattr(tiny_model, f"spread_{name}")))
        assert scale.std == relative * scale.spread
        entropy = 0.5 * math.log2(2 * math.pi * math.e * scale.std**2) * latents[name].dimensions / D
        assert latents[name].parts["entropy"].mean == pytest.approx(-entropy, rel=1e-5)
    # the average standard normal latent costs this much; a trained model comes near, no model's prior is below
    for name, latent in latents.items():
        least = 0.5 * math.log2(2 * math.pi) * latent.dimensions / D
        assert latent.parts["prior"].mean > least, name


def test_errors_are_over_images(tiny_model: Any) -> None:
    """Of one image repeated, only the noise differs; of one image alone there is no error."""
    one = bits_per_dim(tiny_model, PIXELS[:1])
    found, same, alone = (
        report.bounds["strict"].total.standard_error
        for report in (bits_per_dim(tiny_model, PIXELS), bits_per_dim(tiny_model, np.repeat(PIXELS[:1], 7, 0)), one)
    )
    assert 0 < same < 0.5 * found
    assert math.isnan(alone)
    text = json.dumps(one.dump(), allow_nan=False)
    assert json.loads(text)["strict"]["latents"]["z1"]["own"]["standard_error"] is None


def test_deterministic_and_shared(tiny_model: Any) -> None:
    first = bits_per_dim(tiny_model, PIXELS, seed=1, batch=2)
    torch.rand(3)
    assert bits_per_dim(tiny_model, PIXELS, seed=1, batch=2) == first
    assert bits_per_dim(tiny_model, PIXELS, seed=2, batch=2) != first
    collected: list[Any] = []

    class Other:
        """The second of two processes, which hears nothing of the first."""

        is_main = False

        def share(self, items: Any) -> Any:
            return items[1::2]

        def collect(self, results: list[Any]) -> list[Any]:
            collected.append(results)
            return results

        def any(self, flag: bool) -> bool:
            return flag

    bits_per_dim(tiny_model, PIXELS, seed=1, batch=2, shares=Other())
    assert [sum(len(part["z0.prior"]) for part in mine) for mine in collected] == [3, 3]  # images 2, 3 and 6


# models without a strict bound, and models that tell no parts apart


def test_a_model_without_noise_has_the_published_bound_only(tiny_settings: dict[str, Any]) -> None:
    image, coarse = tiny_settings["levels"]
    model = build_model("hflow", {**tiny_settings, "levels": [image, {**coarse, "noise": None}]}).eval()
    found = bits_per_dim(model, PIXELS[:2])
    assert list(found.bounds) == ["paper"]
    assert found.reasons == {"strict": "z1 has no posterior noise in this configuration"}
    assert list(found.noise) == ["end0", "end1"]
    assert found.dump()["strict"] is None


def test_spreads_that_nobody_estimated_are_noticed(tiny_settings: dict[str, Any], tiny_model: Any) -> None:
    assert bits_per_dim(build_model("hflow", tiny_settings).eval(), PIXELS[:2]).noise_unknown
    assert not bits_per_dim(tiny_model, PIXELS[:2]).noise_unknown


def test_what_is_not_finite_is_none_with_the_reason(tiny_settings: dict[str, Any]) -> None:
    model = build_model("hflow", tiny_settings).eval()
    with torch.no_grad():
        model.get_buffer("spread_z1").fill_(math.inf)
    found = bits_per_dim(model, PIXELS[:3])
    assert found.bounds == {}
    assert found.reasons["strict"] == "it is not finite on 3 of 3 images"


class Plain(torch.nn.Module):
    """A family that tells no parts apart."""

    resolution, channels = 4, 3
    conditions, noise_scales = LatentModel.conditions, LatentModel.noise_scales

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))

    def latent_shapes(self) -> dict[str, tuple[int, ...]]:
        return {"z": (5,)}

    def bounds(self) -> dict[str, Bound]:
        return {"strict": Bound("strict bound", "upper"), "paper": Bound("paper's bound", "published")}

    def bound_features(self, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {}

    def bound_inputs(self, bound: str, pixels: torch.Tensor, generator: torch.Generator, conditions: Any) -> Any:
        return {"image": pixels.float()}

    def bound_terms(self, inputs: dict[str, torch.Tensor]) -> dict[str, Any]:
        return {"image.bits": inputs["image"].mean((1, 2, 3))}


def test_a_family_without_parts_has_one() -> None:
    pixels = PIXELS[:, :, :4, :4]
    found = bits_per_dim(Plain(), pixels, batch=3)  # type: ignore[arg-type]
    values = pixels.mean((1, 2, 3))
    for bound in found.bounds.values():
        (image,) = bound.latents
        assert (image.name, image.dimensions, list(image.parts)) == ("image", 48, ["bits"])
        assert bound.total.mean == pytest.approx(values.mean(), rel=1e-6)
        assert bound.total.standard_error == pytest.approx(values.std(ddof=1) / math.sqrt(7), rel=1e-5)
    assert (found.noise, found.noise_unknown) == ({}, False)


class WithoutFloat64(Plain):
    """On a device that has no float64: what it gives can only be copied to the host."""

    def bound_terms(self, inputs: dict[str, torch.Tensor]) -> dict[str, Any]:
        found = super().bound_terms(inputs)
        return {name: SimpleNamespace(cpu=lambda values=values: values) for name, values in found.items()}


def test_a_device_without_float64() -> None:
    pixels = PIXELS[:, :, :4, :4]
    assert bits_per_dim(WithoutFloat64(), pixels) == bits_per_dim(Plain(), pixels)  # type: ignore[arg-type]


# a graph that computes the bounds


class Folded:
    """The graph `bound` as export takes it, in a bundle that says it has it; it remembers what it was given."""

    def __init__(self, model: Any, graphs: tuple[str, ...] = ("forward", "bound")) -> None:
        self.manifest = SimpleNamespace(graphs=dict.fromkeys(graphs))
        self.spec = model.graphs()["bound"]
        self.given: list[dict[str, NDArray[np.float32]]] = []

    def run_graph(self, name: str, values: dict[str, NDArray[np.float32]]) -> dict[str, NDArray[np.float32]]:
        assert name == "bound"
        assert set(values) == {tensor.name for tensor in self.spec.inputs}
        for tensor in self.spec.inputs:
            assert values[tensor.name].shape[1:] == tensor.shape
            assert values[tensor.name].dtype == np.float32
        self.given.append(values)
        outputs = self.spec.module(*(torch.from_numpy(values[tensor.name]) for tensor in self.spec.inputs))
        return {tensor.name: value.numpy() for tensor, value in zip(self.spec.outputs, outputs, strict=True)}


@pytest.mark.parametrize("bits", [8, 5])
def test_a_graph_finds_what_the_reference_finds(tiny_settings: dict[str, Any], bits: int) -> None:
    torch.manual_seed(0)
    model = build_model("hflow", {**tiny_settings, "bits": bits})
    model.initialize(torch.from_numpy(PIXELS), torch.Generator().manual_seed(0))
    session: Any = Folded(model.eval())
    found, exact = (bits_per_dim(model, PIXELS, seed=2, draws=2, batch=3, session=which) for which in (session, None))
    assert len(session.given) == 3 * (2 + 1)
    for one, other in zip(found.bounds.values(), exact.bounds.values(), strict=True):
        for a, b in zip(one.latents, other.latents, strict=True):
            assert list(a.parts) == list(b.parts)
            for name, part in a.parts.items():
                assert part == pytest.approx(b.parts[name], rel=1e-5, abs=1e-6), (a.name, name)
    assert found.noise == exact.noise


def test_the_two_bounds_differ_in_their_inputs_alone(tiny_model: Any) -> None:
    """One draw for all that depends on a target, or one for its flow and the rest as training has it."""
    session: Any = Folded(tiny_model)
    bits_per_dim(tiny_model, PIXELS, session=session)
    strict, paper = session.given
    for name in ("end0", "end1", "z1"):
        uses = [use for use in ("seen", "known") if f"{name}.{use}" in strict]
        assert uses == (["seen", "known"] if name == "end0" else ["seen"])
        for use in uses:
            np.testing.assert_array_equal(strict[f"{name}.flow"], strict[f"{name}.{use}"])
        assert np.abs(paper[f"{name}.flow"] - paper[f"{name}.seen"]).min() > 0
    assert not paper["z1.seen"].any()
    assert not paper["end0.known"].any()
    seen = np.concatenate([paper["end0.seen"], paper["end1.seen"]], 1)
    assert seen.std() == pytest.approx(1.5, rel=0.3)
    for values in (strict, paper):
        np.testing.assert_array_equal(values["image"], PIXELS / np.float32(255))
        assert 0 <= values["uniform"].min() < 0.1
        assert 0.9 < values["uniform"].max() < 1


def test_a_graph_has_no_strict_bound_either_without_noise(tiny_settings: dict[str, Any]) -> None:
    image, coarse = tiny_settings["levels"]
    model = build_model("hflow", {**tiny_settings, "levels": [image, {**coarse, "noise": None}]}).eval()
    session: Any = Folded(model)
    found = bits_per_dim(model, PIXELS[:2], session=session)
    assert found.reasons == {"strict": "z1 has no posterior noise in this configuration"}
    assert "paper" in found.bounds
    assert "z1.flow" not in session.given[0]


def test_a_bundle_without_that_graph(tiny_model: Any) -> None:
    session: Any = Folded(tiny_model, ("forward", "inverse"))
    with pytest.raises(BundleError, match=r"no 'bound' engine; export it with 'hflow-rt export RUN --bound', or use"):
        bits_per_dim(tiny_model, PIXELS, session=session)


# bad input


def test_bad_images_and_counts(tiny_model: Any) -> None:
    with pytest.raises(DataError, match=r"evaluation needs uint8 images \[n, 3, 16, 16\], n >= 1; found"):
        bits_per_dim(tiny_model, PIXELS[:0])
    with pytest.raises(DataError, match="the number of draws must be at least 1, not 0"):
        bits_per_dim(tiny_model, PIXELS, draws=0)
    with pytest.raises(DataError, match="the batch must be at least 1, not 0"):
        bits_per_dim(tiny_model, PIXELS, batch=0)


def test_the_reference_of_a_file(tiny_run: Any, tiny_model: Any) -> None:
    found = open_reference(tiny_run / "model.safetensors")
    assert not found.training
    assert bits_per_dim(found, PIXELS[:2]) == bits_per_dim(tiny_model, PIXELS[:2])
    with pytest.raises(ConfigError):
        build_model("nothing", {})
