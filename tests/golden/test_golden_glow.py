"""Every tensor of every golden Glow case, in float64 and float32, within the bounds of the format's README."""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from hflow_rt.layers.actnorm import ActNorm
from hflow_rt.models.bins import in_bins, to_public
from hflow_rt.models.checkpoint import load_state
from hflow_rt.models.glow.config import GlowConfig
from hflow_rt.models.glow.coupling import ZeroConv2d
from hflow_rt.models.glow.network import Encoded, Glow
from hflow_rt.models.glow.prior import TopPrior, ZeroLinear
from hflow_rt.models.glow.published import infer_settings
from hflow_rt.models.glow.weights import from_original, ignored_kind, layout_of, place

FAMILY = "glow"
Quantities = Iterator[tuple[str, Tensor]]


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
        self.stored = golden.tensors()
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
        key = "z" if "noise.z0" in self.stored else "eps"
        return {f"z{i}": self[f"noise.{key}{i}"] * temperature for i in self.levels}

    def original(self, model: Glow, name: str, values: dict[str, Tensor]) -> Tensor:
        where = place(model.config, self.layout, name)
        return where.theirs(values[where.name]).reshape(self.weights[name].shape)


def encode(model: Glow, x: Tensor, labels: dict[str, Tensor]) -> Encoded:
    with torch.no_grad():
        return model.encode_model(x, labels.get("labels"))


def encoding(case: Case) -> Quantities:
    yield "v8", case.x(8)
    yield "v5", case.x(5)
    model, learned = case.model(), case.described["split_prior"]
    x = case.x(8)
    sizes = [(level, x.new_zeros(1, 1, level.chain.side, level.chain.side)) for level in model.levels]
    for name in ("actnorm", "mixing"):
        values = [[getattr(step, name).log_det(like) for step in level.chain.steps] for level, like in sizes]
        key = {"actnorm": "logdet_actnorm", "mixing": "logdet_conv1x1"}[name]
        yield key, torch.stack([torch.stack(row) for row in values]).detach()
    for bits in (8, 5):
        model, x, prefix = case.model(bits), case.x(bits), f"enc{bits}"
        labels = case.labels()
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
    model, x, found = case.model(), case.x(8), encode(case.model(), case.x(8), case.labels())
    if learned:
        with torch.no_grad():
            kept = [chain.value.chunk(2, 1)[0] for chain in found.chains]
            for i in case.levels:
                top = i == case.levels[-1]
                prior = model.top(found.raw[i], case.labels().get("labels")) if top else model.levels[i].prior(kept[i])
                zeros = torch.zeros_like(found.raw[i])
                yield f"enc8.mu{i}", zeros if prior is None else zeros + prior.mean
                yield f"enc8.logs{i}", zeros if prior is None else zeros + prior.log_std
    with torch.no_grad():
        for i, level in enumerate(model.levels):
            x = torch.nn.functional.pixel_unshuffle(x, 2)
            for k, step in enumerate(level.chain.steps):
                x, _ = step.inverse(x)
                yield f"enc8.step.l{i}.k{k}", x
            x = x.chunk(2, 1)[0]
    if case.described["y_classes"]:
        other = encode(model, case.x(8), case.labels(shift=1))
        yield "enc8_other.bpd", -other.log_prob / (case.x(8)[0].numel() * math.log(2)) + 8


@torch.no_grad()
def decoding(case: Case) -> Quantities:
    model, labels = case.model(), case.labels()
    temperature = case.described["temperature"]
    found = model.decode_model(case.noise(temperature) | labels)
    yield "sample_T07.v", found.image
    yield "sample_T07.image", (found.image + 0.5).clamp(0, 1)
    yield "sample_T07.u8", to_public(found.image, 8) * 255
    for i in case.levels:
        yield f"sample_T07.z{i}", found.raw[i]
    if labels:
        yield "sample_T07_other.v", model.decode_model(case.noise(temperature) | case.labels(shift=1)).image
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


def initialization(case: Case) -> Quantities:
    for label in ("fresh", "kept"):
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


def training(case: Case) -> Quantities:
    runs = {"train": case.described["train_optimizer"]}
    if "train2_optimizer" in case.described:
        runs["train2"] = case.described["train2_optimizer"]
    bits = case.described["train_bits"]
    for prefix, settings in runs.items():
        model = case.model(bits)
        kinds = {"Adam": torch.optim.Adam, "Adamax": torch.optim.Adamax}
        optimizer = kinds[settings["type"]](model.parameters(), **{k: v for k, v in settings.items() if k != "type"})
        losses, norms = [], []

        def loss(index: int, model: Glow = model) -> Tensor:
            return model.loss(case.x(bits, "train.", index), conditions=case.labels("train.labels", index=index)).loss

        for step in range(3):
            optimizer.zero_grad()
            losses.append(loss(step))
            losses[-1].backward()
            gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
            norms.append(torch.stack([g.norm() for g in gradients.values()]).norm())
            if step == 0 and prefix == "train":
                for listed in case.listed:
                    if listed.startswith("train.grad:"):
                        name = listed.removeprefix("train.grad:")
                        zero = torch.zeros_like(case.weights[name])
                        yield listed, zero if ignored_kind(name) else case.original(model, name, gradients).clone()
            optimizer.step()
        yield f"{prefix}.losses", torch.stack(losses).detach()
        yield f"{prefix}.grad_norm", torch.stack(norms)
        yield f"{prefix}.loss_after", loss(0).detach()


def test_golden_glow(golden: Any) -> None:
    case = Case(golden)
    computed: dict[str, Tensor] = {}
    for group in (encoding, decoding, initialization, training):
        computed |= dict(group(case))
    failures = [f"{name}: not computed" for name in case.listed if name not in computed]
    for name in case.listed.keys() & computed.keys():
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
    assert len(case.listed) > 50
    assert not failures, f"{len(failures)} of {len(case.listed)}:\n" + "\n".join(sorted(failures))


def test_published_settings_are_found(golden: Any) -> None:
    """What names and shapes tell of a file is what the case says."""
    case = Case(golden)
    expected = case.config().model_dump()
    for name, value in infer_settings(case.weights).items():
        assert value == expected[name], name
