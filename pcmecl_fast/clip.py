"""CLIP models by name: everything open_clip has, and `tiny-face`, the small one that ships with the package."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.tokenizer import SimpleTokenizer
from safetensors.torch import load_file
from torch import Tensor, nn

from pcmecl_fast import ops
from pcmecl_fast.hub import HubError, first_line, from_hub
from pcmecl_fast.wording import did_you_mean

log = logging.getLogger("pcmecl_fast")

TINY_FACE = "tiny-face"
ASSETS = Path(__file__).parent / "assets"


def load_clip(
    name: str = TINY_FACE,
    pretrained: str | None = None,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Clip:
    """Load a frozen CLIP model.

    Args:
        name: `"tiny-face"` (built in: drawn faces, 64×64, no download) or any name open_clip knows, such as
            `"ViT-B-32"`.
        pretrained: a weights tag of open_clip (`"openai"`, `"laion2b_s34b_b79k"`, …) or a local checkpoint file.
            None gives random weights, the same in every process, and a warning.
        device: where to put the model; None means the CPU.
        dtype: dtype of its parameters.

    Raises:
        ValueError: `name` or `pretrained` is unknown; the message lists the closest matches.
        RuntimeError: the weights could not be fetched or read; without a network, within seconds.
    """
    if name == TINY_FACE:
        if pretrained is not None:
            raise ValueError(f"pretrained: {TINY_FACE!r} has its weights built in and takes none, got {pretrained!r}")
        model = tiny_face_model()
        model.load_state_dict(tiny_face_state(load_file(ASSETS / "tiny-face.safetensors")))
        config = tiny_face_config()
        return Clip(model, name, "built-in", config["mean"], config["std"], SimpleTokenizer).to(
            device=device, dtype=dtype
        )

    _check_name(name)
    if pretrained is not None:
        _check_pretrained(name, pretrained)
    else:
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(name)[:4]) or "a local file"
        log.warning("%s has random weights, so its features mean nothing: pass pretrained= (%s).", name, tags)
    # The same random tower in every process: a bank built in one must be valid in the others.
    with torch.random.fork_rng(devices=[]), _quiet_root(logging.ERROR if pretrained is None else logging.WARNING):
        torch.manual_seed(0)
        model = _open_clip_model(name, pretrained)
    preprocessing = open_clip.get_model_preprocess_cfg(model)
    return Clip(
        model,
        name,
        pretrained or "random",
        preprocessing["mean"],
        preprocessing["std"],
        lambda: _open_clip_tokenizer(name),
    ).to(device=device, dtype=dtype)


class Clip(nn.Module):
    """A frozen CLIP model in eval mode: `train()` has no effect and its parameters never require gradients."""

    def __init__(
        self,
        model: nn.Module,
        name: str,
        pretrained: str,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        tokenizer: Callable[[], Any],
    ) -> None:
        super().__init__()
        self.model: Any = model.requires_grad_(False).eval()
        self.name = name
        self.pretrained = pretrained
        self.mean, self.std = tuple(mean), tuple(std)
        self._make_tokenizer = tokenizer
        visual: Any = model.visual
        size = visual.image_size
        self.image_size = int(size if isinstance(size, int) else size[0])
        # Taken before any cast: a tower in bfloat16 is still the same tower.
        self._text_hash: str | None = None
        self._visual_hash: str | None = None
        self.eval()

    def encode_image(
        self,
        frames: Tensor,  # (B, 3, H, W) in [-1, 1], any H and W
        *,
        backend: str | None = None,
    ) -> Tensor:
        """Image features (B, D), not normalised; gradients reach the frames."""
        pixels = ops.clip_frames(frames, self.image_size, self.mean, self.std, backend=backend)
        return self.model.encode_image(pixels.to(self.dtype))

    @cached_property
    def tokenizer(self) -> Callable[[list[str]], Tensor]:
        """Strings to token ids, (n, context_length); some models' has to be fetched: RuntimeError if it cannot be."""
        return self._make_tokenizer()

    @cached_property
    def embed_dim(self) -> int:
        """D, the size of the features shared by images and texts."""
        with torch.no_grad():
            side = self.image_size
            return self.model.encode_image(torch.zeros(1, 3, side, side, device=self.device, dtype=self.dtype)).shape[1]

    @property
    def logit_scale(self) -> float:
        """exp of the learned temperature, at most 100."""
        return min(float(self.model.logit_scale.exp()), 100.0)

    @property
    def device(self) -> torch.device:
        return self.model.logit_scale.device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.model.visual.parameters()).dtype

    def text_hash(self) -> str:
        """A hash of the text tower's weights as loaded, which a prompt bank is tied to."""
        if self._text_hash is None:
            self._text_hash = self._hash(visual=False)
        return self._text_hash

    def image_hash(self) -> str:
        """A hash of everything that determines image features: weights, dtype and preprocessing."""
        if self._visual_hash is None:
            self._visual_hash = self._hash(visual=True)
        how = f"{self._visual_hash} {self.dtype} bicubic {self.image_size} {self.mean} {self.std}"
        return hashlib.blake2b(how.encode(), digest_size=16).hexdigest()

    def _hash(self, *, visual: bool) -> str:
        digest = hashlib.blake2b(digest_size=16)
        for key, value in sorted(self.model.state_dict().items()):
            if key.startswith("visual.") == visual:
                digest.update(f"{key}{tuple(value.shape)}".encode())
                digest.update(value.detach().cpu().contiguous().float().numpy().tobytes())
        return digest.hexdigest()

    def train(self, mode: bool = True) -> Clip:
        return super().train(False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Clip:
        if fn(torch.zeros(1, dtype=self.dtype, device=self.device)).dtype != self.dtype:
            self.text_hash(), self.image_hash()
        return super()._apply(fn, recurse)


def _open_clip_model(name: str, pretrained: str | None) -> Any:
    def create() -> Any:
        return open_clip.create_model(name, pretrained=pretrained, precision="fp32", weights_only=True)

    text = _text_config(name).get("hf_model_name")
    fetched = [f"the weights {pretrained!r}"] if pretrained and not Path(pretrained).is_file() else []
    fetched += [f"the configuration {text!r} of its text tower"] if text else []
    if name.startswith("hf-hub:"):
        fetched = ["its files"]
    try:
        return from_hub(create, **_words(name, pretrained, fetched)) if fetched else create()
    except HubError:
        raise
    except Exception as error:
        what = f"pretrained: the weights {pretrained!r} of {name!r}" if pretrained else f"name: {name!r}"
        raise RuntimeError(f"{what} could not be loaded ({first_line(error)})") from error


def _open_clip_tokenizer(name: str) -> Any:
    fetched = _text_config(name).get("hf_tokenizer_name") or (name if name.startswith("hf-hub:") else None)
    if fetched is None:
        return open_clip.get_tokenizer(name)
    words = _words(name, None, [f"the tokenizer {fetched!r}"], attribute=".tokenizer")
    try:
        with _quiet_root(logging.WARNING):
            return from_hub(lambda: open_clip.get_tokenizer(name), **words)
    except ModuleNotFoundError as error:
        raise ImportError(f"name: the tokenizer of {name!r} needs {error.name}; pip install {error.name}") from error


def _words(name: str, pretrained: str | None, fetched: list[str], attribute: str = "") -> dict[str, str]:
    """The words of `from_hub` for a model."""
    arguments = ", ".join(f"'{argument}'" for argument in (name, pretrained) if argument)
    return {
        "subject": f"name: {name!r}",
        "what": " and ".join(fetched),
        "bring": f"load_clip({arguments}){attribute}",
    }


def _text_config(name: str) -> dict[str, Any]:
    """That of a model that open_clip has built in: asking for another one's would fetch it."""
    return open_clip.get_model_config(name)["text_cfg"] if name in open_clip.list_models() else {}


@contextmanager
def _quiet_root(level: int) -> Iterator[None]:
    """Drop open_clip's root-logger messages below `level`: it logs every step, and repeats our own warning."""

    def important(record: logging.LogRecord) -> bool:
        return level <= record.levelno < logging.ERROR

    root = logging.getLogger()
    root.addFilter(important)
    try:
        yield
    finally:
        root.removeFilter(important)


def _check_name(name: str) -> None:
    known = open_clip.list_models()
    if name in known or name.startswith(("hf-hub:", "local-dir:")):
        return
    hint = did_you_mean(name, [TINY_FACE, *known], most=4, cutoff=0.4) or f"e.g. {TINY_FACE}, ViT-B-32, ViT-L-14"
    raise ValueError(f"name: no CLIP model is called {name!r}; {hint}")


def _check_pretrained(name: str, pretrained: str) -> None:
    tags = open_clip.list_pretrained_tags_by_model(name)
    if pretrained in tags or Path(pretrained).is_file() or name.startswith(("hf-hub:", "local-dir:")):
        return
    raise ValueError(
        f"pretrained: {pretrained!r} is neither a file nor a weights tag of {name!r}; its tags are {', '.join(tags)}"
    )


def tiny_face_config() -> dict[str, Any]:
    return json.loads((ASSETS / "tiny-face.json").read_text())


def tiny_face_model() -> Any:
    """The architecture of `tiny-face` with untrained weights: a 64×64 ViT and a causal text tower of 77 tokens."""
    config = tiny_face_config()
    return open_clip.CLIP(embed_dim=config["embed_dim"], vision_cfg=config["vision"], text_cfg=config["text"])


def tiny_face_state(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The model's state dict, from the stored half-precision tensors.

    The 49,408 token embeddings, most of the model at this size, are stored as a product of two thin factors.
    """
    state = {key: value.float() for key, value in tensors.items()}
    factors = state.pop("token_embedding.factors"), state.pop("token_embedding.basis")
    state["token_embedding.weight"] = factors[0] @ factors[1]
    return state
