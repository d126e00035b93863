"""What golden INR-GAN cases list of training: iterations, averages, mixing, path lengths, projection, adaptation."""

import copy
from typing import Any

import numpy as np
import torch
from golden_cases import Quantities
from inrgan_case import Case, gradients, norm
from torch import Tensor, nn

from hflow_rt.models.inrgan.plan import INRGANPlan, adapted
from hflow_rt.models.inrgan.presets import PRESETS
from hflow_rt.models.plan import Batch, Place
from hflow_rt.projection.search import centre_of, noise_scale, projected, rate
from hflow_rt.training.config import TrainingConfig
from hflow_rt.training.ema import average_weight, update_average


def plan_of(case: Case, **changes: Any) -> INRGANPlan:
    """Generator and discriminator of the case, with other settings of training."""
    model = case.model()
    model.config = model.config.model_copy(update=changes)
    plan = INRGANPlan(model)
    plan.discriminator = case.judge()
    return plan.to(case.dtype)


def recipe(case: Case) -> TrainingConfig:
    """The presets', with the batch and average of the case."""
    settings = case.described["training"]
    return TrainingConfig(
        **PRESETS["inrgan-256"]["training"]
        | {
            "batch_size": settings["batch_per_round"],
            "accumulate": settings["batch"] // settings["batch_per_round"],
            "ema_half_life_images": 1000 * settings["ema_kimg"],
            "ema_ramp": settings["ema_rampup"],
        }
    )


class Run:
    """Published iterations; z by phase, of which one is for a regulariser that is off."""

    PHASES = ("generator", None, "discriminator", "penalty")

    def __init__(self, case: Case) -> None:
        self.case, self.training, self.plan = case, recipe(case), plan_of(case)
        self.average = copy.deepcopy(self.plan.model)
        self.adams = {}
        for name, groups in self.plan.groups().items():
            own = self.training.optimizer_settings(name)
            self.adams[name] = torch.optim.Adam(
                groups[name], lr=self.training.learning_rates[name], betas=own.betas, eps=own.eps
            )

    def phase(self, name: str, iteration: int, z: Tensor) -> tuple[Tensor, Tensor]:
        """What is told of each image, and the norm of the gradient."""
        optimizer = {phase.name: phase.optimizer for phase in self.plan.phases()}[name]
        for key, adam in self.adams.items():
            adam.zero_grad()
            for parameter in adam.param_groups[0]["params"]:
                parameter.requires_grad_(key == optimizer)
        told = []
        for rows in torch.arange(len(z)).split(self.training.batch_size):
            batch = Batch(self.case["train_real8"][iteration, rows], {"z": z[rows]}, {})
            before = self.plan.model.w_avg.clone()
            self.plan.loss(name, batch, Place()).loss.backward()
            after = self.plan.model.w_avg.clone()
            self.plan.model.w_avg.copy_(before)  # asked again, by image
            losses = {
                "generator": self.plan.generator_losses,
                "discriminator": self.plan.discriminator_losses,
                "penalty": self.plan.slopes,
            }[name]
            told.append(losses(batch)[0].detach())
            self.plan.model.w_avg.copy_(after)
        gradients = [parameter.grad for parameter in self.adams[optimizer].param_groups[0]["params"]]
        norm = torch.stack([gradient.norm() for gradient in gradients if gradient is not None]).norm()
        self.adams[optimizer].step()
        return torch.cat(told), norm


def training(case: Case) -> Quantities:
    run, batch = Run(case), case.described["training"]["batch"]
    told: dict[str, list[Tensor]] = {name: [] for name in Run.PHASES if name}
    norms, betas = [], []
    for iteration in range(case.described["training"]["iterations"]):
        row = torch.zeros(len(Run.PHASES), dtype=case.dtype)
        for index, phase in enumerate(Run.PHASES):
            every = {known.name: known.every for known in run.plan.phases()}.get(phase or "")
            if phase is not None and every is not None and iteration % every == 0:
                losses, row[index] = run.phase(phase, iteration, case["train_z"][iteration, index])
                told[phase].append(losses)
        norms.append(row)
        weight = average_weight(run.training, Place(iteration + 1, (iteration + 1) * batch), batch)
        update_average(run.average, run.plan.model, weight)
        betas.append(1 - weight)
    for name, phase in (("g_loss", "generator"), ("d_loss", "discriminator"), ("r1_penalty", "penalty")):
        yield name, torch.stack(told[phase])
    yield "grad_norm", torch.stack(norms)
    yield "ema_beta_hp", torch.tensor(betas, dtype=torch.float64)
    yield "lr_hp", torch.tensor(list(run.training.learning_rates.values()), dtype=torch.float64)
    seconds = [run.training.optimizer_settings(name).betas for name in run.adams]
    yield "betas_hp", torch.tensor(seconds, dtype=torch.float64)
    for label, model in (("G", run.plan.model), ("E", run.average)):
        top = model.synthesis.stages[-1]
        layer, const = top.layers[1], top.embedding.const
        thin = const.shape[-1] // 16
        yield f"{label}_map_weight", model.mapping.layers[0].weight
        yield f"{label}_w_avg", model.w_avg
        yield f"{label}_top_weight", layer.weight[:, :, None, None]
        yield f"{label}_top_affine_bias", layer.affine.bias
        yield f"{label}_rgb4_bias", model.synthesis.stages[0].colours.bias
        yield f"{label}_const", const[..., ::thin, ::thin]
        yield f"{label}_sq_sum", squares(model)
    judge = run.plan.discriminator
    yield "D_out_weight", judge.out.weight
    yield "D_rgb_weight", judge.from_colours.weight
    yield "D_fc_bias", judge.fc.bias
    yield "D_sq_sum", squares(judge)


def squares(network: nn.Module) -> Tensor:
    return torch.stack([parameter.square().sum() for parameter in network.parameters()]).sum()


def averages(case: Case) -> Quantities:
    published = TrainingConfig(**PRESETS["inrgan-256"]["training"])
    weights = [average_weight(published, Place(0, seen + 64), 64) for seen in case["ema_seen"].tolist()]
    yield "ema_beta_table_hp", 1 - torch.tensor(weights, dtype=torch.float64)


def mixing(case: Case) -> Quantities:
    plan = plan_of(case, style_mixing=1.0)
    first, slots = int(case["mix_cut"]), plan.model.config.slots
    where = (first - 0.5) / (slots - 1)  # the middle of the draws that lead there
    draws = {"z": case["mix_z"], "z2": case["mix_z2"], "mix": torch.tensor([[0.0, where]]).expand(4, 2)}
    styles = plan.styles(Batch(torch.zeros(4), draws, {}))
    yield "mix_ws", styles[:2]
    yield "mix_img", plan.model.synthesis(styles[:2])
    yield "mix_w_avg_after", plan.model.w_avg


def paths(case: Case) -> Quantities:
    plan = plan_of(case, path_weight=2.0)
    batch = Batch(torch.zeros(4), {"z": case["pl_z"], "direction": case["pl_noise"]}, {})
    plan.path_mean.fill_(0.5)
    losses = plan.path_losses(batch)
    yield "pl_penalty", losses
    yield "pl_loss", 2 * losses
    yield "pl_mean_after", plan.path_mean.clone()
    plan.path_mean.fill_(0.5)
    found = gradients(plan.model, plan.loss("path", batch, Place()).loss)
    top = f"synthesis.stages.{len(plan.model.config.stages) - 1}.layers.1"
    yield "pl_grad_norm", norm(found)
    yield "pl_grad_map_bias", found["mapping.layers.0.bias"]
    yield "pl_grad_top_bias", found[f"{top}.bias"]
    yield "pl_grad_top_affine_bias", found[f"{top}.affine.bias"]
    yield "pl_grad_top_weight", found[f"{top}.weight"][:, :, None, None]


def projection(case: Case) -> Quantities:
    """The picture's plain values are what is compared."""
    model = case.model().requires_grad_(False)
    z = torch.from_numpy(np.random.RandomState(123).randn(64, model.config.z_dim)).to(case.dtype)
    mean, spread = (value.to(case.dtype) for value in centre_of([model.mapping(z)]))
    noise, target = case["proj_noise"], case["proj_target"].to(case.dtype) / 255
    steps = range(len(noise))

    def image(w: Tensor) -> Tensor:
        return model.synthesis(model.slots(w))

    def far(w: Tensor) -> Tensor:
        return (image(w) / 2 + 0.5 - target).square().flatten(1).sum(1)

    walked = list(projected(far, mean[None], spread, noise[:, None], len(noise)))
    yield "proj_w_mean", mean
    yield "proj_w_std", spread
    yield "proj_noise_scale", torch.stack([spread * noise_scale(step, len(steps)) for step in steps])
    yield "proj_lr_hp", torch.tensor([rate(step, len(steps)) for step in steps], dtype=torch.float64)
    yield "proj_w", torch.cat([w for w, _ in walked])
    yield "proj_dist", torch.cat([distance for _, distance in walked])
    yield "proj_img", image(walked[-1][0])
    yield "proj_lr_table_hp", torch.tensor([rate(step, 1000) for step in range(1000)], dtype=torch.float64)
    yield "proj_noise_table_hp", torch.tensor([noise_scale(step, 1000) for step in range(1000)], dtype=torch.float64)


def adaptation(case: Case) -> Quantities:
    p, found = torch.zeros(()), []
    for mean in case["ada_means"].tolist():
        p = adapted(p, mean, 0.6, 64 * 4 / 500_000)
        found.append(p)
    yield "ada_p_table", torch.stack(found)


def adaptation_of_a_run(case: Case) -> Quantities:
    """The signs of each phase of each iteration, as the trainer tells them of a step."""
    settings, signs = case.described["training"], case["ada_window_signs"].split(case.described["training"]["batch"])
    changes = {"augment": settings["augment"], "augment_start": settings["augment_p"]}
    plan = plan_of(case, **changes, augment_images=int(1000 * settings["ada_kimg"])).float()
    assert plan.model.config.augment_every == settings["ada_interval"]
    found, told = [], iter(signs)
    for iteration in range(settings["iterations"]):
        phases = ["discriminator"] + (["penalty"] if iteration % 16 == 0 else [])
        terms = {phase: {"sign": next(told).mean().item()} for phase in phases}
        plan.after_step(terms, Place(iteration + 1, (iteration + 1) * settings["batch"]))
        found.append(plan.p.clone())
    yield "ada_p_hp", torch.stack(found)
