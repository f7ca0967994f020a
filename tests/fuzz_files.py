"""Files with damaged bytes, read by what reads them: `python tests/fuzz_files.py --files 10000 --seed 0`.

Each is read in a process of its own kind, which may neither die nor hang nor unpickle an object: it says that the file
was read, as one with another number in a tensor is, or raises an error that names the file. A file is damaged by its
number and the seed alone, so that `--only 1234` repeats one, and `--keep FOLDER` keeps those that fail. The suite does
the first few hundred (`test_fuzz.py`).
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import pickle
import re
import resource
import shutil
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import yaml
from tqdm import tqdm

from pcmecl_fast import PersonalizedPrompts, PromptBank, load_clip
from pcmecl_fast.clip import Clip
from pcmecl_fast.data.features import FeatureStore, LiveFeatures
from pcmecl_fast.data.folder import FolderFaces
from pcmecl_fast.data.media import read_frames, write_frames
from pcmecl_fast.models import load_generator, save_generator
from pcmecl_fast.models.base import make_generator
from pcmecl_fast.options import plain_options, read_config
from pcmecl_fast.prompts import load_prompts, save_prompts
from pcmecl_fast.synthetic import SyntheticFaces
from pcmecl_fast.train.config import TrainConfig
from pcmecl_fast.train.loop import Loop

Random = np.random.Generator

EMOTIONS = ["neutral", "happy", "sad"]
SECONDS = 60.0  # until a reader counts as hanging, on however busy a machine
MEMORY = 4 * 2**30  # that a reader may take; its libraries alone take half a GiB


class Outcome(NamedTuple):
    kind: str
    says: str
    """"read", "refused", or else what is wrong."""


def fuzz(
    numbers: range, seed: int, *, workers: int = 1, keep: Path | None = None, progress: bool = False
) -> tuple[Counter[str], list[str]]:
    """Damage and read these files: how many there were of each kind, and a line for each that failed."""
    counts: Counter[str] = Counter()
    failures = []
    parts = [numbers[i::workers] for i in range(workers)]
    with (
        tempfile.TemporaryDirectory() as folder,
        ThreadPoolExecutor(workers) as pool,
        tqdm(total=len(numbers), disable=not progress, unit="file") as bar,
    ):
        work = partial(_drive, Path(folder), seed, keep, bar)
        for number, outcome in sorted(pair for part in pool.map(work, parts) for pair in part):
            well = outcome.says in ("read", "refused")
            counts[f"{outcome.kind}: {outcome.says if well else 'failed'}"] += 1
            if not well:
                again = f"python tests/fuzz_files.py --seed {seed} --only {number}"
                failures.append(f"{outcome.kind}: {outcome.says}\n    {again}")
    return counts, failures


# ---- The files, and what reads them ----------------------------------------------------------------------------------


class Reader:
    """Makes whole files of every kind, and reads damaged ones."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.clip = load_clip()
        self.faces = SyntheticFaces(3, emotions=EMOTIONS, clips=1, frames_per_clip=2, size=32)
        self.files = {**self._runs_files(), **self._media()}

    def _runs_files(self) -> dict[str, tuple[str, bytes, Callable[[Path], Any]]]:
        """By kind: the file's name, its content, and its reader."""
        whole = self.folder / "whole"
        prompts = _prompts(self.clip)
        conditions = LiveFeatures(self.clip, self.faces)[torch.arange(3)]
        bank, learned, generator = (whole / f"{name}.safetensors" for name in ("bank", "prompts", "generator"))
        PromptBank.build(prompts, conditions, ["ann", "ben", "cleo"], EMOTIONS, clip=self.clip, path=bank)
        save_prompts(learned, prompts, EMOTIONS, self.clip)
        save_generator(generator, make_generator("warp-fields", EMOTIONS, 32))
        loop = _loop(whole, resume=False)
        for step in loop:
            loop.record(step, loss=1 / (step + 1))
        FeatureStore(whole / "store", self.clip)(self.faces)
        [shard] = (whole / "store").rglob("*.safetensors")
        self.store = shard.parent.relative_to(whole / "store")
        config = yaml.safe_dump(plain_options(TrainConfig()), sort_keys=False).encode()
        return {
            "config": ("config.yaml", config, lambda path: read_config(TrainConfig, path)),
            "bank": (bank.name, bank.read_bytes(), self._read_bank),
            "bank on disk": (bank.name, bank.read_bytes(), partial(self._read_bank, on_disk=True)),
            "prompts": (learned.name, learned.read_bytes(), self._read_prompts),
            "generator": (generator.name, generator.read_bytes(), self._read_generator),
            "checkpoint": (loop.path.name, loop.path.read_bytes(), _read_checkpoint),
            "store": ("shard.safetensors", shard.read_bytes(), self._read_store),
        }

    def _media(self) -> dict[str, tuple[str, bytes, Callable[[Path], Any]]]:
        whole = self.folder / "whole" / "media"
        frames = self.faces.frames(torch.arange(6))
        found: dict[str, tuple[str, bytes, Callable[[Path], Any]]] = {}
        for suffix in ("jpg", "png", "webp"):
            write_frames(whole / f"face.{suffix}", frames[:1], None)
        if _videos_can_be_read():
            for suffix in ("mp4", "mov", "avi", "mkv", "webm"):
                write_frames(whole / f"face.{suffix}", frames, 25)
        for path in sorted(whole.iterdir()):
            found[path.suffix] = (path.name, path.read_bytes(), lambda path: read_frames(path, 16))
            found[f"folder of {path.suffix}"] = (path.name, path.read_bytes(), self._read_folder)
        return found

    def read(self, kind: str, content: bytes) -> str:
        """What comes of it: "read", "refused", or what is wrong."""
        name, _, read = self.files[kind]
        path = self.folder / "damaged" / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
        with warnings.catch_warnings(), _Unpickled() as unpickled:
            warnings.simplefilter("ignore")
            try:
                read(path)
                says = "read"
            except (ValueError, FileNotFoundError) as error:
                says = "refused" if path.name in str(error) else f"{type(error).__name__} without the file: {error}"
            except Exception as error:  # not what the readers' docstrings say
                says = f"{type(error).__name__}: {error}"
        if unpickled.names:
            return f"unpickled {unpickled.names}"
        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        return f"took {most / 2**30:.1f} GiB" if most > MEMORY else says

    def _read_bank(self, path: Path, *, on_disk: bool = False) -> None:
        bank = PromptBank.load(path, self.clip, on_disk=on_disk)
        shape = (len(bank.individuals), len(bank.emotions), self.clip.embed_dim)
        assert bank.lookup(torch.arange(len(bank.individuals))).shape == shape

    def _read_prompts(self, path: Path) -> None:
        prompts, emotions = load_prompts(path, self.clip)
        assert prompts(torch.ones(1, self.clip.embed_dim)).shape == (1, len(emotions), self.clip.embed_dim)

    def _read_generator(self, path: Path) -> None:
        generator = load_generator(path)
        with torch.no_grad():
            assert generator(torch.zeros(1, 3, 32, 32), torch.tensor([1])).shape == (1, 3, 32, 32)

    def _read_store(self, path: Path) -> None:
        root = path.parent / "store"
        shutil.rmtree(root, ignore_errors=True)
        (root / self.store).mkdir(parents=True)
        path.rename(root / self.store / path.name)
        assert FeatureStore(root, self.clip)(self.faces)[torch.arange(len(self.faces))].shape[0] == len(self.faces)

    def _read_folder(self, path: Path) -> None:
        root = path.parent / "faces"
        shutil.rmtree(root, ignore_errors=True)
        (root / "ann" / "happy").mkdir(parents=True)
        path.rename(root / "ann" / "happy" / path.name)
        faces = FolderFaces(root, size=16)
        faces.frames(torch.arange(len(faces)))


def _prompts(clip: Clip) -> PersonalizedPrompts:
    torch.manual_seed(0)
    return PersonalizedPrompts(clip, ["a calm face", "joy", "about to cry"], n_ctx=3).requires_grad_(False)


def _loop(folder: Path, *, resume: bool) -> Loop:
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 3)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(2, 4)).sum().backward()
    optimizer.step()
    states = {"model": model, "optimizer": optimizer}
    signature = {"seed": 0, "data": "synthetic"}
    return Loop(folder, "stage 1", states, steps=3, seed=0, every=2, resume=resume, signature=signature)


def _read_checkpoint(path: Path) -> None:
    loop = _loop(path.parent, resume=True)
    assert loop.path == path
    assert 0 <= loop.done <= loop.steps
    for step in loop:
        loop.record(step, loss=0.5)
    loop.states["optimizer"].step()  # with the state that was read


def _videos_can_be_read() -> bool:
    try:
        import av  # noqa: F401
    except ImportError:
        return False
    return True


class _Unpickled:
    """Notes what Python's unpickler looks up; torch's own, which allows tensors alone, is another."""

    current: _Unpickled | None = None
    hooked = False

    def __enter__(self) -> _Unpickled:
        self.names: list[str] = []
        if not _Unpickled.hooked:
            sys.addaudithook(_note)
        _Unpickled.hooked, _Unpickled.current = True, self
        return self

    def __exit__(self, *_: object) -> None:
        _Unpickled.current = None


def _note(event: str, arguments: tuple[Any, ...]) -> None:
    if event in ("pickle.find_class", "os.system") and _Unpickled.current is not None:
        _Unpickled.current.names.append(".".join(map(str, arguments)))


# ---- The damage ------------------------------------------------------------------------------------------------------


def damaged(content: bytes, random: Random) -> bytes:
    """Some bytes flipped, changed, cut, put in or left out: half of the time where headers are."""
    data = bytearray(content)
    for _ in range(_pick(random, [1, 1, 1, 1, 2, 8])):
        damage = _pick(random, [*[_flip] * 6, _set, _set, _retype, _retype, _cut, _insert, _remove, _zero])
        damage(data, random)
    return _pick(random, POISONS) if random.random() < 0.01 else bytes(data)


class _Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("exit 0",)


def _poison(save: Callable[[Any, Path], Any]) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "poison"
        save({"step": 1, "states": _Evil(), "curves": {}, "signature": {}}, path)
        return path.read_bytes()


POISONS = [
    pickle.dumps(_Evil()),
    _poison(torch.save),
    _poison(partial(torch.save, _use_new_zipfile_serialization=False)),
    b"!!python/object/apply:os.system ['exit 0']\n",
]


def _flip(data: bytearray, random: Random) -> None:
    if data:
        data[_place(data, random)] ^= 1 << random.integers(8)


def _set(data: bytearray, random: Random) -> None:
    if data:
        data[_place(data, random)] = random.integers(256)


def _retype(data: bytearray, random: Random) -> None:
    """Another word in a text, of the same kind or not: what flipped bits hardly ever make."""
    text = bytes(data[:4096])
    words = [match.span() for match in re.finditer(rb'\\?"[^"\\]{0,80}\\?"|\d+|null|true|false', text)]
    if not words:
        return
    begin, end = words[random.integers(len(words))]
    word = _pick(random, WORDS)
    if text[begin : begin + 1] == b"\\":  # inside a text that is quoted itself
        word = word.replace(b'"', b'\\"')
    data[begin:end] = word
    if text[8:9] == b"{":  # a safetensors file: its head begins with the head's length
        length = int.from_bytes(text[:8], "little") + len(word) - (end - begin)
        data[:8] = (length % 2**64).to_bytes(8, "little")


WORDS = [b"null", b"[]", b"{}", b"-1", b"0", b"7", b"1e999", b"NaN", b"0.5", b'"F16"', b'"x"', b"true", b"9" * 30]
WORDS += [b"9" * 5000, b"[" * 3000, b'{"a": 1}', b'["a", 3]', b"2001-99-99", b"&a [*a]", b"!!binary x", b'"\\ud800"']


def _cut(data: bytearray, random: Random) -> None:
    del data[random.integers(len(data) + 1) :]


def _insert(data: bytearray, random: Random) -> None:
    at = _place(data, random)
    data[at:at] = random.bytes(_pick(random, [1, 3, 8, 100]))


def _remove(data: bytearray, random: Random) -> None:
    at = _place(data, random)
    del data[at : at + _pick(random, [1, 3, 8, 100])]


def _zero(data: bytearray, random: Random) -> None:
    at = _place(data, random)
    stop = min(at + _pick(random, [4, 8, 64]), len(data))
    data[at:stop] = bytes(stop - at)


def _place(data: bytearray, random: Random) -> int:
    size = max(len(data), 1)
    head = min(size, 2048)
    begin, end = _pick(random, [(0, head), (size - head, size), (0, size), (0, size)])
    return int(random.integers(begin, end))


def _pick(random: Random, choices: Any) -> Any:
    return choices[random.integers(len(choices))]


# ---- The processes ---------------------------------------------------------------------------------------------------


def _drive(folder: Path, seed: int, keep: Path | None, bar: Any, numbers: range) -> list[tuple[int, Outcome]]:
    """Have one process after another read these files."""
    outcomes: list[tuple[int, Outcome]] = []
    worker = None
    for number in numbers:
        worker = worker or _Worker(folder)
        outcome = worker.read(number, seed, keep)
        if outcome.says not in ("read", "refused"):
            tqdm.write(f"{number} {outcome.kind}: {outcome.says}", file=sys.stderr)
        outcomes.append((number, outcome))
        bar.update()
        if not worker.alive:
            worker = None
    if worker:
        worker.ours.close()
        worker.process.join(10)
        worker.end()
    return outcomes


class _Worker:
    """A process that reads; done with once it has died or hung."""

    def __init__(self, folder: Path, serve: Callable[[Connection, str], None] | None = None) -> None:
        context = multiprocessing.get_context("spawn")
        self.ours, theirs = context.Pipe()
        own = tempfile.mkdtemp(dir=folder)
        self.process = context.Process(target=serve or _serve, args=(theirs, own), daemon=True)
        self.process.start()
        theirs.close()
        self.alive = True
        self.kinds: list[str] = self.ours.recv()

    def read(self, number: int, seed: int, keep: Path | None) -> Outcome:
        kind = self.kinds[number % len(self.kinds)]
        try:
            self.ours.send((number, seed, keep))
            says = self.ours.recv() if self.ours.poll(SECONDS) else "hangs"
        except (EOFError, OSError):
            self.process.join()
            says = f"crash: exit status {self.process.exitcode}"
        if says == "hangs" or says.startswith(("crash", "took")):
            self.end()
        return Outcome(kind, says)

    def end(self) -> None:
        self.process.kill()
        self.process.join()
        self.alive = False


def _serve(pipe: Connection, folder: str) -> None:
    os.environ["TQDM_DISABLE"] = "1"
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # what decoders say of what they find
    torch.set_num_threads(1)
    reader = Reader(Path(folder))
    kinds = list(reader.files)
    for kind in kinds:  # the first time, libraries are loaded
        whole = reader.read(kind, reader.files[kind][1])
        assert whole == "read", f"{kind}, undamaged: {whole}"
    pipe.send(kinds)
    while True:
        try:
            number, seed, keep = pipe.recv()
        except EOFError:
            return
        kind = kinds[number % len(kinds)]
        name, content, _ = reader.files[kind]
        content = damaged(content, np.random.default_rng([seed, number]))
        kept = keep and keep / f"{number}-{name}"
        if kept:
            keep.mkdir(parents=True, exist_ok=True)
            kept.write_bytes(content)
        says = reader.read(kind, content)
        if kept and says in ("read", "refused"):
            kept.unlink()
        pipe.send(says)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--only", type=int, help="the number of one file")
    parser.add_argument("--keep", type=Path, help="a folder for the files that fail")
    options = parser.parse_args()
    numbers = range(options.files) if options.only is None else range(options.only, options.only + 1)
    counts, failures = fuzz(numbers, options.seed, workers=options.workers, keep=options.keep, progress=True)
    for failure in failures:
        print(failure)
    for kind, count in sorted(counts.items()):
        print(f"{count:6} {kind}")
    print(f"{len(numbers)} files, {len(failures)} failures")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
