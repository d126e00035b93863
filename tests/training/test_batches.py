from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from hflow_rt.models.checkpoint import build_model
from hflow_rt.models.plan import Place
from hflow_rt.training.batches import MicroBatches, Shuffle
from hflow_rt.training.config import load_config


def _batches(images: Any, rank: int = 0, count: int = 1, overrides: tuple[str, ...] = ()) -> MicroBatches:
    settings = load_config("toy", overrides=overrides)
    processes: Any = SimpleNamespace(rank=rank, count=count, device=torch.device("cpu"))
    plan = build_model("toy", settings.model).plan(settings.training)
    return MicroBatches(plan, images, images.split()[0], settings.training, processes)


def test_the_stream_is_one_permutation_after_another() -> None:
    indices = np.arange(100, 107)
    stream = Shuffle(indices, seed=1).take(0, 21)
    epochs = [stream[start : start + 7].tolist() for start in (0, 7, 14)]
    assert all(sorted(epoch) == indices.tolist() for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert Shuffle(indices, seed=2).take(0, 21).tolist() != stream.tolist()


def test_pieces_of_the_stream_fit_wherever_they_are_cut() -> None:
    indices = np.arange(7)
    stream = Shuffle(indices, 0).take(0, 60)
    cut = Shuffle(indices, 0)
    pieces = [cut.take(start, 5) for start in range(0, 60, 5)]
    assert np.concatenate(pieces).tolist() == stream.tolist()
    assert Shuffle(indices, 0).take(33, 10).tolist() == stream[33:43].tolist()


def test_processes_and_micro_batches_share_no_image(images: Any) -> None:
    """Unflipped images identify themselves: a step of two processes sees 16 different ones."""
    seen = [
        _batches(images, rank, 2, ("training.flip=false",)).get(Place(0, 0), micro).pixels.numpy()
        for rank in (0, 1)
        for micro in (0, 1)
    ]
    found = [np.flatnonzero((images.array == image).all((1, 2, 3))).item() for part in seen for image in part]
    assert len(set(found)) == 16
    assert sorted(found) == sorted(Shuffle(images.split()[0], 0).take(0, 16).tolist())


def test_draws_depend_on_seed_step_micro_batch_and_process(images: Any) -> None:
    def first(step: int = 0, micro: int = 0, rank: int = 0, seed: int = 0) -> list[float]:
        batches = _batches(images, rank, 2, (f"training.seed={seed}",))
        return batches.get(Place(step, 0), micro).draws["z1.flow"].flatten().tolist()

    assert first() == first()
    others = [first(step=1), first(micro=1), first(rank=1), first(seed=1)]
    assert len({tuple(values) for values in [first(), *others]}) == 5


def test_flips_mirror_about_half(images: Any) -> None:
    plain = _batches(images, overrides=("training.flip=false", "training.batch_size=400"))
    flipped = _batches(images, overrides=("training.flip=true", "training.batch_size=400"))
    a, b = (batches.get(Place(), 0).pixels.numpy() for batches in (plain, flipped))
    same, mirrored = (a == b).all((1, 2, 3)), (a[..., ::-1] == b).all((1, 2, 3))
    assert (same ^ mirrored).all()
    assert 140 < mirrored.sum() < 260
