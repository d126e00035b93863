"""Every tensor of every golden INR-GAN case, in float64 and float32, within the bounds of the format's README."""

import hashlib
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from golden_cases import Absent, Quantities, bound, compute
from inrgan_case import Case, full, gradients, norm
from inrgan_training import adaptation, adaptation_of_a_run, averages, mixing, paths, projection, training

from hflow_rt.models.checkpoint import load_state
from hflow_rt.models.inrgan.augment import PIPES, Augmenter
from hflow_rt.models.inrgan.discriminator import Discriminator
from hflow_rt.models.inrgan.layers import ModulatedLayer
from hflow_rt.models.inrgan.losses import generator_loss, judged_loss, slope
from hflow_rt.models.inrgan.model import INRGAN
from hflow_rt.models.inrgan.published import read_published, read_snapshot
from hflow_rt.models.inrgan.weights import discriminator_from_original, our_name

FAMILY = "inrgan"


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
