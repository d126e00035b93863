"""Snapshots as the published INR-GAN writes them: read as data, settings from inside, misfits named."""

import collections
import io
import json
import pickle
import pickletools
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from hflow_rt.errors import CheckpointError, ConfigError
from hflow_rt.foreign import states
from hflow_rt.foreign.importing import import_published
from hflow_rt.models.checkpoint import load_model
from hflow_rt.models.inrgan.published import read_published, read_snapshot

CASE = Path(__file__).parents[1] / "golden" / "inrgan" / "b_bil32"
RAISES = "raise SystemExit('the text of a module was executed')"


class Network:
    """Pickled as a call that, obeyed, would execute the text of its module."""

    def __init__(self, state: dict[str, Any], class_name: str = "Layer") -> None:
        self.meta = {"type": "class", "version": 6, "module_src": RAISES, "class_name": class_name, "state": state}

    def __reduce__(self) -> tuple[Any, ...]:
        return sys.modules["torch_utils.persistence"]._reconstruct_persistent_obj, (self.meta,)


@pytest.fixture(autouse=True)
def _modules(monkeypatch: pytest.MonkeyPatch) -> None:
    """The names that snapshots use, for writing them; gone when they are read."""
    for name in ("torch_utils", "torch_utils.persistence", "dnnlib", "dnnlib.util"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))

    def _reconstruct_persistent_obj(meta: Any) -> None:
        exec(meta["module_src"])

    class EasyDict(dict[str, Any]):
        pass

    for module, entry in (("torch_utils.persistence", _reconstruct_persistent_obj), ("dnnlib.util", EasyDict)):
        entry.__module__, entry.__qualname__ = module, entry.__name__
        setattr(sys.modules[module], entry.__name__, entry)


def nested(tensors: dict[str, Tensor]) -> dict[str, Any]:
    """The attributes of a network with these tensors, of which `*_avg`, `*_basis` and kernels are buffers."""
    state: dict[str, Any] = {"training": False, "_parameters": {}, "_buffers": {}, "_modules": {}}
    below: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        head, dot, tail = name.partition(".")
        if dot:
            below.setdefault(head, {})[tail] = tensor
        elif name.endswith(("_avg", "_basis", "_filter")):
            state["_buffers"][name] = tensor
        else:
            state["_parameters"][name] = torch.nn.Parameter(tensor, requires_grad=False)
    state["_modules"] = {name: Network(nested(inner)) for name, inner in below.items()}
    # what a cache of embeddings holds: a view of a whole batch, on a device of the past
    if "const_embs" in tensors:
        state["_full_cache"] = collections.defaultdict(dict, {8: torch.zeros(2, 9)[:, ::3]})
    return state


@pytest.fixture
def tree() -> dict[str, Any]:
    """Settings of the golden case in the words of a snapshot."""
    low = {"log_emb_size": 64, "const_emb_size": 10, "use_diagonal": True, "use_cosine": True}
    high = {"log_emb_size": 32, "const_emb_size": 6, "random_emb_size": 4, "use_cosine": True}
    sides = {"4": "low", "8": "low", "16": "low", "32": "medium"}
    return {
        "coords": {
            "enabled": True, "per_resolution": True, "fallback": False, "low_res_cfg": low, "medium_res_cfg": high,
            "res_configs": {side: f"${{coords.{name}_res_cfg}}" for side, name in sides.items()},
        },
        "fmm": {"enabled": True, "rank": 5, "activation": "demod", "instance_norm": True},
        "input": {"type": "coords", "resolution": 8, "coord_fuser_cfg": "${coords}"},
        "upsampling_mode": "bilinear", "use_noise": False, "fmaps": 1, "fp32": True,
    }  # fmt: skip


Save = Callable[..., Path]


@pytest.fixture
def save(tree: dict[str, Any], tmp_path: Path) -> Save:
    def saved(change: Callable[[dict[str, Any]], object] = lambda snapshot: None, after: bytes = b"") -> Path:
        weights = load_file(CASE.with_suffix(".weights.safetensors"))
        easy = sys.modules["dnnlib.util"].EasyDict
        sizes = easy(channel_base=768, channel_max=32, num_fp16_res=0, conv_clamp=None)
        kwargs = {
            "G": {
                "z_dim": 16, "w_dim": 16, "c_dim": 0, "img_resolution": 32, "img_channels": 3, "cfg": tree,
                "mapping_kwargs": easy(num_layers=3), "synthesis_kwargs": sizes,
            },
            "D": {"channel_base": 768, "channel_max": 32, "epilogue_kwargs": easy(mbstd_group_size=4)},
        }  # fmt: skip
        snapshot: dict[str, Any] = {"training_set_kwargs": easy(resolution=32)}
        for name, source in (("G", "G"), ("D", "D"), ("G_ema", "G")):
            factor = 2 if name == "G" else 1
            own = {key[2:]: factor * tensor for key, tensor in weights.items() if key.startswith(f"{source}.")}
            snapshot[name] = Network(nested(own) | {"_init_kwargs": kwargs[source]}, name)
        snapshot["augment_pipe"] = None
        change(snapshot)
        path = tmp_path / "network-snapshot-000001.pkl"
        path.write_bytes(pickle.dumps(snapshot, 4) + after)
        return path

    return saved


def test_a_snapshot_is_imported_and_nothing_of_it_executed(save: Save, tmp_path: Path) -> None:
    path = save()
    with pytest.raises(SystemExit, match="was executed"):  # what the file would do
        pickle.load(io.BytesIO(path.read_bytes()))
    imported = import_published(path, None, tmp_path / "run")
    assert (imported.family, imported.part, imported.resolution) == ("inrgan", "G_ema", 32)
    assert imported.dropped == {"constant kernels": 11}
    assert imported.passed_over.keys() == {"training_set_kwargs", "G", "D", "augment_pipe"}
    assert "excludes commercial use" in imported.notes[0]
    model = load_model(tmp_path / "run" / "model.safetensors")
    described = json.loads(CASE.with_suffix(".json").read_text())["config"]
    assert (model.config.rank, model.config.upsampling, model.config.input_side) == (5, "bilinear", 8)  # type: ignore[attr-defined]
    assert model.config.slots == described["num_ws"]  # type: ignore[attr-defined]
    weights = load_file(CASE.with_suffix(".weights.safetensors"))
    state = model.state_dict()
    assert torch.equal(state["w_avg"], weights["G.mapping.w_avg"])
    waves = [weights[f"G.synthesis.b32.coord_fuser.{kind}_basis"] for kind in ("log", "random")]
    assert torch.equal(state["synthesis.stages.3.embedding.waves"], torch.cat(waves))


def test_parts(save: Save) -> None:
    path = save()
    raw, average = read_published(path, part="G").state, read_published(path).state
    assert all(torch.equal(value, 2 * average[name]) for name, value in raw.items())
    judge, _ = read_snapshot(path, "D")
    weights = load_file(CASE.with_suffix(".weights.safetensors"))
    assert {f"D.{name}" for name in judge.weights} == {name for name in weights if name.startswith("D.")}
    with pytest.raises(CheckpointError, match="--part must be one of G_ema, G, not D"):
        read_published(path, part="D")


def test_settings_of_ours_replace_those_inside(save: Save, tmp_path: Path) -> None:
    given = tmp_path / "settings.json"
    given.write_text('{"psi": 0.7}')
    assert read_published(save(), given).config.psi == 0.7  # type: ignore[attr-defined]
    given.write_text('{"rank": 0}')
    with pytest.raises(ConfigError, match="rank: Input should be greater than or equal to 1"):
        read_published(save(), given)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("fmm.activation", "tanh", "setting fmm.activation must be demod, and is tanh"),
        ("fmm.instance_norm", False, "upsampling_mode must fit fmm.instance_norm, and is bilinear"),
        ("use_noise", True, "setting use_noise must be False, and is True"),
        ("input.type", "const", "setting input.type must be coords, and is const"),
        ("coords.fallback", True, "setting coords.fallback must be False, and is True"),
        ("coords.low_res_cfg.use_raw_coords", True, "setting coords.res_configs.4.use_raw_coords is unknown"),
        ("coords.low_res_cfg", "${coords.low_res_cfg}", "settings refer to each other in a circle"),
        ("fmm", None, "setting fmm.enabled must be True, and is False"),
        ("something", 3, "setting something is unknown, and is 3"),
    ],
)
def test_what_this_family_does_not_compute_is_refused(
    save: Save, tree: dict[str, Any], path: str, value: Any, message: str
) -> None:
    *above, last = path.split(".")
    at = tree
    for key in above:
        at = at[key]
    at[last] = value
    with pytest.raises(CheckpointError, match=message):
        read_published(save())


@pytest.mark.parametrize(
    ("change", "after", "message"),
    [
        (lambda s: s.pop("G_ema"), b"", "must hold the network G_ema, as published snapshots do; it has G, D"),
        (lambda s: s["G_ema"].meta["state"].pop("_init_kwargs"), b"", "does not tell how its generator was made"),
        (lambda s: s["G_ema"].meta.update(type="function"), b"", "a network is made of odd arguments"),
        (lambda s: None, b".", "something follows its end"),
    ],
)
def test_damaged_snapshots(save: Save, change: Callable[[Any], object], after: bytes, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        read_published(save(change, after))


def test_every_cut_is_noticed(save: Save) -> None:
    path = save()
    content = path.read_bytes()
    for end in range(1, len(content), len(content) // 12):
        path.write_bytes(content[:end])
        with pytest.raises(CheckpointError):
            read_published(path)


def test_bytes_of_storages_are_checked(save: Save) -> None:
    """A storage whose size is not what its file in the file says, or that another value follows."""
    path = save()
    content = path.read_bytes()
    marker = (3).to_bytes(8, "little")  # the count of values before those of a bias of three colours
    at = content.rindex(marker)
    path.write_bytes(content[:at] + (4).to_bytes(8, "little") + content[at + 8 :])
    with pytest.raises(CheckpointError, match="has another size than declared"):
        read_snapshot(path, "G_ema")


def test_the_same_bytes_are_read_once_however_often_they_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise a short file could ask for hours of work."""
    whole = pickletools.genops(pickle.dumps(torch.zeros(1000), 4))
    stream = next(argument for opcode, argument, _ in whole if opcode.name == "BINBYTES")
    head = b"\x80\x04\x8c\x0dtorch.storage\x94\x8c\x10_load_from_bytes\x94\x93\x94"
    held = b"B" + len(stream).to_bytes(4, "little") + stream + b"\x94"
    again = b"h\x02h\x03\x85R0"  # the function, the bytes, a tuple of them; called, and dropped
    path = tmp_path / "many.pkl"
    path.write_bytes(head + held + again * 1000 + b".")
    begin, begun = states._begin_stream, []
    monkeypatch.setattr(states, "_begin_stream", lambda *given: begun.append(1) or begin(*given))
    with pytest.raises(CheckpointError, match="must hold the network G_ema"):
        read_published(path)
    assert len(begun) == 1
