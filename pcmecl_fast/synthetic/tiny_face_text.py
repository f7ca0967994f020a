"""The last part of training `tiny-face`: its text tower alone, on fixed image features (ours).

    python -m pcmecl_fast.synthetic.tiny_face_text --start second/tiny-face.safetensors

A text tower that has learned to ignore every word but the emotion's cannot be steered by a learned context either.
Here, visible details (how far each brow is raised, on which side the smile is) come before the emotion's word as often
as after it, just where a personalized context goes, and they matter: the contrastive loss asks for the exact frame
among many of the same emotion. Emotions come in composed sentences, so that unseen wordings still work.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from pcmecl_fast.clip import ASSETS
from pcmecl_fast.data.emotions import EMOTIONS
from pcmecl_fast.synthetic.augment import augmented, drawn
from pcmecl_fast.synthetic.captions import (
    EMOTION_WORDS,
    LOOKS,
    TEMPLATES,
    UNIT_PHRASES,
    any_words,
    looks_of,
    unit_phrases,
)
from pcmecl_fast.synthetic.faces import SyntheticFaces
from pcmecl_fast.synthetic.tiny_face import (
    WORDINGS,
    Checkpoints,
    FactoredTower,
    contrastive_loss,
    emotion_loss,
    warmup_cosine,
)
from pcmecl_fast.synthetic.training import TrainingConfig, load_half, main, optimise

_OPENINGS = (
    "", "", "", "a photo of", "a picture of", "an image of", "a video of", "a shot of", "a drawing of", "this is",
    "here is", "we see", "it shows", "a still of", "there is", "look at",
)  # fmt: skip
_SENTENCES = (
    "{e}", "a {e} {s}", "the {e} {s}", "{e} {s}", "a {s} who looks {e}", "the face of a {s} feeling {e}",
    "a {s} in a {e} mood", "a {s} being {e}", "a {s} whose face is {e}", "a {s} with a {e} expression",
    "a talking {s}, {e}", "a {s} who is {e}", "this {s} feels {e}", "some {s} looking {e}", "{s}: {e}",
    "a very {e} {s}", "a {s} speaking in a {e} way", "how a {s} gets {e}",
)  # fmt: skip
_SUBJECTS = ("face", "person", "speaker", "man", "woman", "human", "actor", "someone", "figure", "girl", "boy")
_ENDINGS = ("", "", "", "", "while speaking", "in a video", "today", "outdoors", "in a studio", "on camera")


@dataclass
class TextConfig(TrainingConfig):
    """Options for training the text tower of `tiny-face`."""

    start: Path = ASSETS / "tiny-face.safetensors"
    """Both towers, as `pcmecl_fast.synthetic.tiny_face` left them."""
    steps: int = 3000
    batch: int = 96
    lr: float = 1e-3
    seed: int = 33
    views: int = 3
    """Features per frame, each from a different random view."""
    strange: float = 0.4
    """Fraction of captions sprinkled with unrelated words."""


def train(config: TextConfig) -> float:
    """Train, save and return the zero-shot accuracy on unseen people and wordings."""
    torch.manual_seed(config.seed)
    words = random.Random(config.seed)
    faces = SyntheticFaces(config.individuals, clips=1, frames_per_clip=3, seed=config.seed + 1000, intensity=(0.35, 1))
    model = FactoredTower()
    model.load_stored(load_half(config.start))
    features = _features(model, drawn(faces), config.views)  # (V, L, D)
    model.clip.visual.requires_grad_(False)
    learned = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learned, lr=config.lr, weight_decay=0.05, betas=(0.9, 0.98))

    def loss(_: int) -> tuple[Tensor, dict[str, Tensor]]:
        index = torch.randint(len(faces), (config.batch,))
        image = features[torch.randint(config.views, index.shape), index]
        captions = [strewn(describe(faces, i, words), words, config.strange / 2) for i in index.tolist()]
        prompts = [strewn(emotion_sentence(e, words), words, config.strange) for _ in range(WORDINGS) for e in EMOTIONS]
        text = model.text(captions + prompts)
        contrastive = contrastive_loss(image, text[: config.batch], model.scale())
        emotion = emotion_loss(image, text[config.batch :], faces.emotion_index[index], model.scale())
        return contrastive + emotion, {"contrastive": contrastive, "emotion": emotion}

    save = Checkpoints(model, config)
    schedule = warmup_cosine(optimizer, config.steps)
    optimise("tiny-face's text tower", config.steps, optimizer, schedule, loss, clipped=model, after=save)
    return save.accuracy


def describe(faces: SyntheticFaces, index: int, words: random.Random) -> str:
    """A caption of one drawn frame: details of its expression before, after or instead of the emotion."""
    parts = unit_phrases(faces, index, words, most=4)
    parts += words.sample(looks := looks_of(faces, index), k=words.randint(0, min(3, len(looks))))
    words.shuffle(parts)
    details, emotion = ", ".join(parts), emotion_sentence(EMOTIONS[int(faces.emotion_index[index])], words)
    if not parts:
        return emotion
    where = words.random()
    if where < 0.25:
        return details
    if where < 0.7:
        return details + words.choice((", ", " ", " and ")) + emotion
    return emotion + words.choice((", ", " with ")) + details


def emotion_sentence(emotion: str, words: random.Random) -> str:
    """An emotion in one of about a thousand wordings."""
    word = words.choice(EMOTION_WORDS[emotion])
    if words.random() < 0.5:
        return words.choice(TEMPLATES).format(word)
    sentence = words.choice(_SENTENCES).format(e=word, s=words.choice(_SUBJECTS))
    return " ".join(part for part in (words.choice(_OPENINGS), sentence, words.choice(_ENDINGS)) if part)


def strewn(caption: str, words: random.Random, part: float) -> str:
    """A caption surrounded by words that mean nothing here, none of which describe faces."""
    if words.random() >= part:
        return caption
    before = [words.choice(_strange_words()) for _ in range(words.choice((0, 1, 1, 2, 3)))]
    after = [words.choice(_strange_words()) for _ in range(words.choice((0, 1, 1, 2)))]
    return " ".join([*before, caption, *after])


@cache
def _strange_words() -> list[str]:
    described = " ".join((*UNIT_PHRASES.values(), *LOOKS, "strong slight on the left right"))
    return [word for word in any_words() if word not in described.split()]


@torch.no_grad()
def _features(model: FactoredTower, pixels: Tensor, views: int) -> Tensor:
    """Unit image features of every frame in `views` random views, (V, L, D)."""
    chunks = [chunk for _ in range(views) for chunk in pixels.split(256)]
    rows = [
        model.image(augmented(chunk, zoom=0.08, shift=0.06, blurred=0.5, noise=0.1, tint=0.15).clamp(-1, 1))[0]
        for chunk in tqdm(chunks, desc="image features")
    ]
    return torch.cat(rows).unflatten(0, (views, len(pixels)))


if __name__ == "__main__":
    main(train, TextConfig)
