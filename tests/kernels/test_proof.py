"""What needs no kernel to run: that CPU tensors never ask for a proof, the settings, and what `doctor` shows."""

import dataclasses
import json
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import platformdirs
import pytest
import torch

from hflow_rt.cli.info import doctor
from hflow_rt.errors import BackendUnavailable, ConfigError
from hflow_rt.kernels import (
    batch_norm,
    bias_act,
    blur,
    coupling,
    coupling_kernels,
    dispatch,
    group_norm,
    instance_norm,
    logistic_mixture,
    mixing,
    mixture_image,
    mixture_kernels,
    modulated_weights,
    proof,
    proof_records,
    quantise,
    report,
    residual_normal,
    sampler_update,
    split_act,
    squeeze_excite,
)
from hflow_rt.kernels.blur import blur_down
from hflow_rt.kernels.proof_cases import PROOFS, Difference, largest_difference, tolerance
from hflow_rt.kernels.proof_records import Environment, Record

sys.path.insert(0, str(Path(__file__).parent))
from variants import but_for_sides

ENVIRONMENT = Environment("A GPU", "9.0", "580.1", "2.13.0", "13.0", "3.9.0", "0123456789abcdef")

NEEDS_TRITON = pytest.mark.skipif(
    not dispatch.INSTALLED, reason="needs triton: pip install 'hflow-rt[kernels]' on Linux"
)


def test_every_operator_has_a_proof_of_its_own() -> None:
    assert tuple(PROOFS) == dispatch.OPERATORS == tuple(sorted(PROOFS))
    registered = {name.partition("::")[2] for name in torch._C._dispatch_get_all_op_names() if name[:8] == "hflow_rt"}
    gradients = {"blur_down_adjoint", "blur_up_adjoint"}
    others = {
        "blur_down",
        "blur_up",
        "mixture_image",
        "quantise",
        "sampler_update",
    }  # two, or none, or one in plain torch
    gradients |= {f"{name}_backward" for name in {*PROOFS} - others}
    assert registered == {*PROOFS, *gradients}
    for name, of in PROOFS.items():
        schema = torch._C._get_schema(f"hflow_rt::{name}", "")
        tensors = [argument for argument in schema.arguments if "Tensor" in str(argument.type)]
        assert len(of.inputs) == len(tensors)
        assert len(of.outputs) == len(schema.returns)
        told = " ".join(case.what for case in of.cases)
        assert all(re.search(rf"\b{dtype}\b", told) for dtype in ("float32", "float16", "bfloat16"))


@NEEDS_TRITON
def test_what_the_proofs_launch_compiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """A case that does not compile would refuse a right operator. What differs in sides alone is the report's."""
    monkeypatch.setattr(blur, "_down_adjoint", blur._down_adjoint_triton)
    monkeypatch.setattr(blur, "_up_adjoint", blur._up_adjoint_triton)
    monkeypatch.setattr(coupling, "_coupling_backward", coupling_kernels.couple_backward)
    monkeypatch.setattr(group_norm, "_backward", group_norm._backward_triton)
    monkeypatch.setattr(instance_norm, "_norm_backward", instance_norm._norm_backward_triton)
    monkeypatch.setattr(mixing, "_mixing_backward", mixing._mixing_backward_triton)
    monkeypatch.setattr(logistic_mixture, "_backward", mixture_kernels.backward_triton)
    for module in (bias_act, split_act):
        monkeypatch.setattr(module, "backward", bias_act._backward_triton)
    monkeypatch.setattr(split_act, "_gathered", split_act._gathered_triton)
    for module in (batch_norm, modulated_weights, residual_normal, squeeze_excite):
        monkeypatch.setattr(module, "_backward", module._backward_triton)
    operators = {
        "batch_norm_silu": batch_norm._norm_triton,
        "bias_act": bias_act._act_triton,
        "blur_down": blur._down_triton,
        "blur_up": blur._up_triton,
        "coupling": coupling_kernels.couple,
        "group_norm_silu": group_norm._norm_triton,
        "instance_norm_act": instance_norm._norm_triton,
        "mixing": mixing._mixing_triton,
        "mixture_image": mixture_image._image_triton,
        "mixture_log_prob": mixture_kernels.log_prob_triton,
        "modulated_weights": modulated_weights._generate_triton,
        "quantise": quantise._quantise_triton,
        "residual_normal": residual_normal._residual_triton,
        "sampler_update": sampler_update._update_triton,
        "split_act": split_act._split_triton,
        "squeeze_excite": squeeze_excite._excite_triton,
    }
    found: dict[str, dispatch.Launch] = {}
    for name, of in PROOFS.items():
        with dispatch.recorded() as launches:
            for case in of.cases:  # each alone, for nothing is computed, and a proof ends at the first that is wrong
                alone = dataclasses.replace(of, operator=operators[name], cases=(case,))
                largest_difference(alone, torch.device("cpu"))
        found |= {f"{name} {at}": launch for at, launch in enumerate(launches)}
    kernels = [name for name in found if report._first(found, name)]
    assert len(kernels) == 148
    reported = {but_for_sides(launch) for name, launch in report.launches().items() if " fp32 " in name}
    kernels = [name for name in kernels if but_for_sides(found[name]) not in reported]
    assert len(kernels) == 81
    # the two types of half precision differ in how values are read and written alone: one of them will do
    different = {str(but_for_sides(found[name])).replace("*bf16", "*fp16"): name for name in kernels}
    for at, name in enumerate(different.values()):
        capability = report.CAPABILITIES[at % len(report.CAPABILITIES)]
        compiled = report.compiled(name, found[name], capability)
        assert compiled.spilled == 0, compiled


ON_CPU = """
import sys, torch
from hflow_rt.kernels import blur, coupling, dispatch, mixing
x = torch.randn(1, 2, 4, 4, requires_grad=True)
assert dispatch._proves
blur.blur_up(blur._down(x, False)[0]).sum().backward()
mixing._mixing(x, torch.eye(2), None, None, None, False).sum().backward()
print([name for name in sys.modules if "proof" in name])
"""


def test_tensors_of_a_cpu_are_never_proved() -> None:
    """Not even the module of proofs is imported; see `test_the_switch_costs_a_cpu_call_nothing` for the price."""
    switches = {"TRITON_INTERPRET": "0", "HFLOW_RT_KERNELS": ""}
    command = [sys.executable, "-c", ON_CPU]
    run = subprocess.run(command, env=os.environ | switches, capture_output=True, text=True, timeout=60)
    assert (run.stderr, run.stdout) == ("", "[]\n")


def test_an_unknown_name_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_unknown", ["blur"])
    line = (
        "HFLOW_RT_KERNELS_OFF must list some of batch_norm_silu, bias_act, .*, squeeze_excite; found 'blur'; unset it"
    )
    with dispatch.using("triton"), pytest.raises(ConfigError, match=line):
        blur_down(torch.zeros(1, 1, 2, 2))


@pytest.mark.parametrize(
    ("dtype", "allowed"), [(torch.float32, 1e-5), (torch.float16, 2**-10), (torch.bfloat16, 2**-7)]
)
def test_tolerances(dtype: torch.dtype, allowed: float) -> None:
    assert tolerance(dtype) == allowed
    assert Difference("", 2 * allowed, allowed).share == 2
    assert Difference("", torch.nan, allowed).share == torch.inf


# processes with kernels, which Triton interprets


PROVING = """
import sys, torch
from hflow_rt.kernels import dispatch, mixing, proof
if "again" in sys.argv:
    proof.largest_difference = None
dispatch._proves = True
x, weight = torch.ones(1, 2, 3, 3), torch.eye(2)
with dispatch.using("triton"):
    assert torch.equal(mixing.mixing(x, weight), x)
"""


@NEEDS_TRITON
def test_processes_may_prove_at_once(tmp_path: Path) -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "XDG_CACHE_HOME": str(tmp_path)}

    def run(*arguments: str) -> str:
        command = [sys.executable, "-W", "error", "-c", PROVING, *arguments]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120).stderr

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(lambda _: run(), range(2))) == ["", ""]
    assert run("again") == ""
    (path,) = tmp_path.rglob("*.*")
    assert json.loads(path.read_text())["environment"]["gpu"] == "Triton's interpreter"
    assert path.parent == tmp_path / "hflow-rt" / "kernels"


OFF = """
import torch
from hflow_rt.kernels import coupling, dispatch, mixing
launched = []
launch = dispatch.launch
from hflow_rt.kernels import coupling_kernels
for module in (coupling_kernels, mixing):
    module.launch = lambda kernel, *a, **k: (launched.append(kernel.fn.__name__), launch(kernel, *a, **k))
x, weight = torch.randn(1, 2, 3, 3, requires_grad=True), torch.eye(2)
with dispatch.using("triton"):
    y, log_det = coupling.coupling(x, x, x, weight, None, coupling.Region(0, 1), inverse=True, form="clipped")
    mixing.mixing(y, weight).sum().backward()
    print(dispatch.live())
right, _ = coupling.coupling_reference(x, x, x, weight, None, coupling.Region(0, 1), inverse=True, form="clipped")
assert torch.allclose(y, right)
print(launched)
"""


@NEEDS_TRITON
def test_one_operator_can_be_switched_off() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "HFLOW_RT_KERNELS_OFF": "coupling, blur_up"}
    run = subprocess.run([sys.executable, "-c", OFF], env=environment, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    live, launched = run.stdout.splitlines()
    assert live.endswith(" on the interpreter; plain torch by HFLOW_RT_KERNELS_OFF: blur_up, coupling")
    assert launched == "['_mix', '_mix_gradient']"


# what doctor shows


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Environment]:
    """GPUs of a machine, on which every proof passes; the list can be changed."""
    found = [ENVIRONMENT]
    monkeypatch.setattr(platformdirs, "user_cache_dir", lambda *name, **options: str(tmp_path / "cache"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(found))
    monkeypatch.setattr(proof, "environment", lambda device: found[device.index])
    monkeypatch.setattr(proof, "_capturing", lambda device: False)
    monkeypatch.setattr(proof, "_records", {})
    monkeypatch.setattr(dispatch, "_proved", set())
    monkeypatch.setattr(dispatch, "_off", frozenset())
    monkeypatch.setattr(dispatch, "missing", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *device: "A GPU")
    monkeypatch.setattr(dispatch, "triton", type("triton", (), {"__version__": "3.9.0"}))
    monkeypatch.setattr(proof, "largest_difference", lambda which, device: Difference("", 0.0, 1.0))
    return found


def fail(monkeypatch: pytest.MonkeyPatch, operator: str, error: Exception | None = None) -> None:
    def judged(which: Any, device: torch.device) -> Difference:
        if error is not None and which is PROOFS[operator]:
            raise error
        return Difference("log_det, sigmoid", 2e-3 if which is PROOFS[operator] else 0.0, 1e-5)

    monkeypatch.setattr(proof, "largest_difference", judged)


def shown(capsys: pytest.CaptureFixture[str]) -> list[str]:
    """The lines about kernels, without dates."""
    capsys.readouterr()
    doctor()
    lines = re.sub(r"\d{4}-\d\d-\d\d \d\d:\d\d", "DATE", capsys.readouterr().out).splitlines()
    start = next(at for at, line in enumerate(lines) if line.startswith("  triton kernels: "))
    return lines[start + 1 : -2]


WHERE = "    on A GPU (compute capability 9.0, driver 580.1, torch 2.13.0, CUDA 13.0, triton 3.9.0):"


def test_doctor_proves_and_shows(gpus: list[Environment], capsys: pytest.CaptureFixture[str]) -> None:
    proved = [f"      {operator}: proved DATE" for operator in dispatch.OPERATORS]
    assert shown(capsys) == [WHERE, *proved]
    doctor()
    assert "proving" not in capsys.readouterr().err
    gpus.append(dataclasses.replace(ENVIRONMENT, gpu="B GPU"))  # and two of a kind
    gpus.append(ENVIRONMENT)
    assert shown(capsys) == [WHERE, *proved, WHERE.replace("A GPU", "B GPU"), *proved]
    doctor()
    assert capsys.readouterr().err == ""


def test_doctor_says_what_it_proves(gpus: list[Environment], capsys: pytest.CaptureFixture[str]) -> None:
    doctor()
    assert capsys.readouterr().err.splitlines() == [f"proving {operator} on A GPU" for operator in dispatch.OPERATORS]
    gpus[0] = dataclasses.replace(ENVIRONMENT, driver="590")
    doctor(json=True)
    assert capsys.readouterr().err == ""


def test_doctor_shows_what_failed(
    gpus: list[Environment], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    fail(monkeypatch, "coupling")
    text = "computes wrong: log_det, sigmoid is off by 0.002 of the largest value where 1e-05 is allowed"
    lines = shown(capsys)
    at = dispatch.OPERATORS.index("coupling")
    assert lines[1 + at] == f"      coupling: FAILED DATE: {text}; set HFLOW_RT_KERNELS_OFF=coupling"
    assert [line for line in lines if "FAILED" in line] == [lines[1 + at]]
    doctor(json=True)
    found = json.loads(capsys.readouterr().out)["kernel proofs"]
    assert [proof["operator"] for proof in found] == list(dispatch.OPERATORS)
    states = {proof["operator"]: proof["state"] for proof in found}
    assert states == dict.fromkeys(dispatch.OPERATORS, "proved") | {"coupling": "FAILED"}
    assert found[at]["why"] == f"{text}; set HFLOW_RT_KERNELS_OFF=coupling"
    assert found[0]["environment"] == dataclasses.asdict(ENVIRONMENT)
    assert all(len(proof["date"]) == len("2026-01-31 23:59") for proof in found)
    with pytest.raises(BackendUnavailable, match="kernel 'coupling' computes wrong: log_det, sigmoid is off by"):
        proof.prove("coupling", torch.device("cuda", 0))


def test_doctor_shows_what_is_not_proved(
    gpus: list[Environment], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatch, "_off", frozenset({"mixing"}))
    fail(monkeypatch, "blur_up", torch.OutOfMemoryError("CUDA out of memory"))
    lines = shown(capsys)
    assert lines[1 + dispatch.OPERATORS.index("blur_up")] == "      blur_up: not yet: the GPU is out of memory"
    assert lines[1 + dispatch.OPERATORS.index("mixing")] == "      mixing: off"


def test_doctor_proves_nothing_where_kernels_are_off(
    gpus: list[Environment], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatch, "missing", lambda: "HFLOW_RT_KERNELS is 'reference'")
    proof_records.keep(Record("mixing", ENVIRONMENT, "2026-01-31 23:59"))
    standing = dict.fromkeys(dispatch.OPERATORS, "not yet: HFLOW_RT_KERNELS is 'reference'") | {"mixing": "proved DATE"}
    assert shown(capsys) == [WHERE, *(f"      {name}: {what}" for name, what in standing.items())]


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what is shown without a GPU")
def test_doctor_shows_no_proofs_without_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    doctor(json=True)
    assert json.loads(capsys.readouterr().out)["kernel proofs"] == []


def test_what_a_proof_depends_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"GPU {device.index}")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, device.index))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(proof_records, "_driver", lambda: "580.65.06/13000")
    monkeypatch.setattr(dispatch, "INTERPRETED", False)
    monkeypatch.setattr(dispatch, "triton", type("triton", (), {"__version__": "3.9.0"}))
    found = proof_records.environment(torch.device("cuda", 6))
    assert found == Environment("GPU 6", "8.6", "580.65.06/13000", torch.__version__, "13.0", "3.9.0", found.kernels)
    assert len(found.kernels) == 16
