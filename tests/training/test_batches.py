from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from hflow_rt.models.checkpoint import build_model
from hflow_rt.training.batches import MicroBatches, Place, Shuffle
from hflow_rt.training.config import load_config


def _batches(images: Any, rank: int = 0, count: int = 1, overrides: tuple[str, ...] = ()) -> MicroBatches:
    settings = load_config("toy", overrides=overrides)
    processes: Any = SimpleNamespace(rank=rank, count=count, device=torch.device("cpu"))
    return MicroBatches(build_model("toy", settings.model), images, images.split()[0], settings.training, processes)


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
    """Unflipped and noise-free images identify themselves: a step of two processes sees 16 different ones."""
    plain = ("training.flip=false", "training.added_noise_std=0")
    seen = [
        np.floor((batch.images.numpy() + 0.5) * 256).astype(np.uint8)
        for rank in (0, 1)
        for micro in (0, 1)
        for batch in [_batches(images, rank, 2, plain).get(Place(0, 0), micro)]
    ]
    found = [np.flatnonzero((images.array == image).all((1, 2, 3))).item() for part in seen for image in part]
    assert len(set(found)) == 16
    assert sorted(found) == sorted(Shuffle(images.split()[0], 0).take(0, 16).tolist())


def test_draws_depend_on_seed_step_micro_batch_and_process(images: Any) -> None:
    def first(step: int = 0, micro: int = 0, rank: int = 0, seed: int = 0) -> list[float]:
        batches = _batches(images, rank, 2, (f"training.seed={seed}",))
        return batches.get(Place(step, 0), micro).noise["z1.flow"].flatten().tolist()

    assert first() == first()
    others = [first(step=1), first(micro=1), first(rank=1), first(seed=1)]
    assert len({tuple(values) for values in [first(), *others]}) == 5


def test_flips_mirror_about_half(images: Any) -> None:
    plain = _batches(images, overrides=("training.flip=false", "training.batch_size=400"))
    flipped = _batches(images, overrides=("training.flip=true", "training.batch_size=400"))
    a = np.floor((plain.get(Place(), 0).images.numpy() + 0.5) * 256)
    b = np.floor((flipped.get(Place(), 0).images.numpy() + 0.5) * 256)
    same = np.abs(a - b).max((1, 2, 3)) < 20  # the draws that follow differ, and move a pixel by a few levels
    mirrored = np.abs(a[..., ::-1] - b).max((1, 2, 3)) < 20
    assert (same ^ mirrored).all()
    assert 140 < mirrored.sum() < 260
