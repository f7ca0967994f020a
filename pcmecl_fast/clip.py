"""CLIP models by name: everything open_clip has, and `tiny-face`, the small one that ships with the package."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import astuple
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

import open_clip
import torch
from open_clip.tokenizer import SimpleTokenizer
from open_clip.transformer import QuickGELU
from safetensors.torch import load_file
from torch import Tensor, nn

from pcmecl_fast.hub import HubError, from_hub
from pcmecl_fast.ops.operator import requested_backend
from pcmecl_fast.preprocessing import Preprocessing, of_open_clip, preprocessing_of_file, tag_config
from pcmecl_fast.towers.fingerprint import VERSION, tower_hash
from pcmecl_fast.towers.image import encode_image, image_obstacle
from pcmecl_fast.towers.precision import GradientRange
from pcmecl_fast.weights import read_weights
from pcmecl_fast.wording import did_you_mean, one_line

log = logging.getLogger("pcmecl_fast")

TINY_FACE = "tiny-face"
ASSETS = Path(__file__).parent / "assets"


def load_clip(
    name: str = TINY_FACE,
    pretrained: str | None = None,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    interpolation: Literal["bicubic", "bilinear"] | None = None,
    resize_mode: Literal["squash", "shortest", "longest"] | None = None,
    like: str | None = None,
) -> Clip:
    """Load a frozen CLIP model.

    Images are prepared as the weights were trained: a tag and a model of the Hub say how, and a file is taken to follow
    the tags of its architecture. The last five arguments are for files that follow others.

    Args:
        name: `"tiny-face"` (built in: drawn faces, 64×64, no download) or any name open_clip knows, such as
            `"ViT-B-32"`.
        pretrained: a weights tag of open_clip (`"openai"`, `"laion2b_s34b_b79k"`, …) or a local file: a state dict
            (safetensors or torch.save) or a TorchScript archive such as OpenAI's. Only tensors are read from it; no
            code in it runs. None gives random weights, the same in every process, and a warning.
        device: where to put the model; None means the CPU.
        dtype: dtype of its parameters.
        mean: of red, green and blue in [0, 1], which is subtracted.
        std: three numbers above 0, by which they are divided.
        interpolation: of the resize to the tower's size, antialiased.
        resize_mode: how frames that are not square become so: "squash" scales the sides independently, "shortest" cuts
            out the central square, "longest" pads.
        like: a weights tag of `name` whose preprocessing a file follows.

    Raises:
        ValueError: `name`, `pretrained` or `like` is unknown, and the message lists the closest matches; or a file's
            architecture has tags of different preprocessing, and none was chosen.
        RuntimeError: the weights could not be fetched or read; without a network, within seconds.
    """
    options = {"mean": mean, "std": std, "interpolation": interpolation, "resize_mode": resize_mode}
    given = {option: value for option, value in options.items() if value is not None}
    if name == TINY_FACE:
        _check_nothing_given({"pretrained": pretrained, "like": like, **options})
        return _tiny_face().to(device=device, dtype=dtype)

    _check_name(name)
    registered = None if like is None else tag_config(name, like)
    of_file: Preprocessing | None = None
    if pretrained is not None:
        _check_pretrained(name, pretrained)
        if _is_file(name, pretrained):
            of_file = preprocessing_of_file(name, like=like, given=given)
    else:
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(name)[:4]) or "a local file"
        log.warning("%s has random weights, so its features mean nothing: pass pretrained= (%s).", name, tags)
    # The same random tower in every process: a bank built in one must be valid in the others.
    with torch.random.fork_rng(devices=[]), _quiet_root(logging.ERROR if pretrained is None else logging.WARNING):
        torch.manual_seed(0)
        model = _open_clip_model(name, pretrained)
    preprocessing = of_file or of_open_clip(registered or open_clip.get_model_preprocess_cfg(model), given)
    clip = Clip(model, name, pretrained or "random", preprocessing, partial(_open_clip_tokenizer, name))
    return clip.to(device=device, dtype=dtype)


class Clip(nn.Module):
    """A frozen CLIP model in eval mode: `train()` has no effect and its parameters never require gradients."""

    def __init__(
        self,
        model: nn.Module,
        name: str,
        pretrained: str,
        preprocessing: Preprocessing,
        tokenizer: Callable[[], Any],
    ) -> None:
        super().__init__()
        self.model: Any = model.requires_grad_(False).eval()
        self.name = name
        self.pretrained = pretrained
        self.preprocessing = preprocessing
        self._make_tokenizer = tokenizer
        visual: Any = model.visual
        size = visual.image_size
        self.image_size = int(size if isinstance(size, int) else size[0])
        self._known: dict[str, Any] = {}
        """What is asked of the weights as loaded, before any cast: a tower in bfloat16 is still the same tower."""
        self._known_of: tuple[int, ...] = ()
        """The `_versions` of those weights."""
        self._obstacle: str | None = None
        """The last that was logged."""
        self.eval()

    def encode_image(
        self,
        frames: Tensor,  # (B, 3, H, W) in [-1, 1], any H and W
        *,
        backend: str | None = None,
    ) -> Tensor:
        """Image features (B, D), not normalised; gradients reach the frames.

        Square frames are resized. Of others, the tower sees what `preprocessing.resize_mode` leaves: most towers of
        open_clip the central square; SigLIP, PE and tiny-face the whole frame, squashed.

        Vision transformers run faster and in less memory than `model.encode_image`, with the same result up to
        rounding; where `image_obstacle()` names a reason, and with `backend="reference"`, that is what runs.
        `model.set_grad_checkpointing()` makes the backward pass recompute blocks instead of keeping them, and
        `model.set_grad_checkpointing("attention")` queries, keys, values and what they mix alone. Features are in the
        tower's dtype; of a float16 tower, where gradients are wanted of wider frames, in theirs, and gradients are
        scaled inside it.
        """
        pixels = self.preprocessing(frames, self.image_size, backend=backend)
        if self.dtype is not torch.float16 or pixels.dtype is torch.float16 or not pixels.requires_grad:
            return self._encode(pixels.to(self.dtype), backend)
        scaled = GradientRange()
        return scaled.leave(self._encode(scaled.enter(pixels).to(self.dtype), backend).to(pixels.dtype))

    def _encode(self, pixels: Tensor, backend: str | None) -> Tensor:
        if requested_backend(backend) == "reference":
            return self.model.encode_image(pixels)
        obstacle = image_obstacle(self.model)
        if obstacle is None:
            return encode_image(self.model, pixels)
        if obstacle != self._obstacle and not torch.compiler.is_compiling():
            log.info("images take the plain path, the model's own: %s", obstacle)
            self._obstacle = obstacle
        return self.model.encode_image(pixels)

    def image_obstacle(self) -> str | None:
        """Why the image tower runs as open_clip runs it, in more time and memory, or None if it does not."""
        return image_obstacle(self.model)

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
        if "logit scale" in self._known and self._versions() == self._known_of:
            return min(self._known["logit scale"], 100.0)
        return min(float(self.model.logit_scale.float().exp()), 100.0)

    @property
    def device(self) -> torch.device:
        return self.model.logit_scale.device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.model.visual.parameters()).dtype

    def text_hash(self) -> str:
        """A hash of what the text tower computes, which a prompt bank is tied to: its weights as loaded, and what its
        layers do with them. It does not depend on the dtype."""
        return self._once("text hash", lambda: tower_hash(self.model, visual=False))

    def image_hash(self) -> str:
        """A hash of everything that determines image features: weights, layers, dtype and preprocessing."""
        tower = self._once("image hash", lambda: tower_hash(self.model, visual=True))
        how = f"{tower} {self.dtype} {self.image_size} {astuple(self.preprocessing)}"
        return VERSION + hashlib.blake2b(how.encode(), digest_size=16).hexdigest()

    def train(self, mode: bool = True) -> Clip:
        return super().train(False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Clip:
        if fn(torch.zeros(1, dtype=self.dtype, device=self.device)).dtype != self.dtype:
            self.text_hash(), self.image_hash()
            self._once("logit scale", lambda: float(self.model.logit_scale.exp()))
        known = self._known if self._versions() == self._known_of else {}
        applied = super()._apply(fn, recurse)
        self._known, self._known_of = known, self._versions()
        return applied

    def _once(self, what: str, compute: Callable[[], Any]) -> Any:
        """What is computed of the weights, once as long as they are the same."""
        if self._versions() != self._known_of:
            self._known, self._known_of = {}, self._versions()
        if what not in self._known:
            self._known[what] = compute()
        return self._known[what]

    def _versions(self) -> tuple[int, ...]:
        """Others after weights have been changed in place, as by loading a state dict."""
        return tuple(0 if x.is_inference() else x._version for x in self.model.parameters())


def _open_clip_model(name: str, pretrained: str | None) -> Any:
    openais: list[bool] = []

    def read(path: str, *_: Any, **__: Any) -> dict[str, Tensor]:
        weights, openai = read_weights(path)
        openais.append(openai)
        return weights

    def create() -> Any:
        with _reading_files_by(read):
            return open_clip.create_model(name, pretrained=pretrained, precision="fp32", weights_only=True)

    text = _text_config(name).get("hf_model_name")
    fetched = [f"the weights {pretrained!r}"] if pretrained and not _is_file(name, pretrained) else []
    fetched += [f"the configuration {text!r} of its text tower"] if text else []
    if name.startswith("hf-hub:"):
        fetched = ["its files"]
    repository = _repository(name, pretrained) or text
    try:
        model = from_hub(create, **_words(name, pretrained, fetched), repository=repository) if fetched else create()
    except HubError:
        raise
    except Exception as error:
        what = f"pretrained: the weights {pretrained!r} of {name!r}" if pretrained else f"name: {name!r}"
        raise RuntimeError(f"{what} could not be loaded ({_cause(error)})") from error
    if any(openais) and not any(isinstance(module, QuickGELU) for module in model.modules()):
        log.warning("%s is OpenAI's, made for quick-GELU, and %s has another activation: %s", *_quick(name, pretrained))
    return model


@contextmanager
def _reading_files_by(read: Callable[..., dict[str, Tensor]]) -> Iterator[None]:
    """What open_clip reads, with another reader: its own knows no TorchScript, nor the extra numbers of OpenAI's."""
    before = open_clip.factory.load_state_dict
    open_clip.factory.load_state_dict = read
    try:
        yield
    finally:
        open_clip.factory.load_state_dict = before


def _cause(error: Exception) -> str:
    """An error, whole on one line; of a state dict that does not fit, the first few tensors."""
    first, *mismatches = one_line(error).split("size mismatch for ")
    more = f" size mismatch for {len(mismatches) - 2} more" if len(mismatches) > 2 else ""
    return first + "".join(f"size mismatch for {each}" for each in mismatches[:2]).rstrip() + more


def _quick(name: str, pretrained: str | None) -> tuple[str | None, str, str]:
    sibling = f"{name}-quickgelu"
    way_out = f"load it as {sibling}" if sibling in open_clip.list_models() else "its features will differ"
    return pretrained, name, way_out


def _repository(name: str, pretrained: str | None) -> str | None:
    """Where on the hub a model's weights are; None for a file's."""
    if name.startswith("hf-hub:"):
        return name.removeprefix("hf-hub:")
    registered = open_clip.get_pretrained_cfg(name, pretrained or "").get("hf_hub", "")
    return "/".join(registered.split("/")[:2]) or None


def _open_clip_tokenizer(name: str) -> Any:
    fetched = _text_config(name).get("hf_tokenizer_name") or (name if name.startswith("hf-hub:") else None)
    if fetched is None:
        return open_clip.get_tokenizer(name)
    words = _words(name, None, [f"the tokenizer {fetched!r}"], attribute=".tokenizer")
    try:
        with _quiet_root(logging.WARNING):
            return from_hub(lambda: open_clip.get_tokenizer(name), **words, repository=fetched.removeprefix("hf-hub:"))
    except ModuleNotFoundError as error:
        raise ImportError(f"name: the tokenizer of {name!r} needs {error.name}; pip install {error.name}") from error
    except HubError:
        raise
    except Exception as error:
        raise RuntimeError(f"name: the tokenizer of {name!r} could not be loaded ({_cause(error)})") from error


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
    if pretrained in tags or _is_file(name, pretrained) or name.startswith(("hf-hub:", "local-dir:")):
        return
    raise ValueError(
        f"pretrained: {pretrained!r} is neither a file nor a weights tag of {name!r}; its tags are {', '.join(tags)}"
    )


def _is_file(name: str, pretrained: str) -> bool:
    """Whether the weights are a local file's; a tag comes before a file of its name, as in open_clip."""
    brings_its_own = name.startswith(("hf-hub:", "local-dir:"))
    return not brings_its_own and not open_clip.get_pretrained_cfg(name, pretrained) and Path(pretrained).is_file()


def _check_nothing_given(options: dict[str, Any]) -> None:
    for option, value in options.items():
        if value is not None:
            built_in = "weights" if option == "pretrained" else "preprocessing"
            raise ValueError(f"{option}: {TINY_FACE!r} has its {built_in} built in and takes none, got {value!r}")


def _tiny_face() -> Clip:
    model = tiny_face_model()
    model.load_state_dict(tiny_face_state(load_file(ASSETS / "tiny-face.safetensors")))
    config = tiny_face_config()
    return Clip(model, TINY_FACE, "built-in", Preprocessing(config["mean"], config["std"]), SimpleTokenizer)


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
