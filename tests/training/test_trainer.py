import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from hflow_rt.errors import CheckpointError, ConfigError, DataError, TrainingError
from hflow_rt.models.checkpoint import load_model, read_metadata
from hflow_rt.models.flow import FlowPlan
from hflow_rt.runs import checkpoints, read_run
from hflow_rt.training.config import load_config
from hflow_rt.training.log import Progress
from hflow_rt.training.stop import StopRequest
from hflow_rt.training.trainer import train


def _state(run: Path) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = load_file(checkpoints(run)[-1] / "state.safetensors")
    return tensors


def _equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_resume_is_exact(images: Any, tmp_path: Path) -> None:
    """40 steps at once, and 20 + 20: raw weights, running buffers, average and Adam's moments, bit for bit.

    The images are 36, so that epochs end inside steps; rates decay and encoders stop on the way.
    """
    whole = train(load_config("toy"), images, tmp_path / "whole")
    train(load_config("toy"), images, tmp_path / "parts", images=160)
    middle = _state(tmp_path / "parts")
    parts = train(load_config("toy"), images, tmp_path / "parts", images=320, resume=True)
    assert (parts.step, parts.images) == (whole.step, whole.images) == (40, 320)
    a, b = _state(tmp_path / "whole"), _state(tmp_path / "parts")
    assert _equal(a, b)
    assert not _equal(a, middle)
    assert {name.split("/")[0] for name in a} == {"model", "average", "optimizer"}
    assert a["optimizer/flow/step/model.log_scale"].item() == 40
    assert not torch.equal(a["model/log_scale"], a["average/log_scale"])
    assert parts.initial == whole.initial
    assert parts.final == whole.final
    files = [tmp_path / run / "model.safetensors" for run in ("whole", "parts")]
    assert _equal(load_file(files[0]), load_file(files[1]))


# settings that runs did not have before optimizers had names
_LATER = [
    "eps",
    "weight_decay",
    "optimizers",
    "decay",
    "decay_end_images",
    "final_rates",
    "ema_growing",
    "ema_half_life_images",
    "ema_ramp",
]


def test_a_run_of_before_goes_on_to_the_bit(images: Any, tmp_path: Path) -> None:
    """As it was written then: moments of one optimizer without a name, settings and evaluations of then."""
    train(load_config("toy"), images, tmp_path / "whole", images=160)
    run = tmp_path / "former"
    train(load_config("toy"), images, run, images=80)
    settings = read_run(run)
    for name in _LATER:
        del settings["training"][name]
    (run / "run.json").write_text(json.dumps(settings))
    checkpoint = checkpoints(run)[-1]
    moments = "optimizer/flow/"
    former = {
        f"adam/{name.removeprefix(moments).replace('/model.', '/')}" if name.startswith(moments) else name: value
        for name, value in _state(run).items()
    }
    assert "adam/exp_avg/encoder.weight" in former
    save_file(former, checkpoint / "state.safetensors")
    about = json.loads((checkpoint / "state.json").read_text())
    evaluation = {"images": 0, "strict": 9.5, "standard_error": 0.5, "held_out": 6, "paper": None, "reason": None}
    (checkpoint / "state.json").write_text(json.dumps({**about, "initial": evaluation, "last": None}))
    found = train(load_config(file=read_run(run)), images, run, images=160, resume=True)
    assert _equal(_state(run), _state(tmp_path / "whole"))
    assert found.initial is not None
    assert found.initial.quoted == ("strict bound", (9.5, 0.5, 6), "bits/dim")


def test_adamax_resumes_exactly(images: Any, tmp_path: Path) -> None:
    config = load_config("toy", overrides=["training.optimizer=adamax", "training.betas=[0.8, 0.99]"])
    train(config, images, tmp_path / "whole", images=160)
    train(config, images, tmp_path / "parts", images=80)
    train(config, images, tmp_path / "parts", images=160, resume=True)
    a, b = _state(tmp_path / "whole"), _state(tmp_path / "parts")
    assert _equal(a, b)
    assert {name.split("/")[2] for name in a if name.startswith("optimizer/")} == {"step", "exp_avg", "exp_inf"}
    train(load_config("toy"), images, tmp_path / "adam", images=160)
    assert not torch.equal(_state(tmp_path / "adam")["model/log_scale"], a["model/log_scale"])


def test_accumulation_equals_a_large_batch(images: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two micro-batches of 4 give the step of one batch of 8, at every place of an epoch.

    Noise and flips are off, since they are drawn by micro-batch.
    """
    import toy_family

    monkeypatch.setattr("hflow_rt.models.flow.in_bins", lambda pixels, *given: (pixels + 0.5) / 256 - 0.5)
    monkeypatch.setattr(toy_family.ToyFlow, "noise_shapes", lambda self: {"z1.flow": (0,)})
    bits = toy_family.ToyFlow._bits

    def quiet(self: Any, x: Tensor, noise: Tensor) -> dict[str, Tensor]:
        found: dict[str, Tensor] = bits(self, x, torch.zeros(len(x), 2))
        return found

    monkeypatch.setattr(toy_family.ToyFlow, "_bits", quiet)
    states = []
    for size, accumulate in ((4, 2), (8, 1)):
        overrides = [
            f"training.batch_size={size}",
            f"training.accumulate={accumulate}",
            "training.flip=false",
            "training.added_noise_std=0",
        ]
        train(load_config("toy", overrides=overrides), images, tmp_path / str(size))
        states.append(_state(tmp_path / str(size)))
    for name, value in states[0].items():
        if not name.endswith("spread"):  # a statistic of the micro-batch
            torch.testing.assert_close(value, states[1][name], atol=2e-5, rtol=2e-4)


def test_the_run_folder(images: Any, tmp_path: Path) -> None:
    run = tmp_path / "run"
    seen: list[Progress] = []
    drawn: list[int] = []

    def draw(model: Any, count: int) -> Any:
        assert not model.training
        drawn.append(count)
        return np.zeros((4, 6, 3), np.uint8)

    overrides = [
        "training.evaluate_every_images=80",
        "training.checkpoint_every_images=40",
        "training.sample_every_images=160",
        "training.keep_last=2",
    ]
    result = train(load_config("toy", overrides=overrides), images, run, on_samples=draw, on_progress=seen.append)
    assert [path.name for path in checkpoints(run)] == ["000000280", "000000320"]
    assert drawn == [160, 320]
    evaluated = [progress.evaluation for progress in seen if progress.evaluation is not None]
    assert [found.images for found in evaluated] == [0, 80, 160, 240, 320]
    assert result.initial == evaluated[0]
    assert result.final == evaluated[-1]
    assert result.final is not None
    first, last = evaluated[0].figures["strict"].estimate, result.final.figures["strict"].estimate
    assert last.mean < first.mean - 0.3
    assert last.n == 6
    assert math.isfinite(seen[-1].images_per_second)

    assert load_config(file=read_run(run)) == load_config("toy", overrides=overrides)
    assert read_run(run)["run"]["data"]["hash"] == images.hash
    metadata = read_metadata(run / "model.safetensors")
    assert (metadata["images"], metadata["step"], metadata["data"]) == (320, 40, images.hash)
    assert metadata["evaluation"]["last"]["figures"]["strict"]["mean"] == last.mean
    state = _state(run)
    for name, value in load_model(run / "model.safetensors").state_dict().items():
        assert torch.equal(value, state[f"average/{name}"])

    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    tags = events.Tags()
    assert {"loss", "bits_per_dim/train", "terms/level0", "terms/level1", "learning_rate/flows"} <= set(tags["scalars"])
    assert {"gradient_norm", "images_per_second", "bits_per_dim/held_out_strict"} <= set(tags["scalars"])
    assert tags["images"] == ["samples"]
    assert [event.step for event in events.Scalars("bits_per_dim/held_out_strict")] == [0, 80, 160, 240, 320]
    assert [event.step for event in events.Scalars("loss")][:3] == [24, 48, 72]


def test_no_strict_bound_is_reported_with_its_reason(images: Any, tmp_path: Path) -> None:
    result = train(load_config("toy-loose"), images, tmp_path / "run", images=8)
    assert result.final is not None
    assert list(result.final.figures) == ["paper"]
    assert result.final.reasons == {"strict": "z1 has no posterior noise"}


def test_average_is_a_copy_until_its_warmup_ends(images: Any, tmp_path: Path) -> None:
    train(load_config("toy"), images, tmp_path / "run", images=40)  # warmup is 40 images
    state = _state(tmp_path / "run")
    assert torch.equal(state["model/log_scale"], state["average/log_scale"])
    train(load_config("toy"), images, tmp_path / "run", images=48, resume=True)
    later = _state(tmp_path / "run")
    expected = state["average/log_scale"].lerp(later["model/log_scale"], 0.1)
    torch.testing.assert_close(later["average/log_scale"], expected)


def test_a_cut_group_no_longer_moves(images: Any, tmp_path: Path) -> None:
    config = load_config("toy", overrides=["training.cut_images.encoders=80"])
    train(config, images, tmp_path / "run", images=80)
    before = _state(tmp_path / "run")
    train(config, images, tmp_path / "run", images=160, resume=True)
    after = _state(tmp_path / "run")
    assert torch.equal(before["model/encoder.weight"], after["model/encoder.weight"])
    assert not torch.equal(before["model/log_scale"], after["model/log_scale"])


def test_nan_stops_with_step_level_and_remedy_and_the_last_checkpoint_stays(images: Any, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(load_config("toy"), images, run, images=40)
    good = _state(run)
    wild = load_config("toy", overrides=["training.learning_rates.flows=1e30"])
    with pytest.raises(TrainingError, match=r"step 6 \(48 images\) level1 is inf") as error:
        train(wild, images, run, images=320, resume=True)
    message = str(error.value)
    assert str(checkpoints(run)[-1]) in message
    assert "flows 1e+30" in message
    assert "training.grad_clip" in message
    assert "\n" not in message
    assert _equal(_state(run), good)
    assert train(load_config("toy"), images, run, images=80, resume=True).images == 80


def test_a_gradient_that_is_not_finite_names_its_parameters(
    images: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import toy_family

    loss = toy_family.ToyFlow.loss

    def broken(self: Any, x: Tensor, *given: Any) -> Any:
        if self.training:
            self.mean.register_hook(lambda gradient: gradient * math.nan)
        return loss(self, x, *given)

    monkeypatch.setattr(toy_family.ToyFlow, "loss", broken)
    with pytest.raises(TrainingError, match=r"step 0 .* the gradient of mean is not finite"):
        train(load_config("toy"), images, tmp_path / "run")


def test_steps_that_would_spoil_the_weights_are_skipped(
    images: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many in a row as the settings allow; the statistics that they moved are put back."""
    loss, remedies = FlowPlan.loss, ("another family",)

    def broken(self: Any, phase: str, batch: Any, place: Any) -> Any:
        found = loss(self, phase, batch, place)
        return replace(found, loss=found.loss * math.nan) if place.step in (1, 2) else found

    monkeypatch.setattr(FlowPlan, "remedies", lambda self: remedies)

    def run(name: str, skipped: int, count: int) -> dict[str, Tensor]:
        config = load_config("toy", overrides=[f"training.skipped_steps={skipped}", "training.ema_warmup_images=0"])
        train(config, images, tmp_path / name, images=count)
        return _state(tmp_path / name)

    one = run("one", 0, 8)
    monkeypatch.setattr(FlowPlan, "loss", broken)
    three = run("three", 2, 24)
    kept = [name for name in one if name.startswith(("model/", "optimizer/"))]
    assert all(torch.equal(one[name], three[name]) for name in kept)
    four = run("four", 2, 32)
    assert not torch.equal(four["model/log_scale"], three["model/log_scale"])
    with pytest.raises(TrainingError, match=r"at step 2 .* loss is nan.*, another family"):
        run("few", 1, 32)


def test_a_run_is_never_overwritten(images: Any, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(load_config("toy"), images, run, images=16)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with pytest.raises(CheckpointError, match="already holds a run; go on with --resume"):
        train(load_config("toy"), images, run)
    with pytest.raises(TrainingError, match="has already seen 16 of 16 images; ask for more with --images"):
        train(load_config("toy"), images, run, images=16, resume=True)
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_a_truncated_checkpoint_is_refused_by_name_and_the_one_before_resumes(images: Any, tmp_path: Path) -> None:
    run = tmp_path / "run"
    config = load_config("toy", overrides=["training.checkpoint_every_images=80"])
    train(config, images, run, images=160)
    first, last = checkpoints(run)
    whole = (last / "state.safetensors").read_bytes()
    for broken in (whole[: len(whole) // 2], whole[:-1], b""):
        (last / "state.safetensors").write_bytes(broken)
        with pytest.raises(CheckpointError, match="is not a whole checkpoint") as error:
            train(config, images, run, images=240, resume=True)
        assert str(last / "state.safetensors") in str(error.value)
        assert f"--resume {first}" in str(error.value)
        assert "\n" not in str(error.value)
    (last / "state.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"state.json is not a whole checkpoint"):
        train(config, images, run, images=240, resume=True)

    train(config, images, run, images=240, resume=first)
    assert [path.name for path in checkpoints(run)] == ["000000080", "000000160", "000000240"]
    assert (run / "checkpoints" / "aside-000000160").is_dir()
    train(load_config("toy"), images, tmp_path / "straight", images=240)
    assert _equal(_state(run), _state(tmp_path / "straight"))


def test_another_shape_names_the_parameter_and_both_shapes(images: Any, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(load_config("toy"), images, run, images=16)
    with pytest.raises(CheckpointError, match=r"decoder.0.bias is \[4\] in the file and \[6\] in the model"):
        train(load_config("toy-wide"), images, run, images=32, resume=True)


def test_another_family_other_images_and_no_checkpoint(
    images: Any, make_images: Callable[..., Any], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    config = load_config("toy")
    with pytest.raises(CheckpointError, match="holds no checkpoint to resume"):
        train(config, images, run, resume=True)
    train(config, images, run, images=16)
    with pytest.raises(DataError, match="was trained on other images"):
        train(config, make_images(seed=1), run, images=32, resume=True)
    about = checkpoints(run)[-1] / "state.json"
    about.write_text(json.dumps({**json.loads(about.read_text()), "family": "glow"}))
    with pytest.raises(CheckpointError, match="holds a model of family 'glow', not 'toy'"):
        train(config, images, run, images=32, resume=True)
    with pytest.raises(ConfigError, match="a run goes on in its own folder"):
        train(config, images, tmp_path / "elsewhere", images=32, resume=checkpoints(run)[-1])


def test_images_that_do_not_fit(make_images: Callable[..., Any], tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"the model needs images \[3, 8, 8\]; found \[3, 4, 4\]"):
        train(load_config("toy"), make_images(side=4), tmp_path / "run")
    with pytest.raises(TrainingError, match="at least 2 images that are not held out; found 0 of 0"):
        train(load_config("toy"), make_images(count=0), tmp_path / "run")


def test_fewer_images_than_a_batch_train_and_without_held_out_ones_say_so(
    make_images: Callable[..., Any], tmp_path: Path
) -> None:
    result = train(load_config("toy"), make_images(count=3), tmp_path / "run", images=40)
    assert result.images == 40
    assert result.final is not None
    assert result.final.reason == "there are no held-out images"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["training.cut_images.encoder=3"],
            r"training.cut_images.encoder names no parameter group; .* encoders",
        ),
        (
            ["training.learning_rates={}"],
            r"must name every parameter group; missing: encoders, decoders, flows",
        ),
        (["training.precision=fp16"], r"training.precision fp16 needs a GPU"),
    ],
)
def test_settings_the_model_cannot_have(images: Any, tmp_path: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        train(load_config("toy", overrides=overrides), images, tmp_path / "run", device="cpu")


def test_minutes_stop_cleanly(images: Any, tmp_path: Path) -> None:
    result = train(load_config("toy"), images, tmp_path / "run", images=10**7, minutes=0.4 / 60)
    assert result.stopped_by == "minutes"
    assert 0 < result.images < 10**7
    assert checkpoints(tmp_path / "run")[-1].name == f"{result.images:09d}"
    with pytest.raises(ConfigError, match="minutes must be > 0 and finite"):
        train(load_config("toy"), images, tmp_path / "run", minutes=0)


def test_a_stop_inside_a_step_drops_the_half_step(images: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped after one of two micro-batches: what is saved, running buffers too, is the step before."""
    import toy_family

    loss, calls, request = toy_family.ToyFlow.loss, [0], StopRequest()

    def counted(self: Any, x: Tensor, *given: Any) -> Any:
        calls[0] += self.training
        if calls[0] == 7:  # the first micro-batch of the fourth step
            request.asked = True
        return loss(self, x, *given)

    with monkeypatch.context() as patch:
        patch.setattr(toy_family.ToyFlow, "loss", counted)
        patch.setattr("hflow_rt.training.trainer.StopRequest", lambda: request)
        patch.setattr("hflow_rt.training.run.check_batch", lambda *given: None)  # which tries the loss as well
        result = train(load_config("toy"), images, tmp_path / "run", images=80)
    assert (result.stopped_by, result.images, calls[0]) == ("interrupt", 24, 7)
    train(load_config("toy"), images, tmp_path / "straight", images=24)
    assert _equal(_state(tmp_path / "run"), _state(tmp_path / "straight"))


def test_an_unwritable_place_is_one_line(images: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(DataError, match="cannot write"):
        train(load_config("toy"), images, tmp_path / "file" / "run")


def test_bf16_trains_on_the_cpu(images: Any, tmp_path: Path) -> None:
    config = load_config("toy", overrides=["training.precision=bf16"])
    result = train(config, images, tmp_path / "run", images=80, device="cpu")
    assert result.final is not None
    assert "strict" in result.final.figures
    assert all(value.dtype == torch.float32 for value in _state(tmp_path / "run").values())
