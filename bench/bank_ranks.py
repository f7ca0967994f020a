"""A bank that ranks build together, looked up in little memory: `python -m bench.bank_ranks --rows 1000000`.

Each row is 8 × 512 in float16: eight emotions by the text tower of tiny-face, whose projection is widened with random
numbers to 512. Conditions are random unit vectors, made from their number when they are asked for. Printed are the rate
of the build, the bytes on disk, and the peak memory of each rank and of a process of its own that opens the bank, looks
rows up in random order and compares some of them with the prompts'.
"""

from __future__ import annotations

import os
import resource
import socket
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.multiprocessing as mp
import torch.nn.functional as F
import tyro
from open_clip.tokenizer import SimpleTokenizer
from torch import Tensor, nn

from pcmecl_fast import PersonalizedPrompts, PromptBank, load_clip
from pcmecl_fast.clip import Clip, tiny_face_config
from pcmecl_fast.distributed import joined, rank, ranks
from pcmecl_fast.preprocessing import Preprocessing

EMOTIONS = ["neutral", "angry", "contempt", "disgusted", "fear", "happy", "sad", "surprised"]
WIDTH = 512


@dataclass
class Options:
    """Build a bank by several ranks and look its rows up at random."""

    rows: int = 20_000
    """Individuals; a million take 8.2 GB of disk."""
    ranks: int = 2
    """Processes that build, with one thread each."""
    batch: int = 256
    """Individuals per batch of the text tower."""
    lookups: int = 500
    """Batches of 64 random rows that are looked up."""
    folder: Path | None = None
    """Where the bank is written, and stays; by default a temporary folder."""


def main(options: Options) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = options.folder or Path(name)
        folder.mkdir(parents=True, exist_ok=True)
        mp.spawn(_build, (options, folder / "bank.safetensors", _free_port()), options.ranks)
        files = [path for path in folder.iterdir() if path.name.startswith("bank")]
        print(f"on disk: {sum(path.stat().st_size for path in files) / 1e9:.2f} GB in {len(files)} files")
        mp.spawn(_look_up, (options, folder / "bank.safetensors"), 1)


def _build(number: int, options: Options, path: Path, port: int) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(number), "WORLD_SIZE": str(options.ranks)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    clip = wide_clip()
    before = _megabytes()
    with joined("cpu"):
        began = time.perf_counter()
        bank = PromptBank.build(
            _prompts(clip), _Conditions(options.rows), _names(options.rows), EMOTIONS,
            clip=clip, batch_size=options.batch, path=path, dtype=torch.float16,
        )  # fmt: skip
        took = time.perf_counter() - began
        assert len(bank.individuals) == options.rows
        if rank() == 0:
            print(f"{ranks()} ranks: {options.rows:,} rows in {took:.0f} s, {options.rows / took:.0f} rows a second")
        print(f"rank {rank()}: {before:.0f} MB before, at most {_megabytes():.0f} MB", flush=True)


def _look_up(_: int, options: Options, path: Path) -> None:
    torch.set_num_threads(1)
    clip = wide_clip()
    before, began = _megabytes(), time.perf_counter()
    bank = PromptBank.load(path, clip, on_disk=True)
    opened = time.perf_counter() - began
    generator = torch.Generator().manual_seed(0)
    began = time.perf_counter()
    for _ in range(options.lookups):
        which = torch.randint(options.rows, (64,), generator=generator)
        rows = bank.lookup(which)
    took = time.perf_counter() - began
    names = bank.rows([bank.individuals[int(i)] for i in which])
    assert torch.equal(names, which)
    with torch.no_grad():
        expected = _prompts(clip)(_Conditions(options.rows)[which])
    error = (rows.float() - expected).abs().max()
    print(f"opened in {opened:.1f} s; {options.lookups * 64 / took:.0f} random rows a second")
    print(f"memory: {before:.0f} MB before, at most {_megabytes():.0f} MB; largest error {error:.1e}")
    assert error < 1e-3


def wide_clip() -> Clip:
    """tiny-face with features of 512 numbers."""
    config, model = tiny_face_config(), load_clip().model
    random = torch.Generator().manual_seed(0)
    for owner, name in ((model, "text_projection"), (model.visual, "proj")):
        width = len(getattr(owner, name))
        setattr(owner, name, nn.Parameter(torch.randn(width, WIDTH, generator=random) * width**-0.5))
    return Clip(model, "wide-face", "tiny-face", Preprocessing(config["mean"], config["std"]), SimpleTokenizer)


def _prompts(clip: Clip) -> PersonalizedPrompts:
    torch.manual_seed(1)
    prompts = PersonalizedPrompts(clip, EMOTIONS, n_ctx=2)
    torch.nn.init.normal_(prompts.get_parameter("condition_net.2.weight"), std=0.3)
    return prompts.requires_grad_(False)


class _Conditions:
    """Random unit vectors, each a function of its number."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.frequencies = torch.rand(WIDTH, generator=torch.Generator().manual_seed(2), dtype=torch.float64) * 1000

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: Tensor) -> Tensor:
        return F.normalize(torch.sin(index[:, None] * self.frequencies), dim=-1).float()


def _names(count: int) -> list[str]:
    return [f"person-{number:07d}" for number in range(count)]


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def _megabytes() -> float:
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most / 2**20 if sys.platform == "darwin" else most / 2**10


if __name__ == "__main__":
    main(tyro.cli(Options))
