"""Two processes on the CPU, started the way a user starts them."""

import json
import math
import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from hflow_rt.models.checkpoint import build_model
from hflow_rt.models.plan import Place
from hflow_rt.streams import generator
from hflow_rt.training.batches import MicroBatches, Shuffle
from hflow_rt.training.config import load_config
from hflow_rt.training.schedule import learning_rates

HERE = Path(__file__).parent
# --multi_gpu means torchrun, also where there is no GPU; --cpu would start one process unless under MPI
LAUNCH = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
LAUNCH += ["--num_machines", "1", "--mixed_precision", "no"]
LAUNCH += ["--dynamo_backend", "no", "--main_process_port", "0"]


def _launch(*arguments: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*LAUNCH, *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(HERE), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )


def _expected(images: Any) -> dict[str, torch.Tensor]:
    """The same five steps in one process: gradients and buffers averaged over both shards."""
    settings = load_config("toy")
    training, trained_on = settings.training, images.split()[0]
    torch.manual_seed(training.seed)
    plan = build_model("toy", settings.model).plan(training).train()
    model: Any = plan.model
    first = Shuffle(trained_on, training.seed).take(0, training.init_images)
    model.initialize(torch.from_numpy(images.pixels(first)), generator(training.seed, training.init_images))
    groups = model.parameter_groups()
    adam = torch.optim.Adam([{"params": parameters, "name": name} for name, parameters in groups.items()])
    place = Place()
    while place.images < 80:
        adam.zero_grad()
        start, ends = model.spread.clone(), []
        for rank in (0, 1):
            shard: Any = SimpleNamespace(rank=rank, count=2, device=torch.device("cpu"))
            batches = MicroBatches(plan, images, trained_on, training, shard)
            model.spread.copy_(start)
            for micro in range(training.accumulate):
                batch = batches.get(place, micro)
                (plan.loss("flow", batch, place).loss / training.accumulate / 2).backward()
            ends.append(model.spread.clone())
        model.spread.copy_((ends[0] + ends[1]) / 2)
        rates = learning_rates(training, place.images)
        for group in adam.param_groups:
            group["lr"] = rates[group["name"]]
        torch.nn.utils.clip_grad_norm_(model.parameters(), training.grad_clip)
        adam.step()
        place = Place(place.step + 1, place.images + 16)
    return model.state_dict()


@pytest.fixture(scope="module")
def ends(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, torch.Tensor]]:
    """What both processes hold at the end of training, to the bit, by model."""
    folder, names = tmp_path_factory.mktemp("processes"), ("toy", "ihdm", "inrgan")
    done = _launch(HERE / "two_processes.py", folder, *names, cwd=folder)
    assert done.returncode == 0, done.stderr
    found = {}
    for name in names:
        one, other = (load_file(folder / f"{name}-{rank}.safetensors") for rank in (0, 1))
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], value) for key, value in other.items()), name
        found[name] = one
    return found


@pytest.mark.slow
def test_two_processes_hold_the_expected_weights(ends: Any, images: Any) -> None:
    for name, value in _expected(images).items():
        torch.testing.assert_close(ends["toy"][name], value, atol=2e-6, rtol=2e-5)


@pytest.mark.slow
def test_two_processes_that_each_draw_levels(ends: Any) -> None:
    """Weights, and the bank and moments that were made of images before the first step."""
    found = ends["ihdm"]
    assert found["model.starts"].abs().max() > 0
    assert (found["model.moments"][1] > 0).all()
    assert all(bool(value.isfinite().all()) for value in found.values())


@pytest.mark.slow
def test_two_processes_that_train_in_phases(ends: Any) -> None:
    """Generator and discriminator, penalties, and an augmentation that adapts: whatever a step keeps for the next."""
    found = ends["inrgan"]
    assert {"p", "window", "path_mean", "model.w_avg", "discriminator.out.weight"} <= found.keys()
    assert found["p"] != 0.5  # where it started
    assert found["path_mean"] > 0


@pytest.mark.slow
def test_the_command_trains_on_two_machines(images: Any, tmp_path: Path) -> None:
    """As docs/sharding.md says, each of a folder of its own: one run, one report, on a real (tiny) hflow."""
    settings = {"batch_size": 2, "accumulate": 2, "init_images": 4, "images": 16, "evaluate_images": 2}
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    running = []
    for rank in ("0", "1"):
        folder = tmp_path / rank
        (folder / "pictures").mkdir(parents=True)
        for index in range(12):
            tile = images.array[index].transpose(1, 2, 0)
            Image.fromarray(tile).resize((32, 32)).save(folder / "pictures" / f"{index}.png")
        (folder / "settings.json").write_text(json.dumps({"preset": "hflow-demo", "training": settings}))
        command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_machines", "2"]
        command += ["--machine_rank", rank, "--num_processes", "2", "--main_process_ip", "127.0.0.1"]
        command += ["--main_process_port", port, "-m", "hflow_rt.cli", "train", "--config", "settings.json"]
        command += ["--data", "pictures", "--out", "run", "--device", "cpu", "--json"]
        environment, pipe = {**os.environ, "OMP_NUM_THREADS": "1"}, subprocess.PIPE
        running.append(subprocess.Popen(command, cwd=folder, env=environment, stdout=pipe, stderr=pipe, text=True))
    (out, errors), (silent, _) = (process.communicate(timeout=150) for process in running)
    assert [process.returncode for process in running] == [0, 0], errors
    found = json.loads(out)
    assert (found["images"], found["step"], silent) == (16, 2, "")
    assert math.isfinite(found["final"]["figures"]["strict"]["mean"])
    assert (tmp_path / "0" / "run" / "model.safetensors").is_file()
    assert not (tmp_path / "1" / "run").exists()
