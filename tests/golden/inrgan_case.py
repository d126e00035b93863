"""A golden INR-GAN case: networks of its settings and weights."""

from pathlib import Path

import torch
from golden_cases import Absent, GoldenCase
from golden_cases import Case as Listing
from safetensors.torch import load_file
from torch import Tensor, nn

from hflow_rt.models.checkpoint import load_state
from hflow_rt.models.inrgan.config import DiscriminatorConfig, EmbeddingConfig, INRGANConfig
from hflow_rt.models.inrgan.discriminator import Discriminator
from hflow_rt.models.inrgan.model import INRGAN
from hflow_rt.models.inrgan.weights import discriminator_from_original, from_original


class Case(Listing):
    """Networks built from a golden case's settings and weights, and the means to compute what it lists."""

    def __init__(self, golden: GoldenCase) -> None:
        super().__init__(golden)
        file = self.description["weights"]["file"]  # of a training run, another case's
        self.path: Path = golden.path
        self.weights = load_file(self.path.parent / file)

    def config(self) -> INRGANConfig:
        described, judge = self.described, self.described["discriminator"]
        assert (judge["fp16_stages"], judge["clamp"]) == (0, None)
        embeddings = {}
        for side, entry in described["embedding"].items():
            own = {name: entry[name] for name in ("const", "random", "diagonal", "cosine")}
            embeddings[int(side)] = EmbeddingConfig(**own)
            assert embeddings[int(side)].waves(int(side)) == entry["octave_rows"] + entry["random"]
        config = INRGANConfig(
            resolution=described["resolution"],
            channels=described["img_channels"],
            input_side=described["input_resolution"],
            upsampling="bilinear" if described["variant"] == "bil" else "nearest",
            z_dim=described["z_dim"],
            w_dim=described["w_dim"],
            classes=tuple(map(str, range(described["c_dim"]))),
            mapping_layers=described["mapping_layers"],
            rank=described["rank"],
            **widths(described["widths"]),
            extra_layers={int(side): count for side, count in described["extra_layers"].items()},
            embeddings=embeddings,
            w_avg_decay=described["w_avg_decay"],
            discriminator=DiscriminatorConfig(**widths(judge["widths"]), group=judge["mbstd_group"]),
            r1_gamma=described["loss"]["r1_gamma"],
            r1_every=described["loss"]["r1_interval"],
        )
        assert config.slots == described["num_ws"]
        for side, channels in described["widths"].items():
            assert config.width(int(side)) == channels
            assert config.discriminator.width(int(side)) == judge["widths"][side]
        return config

    def original(self, network: str) -> dict[str, Tensor]:
        """Tensors of G or D under the original's names."""
        return {name[2:]: value for name, value in self.weights.items() if name[0] == network}

    def model(self) -> INRGAN:
        model = INRGAN(self.config())
        load_state(model, from_original(self.original("G")), "golden weights")
        return model.to(self.dtype)

    def judge(self, group: int | None = None) -> Discriminator:
        config = self.config()
        judge = Discriminator(config)
        load_state(judge, discriminator_from_original(config, self.original("D")), "golden weights")
        judge.group = judge.group if group is None else group
        return judge.to(self.dtype)

    def snapshot(self) -> Path:
        """The published file beside the case."""
        path = self.path.parent / self.description.get("container", {}).get("file", "none")
        if not path.is_file():
            raise Absent("container")
        return path

    def labels(self, name: str, rows: slice = slice(None)) -> Tensor | None:
        return self[name][rows] if self.described["c_dim"] else None

    def real(self, rows: slice = slice(None)) -> Tensor:
        return self["d_img8"][rows].to(self.dtype) / 127.5 - 1


def widths(by_stage: dict[str, int]) -> dict[str, int]:
    """The bases that lead to these widths."""
    last = max(by_stage, key=int)
    return {"channel_base": by_stage[last] * int(last), "channel_max": max(by_stage.values())}


def full(case: Case, value: float, count: int = 1) -> Tensor:
    return torch.full((count,), value, dtype=case.dtype)


def gradients(network: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    network.zero_grad()
    loss.backward()
    return {name: value.grad for name, value in network.named_parameters() if value.grad is not None}


def norm(found: dict[str, Tensor]) -> Tensor:
    return torch.stack([gradient.norm() for gradient in found.values()]).norm()
