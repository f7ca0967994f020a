"""Reads CLIP's weights from files of whatever origin: tensors alone, so that no code in a file ever runs.

A file is a state dict (safetensors, or torch.save), perhaps inside a training checkpoint, or a TorchScript archive such
as OpenAI's `ViT-B-32.pt`. `torch.jit.load` would set up the archive's code; here the pickle that lists its tensors goes
through an unpickler that knows nothing but tensors and modules.
"""

from __future__ import annotations

import io
import pickle
import re
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

OPENAI_EXTRAS = {"input_resolution", "context_length", "vocab_size"}
"""Numbers that OpenAI's files hold among the weights; open_clip's models do not have them."""


def read_weights(path: str | Path) -> tuple[dict[str, Tensor], bool]:
    """A file's state dict, and whether it is OpenAI's own: those have a few numbers more, which are left out.

    So are causal masks: TorchScript forgets that a model makes its own, and no state dict has them.

    Raises:
        ValueError: the file holds no state dict, or more than tensors; one line, with the way to convert it.
    """
    loaded = _load(Path(path))
    state = loaded.get("state_dict", loaded) if isinstance(loaded, dict) else loaded
    if not isinstance(state, dict) or not state:
        raise ValueError(f"it holds a {type(state).__name__}, not the names and tensors of a state dict")
    if all(isinstance(key, str) and key.startswith("module.") for key in state):
        state = {key.removeprefix("module."): value for key, value in state.items()}
    openai = not OPENAI_EXTRAS.isdisjoint(state)
    unwanted = OPENAI_EXTRAS | {key for key in state if str(key).endswith("attn_mask")}
    weights = {key: value for key, value in state.items() if key not in unwanted}
    other = next(
        (key for key, value in weights.items() if not isinstance(key, str) or not isinstance(value, Tensor)), None
    )
    if other is not None:
        raise ValueError(
            f"its {other!r} is a {type(weights[other]).__name__}; a state dict has names and tensors alone"
        )
    return weights, openai


def _load(path: Path) -> Any:
    if path.suffix == ".safetensors":
        return load_file(path)
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            script = next((name for name in archive.namelist() if name.endswith("/constants.pkl")), None)
            if script is not None:
                return _Script(archive, script.removesuffix("constants.pkl")).state_dict()
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except EOFError as error:
        raise ValueError("it ends too early to hold weights") from error
    except pickle.UnpicklingError as error:
        raise ValueError(_why_not(path, str(error))) from error


def _why_not(path: Path, error: str) -> str:
    """The one fact in torch's page of advice, which ends with the one not to follow."""
    wanted = re.search(r"GLOBAL (\S+)", error)
    if wanted is None:
        found = re.search(r"Unsupported [^\n]*", error)
        return f"torch.load finds no weights in it{f' ({found[0]})' if found else ''}"
    return (
        f"it holds more than tensors, {wanted[1]}, and reading that could run code; where you trust the file, make a "
        f'state dict of it: python -c "import torch; x = torch.load({str(path)!r}, weights_only=False); '
        "torch.save(x.get('state_dict', x) if isinstance(x, dict) else x.state_dict(), 'weights.pt')\""
    )


class _Script:
    """The parameters and buffers of a TorchScript archive. Its code is text here, read for the names of buffers."""

    def __init__(self, archive: zipfile.ZipFile, folder: str) -> None:
        self._archive, self._folder = archive, folder
        self._declared: dict[str, Callable[[str], bool]] = {}

    def state_dict(self) -> dict[str, Tensor]:
        root = _Unpickler(io.BytesIO(self._read("data.pkl")), self._storage).load()
        if not isinstance(root, _Module):
            raise ValueError(f"its TorchScript archive holds a {type(root).__name__}, not a module")
        return dict(self._tensors(root, ""))

    def _tensors(self, module: _Module, prefix: str) -> Iterator[tuple[str, Tensor]]:
        is_state = self._is_state(module.qualified_name)
        for name, value in module.attributes.items():
            if isinstance(value, _Module):
                yield from self._tensors(value, f"{prefix}{name}.")
            elif isinstance(value, Tensor) and is_state(name):
                yield f"{prefix}{name}", value

    def _is_state(self, qualified_name: str) -> Callable[[str], bool]:
        """Whether a class keeps a tensor in its state dict, or as a plain attribute, such as a mask."""
        if qualified_name not in self._declared:
            place, _, name = qualified_name.rpartition(".")
            code = self._read(f"code/{place.replace('.', '/')}.py").decode()
            body = re.search(rf"^class {re.escape(name)}\(Module\):\n((?:[ \n].*\n?)*)", code, re.MULTILINE)
            lists = re.findall(r"^  __(?:parameters|buffers)__ = \[(.*)\]$", body[1] if body else "", re.MULTILINE)
            names = {found for each in lists for found in re.findall(r'"([^"]+)"', each)}
            # Before torch 1.7 the code named parameters alone.
            everything = len(lists) < 2
            self._declared[qualified_name] = lambda attribute: everything or attribute in names
        return self._declared[qualified_name]

    def _storage(self, key: str, dtype: torch.dtype) -> Tensor:  # flat
        content = bytearray(self._read(f"data/{key}"))
        return torch.frombuffer(content, dtype=dtype) if content else torch.empty(0, dtype=dtype)

    def _read(self, name: str) -> bytes:
        return self._archive.read(self._folder + name)


class _Module:
    """A module of an archive: its attributes, and the name of its class."""

    qualified_name = ""

    def __init__(self) -> None:
        self.attributes: dict[str, Any] = {}

    def __setstate__(self, state: Any) -> None:
        self.attributes = state if isinstance(state, dict) else {}


class _Unpickler(pickle.Unpickler):
    """Makes tensors, numbers, strings, lists, dicts and `_Module`s; whatever else a pickle asks for is refused."""

    def __init__(self, file: io.BytesIO, storage: Callable[[str, torch.dtype], Tensor]) -> None:
        super().__init__(file)
        self._storage = storage

    def find_class(self, module: str, name: str) -> Any:
        if module.startswith("__torch__"):
            return type(name, (_Module,), {"qualified_name": f"{module}.{name}"})
        if module == "torch" and name in _STORAGES:
            return _STORAGES[name]
        if (module, name) in _ALLOWED:
            return _ALLOWED[module, name]
        raise pickle.UnpicklingError(f"its TorchScript archive asks for {module}.{name}, which weights do not need")

    def persistent_load(self, pid: Any) -> Tensor:
        _, dtype, key, _device, _count = pid
        return self._storage(key, dtype)


def _tensor(storage: Tensor, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any) -> Tensor:
    return storage.as_strided(size, stride, offset)


def _as_it_is(value: Any, *_: Any) -> Any:
    return value


_STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
_ALLOWED: dict[tuple[str, str], Callable[..., Any]] = {
    ("collections", "OrderedDict"): OrderedDict,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch", "device"): _as_it_is,
    **{
        ("torch.jit._pickle", name): _as_it_is
        for name in ("build_intlist", "build_tensorlist", "build_doublelist", "build_boollist", "restore_type_tag")
    },
}
