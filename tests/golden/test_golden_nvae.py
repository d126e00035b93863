"""Every tensor of every golden NVAE case, in float64 and float32, within the bounds of the format's README."""

import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from golden_cases import Quantities, compute
from nvae_case import Case, bound, rms, sizes
from torch import Tensor

from hflow_rt.models.bins import public_levels
from hflow_rt.models.checkpoint import load_state
from hflow_rt.models.nvae.convolution import convolutions
from hflow_rt.models.nvae.network import Group, Inferred, Network, packed
from hflow_rt.models.nvae.objective import (
    active_units,
    balance,
    balance_targets,
    bits_per_dim,
    channel_divergence,
    importance_bound,
    kl_weight,
    log_weight,
    reconstruction,
    training_cost,
    weight_penalty,
)
from hflow_rt.models.nvae.output import Bernoulli, Mixture, NormalPixels, pixels
from hflow_rt.models.nvae.plan import NVAEPlan
from hflow_rt.models.nvae.published import read_published
from hflow_rt.models.nvae.regularisers import (
    FIRST_ROUNDS,
    ROUNDS,
    Shape,
    by_shape,
    gain_penalty,
    matrices,
    singular_values,
)
from hflow_rt.models.plan import Batch, Place
from hflow_rt.training.config import TrainingConfig
from hflow_rt.training.schedule import learning_rates

FAMILY = "nvae"


def infer(network: Network, images: Tensor, noise: list[Tensor]) -> Inferred:
    return network.infer(network.bottom_up(images), noise)


def divergences(inferred: Inferred) -> Tensor:
    return inferred.by_group(Group.divergence)


def log_px(network: Network, logits: Tensor, images: Tensor) -> Tensor:
    found = pixels(network.config, logits).log_prob(images)
    return found[:, None] if network.config.channels == 1 else found


def inputs(case: Case) -> Quantities:
    yield "x", case.images()


@torch.no_grad()
def inference(case: Case) -> Quantities:
    network, x = case.network(), case.images()
    with sizes(case, network) as found:
        inferred = infer(network, x, case.groups("eps_q"))
    for label in ("enc", "dec"):
        yield f"{label}.rms", torch.stack([found[name] for name in case.description[f"{label}_stages"]])
    for index, group in enumerate(inferred.groups):
        yield f"q.{index}.raw", group.raw
        yield f"p.{index}.raw", group.raw_prior
        for label, normal in (("q", group.posterior), ("p", group.prior)):
            yield f"{label}.{index}.mu", normal.mean
            yield f"{label}.{index}.log_sigma", normal.std.log()
        yield f"z_pre.{index}", group.path[0]
        yield f"z.{index}", group.z
        for flow, value in enumerate(group.path[1:]):
            yield f"z_mid.{index}.{flow}", value
        # flows keep volume by construction, which `Group.log_q` takes for granted; test_nvae.py holds their Jacobian
        yield f"log_det.{index}", torch.zeros(len(x))
    yield "log_q", inferred.by_group(Group.log_q)
    yield "log_p", inferred.by_group(Group.log_p)
    kl = divergences(inferred)
    yield "kl", kl
    yield "kl_diag", channel_divergence(inferred)
    yield "active_units", active_units(channel_divergence(inferred))
    yield "logits", inferred.logits
    yield "log_px", log_px(network, inferred.logits, x)
    recon = reconstruction(network, inferred, x)
    yield "recon", recon
    yield "nelbo", recon + kl.sum(1)
    yield "bpd", bits_per_dim(network.config, recon + kl.sum(1))
    yield "recon.mean_image", pixels(network.config, inferred.logits).mean()
    yield "kl.alpha", torch.tensor(balance_targets(network.config), dtype=case.dtype)
    yield "kl.gamma", balance(network.config, kl)
    yield "kl.balanced", 0.4 * (balance(network.config, kl) * kl).sum(1)
    yield "kl.vals", kl.mean(0)


def tables(case: Case) -> Quantities:
    config, steps = case.config(), case.stored["beta_steps"].tolist()
    weights = [kl_weight(config, step, case.steps) for step in steps]
    yield "beta_hp", torch.tensor(weights, dtype=torch.float64)
    yield "lambda_hp", torch.tensor([weight_penalty(config, weight) for weight in weights], dtype=torch.float64)
    yield "lr_table_hp", torch.tensor([rate(case, step) for step in range(case.steps)], dtype=torch.float64)


def rate(case: Case, step: int) -> float:
    """By the trainer's schedule, in updates of one image. The published warm-up stops one update short of its end."""
    train = case.train
    warmup = train["warmup_epochs"] * train["iterations_per_epoch"]
    settings = TrainingConfig(
        images=case.steps,
        learning_rates={"network": train["lr"] * (warmup - 1) / warmup},
        warmup_images=warmup - 1,
        decay="cosine",
        decay_start_images=warmup,
        decay_every_images=train["iterations_per_epoch"],
        final_rates={"network": train["lr_min"]},
    )
    return learning_rates(settings, step)["network"]


@torch.no_grad()
def importance(case: Case) -> Quantities:
    network, x = case.network(), case.images()
    features, weights, nelbo = network.bottom_up(x), [], []
    for draw in range(len(case.groups("iw.eps_q")[0])):
        inferred = network.infer(features, case.groups("iw.eps_q", draw))
        recon = reconstruction(network, inferred, x)
        weights.append(log_weight(inferred, recon))
        nelbo.append(recon + divergences(inferred).sum(1))
    bound = importance_bound(torch.stack(weights, 1))
    yield "iw.log_w", torch.stack(weights, 1)
    yield "iw.neg_log_p", bound
    for label, value in (("neg_log_p", bound.mean()), ("nelbo", torch.stack(nelbo).mean())):
        yield f"iw.mean_{label}", value
        yield f"iw.mean_{'bpd' if label == 'neg_log_p' else 'bpd_elbo'}", bits_per_dim(network.config, value)


@torch.no_grad()
def sampling(case: Case) -> Quantities:
    network, noise = case.network(), case.groups("eps_p")
    for name in {match[1] for listed in case.listed if (match := re.match(r"sample\.t([\d.]+)\.", listed))}:
        made = network.generate([float(name) * tensor for tensor in noise])
        found = pixels(network.config, made.logits)
        yield f"sample.t{name}.logits", made.logits
        yield f"sample.t{name}.z_rms", torch.stack([rms(z) for z in made.latents])
        yield f"sample.t{name}.mean", found.mean()
        if isinstance(found, Bernoulli):
            yield f"sample.t{name}.image", found.draw(case["sample.u_pix"])
            continue
        assert isinstance(found, Mixture)
        uniform = case["sample.u_mix"], case["sample.u_pix"]
        yield f"sample.t{name}.image", found.draw(*uniform)
        yield f"sample.t{name}.image_divided", found.draw_divided(*uniform, float(name))


@torch.no_grad()
def spectra(case: Case) -> Quantities:
    network = case.network()
    groups, left = by_shape(network), case.left_vectors()
    for label, rounds in (("first", FIRST_ROUNDS), ("second", ROUNDS)):
        values, left = singular_values(groups, left, rounds)
        yield f"sr.loss.{label}", torch.cat(list(values.values())).sum()
        yield f"sr.sigma.{label}", case.in_order(network, values)
        for (rows, columns), u in left.items():
            yield f"sr.u.{label}.{rows}x{columns}", u
    largest = {shape: torch.linalg.svdvals(matrices(convs))[:, 0] for shape, convs in groups.items()}
    yield "sr.sigma.svd", case.in_order(network, largest)
    yield "bn_loss", gain_penalty(network)


@torch.no_grad()
def readjusted(case: Case) -> Quantities:
    network, temperature = case.network(), 0.6
    steps = [case.groups("readjust.eps_p", index) for index in range(len(case.groups("readjust.eps_p")[0]))]
    network.calibrate(packed(network.config, "z", [temperature * noise for noise in step]) for step in steps)
    yield "readjust.running_mean", case.statistics(network, "running_mean")
    yield "readjust.running_var", case.statistics(network, "running_var")
    logits = network.generate([temperature * tensor for tensor in case.groups("eps_p")]).logits
    yield "readjust.mean", pixels(network.config, logits).mean()
    yield "readjust.logits_rms", logits.square().mean((2, 3)).sqrt()


class Objective:
    """The training loss of one update, in parts."""

    def __init__(self, case: Case, network: Network, x: Tensor, noise: list[Tensor], left: dict[Shape, Tensor]) -> None:
        weight = kl_weight(network.config, case.train["global_step"], case.steps)
        cost = training_cost(network, infer(network, x, noise), x, weight)
        self.recon, self.kl, self.balanced = cost.reconstruction, cost.divergences, cost.balanced
        values, _ = singular_values(by_shape(network), left, FIRST_ROUNDS)
        self.spectral = torch.cat(list(values.values())).sum()
        penalty = weight_penalty(network.config, weight) * (self.spectral + gain_penalty(network))
        self.total = (self.recon + self.balanced).mean() + penalty


def losses(case: Case) -> Quantities:
    for label in ("train", "eval"):
        network = case.network().train(label == "train")
        noise, left = case.groups("eps_q"), case.left_vectors()
        loss = Objective(case, network, case.images(), noise, left)
        yield f"loss.{label}.total", loss.total
        yield f"loss.{label}.recon", loss.recon
        yield f"loss.{label}.balanced_kl", loss.balanced
        yield f"loss.{label}.gamma", balance(network.config, loss.kl)
        yield f"loss.{label}.kl", loss.kl.mean(0)
        yield f"loss.{label}.sr", loss.spectral
        if label == "eval":
            continue
        yield "loss.train.running_mean", case.statistics(network, "running_mean")
        yield "loss.train.running_var", case.statistics(network, "running_var")
        loss.total.backward()
        gradients = {name: p.grad for name, p in case.parameters(network).items() if p.grad is not None}
        yield "grad.norms", torch.stack([gradient.norm() for gradient in gradients.values()])
        for name, gradient in gradients.items():
            yield f"grad.{name}", gradient


def batch(case: Case, plan: NVAEPlan, index: int) -> Batch:
    """Of the training step `index`."""
    config = plan.model.config
    draws = packed(config, "noise", case.groups("steps.eps_q", index))
    if config.output == "bernoulli":
        draws["uniform"] = plan.model.crop(case.stored["steps.x_bin_u"][index])
    return Batch(case.stored["steps.x_u8"][index], draws, {})


def updates(case: Case) -> Quantities:
    """By the training plan."""
    model, train = case.network().train(), case.train
    plan = NVAEPlan(model).to(case.dtype)
    for (rows, columns), u in case.left_vectors().items():
        plan.get_buffer(f"left_{rows}x{columns}").copy_(u)
    before = {name: p.detach().clone() for name, p in case.parameters(model).items()}
    adamax = torch.optim.Adamax(plan.groups()["network"]["network"], eps=1e-3, weight_decay=train["weight_decay"])
    totals, rates, norms = [], [], []
    for index in range(train["steps"]):
        step = train["global_step"] + index
        loss = plan.loss("network", batch(case, plan, index), Place(index, step, case.steps)).loss
        adamax.zero_grad()
        loss.backward()
        norms.append(torch.stack([p.grad.norm() for p in case.parameters(model).values() if p.grad is not None]))
        rates.append(rate(case, step))
        adamax.param_groups[0]["lr"] = rates[-1]
        adamax.step()
        totals.append(loss)
    yield "steps.loss", torch.stack(totals)
    yield "steps.lr_hp", torch.tensor(rates, dtype=torch.float64)
    yield "steps.grad_norms", torch.stack(norms)
    moved = case.parameters(model)
    still = case.description["zero_gradient"]
    yield (
        "steps.delta_norms",
        torch.stack([(p - before[name]).norm() * (name not in still) for name, p in moved.items()]),
    )
    for name, parameter in moved.items():
        yield f"steps.param.{name}", parameter
    yield "steps.running_mean", case.statistics(model, "running_mean")
    yield "steps.running_var", case.statistics(model, "running_var")
    with torch.no_grad():
        x = case.images()
        inferred = infer(model.eval(), x, case.groups("eps_q"))
        yield "steps.after.nelbo", reconstruction(model, inferred, x) + divergences(inferred).sum(1)
        logits = model.generate([0.6 * tensor for tensor in case.groups("eps_p")]).logits
        yield "steps.after.sample_mean", pixels(model.config, logits).mean()


def distributions(case: Case) -> Quantities:
    pixels, logits = case.stored["dist.x_u8"], case["dist.logits"]
    for bits in (8, 5):
        image = public_levels(pixels, bits).to(case.dtype)
        yield f"dist.log_px{bits}", Mixture(logits, bits=bits, published=True).log_prob(image)
    yield "dist.mean", Mixture(logits).mean()
    for name in {match[1] for listed in case.listed if (match := re.match(r"dist\.sample_t([\d.]+)", listed))}:
        uniform = case["dist.u_mix"], case["dist.u_pix"]
        yield f"dist.sample_t{name}", Mixture(logits).draw_divided(*uniform, float(name))
    normal = NormalPixels(case["dist.normal_param"])
    yield "dist.normal_log_px", normal.by_colour(public_levels(pixels[:, :, :4, :4], 8).to(case.dtype))
    yield "dist.normal_sample", normal.draw(case["dist.normal_eps"])


# what computes the outputs whose names begin so
GROUPS: dict[str, Callable[[Any], Quantities]] = {
    r"x$": inputs,
    r"enc\.|dec\.|q\.|p\.|z_|z\.|log_|kl|active|logits|recon|nelbo|bpd": inference,
    r"beta_hp|lambda_hp|lr_table": tables,
    r"iw\.": importance,
    r"sample\.": sampling,
    r"sr\.|bn_loss": spectra,
    r"readjust\.": readjusted,
    r"loss\.|grad\.": losses,
    r"steps\.": updates,
    r"dist\.": distributions,
}


def test_golden_nvae(golden: Any) -> None:
    case = Case(golden)
    computed, absent = compute(GROUPS, case, case.listed)
    absent -= computed.keys()
    failures = [f"{name}: not computed" for name in case.listed.keys() - computed.keys() - absent]
    failures += [f"{name}: not computed, in a case that is whole" for name in absent if golden.is_ours]
    compared = case.listed.keys() & computed.keys()
    for name in compared:
        value = computed[name].detach().double()
        expected, allowed = bound(case, case.listed[name], name)
        if value.shape != expected.shape:
            failures.append(f"{name}: shape {list(value.shape)} instead of {list(expected.shape)}")
            continue
        error = (value - expected).abs().max().item()
        if not error <= allowed:
            failures.append(f"{name}: error {error:.3g} above {allowed:.3g}")
    assert compared, f"nothing of {golden} was compared"
    assert not failures, f"{len(failures)} of {len(case.listed)}:\n" + "\n".join(sorted(failures))


def test_the_case_says_what_the_options_say(golden: Any) -> None:
    case = Case(golden)
    config, described = case.config(), case.described
    assert (config.canvas, config.channels, len(config.group_scales)) == (
        described["S"],
        described["C"],
        described["G"],
    )
    assert list(config.groups) == described["groups_high_to_low_resolution"]
    sides = [config.group_shape(group)[1] for group in range(described["G"])]
    assert sides == described["group_sides_top_first"]
    assert math.prod(config.image_shape) == described["bpd_divisor"]
    order = [case.names[name] for name in case.description["parameter_order"]]
    with torch.device("meta"):
        network = Network(config)
    assert [name for name, _ in network.named_parameters()] == order
    assert list(convolutions(network)) == [
        case.names[f"{name}.weight"].removesuffix(".weight") for name in case.description["convs"]
    ]


def test_published_checkpoint_to_the_bit(golden: Any) -> None:
    """It was written after the updates of the case; options, weights and statistics come along."""
    case = Case(golden)
    if "checkpoint" not in case.description:
        pytest.skip("a case without a published file")
    path = golden.path.parent / case.description["checkpoint"]["file"]
    if not path.exists():
        pytest.skip("its published file is not at hand")
    published = read_published(path)
    assert published.config == case.config().model_copy(update={"likelihood": "exact"})
    network = Network(published.config)
    load_state(network, published.state, str(path))
    for name in case.listed:
        if name.startswith("steps.param."):
            ours = case.names[name.removeprefix("steps.param.")]
            assert torch.equal(published.state[ours], case.stored[name]), name
    for name in ("running_mean", "running_var"):
        assert torch.equal(case.statistics(network, name), case.stored[f"steps.{name}"]), name
