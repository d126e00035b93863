"""Every tensor of every golden IHDM case, in float64 and float32, within the bounds of the format's README."""

import copy
import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from golden_cases import Absent, Quantities, bound, compute
from golden_cases import Case as Listing
from torch import Tensor

from hflow_rt.models.checkpoint import load_state
from hflow_rt.models.ihdm.bank import Waves
from hflow_rt.models.ihdm.blur import blur_lengths
from hflow_rt.models.ihdm.bound import pixel_cost, start_cost, step_cost, uniformly
from hflow_rt.models.ihdm.config import IHDMConfig
from hflow_rt.models.ihdm.model import IHDM
from hflow_rt.models.ihdm.network import sinusoid
from hflow_rt.models.ihdm.presets import PRESETS
from hflow_rt.models.ihdm.published import TrainingState, read_published, read_training_state
from hflow_rt.models.ihdm.sampling import Noise, blend, interpolation_weights, prior_state, sample, states
from hflow_rt.models.ihdm.weights import from_original, infer_network
from hflow_rt.models.plan import Place
from hflow_rt.training.config import TrainingConfig
from hflow_rt.training.ema import average_weight, update_average
from hflow_rt.training.schedule import learning_rates

FAMILY = "ihdm"
HEAD, STEM = "network.head.weight", "network.down.0.conv.weight"


class Case(Listing):
    """A model built from a golden case's settings and weights, and the means to compute what it lists."""

    def config(self) -> IHDMConfig:
        described = self.described
        assert (described["heads"], described["groups"]) == (1, 32)
        return IHDMConfig(
            resolution=described["N"],
            channels=described["C"],
            steps=described["K"],
            blur_min=described["s_min"],
            blur_max=described["s_max"],
            sigma=described["sigma"],
            delta=described["delta"],
            base_width=described["mc"],
            widths=tuple(described["mult"]),
            blocks=described["nres"],
            attention=tuple(described["attn_levels"]),
            dropout=described["dropout"],
            bank=0,
        )

    def original(self) -> dict[str, Tensor]:
        """Weights without the prefix."""
        prefix = self.description["weights"]["key_prefix"]
        return {name.removeprefix(prefix): tensor for name, tensor in self.golden.weights().items()}

    def model(self, state: dict[str, Tensor] | None = None) -> IHDM:
        model = IHDM(self.config())
        load_state(model, from_original(self.original()) if state is None else state, "golden weights")
        return model.to(self.dtype)

    def noise(self, rows: int | slice = slice(None)) -> Noise:
        stack = self["noise"]
        return lambda k: stack[k - 1][rows]

    def checkpoint(self) -> Path:
        """The published file beside the case."""
        if "checkpoint" not in self.description:
            raise Absent("checkpoint")
        path: Path = self.golden.path.parent / self.description["checkpoint"]["file"]
        if not path.exists():
            raise Absent("checkpoint")
        return path

    def resumed(self) -> TrainingState:
        return read_training_state(self.checkpoint())


def tables(case: Case) -> Quantities:
    yield "schedule_hp", blur_lengths(case.config())
    level = case["net_k"]
    yield "sinusoid", sinusoid(level, case.described["mc"]).to(case.dtype)
    yield "level_emb", case.model().network.embed(level)


def network(case: Case) -> Quantities:
    model = case.model()
    sizes: list[Tensor] = []
    for element in model.network.elements():
        if element is not model.network.middle[0]:  # the middle is listed as a whole
            element.register_forward_hook(lambda _, args, out: sizes.append(out.square().flatten(1).mean(1).sqrt()))
    yield "net_out", model.network(case["net_u"], case["net_k"])
    yield "block_rms", torch.stack(sizes)
    if "net_k_real" in case.stored.names:
        yield "net_out_real", model.network(case["net_u"][:2], case["net_k_real"])


def blurs(case: Case) -> Quantities:
    model = case.model()
    yield "blur_out", model.blur(case["x_train"], case["blur_k"])
    yield "start", prior_state(model, case["x_train"][:2])


def trajectory(model: IHDM, start: Tensor, noise: Noise, every: int = 1) -> tuple[Tensor, Tensor]:
    """The last mean, and the states of the levels divisible by `every`."""
    levels, kept = range(model.config.steps, -1, -1), [start]
    mean = start
    for mean, u in states(model, start, noise):  # noqa: B007 - the last is used
        kept.append(u)
    return mean, torch.stack([u for level, u in zip(levels, kept, strict=True) if level % every == 0])


def to_bytes(mean: Tensor) -> Tensor:
    return (mean * 255).clamp(0, 255).floor()


def sampling(case: Case) -> Quantities:
    model, every = case.model(), case.described["save_freq"]
    start = prior_state(model, case["x_train"][:2])
    final, kept = trajectory(model, start, case.noise())
    yield "final", final
    yield "traj", kept
    yield "final_u8", to_bytes(final)
    yield "same_init_final", sample(model, start[:1].expand_as(start), case.noise())
    shared = case.noise(slice(0, 1))
    final, kept = trajectory(model, start, shared, every)
    yield "share_noise_final", final
    yield "share_noise_traj", kept
    yield "both_final", sample(model, start[:1], shared)


def interpolation(case: Case) -> Quantities:
    model, noise = case.model(), case["noise"]
    linear, angular = interpolation_weights(case.described["P"], case.dtype)
    start = blend(*prior_state(model, case["x_train"][:2]), linear)
    yield "interp_start", start
    yield "interp_final", sample(model, start, lambda k: blend(noise[k - 1, 0], noise[k - 1, 1], angular))


def losses(case: Case) -> Quantities:
    model = case.model()
    per_image = model.errors(case["x_train"][:4], case["loss_k"], case["loss_eps"])
    per_image.mean().backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    yield "loss_per_image", per_image
    yield "loss", per_image.mean()
    yield "grad_norm", torch.stack([gradient.norm() for gradient in gradients.values()]).norm()
    yield "grad_head", gradients[HEAD]
    yield "grad_stem", gradients[STEM]


def recipe(rate: float, warmup: int, average: float) -> TrainingConfig:
    """The presets' settings with these numbers, and updates of one image, so that both are counted alike."""
    values = PRESETS["ihdm-mnist"]["training"] | {"learning_rates": {"network": rate}, "batch_size": 1}
    return TrainingConfig(**values | {"warmup_images": warmup, "ema_weight": 1 - average})


class Run:
    """Published updates: warm-up, clipping, Adam, ramped average."""

    def __init__(self, case: Case, resumed: TrainingState | None = None) -> None:
        self.settings = case.described["train"]
        self.training = recipe(self.settings["lr"], self.settings["warmup"], self.settings["ema_rate"])
        self.model = case.model(None if resumed is None else resumed.weights)
        self.average = copy.deepcopy(self.model)
        betas = tuple(self.settings["betas"])
        self.adam = torch.optim.Adam(self.model.parameters(), betas=betas, eps=self.settings["eps"])
        self.step = self.updates = 0
        if resumed is not None:
            load_state(self.average, resumed.average, "golden average")
            self.step, self.updates = resumed.step, resumed.average_updates
            for name, parameter in self.model.named_parameters():
                self.adam.state[parameter] = {
                    "step": torch.tensor(float(resumed.adam_step)),
                    "exp_avg": resumed.moments[0][name].to(case.dtype),
                    "exp_avg_sq": resumed.moments[1][name].to(case.dtype),
                }

    def update(self, *batch: Tensor) -> tuple[Tensor, float, Tensor]:
        """Loss per image, rate and norm of the gradient of one update."""
        errors = self.model.errors(*batch)
        self.adam.zero_grad()
        errors.mean().backward()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.settings["grad_clip"])
        rate = learning_rates(self.training, self.step)["network"]
        self.adam.param_groups[0]["lr"] = rate
        self.adam.step()
        self.step += 1
        self.updates += 1
        done = Place(self.updates, self.updates)
        update_average(self.average, self.model, average_weight(self.training, done, 1))
        return errors.detach(), rate, norm

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        for label, model in (("", self.model), ("ema_", self.average)):
            found = dict(model.named_parameters())
            yield f"{label}head", found[HEAD]
            yield f"{label}stem", found[STEM]


def training(case: Case) -> Quantities:
    run, batch = Run(case), (case["x_train"][:4], case["loss_k"], case["loss_eps"])
    done = [run.update(*batch) for _ in range(case.described["train"]["steps"])]
    yield "train_loss", torch.stack([errors.mean() for errors, _, _ in done])
    yield "train_lr_hp", torch.tensor([rate for _, rate, _ in done], dtype=torch.float64)
    for name, value in run.weights():
        yield f"train_{name}", value
    yield "eval_loss_ema", run.average.errors(*batch).mean()


def averages(case: Case) -> Quantities:
    for label, rate in zip("ab", case.described["ema_rates"], strict=True):
        average = torch.nn.Linear(5, 1, bias=False).to(case.dtype)  # any module with five parameters
        model = copy.deepcopy(average)
        rows = []
        for update, parameters in enumerate(case["ema_params"]):
            model.weight.data = parameters[None]
            weight = average_weight(recipe(1.0, 1, rate), Place(update, update), 1)  # 1 at first: a copy
            update_average(average, model, weight)
            rows.append(average.weight[0].detach().clone())
        yield f"ema_values_{label}", torch.stack(rows[1:])


def likelihood(case: Case) -> Quantities:
    model, delta, x = case.model(), case.described["delta"], case["x_test"]
    with torch.no_grad():
        blurred = prior_state(model, case["x_train"].double())
        start = start_cost(model, x, Waves(model.config).coefficients(blurred), delta)
        level_1 = torch.ones(len(x), dtype=torch.int64)
        errors = [model.errors(x, level_1, case["nll_noise0"])]
        errors += [model.errors(x, level_1 * k, case["noise"][k - 1]) for k in range(1, model.config.steps + 1)]
    config, (pixels, *steps) = model.config, [error.double() for error in errors]
    terms = [pixel_cost(config, pixels, delta), *(step_cost(config, error, delta) for error in steps)]
    means = torch.stack([term.mean() for term in terms])
    yield "nll_LK", start
    yield "nll_terms", means
    yield "nll_sq_err", torch.stack([error.mean() for error in errors])
    yield "nll_reference_terms", means[:-1]
    yield "nll_reference_total", start.mean() + means[:-1].sum()
    yield "nll_total", start.mean() + means[0] + means[2:].sum()


def averaged(case: Case) -> Quantities:
    """Of the published file's average: network, samples as distances are measured on."""
    model = case.model(case.resumed().average)
    yield "net_out_ema", model.network(case["net_u"], case["net_k"])
    start = prior_state(model, case["x_train"][:2], case["fid_eps"])
    yield "fid_start", start
    final, kept = trajectory(model, start, case.noise(), case.described["save_freq"])
    yield "fid_final", final
    yield "fid_u8", to_bytes(final)
    yield "fid_traj", kept


def resuming(case: Case) -> Quantities:
    run = Run(case, case.resumed())
    batches = list(zip(case["step_x"], case["step_k"], case["step_eps"], strict=True))
    done = [run.update(*batch) for batch in batches]
    yield "res_loss_per_image", torch.stack([errors for errors, _, _ in done])
    yield "res_loss", torch.stack([errors.mean() for errors, _, _ in done])
    yield "res_lr_hp", torch.tensor([rate for _, rate, _ in done], dtype=torch.float64)
    yield "res_grad_norm", torch.stack([norm for _, _, norm in done])
    for name, value in run.weights():
        yield f"res_{name}", value
    parameters = dict(run.model.named_parameters())
    for label, name in (("head", HEAD), ("stem", STEM)):
        yield f"res_adam_m_{label}", run.adam.state[parameters[name]]["exp_avg"]
        yield f"res_adam_v_{label}", run.adam.state[parameters[name]]["exp_avg_sq"]
    squares = [sum(p.square().sum() for p in model.parameters()) for model in (run.model, run.average)]
    yield "res_param_sq_sum", torch.stack(squares)
    adam_step = run.adam.state[parameters[HEAD]]["step"]
    yield "res_counters", torch.tensor([run.step, run.updates, int(adam_step)])
    yield "eval_loss_ema", run.average.errors(*batches[0]).mean()


def warm_up(case: Case) -> Quantities:
    published = recipe(2e-4, 5000, 0.999)
    rates = [learning_rates(published, step)["network"] for step in case["lr_steps"].tolist()]
    yield "lr_values_hp", torch.tensor(rates, dtype=torch.float64)


def dequantized(case: Case) -> Quantities:
    yield "deq_x", uniformly(case["deq_u8"] / torch.tensor(255, dtype=case.dtype), case["deq_draw"], 8)


# what computes the outputs whose names begin so
GROUPS: dict[str, Callable[[Any], Quantities]] = {
    r"schedule_hp|sinusoid|level_emb": tables,
    r"net_out(_real)?$|block_rms": network,
    r"blur_out|start": blurs,
    r"final|traj|same_init|share_noise|both": sampling,
    r"interp_": interpolation,
    r"loss|grad_": losses,
    r"train_|eval_loss_ema": training,
    r"lr_values": warm_up,
    r"ema_values": averages,
    r"nll_": likelihood,
    r"net_out_ema|fid_": averaged,
    r"res_|eval_loss_ema": resuming,
    r"deq_": dequantized,
}


def test_golden_ihdm(golden: Any) -> None:
    case = Case(golden)
    computed, absent = compute(GROUPS, case, case.listed)
    absent -= computed.keys()
    failures = [f"{name}: not computed" for name in case.listed.keys() - computed.keys() - absent]
    failures += [f"{name}: not computed, in a case that is whole" for name in absent if golden.is_ours]
    compared = case.listed.keys() & computed.keys()
    for name in compared:
        entry, value = case.listed[name], computed[name].detach().double()
        if entry["dtype"] == "uint8":
            expected = case.stored[name].double()
            # one level where a value sits on the edge between two bytes
            differs = (value - expected).abs()
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


def test_published_settings_are_found(golden: Any) -> None:
    """What names and shapes tell of a file is what the case says."""
    case = Case(golden)
    expected = case.config().model_dump()
    shapes = {name: tuple(tensor.shape) for name, tensor in case.original().items()}
    for name, value in infer_network(shapes, "the file").items():
        assert value == expected[name], name


def test_published_checkpoint_to_the_bit(golden: Any, tmp_path: Path) -> None:
    """Digests of all tensors; and the import takes the average."""
    case = Case(golden)
    try:
        state, path = case.resumed(), case.checkpoint()
    except Absent:
        pytest.skip("a case without a published file")
    listed = case.description["checkpoint"]
    found = {"model": state.weights, "ema": state.average, "adam_m": state.moments[0], "adam_v": state.moments[1]}
    for label, tensors in found.items():
        digests = [hashlib.sha256(tensor.numpy().tobytes()).hexdigest()[:16] for tensor in tensors.values()]
        assert digests == listed["digests"][label], label
    assert (state.step, state.average_updates) == (listed["step"], listed["ema_num_updates"])
    settings = tmp_path / "settings.json"
    settings.write_text(f'{{"resolution": {case.described["N"]}, "steps": 8, "blur_max": 8.0}}')
    published = read_published(path, settings)
    assert (published.part, published.prefix) == ("ema", "module.")
    assert published.state.keys() == state.average.keys()
    assert all(torch.equal(published.state[name], tensor) for name, tensor in state.average.items())
