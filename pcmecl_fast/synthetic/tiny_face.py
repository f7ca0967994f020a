r"""Trains `tiny-face`, the CLIP model that ships with the package, on drawn faces and varied captions (ours).

    python -m pcmecl_fast.synthetic.tiny_face --out first
    python -m pcmecl_fast.synthetic.tiny_face --start first/tiny-face.safetensors --steps 1000 --seed 21 --attack 0.03 \
        --out second
    python -m pcmecl_fast.synthetic.tiny_face_text --start second/tiny-face.safetensors

Three losses share the image features: CLIP's contrastive loss against detailed captions (emotion, action units with
their strength and side, hair, skin, eyes, mouth), a cross entropy against one caption per emotion in many wordings,
and a linear read-out of the action units, so that the features keep each person's own way of showing an emotion.
The text tower is then trained further by itself, see `tiny_face_text`. About three quarters of an hour on two cores.
Zero-shot accuracy is reported on people and wordings that training never saw.
"""

from __future__ import annotations

import logging
import math
import random
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from open_clip.tokenizer import SimpleTokenizer
from safetensors.torch import load_file, save
from torch import Tensor, nn
from tqdm import tqdm

from pcmecl_fast.clip import ASSETS, tiny_face_config, tiny_face_model, tiny_face_state
from pcmecl_fast.data.base import EMOTIONS
from pcmecl_fast.files import write_atomically
from pcmecl_fast.synthetic.augment import augmented, drawn
from pcmecl_fast.synthetic.faces import SyntheticFaces
from pcmecl_fast.synthetic.people import ACTION_UNITS, EYE_COLOURS, HAIR_COLOURS, SKIN_TONES

log = logging.getLogger("pcmecl_fast")

EMOTION_WORDS = {
    "neutral": ("neutral", "calm", "expressionless"),
    "angry": ("angry", "furious", "mad"),
    "disgusted": ("disgusted", "repulsed", "grossed out"),
    "fear": ("fear", "fearful", "afraid", "scared"),
    "happy": ("happy", "joyful", "cheerful"),
    "sad": ("sad", "unhappy", "sorrowful"),
    "surprised": ("surprised", "astonished", "amazed"),
}
TEMPLATES = (
    "{}", "{} face", "a {} face", "a photo of a {} face", "a {} person", "a photo of a {} person", "someone {}",
    "a person who looks {}", "the face of a {} speaker", "a person feeling {}", "they look {}", "a very {} face",
    "a slightly {} face", "a picture of a {} woman", "a picture of a {} man", "a {} expression", "speaking, {}",
)  # fmt: skip
UNSEEN_TEMPLATES = (
    "a portrait of somebody who seems {}",
    "this talking person appears {}",
    "an image showing a {} talker",
    "a close-up of a {} human face",
    "a frame of a video in which one looks {}",
)
UNIT_PHRASES = {
    "inner_brow_raise": "raised inner brows", "outer_brow_raise": "raised outer brows", "brow_lower": "lowered brows",
    "upper_lid_raise": "wide eyes", "cheek_raise": "raised cheeks", "lid_tighten": "narrowed eyes",
    "nose_wrinkle": "wrinkled nose", "upper_lip_raise": "raised upper lip", "lip_corner_pull": "smile",
    "lip_corner_depress": "mouth corners down", "chin_raise": "raised chin", "lip_stretch": "stretched lips",
    "lip_tighten": "pressed lips", "jaw_drop": "dropped jaw",
}  # fmt: skip
LOOKS = (
    *HAIR_COLOURS, *SKIN_TONES, *EYE_COLOURS, "hair", "skin", "eyes", "long", "short", "open mouth", "rounded lips",
    "wide lips", "closed mouth",
)  # fmt: skip


@dataclass
class TinyFaceConfig:
    """How `tiny-face` is trained."""

    steps: int = 2500
    """Optimiser steps."""
    batch: int = 128
    """Frames a step."""
    individuals: int = 1000
    """People drawn for training."""
    lr: float = 2e-3
    """Peak learning rate (AdamW, cosine)."""
    seed: int = 20
    """Seed of people, captions and weights."""
    attack: float = 0.0
    """Largest change of a pixel, of a range of 2, by which frames are pushed away from their emotion."""
    start: Path | None = None
    """A `tiny-face.safetensors` to go on from, at half the learning rate and with all that makes it hard at once."""
    out: Path = ASSETS
    """Folder that `tiny-face.safetensors` is written to."""


def train(config: TinyFaceConfig) -> float:
    """Train, save and return the zero-shot accuracy on unseen people and wordings."""
    torch.manual_seed(config.seed)
    words = random.Random(config.seed)
    faces = SyntheticFaces(config.individuals, clips=1, frames_per_clip=3, seed=config.seed + 1000, intensity=(0.35, 1))
    pixels = drawn(faces)
    units = faces.parameters.action_units.flatten(1)
    model = FactoredTower()
    if config.start is not None:
        model.load_stored(load_file(config.start))
    targets = torch.cat([units, faces.parameters.speech], dim=1)
    readout = nn.Linear(model.clip.visual.output_dim, targets.shape[1])
    # A transformer is slow to find small things like brows. A read-out that knows where each patch lies finds them in
    # a tenth of the steps, and the pooled feature follows.
    patch_readout = nn.LazyLinear(len(EMOTIONS) + targets.shape[1])
    patch_readout(model.image(pixels[:2].float())[1].flatten(1))
    decayed = [p for p in model.parameters() if p.ndim > 1]
    plain = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [
            {"params": decayed, "weight_decay": 0.1},
            {"params": [*plain, *readout.parameters(), *patch_readout.parameters()], "weight_decay": 0.0},
        ],
        lr=config.lr if config.start is None else config.lr / 2,
        betas=(0.9, 0.98),
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: warmup_cosine(step, config.steps))
    progress = tqdm(range(config.steps), desc="tiny-face")
    order = torch.randperm(len(faces))
    position = 0
    for step in progress:
        if position + config.batch > len(order):
            order, position = torch.randperm(len(faces)), 0
        index = order[position : position + config.batch]
        position += config.batch
        half = len(index) // 2  # captions cost more than frames
        # The hard part comes after a third: words that mean nothing, and frames pushed away from their emotion.
        hardness = 1.0 if config.start else min(max(3 * step / config.steps - 1, 0.0), 1.0)
        detailed = [describe(faces, i, words, hardness) for i in index[:half].tolist()]
        by_emotion = [_emotion_caption(e, words, hardness) for _ in range(3) for e in EMOTIONS]
        text = model.text(detailed + by_emotion)
        prompts = text[half:].unflatten(0, (3, len(EMOTIONS)))
        frames = augmented(pixels[index], zoom=0.08, shift=0.06, blurred=0.5, noise=0.1, tint=0.15).clamp(-1, 1)
        if config.attack * hardness > 0:
            frames = _attacked(model, patch_readout, frames, faces.emotion_index[index], config.attack * hardness)
        image, patches = model.image(frames)
        scale = model.clip.logit_scale.exp().clamp(max=100)
        logits = scale * image[:half] @ text[:half].T
        diagonal = torch.arange(half)
        contrastive = (F.cross_entropy(logits, diagonal) + F.cross_entropy(logits.T, diagonal)) / 2
        zero_shot = scale * torch.einsum("bd,wed->bwe", image, prompts)
        labels = faces.emotion_index[index][:, None].expand(-1, 3)
        emotion = F.cross_entropy(zero_shot.flatten(0, 1), labels.flatten())
        style = F.mse_loss(readout(image * math.sqrt(image.shape[1])), targets[index])
        local = patch_readout(patches.flatten(1))
        local_emotion = F.cross_entropy(local[:, : len(EMOTIONS)], faces.emotion_index[index])
        local_style = F.mse_loss(local[:, len(EMOTIONS) :], targets[index])
        loss = contrastive + emotion + 10 * style + local_emotion + 10 * local_style
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 20 == 0:
            progress.set_postfix(
                clip=f"{contrastive.item():.2f}",
                emotion=f"{emotion.item():.2f}/{local_emotion.item():.2f}",
                style=f"{style.item():.3f}",
            )
        if (step + 1) % 500 == 0 or step + 1 == config.steps:
            write_atomically(config.out / "tiny-face.safetensors", save(model.stored()))
            accuracy = zero_shot_accuracy(model.shipped())
            log.info("step %d: zero-shot accuracy on unseen people and wordings %.3f", step + 1, accuracy)
    return accuracy


def zero_shot_accuracy(model: Any, *, individuals: int = 24, seed: int = 5) -> float:
    """Share of frames of unseen people whose nearest emotion prompt, in an unseen wording, is the right one."""
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
    """A caption of one drawn frame: always its emotion, and some of what else can be seen."""
    parts = unit_phrases(faces, index, words, most=3)
    parts += words.sample(looks_of(faces, index), k=words.randint(1, 4))
    words.shuffle(parts)
    emotion = _emotion_caption(EMOTIONS[int(faces.emotion_index[index])], words, distraction)
    return emotion + words.choice((", ", " with ")) + ", ".join(parts)


def unit_phrases(faces: SyntheticFaces, index: int, words: random.Random, *, most: int) -> list[str]:
    """Up to `most` of the action units that one drawn frame shows, with their strength and side."""
    units = faces.parameters.action_units[index]
    shown = [a for a in range(len(ACTION_UNITS)) if float(units[a].mean()) > 0.25]
    chosen = words.sample(shown, k=min(len(shown), words.randint(0, most)))
    return [_unit_phrase(a, float(units[a, 0]), float(units[a, 1])) for a in chosen]


def looks_of(faces: SyntheticFaces, index: int) -> list[str]:
    """Who one drawn frame shows, and how open the mouth is."""
    who, identity = int(faces.individual_index[index]), faces.identities
    return [
        f"{identity.hair_name[who]} hair",
        f"{identity.skin_name[who]} skin",
        f"{identity.eye_name[who]} eyes",
        "long hair" if identity.hair_length[who] > 0.5 else "short hair",
        _mouth_phrase(*faces.parameters.speech[index].tolist()),
    ]


def _unit_phrase(unit: int, left: float, right: float) -> str:
    phrase = UNIT_PHRASES[ACTION_UNITS[unit]]
    strength = (left + right) / 2
    if strength > 1.1:
        phrase = f"strong {phrase}"
    elif strength < 0.55:
        phrase = f"slight {phrase}"
    if left > 1.35 * right:
        phrase += " on the left"
    elif right > 1.35 * left:
        phrase += " on the right"
    return phrase


def _mouth_phrase(openness: float, spread: float) -> str:
    if openness > 0.5:
        return "open mouth"
    if spread < -0.4:
        return "rounded lips"
    return "wide lips" if spread > 0.5 else "closed mouth"


def _emotion_caption(emotion: str, words: random.Random, distraction: float) -> str:
    caption = words.choice(TEMPLATES).format(words.choice(EMOTION_WORDS[emotion]))
    if words.random() >= distraction:
        return caption
    # Words that mean nothing here, so that a wording never seen does not drown the one word that counts.
    before = [words.choice(any_words()) for _ in range(words.choice((0, 0, 1, 2, 3, 4)))]
    after = [words.choice(any_words()) for _ in range(words.choice((0, 0, 1, 2, 3)))]
    return " ".join([*before, caption, *after])


@cache
def any_words() -> list[str]:
    """Every whole word of letters in the vocabulary, but those that name an emotion."""
    named = {word for group in EMOTION_WORDS.values() for phrase in group for word in phrase.split()}
    whole = (token.removesuffix("</w>") for token in SimpleTokenizer().encoder if token.endswith("</w>"))
    return sorted(word for word in whole if word.isascii() and word.isalpha() and word not in named)


class FactoredTower(nn.Module):
    """tiny-face while it trains: its token embedding is a product of two thin factors, as it is stored."""

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
        """Unit image features (B, D) and the patches' features (B, P, W) that they are pooled from."""
        config, visual = tiny_face_config(), self.clip.visual
        x = visual._embeds((pixels / 2 + 0.5 - config["mean"][0]) / config["std"][0])
        patches = visual.transformer(x)[:, 1:]
        return F.normalize(visual.ln_post(patches).mean(1) @ visual.proj, dim=-1), patches

    def text(self, captions: list[str]) -> Tensor:
        """Unit text features; the padding after the longest caption, which a causal tower never looks at, is cut."""
        clip = self.clip
        tokens = self.tokenizer(captions)
        tokens = tokens[:, : int(tokens.argmax(1).max()) + 1]
        length = tokens.shape[1]
        x = F.embedding(tokens, self.factors) @ self.basis + clip.positional_embedding[:length]
        x = clip.ln_final(clip.transformer(x, attn_mask=clip.attn_mask[:length, :length]))
        return F.normalize(x[torch.arange(len(x)), tokens.argmax(1)] @ clip.text_projection, dim=-1)

    def stored(self) -> dict[str, Tensor]:
        """What the safetensors file holds, in half precision."""
        state = {k: v for k, v in self.clip.state_dict().items() if k != "attn_mask"}
        state |= {"token_embedding.factors": self.factors, "token_embedding.basis": self.basis}
        return {k: v.detach().half().contiguous() for k, v in state.items()}

    def load_stored(self, tensors: dict[str, Tensor]) -> None:
        """The opposite of `stored`."""
        state = {k: v.float() for k, v in tensors.items()}
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
    """Frames changed by up to `reach` so that they look less like their emotion, half of them in patches of 8×8.

    A tower trained on these cannot be pleased by faint patterns and tints: what moves its features looks like a
    change of expression to people too, which is what a generator that learns from it needs.
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


def warmup_cosine(step: int, steps: int, warmup: int = 100) -> float:
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warmup) / max(1, steps - warmup))))


if __name__ == "__main__":
    import tyro

    logging.basicConfig(level=logging.INFO)
    train(tyro.cli(TinyFaceConfig))
