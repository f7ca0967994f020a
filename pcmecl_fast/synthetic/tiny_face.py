r"""Trains `tiny-face`, the CLIP model that ships with the package, on drawn faces and varied captions (ours).

    python -m pcmecl_fast.synthetic.tiny_face --out first
    python -m pcmecl_fast.synthetic.tiny_face --start first/tiny-face.safetensors --steps 1000 --seed 21 --attack 0.03 \
        --out second
    python -m pcmecl_fast.synthetic.tiny_face_text --start second/tiny-face.safetensors

Three losses share the image features: CLIP's contrastive loss against detailed captions (emotion, action units with
their strength and side, hair, skin, eyes, mouth), a cross entropy against one caption per emotion in many wordings,
and a linear read-out of the action units, so that the features keep each person's own way of showing an emotion.
The text tower is then trained further on its own, see `tiny_face_text`. About three quarters of an hour on two cores.
Zero-shot accuracy is reported on people and wordings unseen in training.
"""

from __future__ import annotations

import logging
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from open_clip.tokenizer import SimpleTokenizer
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from pcmecl_fast.clip import tiny_face_config, tiny_face_model, tiny_face_state
from pcmecl_fast.data.emotions import EMOTIONS
from pcmecl_fast.synthetic.augment import augmented, drawn
from pcmecl_fast.synthetic.captions import (
    EMOTION_WORDS,
    TEMPLATES,
    UNSEEN_TEMPLATES,
    any_words,
    looks_of,
    unit_phrases,
)
from pcmecl_fast.synthetic.faces import SyntheticFaces
from pcmecl_fast.synthetic.training import TrainingConfig, in_half, load_half, main, optimise, save_half

log = logging.getLogger("pcmecl_fast")

WORDINGS = 3
"""The number of wordings per emotion in each step."""


@dataclass
class TinyFaceConfig(TrainingConfig):
    """Options for training `tiny-face`."""

    steps: int = 2500
    seed: int = 20
    attack: float = 0.0
    """Largest change of a pixel, on a scale of 2, when pushing frames away from their emotion."""
    start: Path | None = None
    """A `tiny-face.safetensors` to continue from, at half the learning rate and at full difficulty from the start."""


def train(config: TinyFaceConfig) -> float:
    """Train, save and return the zero-shot accuracy on unseen people and wordings."""
    torch.manual_seed(config.seed)
    words = random.Random(config.seed)
    faces = SyntheticFaces(config.individuals, clips=1, frames_per_clip=3, seed=config.seed + 1000, intensity=(0.35, 1))
    pixels = drawn(faces)
    model = FactoredTower()
    if config.start is not None:
        model.load_stored(load_half(config.start))
    readouts = _Readouts(model, faces, pixels)
    optimizer = _optimizer(model, readouts, config.lr if config.start is None else config.lr / 2)
    batches = _batches(len(faces), config.batch)

    def loss(step: int) -> tuple[Tensor, dict[str, Tensor]]:
        index = next(batches)
        half = len(index) // 2  # captions cost more than frames
        # The hard part starts after a third: meaningless words, and frames pushed away from their emotion.
        hardness = 1.0 if config.start else min(max(3 * step / config.steps - 1, 0.0), 1.0)
        detailed = [describe(faces, i, words, hardness) for i in index[:half].tolist()]
        by_emotion = [_emotion_caption(e, words, hardness) for _ in range(WORDINGS) for e in EMOTIONS]
        text = model.text(detailed + by_emotion)
        shown = faces.emotion_index[index]
        frames = augmented(pixels[index], zoom=0.08, shift=0.06, blurred=0.5, noise=0.1, tint=0.15).clamp(-1, 1)
        if config.attack * hardness > 0:
            frames = _attacked(model, readouts.patches, frames, shown, config.attack * hardness)
        image, patches = model.image(frames)
        contrastive = contrastive_loss(image[:half], text[:half], model.scale())
        emotion = emotion_loss(image, text[half:], shown, model.scale())
        style, local_emotion, local_style = readouts.losses(image, patches, shown, index)
        total = contrastive + emotion + 10 * style + local_emotion + 10 * local_style
        return total, {"contrastive": contrastive, "emotion": emotion, "local": local_emotion, "style": style}

    save = Checkpoints(model, config)
    schedule = warmup_cosine(optimizer, config.steps)
    optimise("tiny-face", config.steps, optimizer, schedule, loss, clipped=model, after=save)
    return save.accuracy


class _Readouts(nn.Module):
    """Auxiliary linear read-outs: action units and speech from the features and patches, emotion from the patches.

    A transformer is slow to find small things like brows. A read-out that knows each patch's position finds them in a
    tenth of the steps, and the pooled feature follows.
    """

    def __init__(self, model: FactoredTower, faces: SyntheticFaces, pixels: Tensor) -> None:
        super().__init__()
        self.targets = torch.cat([faces.parameters.action_units.flatten(1), faces.parameters.speech], dim=1)
        self.pooled = nn.Linear(model.clip.visual.output_dim, self.targets.shape[1])
        self.patches = nn.LazyLinear(len(EMOTIONS) + self.targets.shape[1])
        self.patches(model.image(pixels[:2].float())[1].flatten(1))

    def losses(
        self,
        image: Tensor,  # (B, D)
        patches: Tensor,  # (B, P, W)
        shown: Tensor,  # (B,) emotions
        index: Tensor,  # (B,) into the data set
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(targets from the features, emotion from the patches, targets from the patches)."""
        style = F.mse_loss(self.pooled(image * math.sqrt(image.shape[1])), self.targets[index])
        emotion, targets = self.patches(patches.flatten(1)).tensor_split([len(EMOTIONS)], dim=1)
        return style, F.cross_entropy(emotion, shown), F.mse_loss(targets, self.targets[index])


def _optimizer(model: FactoredTower, readouts: _Readouts, lr: float) -> Optimizer:
    decayed = [p for p in model.parameters() if p.ndim > 1]
    plain = [p for p in model.parameters() if p.ndim <= 1]
    groups: list[dict[str, Any]] = [
        {"params": decayed, "weight_decay": 0.1},
        {"params": [*plain, *readouts.parameters()], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98))


def _batches(count: int, size: int) -> Iterator[Tensor]:
    """Endless batches of shuffled rows; the incomplete batch at the end of each epoch is dropped."""
    size = min(size, count)
    while True:
        yield from torch.randperm(count)[: count // size * size].split(size)


def warmup_cosine(optimizer: Optimizer, steps: int, *, warmup: int = 100) -> LambdaLR:
    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warmup) / max(1, steps - warmup))))

    return LambdaLR(optimizer, factor)


def contrastive_loss(
    image: Tensor,  # (B, D) unit features
    text: Tensor,  # (B, D), of the same frames
    scale: Tensor,  # ()
) -> Tensor:
    """CLIP's loss: match each frame to its caption and each caption to its frame."""
    logits = scale * image @ text.T
    own = torch.arange(len(logits))
    return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2


def emotion_loss(
    image: Tensor,  # (B, D) unit features
    text: Tensor,  # (WORDINGS · E, D): every emotion in one wording, then in the next
    shown: Tensor,  # (B,) int
    scale: Tensor,  # ()
) -> Tensor:
    """Match each frame to its emotion, in every wording."""
    logits = scale * torch.einsum("bd,wed->bwe", image, text.unflatten(0, (WORDINGS, len(EMOTIONS))))
    return F.cross_entropy(logits.flatten(0, 1), shown[:, None].expand(-1, WORDINGS).flatten())


@dataclass
class Checkpoints:
    """Saves and evaluates `tiny-face` every 500 steps and at the end."""

    model: FactoredTower
    config: TrainingConfig
    accuracy: float = math.nan
    """The last checkpoint's, see `zero_shot_accuracy`."""

    def __call__(self, step: int, terms: dict[str, Tensor]) -> None:
        if step % 500 and step != self.config.steps:
            return
        save_half(self.config.out / "tiny-face.safetensors", self.model.stored())
        self.accuracy = zero_shot_accuracy(self.model.shipped())
        losses = ", ".join(f"{name} {value.item():.3f}" for name, value in terms.items())
        log.info("step %d: %s; zero-shot accuracy on unseen people and wordings %.3f", step, losses, self.accuracy)


def zero_shot_accuracy(model: Any, *, individuals: int = 24, seed: int = 5) -> float:
    """Fraction of frames of unseen people whose nearest emotion prompt, in an unseen wording, is correct."""
    faces = SyntheticFaces(individuals, clips=1, frames_per_clip=4, seed=seed)
    config = tiny_face_config()
    mean, std = config["mean"][0], config["std"][0]
    with torch.no_grad():
        image = F.normalize(model.encode_image((faces.frames(range(len(faces))) / 2 + 0.5 - mean) / std), dim=-1)
        tokenizer = SimpleTokenizer()
        right = []
        for template in UNSEEN_TEMPLATES:
            prompts = tokenizer([template.format(EMOTION_WORDS[e][0]) for e in EMOTIONS])
            text = F.normalize(model.encode_text(prompts), dim=-1)
            right.append((image @ text.T).argmax(1) == faces.emotion_index)
    return torch.stack(right).float().mean().item()


def describe(faces: SyntheticFaces, index: int, words: random.Random, distraction: float = 0.0) -> str:
    """A caption of one drawn frame: always its emotion, plus some of what else is visible."""
    parts = unit_phrases(faces, index, words, most=3)
    parts += words.sample(looks_of(faces, index), k=words.randint(1, 4))
    words.shuffle(parts)
    emotion = _emotion_caption(EMOTIONS[int(faces.emotion_index[index])], words, distraction)
    return emotion + words.choice((", ", " with ")) + ", ".join(parts)


def _emotion_caption(emotion: str, words: random.Random, distraction: float) -> str:
    caption = words.choice(TEMPLATES).format(words.choice(EMOTION_WORDS[emotion]))
    if words.random() >= distraction:
        return caption
    # Words that mean nothing here, so that an unseen wording does not drown out the one word that counts.
    before = [words.choice(any_words()) for _ in range(words.choice((0, 0, 1, 2, 3, 4)))]
    after = [words.choice(any_words()) for _ in range(words.choice((0, 0, 1, 2, 3)))]
    return " ".join([*before, caption, *after])


class FactoredTower(nn.Module):
    """tiny-face in training: its token embedding is a product of two thin factors, as in the stored file."""

    def __init__(self) -> None:
        super().__init__()
        self.clip = tiny_face_model()
        vocabulary, width = self.clip.token_embedding.weight.shape
        rank = tiny_face_config()["token_rank"]
        del self.clip.token_embedding
        self.factors = nn.Parameter(torch.randn(vocabulary, rank))
        self.basis = nn.Parameter(torch.randn(rank, width) * 0.02)
        self.tokenizer = SimpleTokenizer()

    def image(
        self,
        pixels: Tensor,  # (B, 3, 64, 64) in [-1, 1]
    ) -> tuple[Tensor, Tensor]:
        """Unit image features (B, D) and the patch features (B, P, W) they are pooled from."""
        config, visual = tiny_face_config(), self.clip.visual
        x = visual._embeds((pixels / 2 + 0.5 - config["mean"][0]) / config["std"][0])
        patches = visual.transformer(x)[:, 1:]
        return F.normalize(visual.ln_post(patches).mean(1) @ visual.proj, dim=-1), patches

    def text(self, captions: list[str]) -> Tensor:
        """Unit text features; padding after the longest caption, which a causal tower never sees, is cut."""
        clip = self.clip
        tokens = self.tokenizer(captions)
        tokens = tokens[:, : int(tokens.argmax(1).max()) + 1]
        length = tokens.shape[1]
        x = F.embedding(tokens, self.factors) @ self.basis + clip.positional_embedding[:length]
        x = clip.ln_final(clip.transformer(x, attn_mask=clip.attn_mask[:length, :length]))
        return F.normalize(x[torch.arange(len(x)), tokens.argmax(1)] @ clip.text_projection, dim=-1)

    def scale(self) -> Tensor:
        return self.clip.logit_scale.exp().clamp(max=100)

    def stored(self) -> dict[str, Tensor]:
        """The contents of the safetensors file, which holds them in half precision."""
        state = {k: v for k, v in self.clip.state_dict().items() if k != "attn_mask"}
        state |= {"token_embedding.factors": self.factors, "token_embedding.basis": self.basis}
        return in_half(state)

    def load_stored(self, tensors: dict[str, Tensor]) -> None:
        """The inverse of `stored`."""
        state = tensors.copy()
        with torch.no_grad():
            self.factors.copy_(state.pop("token_embedding.factors"))
            self.basis.copy_(state.pop("token_embedding.basis"))
        self.clip.load_state_dict(state)

    def shipped(self) -> nn.Module:
        """The model as a user will load it."""
        model = tiny_face_model()
        model.load_state_dict(tiny_face_state(self.stored()))
        return model.eval()


def _attacked(
    model: FactoredTower,
    patch_readout: nn.Module,
    frames: Tensor,  # (B, 3, S, S)
    labels: Tensor,  # (B,)
    reach: float,
) -> Tensor:
    """Frames changed by up to `reach` to look less like their emotion, half of them in patches of 8×8.

    A tower trained on these cannot be fooled by faint patterns and tints: what moves its features also looks like a
    change of expression to people, which is what a generator trained against it needs.
    """
    size = frames.shape[-1]
    bound = reach * torch.rand(len(frames), 1, 1, 1)
    start = bound * (torch.rand_like(frames) * 2 - 1)
    moved = (frames + start).requires_grad_()
    loss = F.cross_entropy(patch_readout(model.image(moved)[1].flatten(1))[:, : len(EMOTIONS)], labels)
    (gradient,) = torch.autograd.grad(loss, moved)
    coarse = F.interpolate(F.avg_pool2d(gradient, 8), (size, size), mode="bilinear", align_corners=False)
    in_patches = torch.rand(len(frames), 1, 1, 1) < 0.5
    step = torch.where(in_patches, coarse, gradient).sign() * bound
    return (frames + torch.where(in_patches, step, (start + 1.25 * step).clamp(-bound, bound))).detach()


if __name__ == "__main__":
    main(train, TinyFaceConfig)
