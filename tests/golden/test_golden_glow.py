"""Every tensor of every golden Glow case, in float64 and float32, within the bounds of the format's README."""

import math
import re
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from golden_cases import HERE, GoldenCase, Listed, Quantities, Reduced, compute
from torch import Tensor

from hflow_rt.layers.actnorm import ActNorm
from hflow_rt.models.bins import in_bins, to_public
from hflow_rt.models.checkpoint import load_state
from hflow_rt.models.glow.config import GlowConfig
from hflow_rt.models.glow.coupling import ZeroConv2d
from hflow_rt.models.glow.network import Encoded, Glow
from hflow_rt.models.glow.prior import TopPrior, ZeroLinear
from hflow_rt.models.glow.published import infer_settings
from hflow_rt.models.glow.weights import from_original, ignored_kind, layout_of, renaming

FAMILY = "glow"


def config_of(described: dict[str, Any], bits: int, invertible: bool = True) -> GlowConfig:
    """Settings from the words of a case."""
    blocks = described["moving_half"] == "first"
    y_weight = described.get("y_weight") or 0.0
    return GlowConfig(
        resolution=described["image_size"],
        levels=described["levels"],
        steps=described["steps_per_level"],
        hidden_channels=described["hidden_channels"],
        coupling=described["coupling"],
        scale="exp_sigmoid" if (described["affine_scale"] or "").startswith("exp_sigmoid") else "sigmoid",
        moving=described["moving_half"],
        hidden="bias" if described["hidden_conv"].startswith("bias") else "actnorm",
        edge="ones" if blocks else "zero",
        permutation=described["permutation"],
        lu=bool(described["lu"]),
        split_prior=bool(described["split_prior"]),
        top_prior="learned" if described["learn_top"] else "fixed",
        classes=tuple(map(str, range(described["y_classes"]))),
        classifier=described.get("classifier") is not None,
        class_weight=y_weight * math.log(2),  # theirs is in nats
        bits=bits,
        invertible_backward=invertible,
    )


class Case:
    """A model built from a golden case's settings and weights, and the means to compute what it lists."""

    def __init__(self, golden: Any) -> None:
        self.description = golden.description()
        self.described = self.description["config"]
        self.stored = Listed(golden.tensors(), self.description["io"])
        self.weights = golden.weights()
        self.dtype = golden.dtype
        self.levels = range(self.described["levels"])
        self.layout = layout_of(self.weights)
        self.listed = {entry["name"]: entry for entry in self.description["io"] if entry["role"] == "output"}

    def __getitem__(self, name: str) -> Tensor:
        return self.stored[name].to(self.dtype)

    def config(self, bits: int = 8) -> GlowConfig:
        return config_of(self.described, bits)

    def model(self, bits: int = 8) -> Glow:
        model = Glow(self.config(bits))
        load_state(model, from_original(self.config(bits), self.weights), "golden weights")
        return model.to(self.dtype).train()

    def x(self, bits: int, prefix: str = "", index: int | None = None) -> Tensor:
        pixels, u = self.stored[f"{prefix}images_u8"], self[f"{prefix}u"]
        return in_bins(pixels, bits, u) if index is None else in_bins(pixels[index], bits, u[index])

    def labels(self, name: str = "labels", shift: int = 0, index: int | None = None) -> dict[str, Tensor]:
        if not self.described["y_classes"]:
            return {}
        classes = self.stored[name] if index is None else self.stored[name][index]
        classes = (classes + shift) % self.described["y_classes"]
        return {"labels": torch.nn.functional.one_hot(classes, self.described["y_classes"]).to(self.dtype)}

    def noise(self, temperature: float = 1.0) -> dict[str, Tensor]:
        """The stored draws times a temperature."""
        key = "z" if "noise.z0" in self.stored.names else "eps"
        return {f"z{i}": self[f"noise.{key}{i}"] * temperature for i in self.levels}

    def original(self, model: Glow, name: str, values: dict[str, Tensor]) -> Tensor:
        where = renaming(model.config, self.layout, name)
        return where.theirs(values[where.name]).reshape(self.weights[name].shape)


def encode(model: Glow, x: Tensor, labels: dict[str, Tensor]) -> Encoded:
    with torch.no_grad():
        return model.encode_model(x, labels.get("labels"))


def dequantized(case: Case) -> Quantities:
    for bits in (8, 5):
        yield f"v{bits}", case.x(bits)


def layers(case: Case) -> Quantities:
    sizes = [
        (level, torch.zeros(1, 1, level.chain.side, level.chain.side, dtype=case.dtype))
        for level in case.model().levels
    ]
    for name, key in (("actnorm", "logdet_actnorm"), ("mixing", "logdet_conv1x1")):
        values = [[getattr(step, name).log_det(like) for step in level.chain.steps] for level, like in sizes]
        yield key, torch.stack([torch.stack(row) for row in values]).detach()


def encoding(case: Case, bits: int) -> Quantities:
    model, x, labels, prefix = case.model(bits), case.x(bits), case.labels(), f"enc{bits}"
    found = encode(model, x, labels)
    for i in case.levels:
        yield f"{prefix}.z{i}", found.raw[i]
        yield f"{prefix}.eps{i}", found.latents[i]
    coupling = torch.stack([chain.coupling for chain in found.chains])
    yield f"{prefix}.logdet_coupling", coupling.permute(2, 0, 1)
    yield f"{prefix}.logdet", torch.stack([chain.log_det for chain in found.chains]).sum(0)
    yield f"{prefix}.logp_level", torch.stack(found.log_prior, 1)
    yield f"{prefix}.logp", torch.stack(found.log_prior).sum(0)
    yield f"{prefix}.bpd", -found.log_prob / (x[0].numel() * math.log(2)) + bits
    loss = model.loss(x, conditions=labels)
    yield f"{prefix}.loss", loss.loss.detach()
    if found.logits is not None:
        yield f"{prefix}.logits", found.logits
        yield f"{prefix}.loss_class", loss.terms["class"] * math.log(2)
    if case.described["split_prior"]:
        yield from priors(model, found, prefix, labels)
    with torch.no_grad():
        for i, level in enumerate(model.levels):
            x = torch.nn.functional.pixel_unshuffle(x, 2)
            for k, step in enumerate(level.chain.steps):
                x, _ = step.inverse(x)
                yield f"{prefix}.step.l{i}.k{k}", x
            x = x.chunk(2, 1)[0]


@torch.no_grad()
def priors(model: Glow, found: Encoded, prefix: str, labels: dict[str, Tensor]) -> Quantities:
    for i, chain in enumerate(found.chains):
        top = i == len(found.chains) - 1
        kept = chain.value.chunk(2, 1)[0]
        prior = model.top(found.raw[i], labels.get("labels")) if top else model.levels[i].prior(kept)
        zeros = torch.zeros_like(found.raw[i])
        yield f"{prefix}.mu{i}", zeros if prior is None else zeros + prior.mean
        yield f"{prefix}.logs{i}", zeros if prior is None else zeros + prior.log_std


def encoding_of_other_labels(case: Case) -> Quantities:
    other = encode(case.model(), case.x(8), case.labels(shift=1))
    yield "enc8_other.bpd", -other.log_prob / (case.x(8)[0].numel() * math.log(2)) + 8


@torch.no_grad()
def sampling(case: Case) -> Quantities:
    found = case.model().decode_model(case.noise(case.described["temperature"]) | case.labels())
    yield "sample_T07.v", found.image
    yield "sample_T07.image", (found.image + 0.5).clamp(0, 1)
    yield "sample_T07.u8", to_public(found.image, 8) * 255
    for i in case.levels:
        yield f"sample_T07.z{i}", found.raw[i]


@torch.no_grad()
def sampling_of_other_labels(case: Case) -> Quantities:
    latents = case.noise(case.described["temperature"]) | case.labels(shift=1)
    yield "sample_T07_other.v", case.model().decode_model(latents).image


@torch.no_grad()
def reconstruction(case: Case) -> Quantities:
    model, labels = case.model(), case.labels()
    encoded = model.named_latents(encode(model, case.x(8), labels))
    back = model.decode_model(encoded | labels).image
    yield "recon8.v", back
    yield "recon8.u8", to_public(back, 8) * 255
    a = case.described["interpolation_a"]
    mixed = {name: a * z[:1] + (1 - a) * z[1:2] for name, z in encoded.items()}
    yield "interp_a03.v", model.decode_model(mixed | {name: value[:1] for name, value in labels.items()}).image
    top = f"z{case.levels[-1]}"
    for label, t in (("T10", 1.0), ("T07", 0.7)):
        yield f"partial_{label}.v", model.decode_model(case.noise(t) | {top: encoded[top]} | labels).image


def initialization(case: Case, label: str) -> Quantities:
    model = case.model()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, ActNorm):
                module.shift.zero_()
                module.log_scale.zero_()
            elif label == "fresh" and isinstance(module, (ZeroConv2d, ZeroLinear, TopPrior)):
                for parameter in module.parameters(recurse=False):
                    parameter.zero_()
    model.initialized.zero_()
    model.init_from_batch(case.x(8, "init."))
    assert model.initialized
    values = {name: value.detach() for name, value in model.named_parameters()}
    for name in case.weights:
        if "actnorm" in name and ignored_kind(name) is None:
            yield f"init_{label}:{name}", case.original(model, name, values)


def training(case: Case, prefix: str) -> Quantities:
    settings, bits = case.described[f"{prefix}_optimizer"], case.described["train_bits"]
    model = case.model(bits)
    kinds = {"Adam": torch.optim.Adam, "Adamax": torch.optim.Adamax}
    optimizer = kinds[settings["type"]](model.parameters(), **{k: v for k, v in settings.items() if k != "type"})
    losses, norms = [], []

    def loss(index: int) -> Tensor:
        return model.loss(case.x(bits, "train.", index), conditions=case.labels("train.labels", index=index)).loss

    for step in range(3):
        optimizer.zero_grad()
        losses.append(loss(step))
        losses[-1].backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        norms.append(torch.stack([g.norm() for g in gradients.values()]).norm())
        if step == 0:
            for listed in case.listed:
                if listed.startswith(f"{prefix}.grad:"):
                    name = listed.removeprefix(f"{prefix}.grad:")
                    zero = torch.zeros_like(case.weights[name])
                    yield listed, zero if ignored_kind(name) else case.original(model, name, gradients).clone()
        optimizer.step()
    yield f"{prefix}.losses", torch.stack(losses).detach()
    yield f"{prefix}.grad_norm", torch.stack(norms)
    yield f"{prefix}.loss_after", loss(0).detach()


# what computes the outputs whose names begin so
GROUPS: dict[str, Callable[[Any], Quantities]] = {
    r"v\d": dequantized,
    r"logdet_": layers,
    r"enc8\.": partial(encoding, bits=8),
    r"enc5\.": partial(encoding, bits=5),
    r"enc8_other\.": encoding_of_other_labels,
    r"sample_T07\.": sampling,
    r"sample_T07_other\.": sampling_of_other_labels,
    r"(recon8|interp_a03|partial_T\d+)\.": reconstruction,
    r"init_fresh:": partial(initialization, label="fresh"),
    r"init_kept:": partial(initialization, label="kept"),
    r"train\.": partial(training, prefix="train"),
    r"train2\.": partial(training, prefix="train2"),
}


def compare(golden: Any) -> int:
    """Hold every output that the case lists, and has the inputs of, against ours. Returns how many these were."""
    case = Case(golden)
    computed, absent = compute(GROUPS, case, case.listed)
    failures = [f"{name}: not computed" for name in case.listed if name not in computed and name not in absent]
    failures += [f"{name}: not computed, in a case that is whole" for name in absent if golden.is_ours]
    compared = case.listed.keys() & computed.keys()
    for name in compared:
        entry, value = case.listed[name], computed[name].double()
        if entry["dtype"] == "uint8":
            expected = case.stored[name].double()
            # one level where a value sits on a bin edge
            differs = (value.round() - expected).abs()
            if not (differs.max() <= 1 and (differs > 0).double().mean() < 0.01):
                failures.append(f"{name}: {int((differs > 0).sum())} levels differ, by up to {differs.max():.0f}")
            continue
        copy = f"{name}.f64"
        if case.dtype == torch.float64 and copy in case.stored:
            expected, bound = case.stored[copy], 1e-10 * entry["max_value"]
        else:
            expected = case.stored.get(copy, case.stored[name]).double()
            bound = 4 * entry["max_abs_err"] + 2e-6 * entry["max_value"] + 1e-7
        if value.shape != expected.shape:
            failures.append(f"{name}: shape {list(value.shape)} instead of {list(expected.shape)}")
            continue
        error = (value - expected).abs().max().item()
        if not error <= bound:
            failures.append(f"{name}: error {error:.3g} above {bound:.3g}")
    assert compared, f"nothing of {golden} was compared"
    assert not failures, f"{len(failures)} of {len(case.listed)}:\n" + "\n".join(sorted(failures))
    return len(compared)


def test_golden_glow(golden: Any) -> None:
    compare(golden)


def reduced(pattern: str) -> Reduced:
    """`paper_ycond` with those inputs and outputs only whose names begin so."""
    whole = GoldenCase(HERE / "glow" / "paper_ycond.json", torch.float64)
    return Reduced(whole, "io", lambda name: re.match(pattern, name) is None)


@pytest.mark.parametrize(
    ("has", "compared"),
    [
        (r"images_u8|u$|v8|enc8\.z|logdet_", 3),  # no labels, which the latents depend on
        (r"noise|labels|sample_T07|recon|train\.loss", 5),  # no images; no batches of the training
    ],
)
def test_a_case_is_compared_in_what_it_has(has: str, compared: int) -> None:
    assert compare(reduced(has)) == compared


def test_a_case_that_compares_nothing_fails() -> None:
    for has in ("images_u8", "enc8", "init_fresh"):
        with pytest.raises(AssertionError, match=r"nothing of .* was compared"):
            compare(reduced(has))


def test_what_a_reduced_case_has_may_not_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = reduced("logdet_")
    stored, listed = wrong.tensors(), wrong.description()
    stored["logdet_actnorm.f64"][0, 0] += 1e-3
    monkeypatch.setattr(Reduced, "tensors", lambda self: stored)
    with pytest.raises(AssertionError, match=r"1 of 2:\n *logdet_actnorm: error 0\.001 above"):
        compare(wrong)
    listed["io"][-1]["name"] = "logdet_of_nothing"
    monkeypatch.setattr(Reduced, "description", lambda self: listed)
    with pytest.raises(AssertionError, match=r"logdet_of_nothing: not computed"):
        compare(wrong)


def test_published_settings_are_found(golden: Any) -> None:
    """What names and shapes tell of a file is what the case says."""
    case = Case(golden)
    expected = case.config().model_dump()
    for name, value in infer_settings(case.weights).items():
        assert value == expected[name], name
