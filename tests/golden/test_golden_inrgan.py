"""Every tensor of every golden INR-GAN case, in float64 and float32, within the bounds of the format's README."""

import copy
import hashlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from golden_cases import Absent, Listed, Quantities, bound, compute
from safetensors.torch import load_file
from torch import Tensor, nn

from hflow_rt.models.checkpoint import load_state
from hflow_rt.models.inrgan.augment import PIPES, Augmenter
from hflow_rt.models.inrgan.config import DiscriminatorConfig, EmbeddingConfig, INRGANConfig
from hflow_rt.models.inrgan.discriminator import Discriminator
from hflow_rt.models.inrgan.layers import ModulatedLayer
from hflow_rt.models.inrgan.losses import generator_loss, judged_loss, slope
from hflow_rt.models.inrgan.model import INRGAN
from hflow_rt.models.inrgan.plan import INRGANPlan, adapted
from hflow_rt.models.inrgan.presets import PRESETS
from hflow_rt.models.inrgan.published import read_published, read_snapshot
from hflow_rt.models.inrgan.weights import discriminator_from_original, from_original, our_name
from hflow_rt.models.plan import Batch, Place
from hflow_rt.projection.search import centre_of, noise_scale, projected, rate
from hflow_rt.training.config import TrainingConfig
from hflow_rt.training.ema import average_weight, update_average

FAMILY = "inrgan"


class Case:
    """Networks built from a golden case's settings and weights, and the means to compute what it lists."""

    def __init__(self, golden: Any) -> None:
        self.description = golden.description()
        self.described = self.description["config"]
        self.stored = Listed(golden.tensors(), self.description["io"])
        file = self.description["weights"]["file"]  # of a training run, another case's
        self.path: Path = golden.path
        self.weights = load_file(self.path.parent / file)
        self.dtype = golden.dtype
        self.listed = {
            entry["name"]: entry
            for entry in self.description["io"]
            if entry["role"] == "output" and not entry["name"].endswith(".f64")
        }

    def __getitem__(self, name: str) -> Tensor:
        value = self.stored[name]
        return value.to(self.dtype) if value.is_floating_point() else value

    def config(self) -> INRGANConfig:
        described, judge = self.described, self.described["discriminator"]
        assert (judge["fp16_stages"], judge["clamp"]) == (0, None)
        embeddings = {}
        for side, entry in described["embedding"].items():
            own = {name: entry[name] for name in ("const", "random", "diagonal", "cosine")}
            embeddings[int(side)] = EmbeddingConfig(**own)
            assert embeddings[int(side)].waves(int(side)) == entry["octave_rows"] + entry["random"]
        config = INRGANConfig(
            resolution=described["resolution"],
            channels=described["img_channels"],
            input_side=described["input_resolution"],
            upsampling="bilinear" if described["variant"] == "bil" else "nearest",
            z_dim=described["z_dim"],
            w_dim=described["w_dim"],
            classes=tuple(map(str, range(described["c_dim"]))),
            mapping_layers=described["mapping_layers"],
            rank=described["rank"],
            **widths(described["widths"]),
            extra_layers={int(side): count for side, count in described["extra_layers"].items()},
            embeddings=embeddings,
            w_avg_decay=described["w_avg_decay"],
            discriminator=DiscriminatorConfig(**widths(judge["widths"]), group=judge["mbstd_group"]),
            r1_gamma=described["loss"]["r1_gamma"],
            r1_every=described["loss"]["r1_interval"],
        )
        assert config.slots == described["num_ws"]
        for side, channels in described["widths"].items():
            assert config.width(int(side)) == channels
            assert config.discriminator.width(int(side)) == judge["widths"][side]
        return config

    def original(self, network: str) -> dict[str, Tensor]:
        """Tensors of G or D under the original's names."""
        return {name[2:]: value for name, value in self.weights.items() if name[0] == network}

    def model(self) -> INRGAN:
        model = INRGAN(self.config())
        load_state(model, from_original(self.original("G")), "golden weights")
        return model.to(self.dtype)

    def judge(self, group: int | None = None) -> Discriminator:
        config = self.config()
        judge = Discriminator(config)
        load_state(judge, discriminator_from_original(config, self.original("D")), "golden weights")
        judge.group = judge.group if group is None else group
        return judge.to(self.dtype)

    def snapshot(self) -> Path:
        """The published file beside the case."""
        path = self.path.parent / self.description.get("container", {}).get("file", "none")
        if not path.is_file():
            raise Absent("container")
        return path

    def labels(self, name: str, rows: slice = slice(None)) -> Tensor | None:
        return self[name][rows] if self.described["c_dim"] else None

    def real(self, rows: slice = slice(None)) -> Tensor:
        return self["d_img8"][rows].to(self.dtype) / 127.5 - 1


def widths(by_stage: dict[str, int]) -> dict[str, int]:
    """The bases that lead to these widths."""
    last = max(by_stage, key=int)
    return {"channel_base": by_stage[last] * int(last), "channel_max": max(by_stage.values())}


def full(case: Case, value: float, count: int = 1) -> Tensor:
    return torch.full((count,), value, dtype=case.dtype)


def latents(case: Case) -> Quantities:
    model = case.model()
    w = model.mapping(case["z"], case.labels("c"))
    yield "w", w
    slots = model.slots(w)
    far = full(case, model.config.slots, 4)
    yield "w_psi07", model.truncated(slots, full(case, 0.7, 4), far)[:, -1]
    cutoff = int(re.search(r"first (\d+) slots", case.listed["ws_cutoff"]["meaning"])[1])  # type: ignore[index]
    yield "ws_cutoff", model.truncated(slots[:1], full(case, 0.7), full(case, cutoff))
    model.follow(w)
    yield "w_avg_after", model.w_avg


@torch.no_grad()
def pictures(case: Case) -> Quantities:
    model = case.model()
    for name, psi in (("img_psi10", 1.0), ("img_psi07", 0.7), ("img_psi05", 0.5)):
        count = case.listed[name]["shape"][0]
        labels = case.labels("c", slice(count))
        w = model.slots(model.mapping(case["z"][:count], labels))
        controls = full(case, psi, count), full(case, model.config.slots, count)
        image = model.synthesis(model.truncated(w, *controls))
        yield name, image
        if psi == 0.7:
            yield "img8_psi07", (model.public(w, *controls) * 255).round().permute(0, 2, 3, 1)


def embeddings(case: Case) -> Quantities:
    for stage in case.model().synthesis.stages:
        if stage.embedding is not None:
            name = f"emb_{stage.embedding.side}"
            thinned = re.search(r"every (\d)\w+ row and every (\d)\w+ column", case.listed[name]["meaning"])
            rows, columns = map(int, thinned.groups()) if thinned else (1, 1)
            yield name, stage.embedding()[..., ::rows, ::columns]


@torch.no_grad()
def stages(case: Case) -> Quantities:
    model, w = case.model(), case["ws_in"]
    walked = list(model.synthesis.walk(w))
    yield "img_ws", walked[-1][1]
    yield "stage_rms", torch.stack([x.square().flatten(1).mean(1).sqrt() for x, _ in walked])
    for stage, (_, image) in zip(model.config.stages, walked, strict=True):
        yield f"stage_img_{stage}", image
    for name in case.listed:
        if match := re.fullmatch(r"W_(b\d+)_(?:(conv\d)|extra_(\d))", name):
            part = match[2] or f"extra_convs.{match[3]}"
            layer = model.get_submodule(our_name(f"synthesis.{match[1]}.{part}.weight").removesuffix(".weight"))
            assert isinstance(layer, ModulatedLayer)
            yield name, layer.weights(w[0, :2])


@torch.no_grad()
def judgements(case: Case) -> Quantities:
    for name in case.listed:
        if match := re.fullmatch(r"logits_b(\d)_g(\d)", name):
            rows = slice(int(match[1]))
            yield name, case.judge(int(match[2]))(case.real(rows), case.labels("d_c", rows))[:, None]
    mapping = case.judge().mapping
    if mapping is not None:
        yield "d_cmap", mapping(None, case.labels("d_c"))


def gradients(network: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    network.zero_grad()
    loss.backward()
    return {name: value.grad for name, value in network.named_parameters() if value.grad is not None}


def norm(found: dict[str, Tensor]) -> Tensor:
    return torch.stack([gradient.norm() for gradient in found.values()]).norm()


def losses(case: Case) -> Quantities:
    model, judge, rows = case.model(), case.judge(), slice(4)
    top = f"synthesis.stages.{len(model.config.stages) - 1}.layers.1.bias"
    fake = model.synthesis(model.slots(model.mapping(case["z"], case.labels("c"))))
    logits = judge(fake, case.labels("c"))
    yield "fake_logits", logits[:, None]
    yield "g_loss", generator_loss(logits)[:, None]
    found = gradients(model, generator_loss(logits).mean())
    yield "gradnorm_Gmain", norm(found)
    yield "grad_Gmain_map_bias", found["mapping.layers.0.bias"]
    yield "grad_Gmain_rgb4_bias", found["synthesis.stages.0.colours.bias"]
    yield "grad_Gmain_top_bias", found[top]
    labels = case.labels("d_c", rows)
    judged = judge(case.real(rows), labels)
    loss = judged_loss(judge(fake.detach(), case.labels("c")), judged)
    yield "real_logits", judged[:, None]
    yield "d_loss", loss[:, None]
    found = gradients(judge, loss.mean())
    yield "gradnorm_Dmain", norm(found)
    yield "grad_Dmain_out_weight", found["out.weight"]
    yield "grad_Dmain_rgb_bias", found["from_colours.bias"]
    penalty = slope(lambda images: judge(images, labels), case.real(rows))
    yield "r1_penalty", penalty
    yield "r1_loss", model.config.r1_gamma / 2 * penalty
    found = gradients(judge, model.config.r1_every * model.config.r1_gamma / 2 * penalty.mean())
    yield "gradnorm_Dreg", norm(found)
    yield "grad_Dreg_out_weight", found["out.weight"]
    yield "grad_Dreg_rgb_weight", found["from_colours.weight"]


@torch.no_grad()
def files(case: Case) -> Quantities:
    """Of the networks in the published file."""
    path, config = case.snapshot(), case.config()
    for part, name, psi in (("G_ema", "file_img_ema_psi07", 0.7), ("G", "file_img_raw", 1.0)):
        published = read_published(path, part=part)
        assert published.config == config.model_copy(update={"r1_gamma": 10.0})
        model = INRGAN(config)
        load_state(model, published.state, "golden snapshot")
        model.to(case.dtype)
        w = model.slots(model.mapping(case["z_eval"]))
        image = model.synthesis(model.truncated(w, full(case, psi, 2), full(case, config.slots, 2)))
        yield name, image
        if part == "G_ema":
            judge = Discriminator(config)
            found, _ = read_snapshot(path, "D")
            load_state(judge, discriminator_from_original(config, found.weights), "golden snapshot")
            yield "file_logits", judge.to(case.dtype)(image)[:, None]


def augmented(case: Case) -> Quantities:
    """Every draw at one quantile; what is normal there lacks a factor, and the second rotation is none."""
    for name in case.listed:
        match = re.fullmatch(r"aug_(grey_)?(\w+?)(?:_q(\d+))?", name)
        if match is None:
            continue
        images = case["aug_x"][:, :1] if match[1] else case["aug_x"]
        channels, side = images.shape[1], images.shape[3]
        off = match[2] == "off"
        pipe = {"off": "bgc", "geom": "bg"}.get(match[2], match[2])  # its "geom" is of all that moves pixels
        names = PIPES.get(pipe, (pipe,))
        augmenter = Augmenter(names, channels, side)
        quantile = 0.5 if off else int(match[3]) / 1e4
        drawn = {spec.name: full(case, 0.0).expand(1, *spec.shape).clone() for spec in augmenter.draws()}
        drawn["uniform"] += quantile
        drawn["uniform"][:, 5] = 0.5  # of the second rotation
        drawn["normal"] += torch.erfinv(full(case, 2 * quantile - 1))
        drawn["normal"][:, -1] = torch.erfinv(full(case, quantile))  # of noise
        if "noise" in names:
            drawn["picture"] = case["aug_noise"]
        yield name, augmenter(images, torch.tensor(0.0 if off else 1.0), drawn)


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


# what computes the outputs whose names begin so
GROUPS: dict[str, Callable[[Any], Quantities]] = {
    r"w$|w_|ws_": latents,
    r"img_psi|img8": pictures,
    r"emb_": embeddings,
    r"img_ws|stage_|W_": stages,
    r"logits_|d_cmap": judgements,
    r"(fake|real)_logits|g_loss|d_loss|gradnorm|grad_[GD]|r1_loss": losses,
    r"[GED]_|grad_norm|lr_hp": training,
    r"ema_beta_table": averages,
    r"mix_": mixing,
    r"pl_": paths,
    r"proj_": projection,
    r"file_": files,
    r"aug_": augmented,
    r"ada_p_table": adaptation,
    r"ada_p_hp": adaptation_of_a_run,
}


def test_golden_inrgan(golden: Any) -> None:
    case = Case(golden)
    computed, absent = compute(GROUPS, case, case.listed)
    failures = [f"{name}: not computed" for name in case.listed.keys() - computed.keys() - absent]
    failures += [f"{name}: not computed, in a case that is whole" for name in absent if golden.is_ours]
    compared = case.listed.keys() & computed.keys()
    for name in compared:
        entry, value = case.listed[name], computed[name].detach().double()
        if entry["dtype"] == "uint8":
            # one level where a value sits on the edge between two bytes
            differs = (value - case.stored[name].double()).abs()
            if not (differs.max() <= 1 and (differs > 0).sum() <= 2):
                failures.append(f"{name}: {int((differs > 0).sum())} bytes differ, by up to {differs.max():.0f}")
            continue
        expected, allowed = bound(case, entry, name)
        if value.shape != expected.shape:
            failures.append(f"{name}: shape {list(value.shape)} instead of {list(expected.shape)}")
            continue
        error = (value - expected).abs().max().item()
        if not error <= allowed:
            failures.append(f"{name}: error {error:.3g} above {allowed:.3g}")
    assert compared, f"nothing of {golden} was compared"
    assert not failures, f"{len(failures)} of {len(case.listed)}:\n" + "\n".join(sorted(failures))


def test_published_snapshot_to_the_bit(golden: Any) -> None:
    """Digests of all tensors, and that those of the import are among them."""
    case = Case(golden)
    try:
        path = case.snapshot()
    except Absent:
        pytest.skip("a case without a published file")
    for part, digests in case.description["container"]["digests"].items():
        if digests is None:
            continue
        found = read_snapshot(path, part)[0].weights
        assert {name: hashlib.sha256(tensor.numpy().tobytes()).hexdigest()[:16] for name, tensor in found.items()} == (
            dict(digests)
        )
