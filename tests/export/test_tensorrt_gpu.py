"""On a GPU: engines are built there, run, and are the model. Says why where it cannot."""

import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from hflow_rt.errors import ConfigError
from hflow_rt.export.bundle import check_bundle
from hflow_rt.export.tensorrt import add_engines, refit_engines, refittable
from hflow_rt.runtime import load
from hflow_rt.runtime.bundle import Bundle, find_bundle
from hflow_rt.runtime.engines.cuda import Cuda, chosen_gpu
from hflow_rt.runtime.engines.plans import Flavor, installed

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def gpu() -> None:
    if chosen_gpu() is None:
        pytest.skip("no NVIDIA driver or GPU here")


def test_memory_goes_there_and_back() -> None:
    found = chosen_gpu()
    assert found is not None
    cuda = Cuda(found)
    values = np.random.default_rng(0).standard_normal(1000).astype(np.float32)
    back = np.empty_like(values)
    with cuda.current():
        stream, first, second = cuda.stream(), cuda.allocate(values.nbytes), cuda.allocate(values.nbytes)
        cuda.upload(first, values.ctypes.data, values.nbytes, stream)
        cuda.copy(second, first, values.nbytes, stream)
        cuda.download(back.ctypes.data, second, values.nbytes, stream)
        cuda.synchronize(stream)
        cuda.free(first)
        cuda.free(second)
        cuda.destroy_stream(stream)
    assert (back == values).all()


def built(bundle: Bundle, flavor: Flavor, **settings: Any) -> tuple[Bundle, str]:
    """Engines built here; a skip where TensorRT for RTX says that it does not build for a GPU like this."""
    if flavor not in installed():
        pytest.skip(f"{flavor} is not installed")
    try:
        return add_engines(bundle, flavor, **settings)
    except ConfigError as error:
        found = chosen_gpu()
        assert found is not None
        if flavor == "rtx" and f"not for {found.capability} of {found.name};" in str(error):
            pytest.skip(str(error))
        raise


def pictures() -> NDArray[np.float32]:
    return np.random.default_rng(0).uniform(0, 1, (4, 3, 16, 16)).astype(np.float32)


@pytest.mark.parametrize("flavor", ["tensorrt", "rtx"])
def test_other_weights(tiny_run: Path, tmp_path: Path, flavor: Flavor) -> None:
    """A plan that was given other weights is the model that has them."""
    from hflow_rt.export.bundle import export_bundle
    from hflow_rt.models.checkpoint import load_model, save_model

    old, key = built(
        find_bundle(shutil.copytree(tiny_run / "bundle", tmp_path / "old")), flavor, batch=(1, 2, 4), refit=True
    )
    # before and after: refittable plans are built by other rules
    assert check_bundle(old, pictures(), "trt", "cuda")["failures"] == []
    model = load_model(tiny_run / "model.safetensors")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= 1.05
    save_model(tmp_path / "model.safetensors", "hflow", model, model.state_dict(), {"images": 0})
    export_bundle(tmp_path / "model.safetensors", tmp_path / "new", pictures())
    assert refittable(old) == key
    new, key = refit_engines(find_bundle(tmp_path / "new"), old, key)
    assert check_bundle(new, pictures(), "trt", "cuda")["failures"] == []
    assert find_bundle(new.path).manifest.engines[key].verified


@pytest.mark.parametrize("flavor", ["tensorrt", "rtx"])
@pytest.mark.parametrize("batch", [(1, 2, 4), (2, 2, 2)])
def test_the_engines_are_the_model(tiny_run: Path, tmp_path: Path, flavor: Flavor, batch: tuple[int, int, int]) -> None:
    bundle = find_bundle(shutil.copytree(tiny_run / "bundle", tmp_path / "bundle"))
    bundle, key = built(bundle, flavor, batch=batch)
    plans = bundle.manifest.engines[key].plans
    assert {plan.layers_of for plan in plans.values()} == {"engine"}
    for plan in plans.values():
        assert len(bundle.file(plan.layers).read_text().splitlines()) == sum(plan.types.values()) > 0
    assert check_bundle(bundle, pictures(), "trt", "cuda")["failures"] == []
    assert find_bundle(bundle.path).manifest.engines[key].verified

    expected = load(bundle.path, "torch", "cpu").sample(7, 0.7)
    for cuda_graph in (True, False):
        with load(bundle.path, "trt", cuda_graph=cuda_graph) as session:
            for _ in range(3):
                np.testing.assert_allclose(session.sample(7, 0.7), expected, atol=1e-3)
            with ThreadPoolExecutor(4) as pool:
                for found in pool.map(lambda _: session.sample(7, 0.7), range(8)):
                    np.testing.assert_allclose(found, expected, atol=1e-3)
            latents = {
                name: torch.from_numpy(value).cuda() for name, value in next(iter(session.draw(range(7), 0.7))).items()
            }
            for _ in range(3):
                image = session.forward(latents)
                assert image.device.type == "cuda"
                np.testing.assert_allclose(image.cpu().numpy(), expected, atol=1e-3)
