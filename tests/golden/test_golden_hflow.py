"""Every tensor of every golden hflow case, in float64 and float32, within the bounds of the format's README."""

import dataclasses
import fnmatch
import math
import re
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from golden_cases import HERE, Absent, GoldenCase, Listed, Quantities, Reduced, compute
from torch import Tensor

from hflow_rt.layers import equalized
from hflow_rt.layers.actnorm import ActNorm, data_init
from hflow_rt.models.checkpoint import load_state
from hflow_rt.models.hflow.bound import BoundTerm, evaluate, noise_shapes, terms
from hflow_rt.models.hflow.network import Decoded, HFlow
from hflow_rt.models.hflow.published_settings import read_settings
from hflow_rt.models.hflow.weights import from_original, to_original_name
from hflow_rt.runtime.latents.operations import lerp, slerp

FAMILY = "hflow"
# How far the original itself parts in float32 once an activation changes side (golden README, point 9).
AFTER_A_KINK = 5e-3
# Its gradients part by up to 1e-2 on one draw with the same weights (point 10), and here the weights have parted too.
GRADIENTS_AFTER_A_KINK = 2e-2


class Case:
    """A model built from a golden case's settings and weights, and the means to compute what it lists."""

    def __init__(self, golden: Any) -> None:
        self.golden = golden
        self.description = golden.description()
        self.stored = Listed(golden.tensors(), self.description["tensors"])
        self.weights = golden.weights()
        self.dtype = golden.dtype
        self.config = read_settings(self.description["config"])
        self.general = self.description["config"]["GENERAL"]

    def __getitem__(self, name: str) -> Tensor:
        return self.stored[name].to(self.dtype)

    @property
    def x(self) -> Tensor:
        return self["in.x"]

    def model(self, zeroed: Callable[[str], bool] = lambda name: False) -> HFlow:
        """A fresh copy with the case's weights, those of `zeroed` original names set to zero."""
        model = HFlow(self.config)
        state = {name: torch.zeros_like(w) if zeroed(name) else w for name, w in self.weights.items()}
        own = from_original(self.config, state)
        own |= {name: value for name, value in model.state_dict().items() if name.startswith("spread_")}
        load_state(model, own, "golden weights")
        return model.to(self.dtype).eval()

    def originals(self, model: HFlow) -> dict[str, str]:
        """Original name to ours, of every trainable tensor, sorted by the original's."""
        ours = to_original_name(self.config, [name for name, _ in model.named_parameters()], list(self.weights))
        assert len(ours) == self.description["weights"]["trainable"] == len(list(model.parameters()))
        return {theirs: name for name, theirs in sorted(ours.items(), key=lambda item: item[1])}

    def parts(self, end: Tensor) -> list[Tensor]:
        return list(end.split(list(self.config.end.channels), 1))

    def latents(self, prefix: str, factor: float = 1.0) -> dict[str, Tensor]:
        """Stored latents times a factor, multiplied in float32 as the original did."""
        names = ["end", *(f"z{i}" for i in range(len(self.config.levels)))]
        values = {name: (self.stored[f"{prefix}.{name}"] * factor).to(self.dtype) for name in names}
        return {f"end{i}": part for i, part in enumerate(self.parts(values.pop("end")))} | values

    def noise(self, model: HFlow, prefix: str, decoders: bool) -> dict[str, Tensor]:
        """The stored draws in call order under our names; evaluation draws none for the level decoders."""
        names = [n for n in noise_shapes(model) if decoders or n.startswith("end") or n.endswith(".flow")]
        keys = sorted(name for name in self.stored.names if name.startswith(f"{prefix}.noise."))
        if not keys:
            raise Absent(f"{prefix}.noise")
        assert len(names) == len(keys)
        return {name: self[key].reshape(-1, *noise_shapes(model)[name]) for name, key in zip(names, keys, strict=True)}


def encoding(case: Case) -> Quantities:
    model = case.model()
    with torch.no_grad():
        targets = model.targets(case.x)
        encoded = model.encode_targets(targets)
        style, start = model.end_output(targets.end)
        found = terms(model, encoded, spreads := model.batch_spreads(targets))
        yield "roundtrip.image", model.generate(model.named_latents(encoded)).image
    yield "target.end", targets.end
    yield "style.g", style
    yield "decoder.start", start.expand(case.x.shape[0], -1, -1, -1)
    yield "latent.end", torch.cat([part.value for part in encoded.end], 1)
    for i, part in enumerate(encoded.end):
        yield from log_dets(f"log_det.end.part{i}", part)
    total = torch.zeros_like(found["z0"].log_det)
    for name, term in found.items():
        total = total + term.log_det + term.entropy
        if name.startswith("z") and name in spreads:
            yield f"log_det.level{name[1:]}.entropy", term.entropy
            yield f"log_det.level{name[1:]}.sigma_times_alpha", spreads[name] * model.noised()[name]
    ends_entropy = sum((term.entropy for name, term in found.items() if name.startswith("end")), torch.zeros(()))
    yield "log_det.total_with_entropy", total - ends_entropy
    for i, level in enumerate(encoded.levels):
        if i > 0:
            yield f"target.y{i}", targets.levels[i]
            skip = encoded.skips[i]
            assert skip is not None
            yield f"skip.level{i}", skip
        for name, value in encoded.thetas[i]._asdict().items():
            yield f"theta.level{i}.{name}", value
        yield f"cond.level{i}", encoded.conditions[i]
        yield f"latent.z{i}", level.value
        yield from log_dets(f"log_det.level{i}", level)
        yield f"log_det.level{i}.theta", level.theta


def log_dets(prefix: str, run: Any) -> Quantities:
    yield f"{prefix}.coupling_steps", run.coupling
    yield f"{prefix}.coupling", run.coupling.sum(0)
    yield f"{prefix}.actnorm", run.actnorm
    yield f"{prefix}.permutation", run.mixing
    yield f"{prefix}.total", run.log_det


def sampling(case: Case, prefix: str) -> Quantities:
    factor = 1.0
    if prefix == "overdrive":
        meanings = [t["meaning"] for t in case.description["tensors"] if t["name"].startswith("overdrive.")]
        factor = float(next(match[1] for m in meanings if (match := re.search(r"multiplied by ([\d.]+)", m))))
    with torch.no_grad():
        run: Decoded = case.model().generate(case.latents("sample", factor))
    yield f"{prefix}.image", run.image
    yield f"{prefix}.y_end", torch.cat([part.value for part in run.end], 1)
    yield f"{prefix}.log_det", torch.stack([r.log_det for r in [*run.end, *run.levels]]).sum(0)
    for i, part in enumerate(run.end):
        yield f"{prefix}.log_det.end.part{i}", part.log_det
    for i, level in enumerate(run.levels):
        yield f"{prefix}.y{i}", level.value
        yield f"{prefix}.log_det.level{i}", level.log_det


@torch.no_grad()
def end_forward(case: Case) -> Quantities:
    parts = case.model().end_flow.decode(case.parts(case["end.z"]))
    yield "end.y_of_z", torch.cat([part.value for part in parts], 1)


@torch.no_grad()
def end_inverse(case: Case) -> Quantities:
    parts = case.model().end_flow.encode(case.parts(case["end.y"]))
    yield "end.z_of_y", torch.cat([part.value for part in parts], 1)


def interpolation(case: Case) -> Quantities:
    """t = 0.3 between the first two images; the end parts are mixed as one vector, in z or as y_end."""
    model = case.model()
    with torch.no_grad():
        targets = model.targets(case.x)
        encoded = model.encode_targets(targets)
    values = {f"z{i}": level.value for i, level in enumerate(encoded.levels)}
    values |= {"z": torch.cat([part.value for part in encoded.end], 1), "y0": targets.end}
    first, second = ({k: v[i : i + 1].numpy() for k, v in values.items()} for i in (0, 1))
    for mode, function in (("lerp", lerp), ("slerp", slerp)):
        mixed = {k: torch.from_numpy(np.asarray(v)).to(case.dtype) for k, v in function(first, second, 0.3).items()}
        levels = {name: value for name, value in mixed.items() if name not in ("z", "y0")}
        for name, value in levels.items():
            yield f"interp.{mode}.{name}", value
        with torch.no_grad():
            inverse = model.end_flow.encode(case.parts(mixed["y0"]))
        ends = {"z": mixed["z"], "y0": torch.cat([part.value for part in inverse], 1)}
        for space, end in ends.items():
            latents = levels | {f"end{i}": part for i, part in enumerate(case.parts(end))}
            with torch.no_grad():
                yield f"interp.{mode}.{space}.image", model.generate(latents).image
            # stored: the mixed vector, in the space it was mixed in
            yield f"interp.{mode}.{space}.end", end


def losses(case: Case, mode: str) -> Quantities:
    model, training = case.model(), mode == "train"
    model.train(training)
    noise = case.noise(model, f"loss.{mode}", decoders=training)
    found = evaluate(model, case.x, noise, batch_spread=True, noise_decoders=training)
    loss = torch.stack([term.bits * term.weight for term in found.values()]).sum(0)
    total = torch.stack([term.log_likelihood for term in found.values()]).sum(0)
    yield f"loss.{mode}.total", loss.detach()
    yield f"loss.{mode}.mean", loss.mean().detach()
    per_dimension = -total.mean().detach() / (case.x[0].numel() * math.log(2))
    yield f"loss.{mode}.bpd", per_dimension + case.general["DISCRETIZATION_BITS"]
    for name, term in found.items():
        yield from loss_terms(f"loss.{mode}", name, term, case)
    conditional = [term for name, term in found.items() if name.startswith("end") and name != "end0"]
    dimensions = sum(term.dimensions for term in conditional)
    bits = -sum((term.log_likelihood for term in conditional), torch.zeros(())) / (dimensions * math.log(2))
    yield f"loss.{mode}.log.bits_per_dim.end_conditional_parts", bits.detach()
    loss.mean().backward()
    parameters = dict(model.named_parameters())
    gradients = {theirs: parameters[ours].grad for theirs, ours in case.originals(model).items()}
    gradients = {name: torch.zeros(1) if g is None else g for name, g in gradients.items()}
    yield f"loss.{mode}.grad_norms", torch.stack([g.double().norm() for g in gradients.values()])
    if training:
        for theirs, gradient in gradients.items():
            yield f"grad.{theirs}", gradient


def loss_terms(prefix: str, name: str, term: BoundTerm, case: Case) -> Quantities:
    end = name.startswith("end")
    key = f"{prefix}.end.part{name[3:]}" if end else f"{prefix}.level{name[1:]}"
    yield f"{key}.log_prior", term.log_prior.detach()
    yield f"{key}.log_det", term.log_det.detach()
    yield f"{key}.entropy", term.entropy.detach()
    yield f"{key}.bits", term.bits.detach()
    yield f"{key}.weighted_bits", (term.bits * term.weight).detach()
    label = f"end_part{name[3:]}" if end else f"res{case.config.levels[int(name[1:])].resolution}"
    yield f"{prefix}.log.bits_per_dim.{label}", term.bits.detach()


def initialization(case: Case, label: str) -> Quantities:
    patterns = re.findall(r"\*\*\.[\w.]+", case.description["zero_init"]) if label == "fresh" else []

    def zeroed(name: str) -> bool:
        is_actnorm = name.endswith(("an_scale", "an_bias"))
        return is_actnorm or any(fnmatch.fnmatch(name, pattern.replace("**", "*")) for pattern in patterns)

    model = case.model(zeroed)
    with data_init(model):
        if label == "loss_call":
            noise = case.noise(model.train(), "loss.train", decoders=True)
            evaluate(model, case.x, noise, batch_spread=True, noise_decoders=True)
        else:
            model.encode_targets(model.targets(case.x))
    for i, level in enumerate(model.levels):
        layers = [layer for layer in level.modules() if isinstance(layer, ActNorm)]
        yield f"init.{label}.level{i}.scale", torch.stack([layer.log_scale for layer in layers]).detach()
        yield f"init.{label}.level{i}.bias", torch.stack([layer.shift for layer in layers]).detach()
    ends = [layer for layer in model.end_flow.modules() if isinstance(layer, ActNorm)]
    assert all(layer.log_scale.abs().max() == 0 == layer.shift.abs().max() for layer in ends)


def kink_step(case: Case, monkeypatch: pytest.MonkeyPatch) -> int:
    """First training step in which float32 puts some leaky-ReLU input on the other side of 0 than float64 does.

    There the gradient jumps by a finite amount however small the rounding error, so from that step on the
    original's measured float32 error says nothing about another float32 run.
    """
    signs: list[list[Tensor]] = []

    def recording(x: Tensor, activation: equalized.Activation) -> Tensor:
        if activation == "leaky":
            signs[-1].append((x.detach() > 0).flatten())
        return activate(x, activation)

    activate = equalized.activate
    with monkeypatch.context() as patch:
        patch.setattr(equalized, "activate", recording)
        for dtype in (torch.float64, torch.float32):
            signs.append([])
            list(training(Case(dataclasses.replace(case.golden, dtype=dtype))))
    per_step = len(signs[0]) // 3
    differ = [bool((a != b).any()) for a, b in zip(*signs, strict=True)]
    return next((i // per_step for i, different in enumerate(differ) if different), 3)


def training(case: Case) -> Quantities:
    model = case.model().train()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    general, groups = case.general, model.parameter_groups()
    rates = {
        "encoders": general["LEARNING_RATE_ENCODERS"],
        "decoders": general["LEARNING_RATE_DECODERS"],
        "flows": general["LEARNING_RATE"],
    }
    optimizer = torch.optim.Adam([{"params": groups[name], "lr": rate} for name, rate in rates.items()])
    found, norms = [], []
    for step in range(3):
        noise = case.noise(model, f"train.step{step}", decoders=True)
        loss = model.loss(case[f"train.step{step}.x"], noise).loss
        optimizer.zero_grad()
        loss.backward()
        found.append(loss.detach())
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), general["GRAD_CLIP"]))
        optimizer.step()
    after = dict(model.named_parameters())
    originals = case.originals(model)
    deltas = {name: (after[name] - before[name]).detach().double().norm() for name in before}
    yield "train.loss", torch.stack(found)
    yield "train.grad_norm_before_clip", torch.stack(norms)
    yield "train.delta_norms", torch.stack([deltas[ours] for ours in originals.values()])
    yield "train.delta_norm", torch.stack(list(deltas.values())).norm()
    for label, group in (("encoders", "encoders"), ("decoders", "decoders"), ("rest", "flows")):
        members = {id(p) for p in groups[group]}
        yield (
            f"train.delta_norm.{label}",
            torch.stack([deltas[n] for n in deltas if id(after[n]) in members]).norm(),
        )
    for theirs, ours in originals.items():
        yield f"train.param_after.{theirs}", after[ours].detach().reshape(case.weights[theirs].shape)


# what computes the outputs whose names begin so
GROUPS: dict[str, Callable[[Any], Quantities]] = {
    r"(roundtrip|target|style|decoder|latent|log_det|skip|theta|cond)\.": encoding,
    r"sample\.": partial(sampling, prefix="sample"),
    r"overdrive\.": partial(sampling, prefix="overdrive"),
    r"end\.y_of_z": end_forward,
    r"end\.z_of_y": end_inverse,
    r"interp\.": interpolation,
    r"(loss\.train|grad)\.": partial(losses, mode="train"),
    r"loss\.eval\.": partial(losses, mode="eval"),
    r"init\.fresh\.": partial(initialization, label="fresh"),
    r"init\.case_weights\.": partial(initialization, label="case_weights"),
    r"init\.loss_call\.": partial(initialization, label="loss_call"),
    r"train\.": training,
}


def compare(golden: Any, monkeypatch: pytest.MonkeyPatch) -> int:
    """Hold every output that the case lists, and has the inputs of, against ours. Returns how many these were."""
    case = Case(golden)
    listed = {entry["name"]: entry for entry in case.description["tensors"] if entry["role"] == "output"}
    computed, absent = compute(GROUPS, case, listed)
    failures = [f"{name}: not computed" for name in listed if name not in computed and name not in absent]
    failures += [f"{name}: not computed, in a case that is whole" for name in absent if golden.is_ours]
    unstable = set(case.description.get("training", {}).get("unstable", []))
    compared = listed.keys() & computed.keys()
    is_trained = any(name.startswith("train.") for name in compared)
    kink = kink_step(case, monkeypatch) if is_trained and case.dtype == torch.float32 else 3
    stable = torch.tensor([name not in unstable for name in case.originals(case.model())])
    for name in compared:
        entry, expected = listed[name], case.stored[name].double()
        value = computed[name].double().reshape(expected.shape)
        if name == "train.delta_norms":
            value, expected = value[stable], expected[stable]
        error = (value - expected).abs().max().item()
        bound = 1e-6 * max(entry["max_abs"], 1e-6)
        if case.dtype == torch.float32:
            bound = 4 * entry["float32_max_abs_error"] + 1e-6 * entry["max_abs"] + 1e-7
            if name.startswith("train.") and kink < 3:
                # The loss of the step itself is before its gradient. What is no list by step is after all of them.
                exact = {"train.loss": kink + 1, "train.grad_norm_before_clip": kink}.get(name, 0)
                off = (value - expected).abs().flatten()
                after = off[exact:].max().item() / entry["max_abs"] if off[exact:].numel() else 0.0
                if not after <= (GRADIENTS_AFTER_A_KINK if "grad_norm" in name else AFTER_A_KINK):
                    failures.append(f"{name}: {after:.3g} of its size off after step {kink}")
                error = off[:exact].max().item() if exact else 0.0
        if not error <= bound:
            failures.append(f"{name}: error {error:.3g} above {bound:.3g}")
    assert compared, f"nothing of {golden} was compared"
    assert not failures, f"{len(failures)} of {len(listed)}:\n" + "\n".join(sorted(failures))
    return len(compared)


def test_golden_hflow(golden: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    compare(golden, monkeypatch)


@pytest.mark.parametrize(
    ("missing", "compared"),
    [
        (r"(?!in\.|style\.|target\.end|loss\.eval\.(mean|bpd)$)", 2),  # no draws of the loss, whose results it has
        (r"overdrive\.|loss\.|grad\.|init\.|train\.|interp\.|in\.x", 13),  # nor the image of what is encoded
    ],
)
def test_a_case_is_compared_in_what_it_has(missing: str, compared: int, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = GoldenCase(HERE / "hflow" / "tiny32.json", torch.float64)
    reduced = Reduced(whole, "tensors", lambda name: re.match(missing, name) is not None)
    assert compare(reduced, monkeypatch) == compared


def test_a_case_that_compares_nothing_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = GoldenCase(HERE / "hflow" / "tiny32.json", torch.float64)
    for has in ("in.x", "sample.image", "loss.eval.mean"):
        only = Reduced(whole, "tensors", lambda name, has=has: name != has)  # type: ignore[misc]
        with pytest.raises(AssertionError, match=r"nothing of .* was compared"):
            compare(only, monkeypatch)


def test_what_a_reduced_case_has_may_not_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = GoldenCase(HERE / "hflow" / "tiny32.json", torch.float64)
    wrong = Reduced(whole, "tensors", lambda name: not name.startswith("end."))
    assert compare(wrong, monkeypatch) == 2
    stored = wrong.tensors()
    stored["end.y_of_z"][0, 0] += 1e-3
    monkeypatch.setattr(Reduced, "tensors", lambda self: stored)
    with pytest.raises(AssertionError, match=r"1 of 2:\n *end\.y_of_z: error 0\.001 above"):
        compare(wrong, monkeypatch)
    unknown = wrong.description()
    unknown["tensors"][-1]["name"] = "end.of_nothing"
    monkeypatch.setattr(Reduced, "description", lambda self: unknown)
    with pytest.raises(AssertionError, match=r"end\.of_nothing: not computed"):
        compare(wrong, monkeypatch)
