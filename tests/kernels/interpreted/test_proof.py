"""Kernels prove themselves before they are trusted: the proof passes right kernels and refuses wrong ones."""

from typing import Any

import pytest
import torch
from torch import Tensor

from hflow_rt.errors import BackendUnavailable
from hflow_rt.kernels import (
    batch_norm,
    bias_act,
    blur,
    coupling_kernels,
    dispatch,
    group_norm,
    instance_norm,
    mixing,
    mixture_image,
    mixture_kernels,
    modulated_weights,
    moments,
    proof,
    quantise,
    residual_normal,
    sampler_update,
    split_act,
    squeeze_excite,
)
from hflow_rt.kernels.blur import blur_down
from hflow_rt.kernels.mixing import mixing_reference
from hflow_rt.kernels.proof_cases import PROOFS
from hflow_rt.kernels.proof_inputs import Draw
from hflow_rt.kernels.proof_records import Environment

proves_by_itself = dispatch._proves
MODULES = {
    "batch_norm_silu": batch_norm,
    "bias_act": bias_act,
    "blur_down": blur,
    "blur_up": blur,
    "coupling": coupling_kernels,
    "group_norm_silu": group_norm,
    "instance_norm_act": instance_norm,
    "mixing": mixing,
    "mixture_image": mixture_image,
    "mixture_log_prob": mixture_kernels,
    "modulated_weights": modulated_weights,
    "quantise": quantise,
    "residual_normal": residual_normal,
    "sampler_update": sampler_update,
    "split_act": split_act,
    "squeeze_excite": squeeze_excite,
}


def mix(x: Tensor, weight: Tensor) -> Tensor:
    y: Tensor = mixing.mixing(x, weight)
    return y


def test_right_kernels_pass_and_every_kernel_takes_part(
    on_new_gpu: Any, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    launched: set[str] = set()
    for module in (*MODULES.values(), moments):
        on_new_gpu.harms(module, lambda kernel, arguments: launched.add(kernel), monkeypatch)
    for operator in PROOFS:
        proof.prove(operator, torch.device(device))
    planes = {"_halve", "_double", "_gather", "_part_moments", "_normalise", "_gradient", "_update_kernel"}
    planes |= {"_plane_parts", "_gather_groups", "_norm_silu", "_norm_silu_gradient"}
    planes |= {"_gather_channel", "_residual_kernel", "_residual_gradient", "_plane_sums", "_gated"}
    planes |= {"_act_kernel", "_act_gradient", "_generate_kernel", "_generate_gradient", "_quantise_kernel"}
    planes |= {"_split_kernel", "_gather_kernel"}
    planes |= {"_log_prob_kernel", "_log_prob_gradient", "_mean_kernel", "_draw_kernel"}
    assert launched == planes | {"_couple", "_couple_gradient", "_mix", "_mix_gradient"}  # as in test_report.py
    assert on_new_gpu.proofs == list(PROOFS)
    assert sorted(kept["operator"] for kept in on_new_gpu.kept()) == list(PROOFS)
    assert all(Environment(**kept["environment"]) == on_new_gpu.known for kept in on_new_gpu.kept())
    assert all(kept["failure"] == "" for kept in on_new_gpu.kept())


def one_level_off(kernel: str) -> Any:
    """Bytes by one level, and numbers by one in ten thousand."""

    def harm(launched: str, arguments: dict[str, Any]) -> None:
        if launched == kernel:
            image = arguments.get("image", arguments.get("made"))
            image.copy_(image + (image < 255) if image.dtype == torch.uint8 else image * 1.0001)

    return harm


WRONG: dict[str, tuple[str, Any, str]] = {
    "batch norm's moments": ("batch_norm_silu", ("_gather_channel", "moments"), "(result|moments|the gradient by .*)"),
    "activation": ("bias_act", ("_act_kernel", "y"), "result"),
    "activation's gradient": ("bias_act", ("_act_gradient", "d"), "the gradient by x"),
    "activation's sums": ("bias_act", ("_act_gradient", "parts"), "the gradient by bias"),
    "blur_down": ("blur_down", ("_halve", "y"), "result"),
    "blur_down's moments": ("blur_down", ("_halve", "emitted"), "moments"),
    "blur_down's gradient": ("blur_down", ("_double", "y", True), "the gradient by x"),
    "blur_up": ("blur_up", ("_double", "y"), "result"),
    "blur_up's gradient": ("blur_up", ("_halve", "y", True), "the gradient by x"),
    "norm": ("instance_norm_act", ("_normalise", "y"), "result"),
    "norm's gradient": ("instance_norm_act", ("_gradient", "d_x"), "the gradient by x"),
    "norm's residual": ("instance_norm_act", ("_gradient", "d_residual"), "the gradient by residual"),
    "norm's style": ("instance_norm_act", ("_gradient", "sums"), "the gradient by (scale|shift|x)"),
    "coupling": ("coupling", ("_couple", "y"), ".*"),
    "coupling's log-determinant": ("coupling", ("_couple", "parts"), "log_det"),
    "coupling's gradient": ("coupling", ("_couple_gradient", "d_x"), "the gradient by x"),
    "coupling's net": ("coupling", ("_couple_gradient", "d_log_scale"), "the gradient by log_scale"),
    "coupling's map": ("coupling", ("_couple_gradient", "parts"), "the gradient by (weight|bias)"),
    "group norm": ("group_norm_silu", ("_norm_silu", "y"), "result"),
    "group norm's moments": ("group_norm_silu", ("_gather_groups", "moments"), "(result|moments|the gradient by .*)"),
    "group norm's gradient": ("group_norm_silu", ("_norm_silu_gradient", "d_x"), "the gradient by x"),
    "group norm's other gradient": ("group_norm_silu", ("_norm_silu_gradient", "d_skip"), "the gradient by skip"),
    "group norm's sums": ("group_norm_silu", ("_norm_silu_gradient", "sums"), "the gradient by .*"),
    "mixing": ("mixing", ("_mix", "y"), "result"),
    "mixing's gradient": ("mixing", ("_mix_gradient", "d_x"), "the gradient by x"),
    "mixing's outer map": ("mixing", ("_mix_gradient", "d_shift"), "the gradient by pre shift"),
    "mixing's map": ("mixing", ("_mix_gradient", "parts"), "the gradient by (weight|bias)"),
    "mixture's probability": ("mixture_log_prob", ("_log_prob_kernel", "out"), "result"),
    "mixture's gradient": ("mixture_log_prob", ("_log_prob_gradient", "d_logits"), "the gradient by logits"),
    "mixture's mean": ("mixture_image", one_level_off("_mean_kernel"), "image"),
    "mixture's draw": ("mixture_image", one_level_off("_draw_kernel"), "image"),
    "residual's value": ("residual_normal", ("_residual_kernel", "value"), "value"),
    "residual's cost": ("residual_normal", ("_residual_kernel", "parts"), "cost"),
    "residual's gradient": ("residual_normal", ("_residual_gradient", "d_raw"), "the gradient by raw"),
    "weights": ("modulated_weights", ("_generate_kernel", "made"), "(result|the gradient by columns)"),
    "weights' products": ("modulated_weights", ("_generate_gradient", "d_product"), "the gradient by style"),
    "weights' gradient": ("modulated_weights", ("_generate_gradient", "d_weight"), "the gradient by weight"),
    "two parts": ("split_act", ("_split_kernel", "y"), "(result|the gradient by .*)"),
    "the smaller part's gradient": ("split_act", ("_gather_kernel", "d_low"), "the gradient by low"),
    "bytes": ("quantise", one_level_off("_quantise_kernel"), "result"),
    "excitement": ("squeeze_excite", ("_gated", "out"), "(result|the gradient by y)"),
    "update": ("sampler_update", ("_update_kernel", "made"), "result"),
    "update's image": ("sampler_update", ("_update_kernel", "image"), "image"),
}


@pytest.mark.parametrize("case", list(WRONG))
def test_a_kernel_off_by_one_in_ten_thousand_is_refused(
    case: str, on_new_gpu: Any, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    operator, harm, what = WRONG[case]
    on_new_gpu.harms(MODULES[operator], harm, monkeypatch)
    line = (
        rf"^kernel '{operator}' computes wrong: {what}, .* is off by \S+ of the largest value where \S+ is allowed, on "
        r"A GPU \(compute capability 9.0, driver 580.1, torch 2.13.0, CUDA 13.0, triton 3.9.0\); "
        rf"set HFLOW_RT_KERNELS_OFF={operator} to run plain torch in its place, or HFLOW_RT_KERNELS=reference to run "
        r"it everywhere$"
    )
    with pytest.raises(BackendUnavailable, match=line):
        proof.prove(operator, torch.device(device))


def test_a_wrong_kernel_gives_no_number_and_others_run(
    on_new_gpu: Any, x: Tensor, weight: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither a wrong one nor, silently, one of plain torch; asked again in the same process, the same line."""
    on_new_gpu.harms(mixing, ("_mix", "y"), monkeypatch)
    lines = set()
    for _ in range(2):
        with pytest.raises(BackendUnavailable, match="kernel 'mixing' computes wrong") as caught:
            mix(x, weight)
        lines.add(str(caught.value))
    assert len(lines) == 1
    assert "\n" not in lines.pop()
    assert on_new_gpu.proofs == ["mixing"]
    assert torch.equal(blur_down(x), blur_down(x))
    assert on_new_gpu.proofs == ["mixing", "blur_down"]
    with dispatch.using("reference"):
        assert torch.equal(mix(x, weight), mixing_reference(x, weight))


def test_what_is_no_number_is_refused(
    on_new_gpu: Any, x: Tensor, weight: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    def harm(kernel: Any, arguments: Any) -> None:
        if kernel == "_mix":
            arguments["y"].view(-1)[-1:].fill_(torch.nan)

    on_new_gpu.harms(mixing, harm, monkeypatch)
    with pytest.raises(BackendUnavailable, match=r"kernel 'mixing' computes wrong: .* is off by nan of"):
        mix(x, weight)


def test_a_kernel_that_does_not_run_is_refused(
    on_new_gpu: Any, x: Tensor, weight: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(kernel: Any, arguments: Any) -> None:
        raise RuntimeError("Triton Error [CUDA]: no kernel image is available\nand more")

    on_new_gpu.harms(mixing, fail, monkeypatch)
    line = r"kernel 'mixing' does not run \(RuntimeError: Triton Error \[CUDA\]: no kernel image is available\), on A"
    with pytest.raises(BackendUnavailable, match=line):
        mix(x, weight)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("full"), RuntimeError("Triton Error [CUDA]: out of memory")])
def test_lack_of_memory_proves_nothing(
    error: Exception, on_new_gpu: Any, x: Tensor, weight: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(kernel: Any, arguments: Any) -> None:
        raise error

    with monkeypatch.context() as full:
        on_new_gpu.harms(mixing, fail, full)
        with pytest.raises(type(error), match=str(error)[:4]):
            mix(x, weight)
    assert on_new_gpu.files() == []
    mix(x, weight)
    assert on_new_gpu.proofs == ["mixing"] * 2


def test_the_interpreter_proves_nothing_by_itself(x: Tensor, weight: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    assert proves_by_itself == (not dispatch.INTERPRETED)
    monkeypatch.setattr(proof, "prove", lambda *_: pytest.fail("was asked to prove"))
    mix(x, weight)


def test_inputs_are_the_same_on_every_machine() -> None:
    one, two = Draw(torch.device("cpu")), Draw(torch.device("cpu"))
    assert torch.equal(one(2, 3), two(2, 3))
    assert [round(float(value), 4) for value in Draw(torch.device("cpu"))(3)] == [0.1257, -0.1321, 0.6404]
