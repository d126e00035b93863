"""What a training takes of memory, before it takes it."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hflow_rt.data.dataset import build_dataset, open_dataset
from hflow_rt.errors import OutOfMemory
from hflow_rt.models.plan import Batch, Place, TrainingPlan, draw
from hflow_rt.training import footprint
from hflow_rt.training.config import load_config


def plan_of(model: Any) -> TrainingPlan:
    plan: TrainingPlan = model.plan(load_config("hflow-demo").training)
    return plan


STEPS = {"learning_rates": dict.fromkeys(("encoders", "decoders", "flows"), 1e-4)}


def test_saved_bytes_grow_with_the_images_and_leave_the_model_as_it_is(tiny_model: Any) -> None:
    before = {name: value.clone() for name, value in tiny_model.state_dict().items()}
    pixels = torch.randint(0, 256, (6, 3, 16, 16), dtype=torch.uint8)
    two, three, six = (footprint.saved_bytes(plan_of(tiny_model), pixels[:n], []) for n in (2, 3, 6))
    assert two < three < six
    # what does not depend on the images, as weights times gains, is no part of the slope
    assert six == pytest.approx(two + 4 * (three - two), rel=0.02)
    for name, value in tiny_model.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)


def test_saved_bytes_are_what_really_stays(tiny_model: Any) -> None:
    """Held against tensors counted by hand: every activation that autograd keeps lies in one of them."""
    pixels = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        plan = plan_of(tiny_model)
        plan.loss("flow", Batch(pixels, draw(plan.draws("flow"), 2, torch.Generator().manual_seed(0)), {}), Place())
    own = {p.untyped_storage().data_ptr() for p in (*tiny_model.parameters(), *tiny_model.buffers())}
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in kept}
    expected = sum(size for pointer, size in storages.items() if pointer not in own)
    assert footprint.saved_bytes(plan_of(tiny_model), pixels, []) == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize(("batch", "fits"), [(3, True), (4, True), (100_000, False)])
def test_a_batch_is_judged(
    tiny_model: Any,
    tiny_settings: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    batch: int,
    fits: bool,
) -> None:
    from PIL import Image

    for index in range(4):
        Image.fromarray(np.full((16, 16, 3), 60 * index, np.uint8)).save(tmp_path / f"{index}.png")
    build_dataset(tmp_path, tmp_path.parent / f"{tmp_path.name}.npy", 16)
    images = open_dataset(tmp_path.parent / f"{tmp_path.name}.npy", 16)
    config = load_config(file={"family": "hflow", "model": tiny_settings, "training": STEPS | {"batch_size": batch}})
    monkeypatch.setattr(footprint, "available", lambda: 2**30)
    indices = images.split()[0]
    if fits:
        footprint.check_batch(plan_of(tiny_model), images, indices, config.training)
    else:
        with pytest.raises(OutOfMemory, match=r"training\.batch_size=100000 would take .* lower it, and raise"):
            footprint.check_batch(plan_of(tiny_model), images, indices, config.training)


def test_a_model_is_judged(tiny_settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config("hflow-demo")
    footprint.check_model(config, torch.device("cpu"))
    monkeypatch.setattr(footprint, "available", lambda: 2**25)
    monkeypatch.setattr("hflow_rt.memory._SMALL", 0)
    with pytest.raises(OutOfMemory, match=r"a model of 1,\d+,\d+ parameters would take .* lower its channels"):
        footprint.check_model(config, torch.device("cpu"))


def test_nothing_of_the_trial_stays(tiny_model: Any) -> None:
    """What exp and its like save is their output: kept by a hook it would hold itself."""
    import gc
    import weakref

    outputs: list[Any] = []
    exp = torch.exp

    def watched(*given: Any, **named: Any) -> Any:
        result = exp(*given, **named)
        outputs.append(weakref.ref(result))
        return result

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(torch, "exp", watched)
        footprint.saved_bytes(plan_of(tiny_model), torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8), [])
        result = watched(torch.ones(3, requires_grad=True))
    assert result is not None
    del result
    gc.collect()
    assert outputs
    assert not any(reference() is not None for reference in outputs)
