"""Every kernel compiles for every GPU generation without spilling, checked with the ptxas that comes with Triton."""

import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from hflow_rt.kernels import report
from hflow_rt.kernels.dispatch import Launch

sys.path.insert(0, str(Path(__file__).parent))
from variants import but_for_sides, tile

pytest.importorskip("triton", reason="needs triton: pip install 'hflow-rt[kernels]' on Linux")
LAUNCHES = report.launches()


def test_every_kernel_of_every_file_is_compiled() -> None:
    from hflow_rt import kernels

    modules = [import_module(f"{kernels.__name__}.{path.stem}") for path in Path(kernels.__path__[0]).glob("[!_]*.py")]
    compiled = {launch.kernel.fn.__name__ for launch in LAUNCHES.values()}
    planes = {"_halve", "_double", "_gather", "_part_moments", "_normalise", "_gradient", "_update_kernel"}
    planes |= {"_plane_parts", "_gather_groups", "_norm_silu", "_norm_silu_gradient"}
    planes |= {"_gather_channel", "_residual_kernel", "_residual_gradient", "_plane_sums", "_gated"}
    planes |= {"_act_kernel", "_act_gradient", "_generate_kernel", "_generate_gradient", "_quantise_kernel"}
    planes |= {"_split_kernel", "_gather_kernel"}
    planes |= {"_log_prob_kernel", "_log_prob_gradient", "_mean_kernel", "_draw_kernel"}
    assert compiled == planes | {"_couple", "_couple_gradient", "_mix", "_mix_gradient"}
    entry = {
        name
        for module in modules
        for name, value in vars(module).items()
        if type(value).__name__ == "JITFunction" and value.fn.__module__ == module.__name__
    }
    helpers = {"_plane", "_welford", "_emit", "_halved_row", "_doubled_row", "_pixels_at", "_style_at", "pooled"}
    helpers |= {"_cells", "_coupled", "_entered", "_leave", "_net_slopes", "_net_terms", "_uncouple", "_unenter"}
    helpers |= {"_load_either", "_hat_at", "_unleave", "mapped", "outer", "pixels_at"}
    helpers |= {"_sides", "_share_below", "parameter_at", "tanh", "_mass", "_grown", "_clipped", "_written", "_drawn"}
    helpers |= {"_limited", "_normals", "_between", "_first", "_given", "_modulated"}
    assert entry == compiled | helpers


# the most registers (the last two take 132 and 134 on sm_100, and spill nowhere), and what has spilled before
HEAVIEST = {
    "norm_backward all 90 fp32 gradient make",
    "blur_up_adjoint 30 fp32 halve",
    "blur_up_adjoint 256 fp16 halve",
    "coupling_backward post clipped inverse 8x32 fp32 couple_gradient",
    "coupling post sigmoid forward 16x64 fp32 couple",
    "coupling post clipped inverse 16x64 fp32 couple",
}


def largest() -> list[str]:
    """Of what differs in sides or in the direction alone the largest, and of all types one.

    What proofs launch is compiled for the others (test_proof.py).
    """
    found: dict[Any, str] = {}
    for name, launch in LAUNCHES.items():
        if " fp32 " in name and ("forward" not in name or name.replace("forward", "inverse") not in LAUNCHES):
            kind = but_for_sides(launch)
            found[kind] = max(found.get(kind, name), name, key=lambda name: tile(LAUNCHES[name]))
    return [name for name in found.values() if name not in HEAVIEST]


@pytest.mark.parametrize("capability", report.CAPABILITIES)
def test_nothing_spills(capability: int) -> None:
    """Every kernel for one generation or another, the heaviest for the newest; `make kernels` compiles all for all."""
    generations = report.CAPABILITIES
    names = largest()[generations.index(capability) :: len(generations)]
    for name in [*names, *sorted(HEAVIEST if capability == generations[-1] else ())]:
        found = report.compiled(name, LAUNCHES[name], capability)
        assert found.spilled == 0, found
        assert 8 <= found.registers <= 128, found
        assert found.shared <= 16 * 1024, found


def test_the_report_prints_a_table_and_fails_on_spills(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(report, "CAPABILITIES", (80,))
    launch = LAUNCHES["norm_backward all 90 fp32 gradient make"]
    monkeypatch.setattr(report, "launches", lambda: {"fine": launch})
    assert report.main() == 0
    assert "| fine (16) | " in capsys.readouterr().out
    monkeypatch.setattr(report, "launches", lambda: {"crowded": Launch(launch.kernel, (1, 1), 1, launch.arguments)})
    assert report.main() == 1
    assert "spills" in capsys.readouterr().out


def test_the_report_needs_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    from hflow_rt.errors import BackendUnavailable

    monkeypatch.setattr(report.dispatch, "INSTALLED", False)
    with pytest.raises(BackendUnavailable, match=r"hflow-rt\[kernels\]"):
        report.compiled("any", LAUNCHES[next(iter(LAUNCHES))], 80)
    assert "triton" in sys.modules


def test_a_step_moves_only_what_it_must() -> None:
    """Four numbers at once, no shared memory but for the one sum, and nothing that the net gave for a seen channel."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    for what, nets in (("board", 6), ("split", 4)):
        launch = LAUNCHES[f"coupling {what} clipped inverse 3x256 fp32 couple"]
        signature, constants, attributes, warps = report._specialised(launch)
        source = ASTSource(fn=launch.kernel, signature=signature, constexprs=constants, attrs=attributes)
        options = {"num_warps": warps, "enable_fp_fusion": True}
        ptx = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"]
        assert ptx.count("ld.global.v4") == 3 + nets
        assert ptx.count("ld.global") == 3 + nets + 9 + 3  # weight and bias
        assert ptx.count("st.global.v4") == 3
        assert ptx.count("bar.sync") == 1
