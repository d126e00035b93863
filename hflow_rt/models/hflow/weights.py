"""Names of the original's tensors and ours (spec appendix B), in both directions."""

import re
from collections.abc import Mapping

from torch import Tensor

from hflow_rt.errors import CheckpointError
from hflow_rt.foreign.source import shown
from hflow_rt.models.hflow.config import HFlowConfig

__all__ = ["from_original", "ignored_kind", "to_original_name"]

# frozen or recomputed in the original's files; not parameters of ours
_IGNORED = {
    "interp_K": "blur kernel",
    "interp_K_down": "blur kernel",
    "mask_in": "mask",
    "mask_out": "mask",
    "_mask_for_style": "mask",
    "_mask_for_base": "mask",
}

_COUPLING = {
    "conv_cond_connect_pre": "condition",
    "cond_preproc_a": "condition",
    "conv_cond_connect_un": "fuse",
    "conv_cond_connect": "fuse",
    "conv_0": "fuse",
    "conv_1": "conv1",
    "conv_2": "conv2",
    "conv_3": "conv3",
    "down_c": "down_merge",
    "up_c": "up_merge",
    "conv_scale_out": "scale_head",
    "conv_scale_out_b": "scale_out",
    "conv_bias_out": "shift_head",
    "conv_bias_out_b": "shift_out",
    "conv_out_scale": "scale_out",
    "conv_out_bias": "shift_head",
    "conv_out_bias_b": "shift_out",
}
_ENCODER = {"conv_e1": "conv1", "conv_e2": "conv2", "conv_e3": "target", "conv_e3_b": "trunk"}
_DECODER_BLOCK = {
    "conv_d1": "conv1",
    "conv_d2": "conv2",
    "conv_d3": "conv3",
    "conv_d4": "conv4",
    "A_1_s": "style1.affine",
    "A_2_s": "style2.affine",
}
_DECODER = {
    "conv_d_pred_0": "predict.unet",
    "conv_d_pred_1": "predict.conv1",
    "conv_d_pred_2": "predict.conv2",
    "conv_d_pred_3": "predict.conv3",
    "conv_d5_a": "start_shift.out",
    "conv_d5_un": "start_shift.unet",
    "conv_d5_b": "start_log_scale.conv",
    "conv_d5_bb": "start_log_scale.out",
    "conv_d5_c": "end_shift.out",
    "conv_d5_c_un": "end_shift.unet",
    "conv_d5_d": "end_log_scale.conv",
    "conv_d5_dd": "end_log_scale.out",
}
_PREFIXES = {
    "learned_upscaler_cond": "condition",
    "skip_to_next": "skip",
    "blocks.steps": "flow.steps",
}
_LEAVES = {
    "w": "weight",
    "b": "bias",
    "K": "weight",
    "_U": "weight",
    "an_scale": "log_scale",
    "an_bias": "shift",
}


def from_original(config: HFlowConfig, state: Mapping[str, Tensor], source: str = "the file") -> dict[str, Tensor]:
    """Rename and reshape the original's tensors. Masks and blur kernels are dropped; running spreads are not in them.

    An unknown name keeps its own, so that loading reports it as unexpected. Raises `CheckpointError`, which begins
    with `source`, where two names mean the same tensor.
    """
    result: dict[str, Tensor] = {}
    names: dict[str, str] = {}
    for name, tensor in state.items():
        if ignored_kind(name) is not None:
            continue
        ours = _our_name(config, name)
        if (other := names.setdefault(ours, name)) != name:
            raise CheckpointError(
                f"{source} holds {shown(other)} and {shown(name)}, which both mean {shown(ours)}; "
                "give a file with one of them"
            )
        if name.endswith(("an_scale", "an_bias")):
            tensor = tensor.flatten()
        elif ".cond_encoders." in name and tensor.dim() == 4:
            tensor = tensor.flatten(1)  # a 1x1 convolution there, a linear map on vectors here
        result[ours] = tensor
    return result


def ignored_kind(name: str) -> str | None:
    """What an original's tensor is that we recompute, such as "mask"; None for one that we need."""
    return _IGNORED.get(name.rpartition(".")[2])


def to_original_name(config: HFlowConfig, names: list[str], originals: list[str]) -> dict[str, str]:
    """Ours to the original's name, for those of `originals` that map into `names`."""
    mapped = {_our_name(config, name): name for name in originals if ignored_kind(name) is None}
    return {name: mapped[name] for name in names if name in mapped}


def _our_name(config: HFlowConfig, name: str) -> str:
    head, _, leaf = name.rpartition(".")
    if name == "endblock_autoencoder.components.0.conv_d_const":
        return "end_output.constant"
    leaf = _LEAVES.get(leaf, leaf)
    if match := re.fullmatch(r"blocks\.(\d+)\.learned_upscaler\.components\.(\d+)\.(\w+)(.*)", head):
        index, block, layer, rest = int(match[1]), int(match[2]), match[3], match[4]
        inside = _autoencoder_name(config.ratio(index) == 4, block, layer)
        return f"levels.{index}.{inside}{rest}.{leaf}"
    if match := re.fullmatch(r"endblock_autoencoder\.components\.(\d+)\.(\w+)", head):
        return f"end_encoder.block{int(match[1]) + 1}.{_ENCODER.get(match[2], match[2])}.{leaf}"
    if match := re.fullmatch(r"blocks\.(\d+)\.(.*)", head):
        rest = match[2]
        for old, new in _PREFIXES.items():
            if rest == old or rest.startswith(old + "."):
                rest = new + rest.removeprefix(old)
                break
        return f"levels.{match[1]}.{_step_name(rest)}.{leaf}"
    head = head.replace("endblock_unified.endblock_uncond.", "end_flow.parts.0.")
    head = re.sub(r"endblock_unified\.conditionals\.(\d+)\.", lambda m: f"end_flow.parts.{int(m[1]) + 1}.", head)
    head = head.replace("endblock_unified.cond_encoders.", "end_flow.conditions.")
    head = head.replace("endblock_split_conv", "end_output.base").replace("global_state.fc1", "end_output.mapping.0")
    head = re.sub(r"global_state\.fc_rest\.(\d+)", lambda m: f"end_output.mapping.{int(m[1]) + 1}", head)
    return f"{_step_name(head)}.{leaf}" if head else leaf


def _step_name(head: str) -> str:
    parts = head.replace(".invconv", ".mixing").split(".")
    if "coupling" in parts:
        after = parts.index("coupling") + 1
        parts[after] = _COUPLING.get(parts[after], parts[after])
    return ".".join(parts)


def _autoencoder_name(double: bool, block: int, layer: str) -> str:
    """Encoder blocks count from fine to coarse like the original's; decoder blocks run the other way."""
    if layer in _ENCODER:
        return f"encoder.blocks.{block}.{_ENCODER[layer]}"
    if layer in _DECODER_BLOCK:
        return f"decoder.blocks.{1 - block if double else 0}.{_DECODER_BLOCK[layer]}"
    return f"decoder.{_DECODER.get(layer, layer)}"
