"""One step of EAT with PCMECL in its CLIP slot: python docs/examples/eat.py --repository ../EAT_code"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import tyro
from common import DrawnActors, criterion_for, train, use_repository
from torch import Tensor, nn

WEIGHT = 100.0
FRAMES, KEYPOINTS = 2, 15  # EAT makes five frames of a source at a time (syncnet_T)
OF_INDEX = ["angry", "contempt", "disgusted", "fear", "happy", "neutral", "sad", "surprised"]  # EAT's y_trg


class StandIn(nn.Module):
    """The generator's interface: sources (B, 3, 256, 256) in [0, 1] and keypoints to "prediction", in [0, 1]."""

    def __init__(self) -> None:
        super().__init__()
        self.move, self.paint = nn.Linear(KEYPOINTS * 3, 16), nn.Conv2d(16, 3, 1)
        self.read = nn.Conv2d(3, 16, 5, padding=2)

    def forward(self, source: Tensor, kp_driving: dict, kp_source: dict, prompt: Tensor) -> dict[str, Tensor]:
        moved = self.move((kp_driving["value"] - kp_source["value"]).flatten(1))
        return {"prediction": torch.sigmoid(self.paint((self.read(source) + moved[:, :, None, None]).relu()))}


def published(repository: Path) -> nn.Module:
    """EAT's generator with random weights, as its configuration for training with CLIP makes it."""
    import yaml
    from modules.generator import OcclusionAwareSPADEGeneratorEam

    config = yaml.safe_load((repository / "config" / "prompt_st_eam3d_tanh_mapper.yaml").read_text())["model_params"]
    return OcclusionAwareSPADEGeneratorEam(**config["generator_params"], **config["common_params"])


def main(repository: Path | None = None, run: Path | None = None, clip: str = "tiny-face", steps: int = 3) -> None:
    """Train a few steps, and print what PCMECL does and costs.

    Args:
        repository: a clone of EAT_code; without one, a stand-in with its interface is trained.
        run: the folder of `pcmecl-fast prompts`; without one, prompts that have learned nothing.
        clip: the tower, where there is no run; ViT-B-32 costs what the published weights cost.
        steps: how many steps to time.
    """
    torch.manual_seed(0)
    generator = published(repository) if use_repository(repository, "EAT_code") and repository else StandIn()
    drawn = DrawnActors(256)
    criterion = criterion_for(drawn, run, clip, value_range=(0, 1))

    # As EAT's batches have them: one neutral source for each clip, and the driving clip's name and emotion.
    x: dict[str, Any] = {"name": ["M003_hap_3_001", "W029_ang_1_007"], "y_trg": torch.tensor([4, 0])}
    actors, asked = [name.split("_")[0] for name in x["name"]], [OF_INDEX[e] for e in x["y_trg"]]
    x["source"] = (drawn.frames(actors, ["neutral"] * 2) + 1) / 2
    driving = (drawn.frames(actors, asked) + 1) / 2
    source = x["source"].repeat_interleave(FRAMES, dim=0)
    kp_source = {"value": torch.rand(len(source), KEYPOINTS, 3) - 0.5}
    # The driving keypoints are what EAT's transformer makes of the sound; here they are trained themselves.
    moved = nn.Parameter(0.1 * torch.randn(len(source), KEYPOINTS, 3))
    prompt = torch.randn(len(source), 128)

    def predict() -> Tensor:
        kp_driving = {"value": kp_source["value"] + moved}
        return generator(source, kp_driving=kp_driving, kp_source=kp_source, prompt=prompt)["prediction"]

    def step(with_pcmecl: bool) -> tuple[Tensor, Tensor]:
        prediction = predict()
        own = 10 * (prediction - driving.repeat_interleave(FRAMES, dim=0)).abs().mean()  # img_l1
        if not with_pcmecl:
            return own, own.new_zeros(())
        edited = prediction.unflatten(0, (len(x["source"]), -1))  # (B, T, 3, 256, 256): a clip for each source
        return own, WEIGHT * criterion(x["source"], edited, actors, "neutral", asked)

    train(step, [*generator.parameters(), moved], steps)
    edited = predict().unflatten(0, (len(x["source"]), -1))
    l1 = 10 * (edited - driving[:, None]).abs().mean()
    print(criterion.explain(x["source"], edited, actors, "neutral", asked, beside={"img_l1": l1}))


if __name__ == "__main__":
    tyro.cli(main)
