"""A user's own generator trains, resumes, evaluates and edits like the built-in one; this one is from the docs."""

import dataclasses
import json
import re
import sys
from pathlib import Path

import pytest
import torch
from one_line import wrong
from safetensors.torch import load_file
from summaries import means

from pcmecl_fast.cli import main
from pcmecl_fast.data.media import read_frames, write_frames
from pcmecl_fast.edit import run_edit
from pcmecl_fast.models import Generator, WarpFields, WarpFieldsConfig, load_generator, save_generator
from pcmecl_fast.models.base import BUILT_IN, generator_class, make_generator
from pcmecl_fast.synthetic import SyntheticFaces
from pcmecl_fast.train.config import EditConfig

pytestmark = pytest.mark.usefixtures("no_report")

DOCUMENT = Path(__file__).parents[1] / "docs" / "generators.md"
EMOTIONS = ["neutral", "happy"]
TRAIN = ["train", "--emotions", *EMOTIONS, "--individuals", "2", "--clips", "1", "--frames-per-clip", "1"]
TRAIN += ["--size", "32", "--device", "cpu", "--batch", "4", "--steps", "20", "--prompt-steps", "2"]
TRAIN += ["--checkpoint-every", "7", "--generator", "residual:Residual", "--generator-options", "width=8"]

OWN = ["--generator", "residual:Residual"]

NOISY = """
import torch
from pcmecl_fast.models import Edit
from residual import Residual

class Noisy(Residual):
    def edit(self, frames, target):
        frames, penalties, _ = super().edit(frames, target)
        shown = frames.mean((2, 3))[:, :2] + self.asked.weight.sum()
        return Edit((frames + 0.1 * torch.randn_like(frames)).clamp(-1, 1), penalties, shown)
"""


@pytest.fixture(autouse=True)
def here(tmp_path_factory, monkeypatch):
    """The current directory, which is not on the path, holds `residual.py`; each test imports its modules itself."""
    here = tmp_path_factory.mktemp("own")
    (here / "residual.py").write_text(re.search(r"```python\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)[1])
    (here / "noisy.py").write_text(NOISY)
    monkeypatch.chdir(here)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    before = set(sys.modules)
    yield here
    for name in set(sys.modules) - before:
        if getattr(sys.modules[name], "__file__", None) and Path(sys.modules[name].__file__).parent == here:
            del sys.modules[name]


def train(out, *options):
    return main([*TRAIN, *options, "--out", str(out)])


def killed_after(steps, out, *options, monkeypatch):
    """A training run that ends in the middle, as if killed."""
    from pcmecl_fast.train.loop import Loop

    record = Loop.record

    def dying(self, step, **scalars):
        if self.name == "stage 2" and step == steps:
            raise OSError("killed")
        record(self, step, **scalars)

    monkeypatch.setattr(Loop, "record", dying)
    assert train(out, *options) == 1
    monkeypatch.setattr(Loop, "record", record)


def assert_same_weights(one, other):
    one, other = (load_file(run / "generator.safetensors") for run in (one, other))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_it_trains_resumes_evaluates_and_edits_from_a_file_outside_the_package(tmp_path, monkeypatch):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert train(whole) == 0
    killed_after(16, killed, monkeypatch=monkeypatch)
    assert not (killed / "generator.safetensors").exists()
    assert torch.load(killed / "stage-2.ckpt", weights_only=True)["step"] == 14
    assert train(killed, "--resume") == 0
    assert_same_weights(whole, killed)

    curves = torch.load(killed / "stage-2.ckpt", weights_only=True)["curves"]
    assert len(curves["stage 2/change"]) == 20
    assert "stage 2/smooth" not in curves
    assert main(["evaluate", "--run", str(whole), "--device", "cpu", *OWN]) == 0
    first, second = (json.loads((out / "summary.json").read_text()) for out in (whole, whole / "evaluation"))
    assert means(first) == pytest.approx(means(second), rel=1e-3, abs=1e-3)

    picture = tmp_path / "face.png"
    write_frames(picture, SyntheticFaces(1, emotions=EMOTIONS, size=32).frames([0]), None)
    edit = ["edit", "--run", str(whole), "--input", str(picture), "--emotion", "happy", "--device", "cpu"]
    assert main([*edit, *OWN, "--out", str(tmp_path / "edited")]) == 0
    _, edited = read_frames(tmp_path / "edited" / "face.happy.png", 32)
    assert edited.shape == (1, 3, 32, 32)
    generator = load_generator(whole / "generator.safetensors", generator=OWN[1])
    assert (type(generator).__name__, generator.config.width, generator.emotions) == ("Residual", 8, EMOTIONS)


def test_one_that_uses_random_numbers_resumes_and_edits_the_same(tmp_path, monkeypatch):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    options = ["--generator", "noisy:Noisy", "--steps", "6", "--checkpoint-every", "2"]
    assert train(whole, *options) == 0
    killed_after(3, killed, *options, monkeypatch=monkeypatch)
    assert train(killed, *options, "--resume") == 0
    assert_same_weights(whole, killed)

    picture = tmp_path / "face.png"
    write_frames(picture, SyntheticFaces(1, emotions=EMOTIONS, size=32).frames([0]), None)
    edited = {}
    for name, seed in (("first", 0), ("again", 0), ("other", 1)):
        own = EditConfig(picture, "happy", run=whole, generator="noisy:Noisy", out=tmp_path / name, seed=seed)
        run_edit(dataclasses.replace(own, device="cpu"))
        edited[name] = (tmp_path / name / "face.happy.png").read_bytes()
    assert edited["first"] == edited["again"] != edited["other"]


def test_recognition_of_the_shown_emotion_is_trained(tmp_path):
    assert train(tmp_path, "--generator", "noisy:Noisy", "--steps", "1") == 0
    curves = torch.load(tmp_path / "stage-2.ckpt", weights_only=True)["curves"]
    assert "stage 2/recognition" in curves


def test_operators_that_it_calls_follow_the_backend_of_edit(here, tmp_path):
    (here / "asks.py").write_text(
        "from pcmecl_fast.models import Edit, Generator\n"
        "from pcmecl_fast.ops.operator import requested_backend\n"
        "seen = []\n"
        "class Asks(Generator):\n"
        "    def edit(self, frames, target):\n"
        "        seen.append(requested_backend(None))\n"
        "        return Edit(frames, {})\n"
    )
    save_generator(tmp_path / "generator.safetensors", make_generator("asks:Asks", EMOTIONS, 32))
    write_frames(tmp_path / "face.png", torch.zeros(1, 3, 32, 32), None)
    edit = EditConfig(tmp_path / "face.png", "happy", run=tmp_path, out=tmp_path / "edited", device="cpu")
    edit.generator = "asks:Asks"
    run_edit(dataclasses.replace(edit, backend="reference"))
    run_edit(dataclasses.replace(edit, overwrite=True))
    assert sys.modules["asks"].seen == ["reference", "auto"]


def test_another_generator_on_the_command_line_does_not_get_the_files_options(tmp_path, capsys):
    (tmp_path / "config.yaml").write_text("generator_options: {hidden: 24}\n")
    line = wrong(capsys, *TRAIN, "--config", tmp_path / "config.yaml", "--generator-options", "w_chnge=1")
    assert line.startswith(
        "pcmecl-fast train: --generator-options: no option is called 'w_chnge'; did you mean w_change?"
    )
    assert "hidden" not in line


# Mistakes


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--generator", "warp-feilds"], "no generator is called 'warp-feilds'; did you mean warp-fields? --generator"),
        (["--generator", "mine"], "--generator takes warp-fields, warp-paint or your own as package.module:Class"),
        (
            ["--generator", "nowhere:Net"],
            "--generator nowhere:Net takes a module in the current folder or on PYTHONPATH; there is no nowhere",
        ),
        (["--generator", "broken:Net"], "--generator broken:Net cannot be imported (ZeroDivisionError: division by"),
        (["--generator", "residual:Net"], "a subclass of pcmecl_fast.models.Generator; residual has no 'Net'"),
        (["--generator", "torch.nn:Conv2d"], "a subclass of pcmecl_fast.models.Generator; Conv2d is not one"),
        (["--generator", "pcmecl_fast.models:Generator"], "does not define edit(frames, target) -> Edit"),
        (["--generator-options", "widht=8"], "no option is called 'widht'; did you mean width? (options of"),
        (["--generator-options", "x=8"], "no option is called 'x' (options of residual:Residual: width, w_change)"),
        (["--generator-options", "width=wide"], "width: got 'wide'; takes int"),
    ],
)
def test_one_that_cannot_be_created_is_explained_before_training(options, says, here, tmp_path, capsys):
    (here / "broken.py").write_text("1 / 0\n")
    line = wrong(capsys, *TRAIN, *options, "--out", tmp_path / "out")
    assert line.startswith(f"pcmecl-fast train: {options[0]}")
    assert says in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("returned", "says"),
    [
        ("frames", "edit returns Edit(frames, penalties), got Tensor"),
        ("Edit(frames[:, :, 1:], {})", "edit was given frames (4, 3, 32, 32), returned (4, 3, 31, 32)"),
        ("Edit(frames, {'cycle': frames.mean()})", "the trainer has a 'cycle' of its own"),
        ("Edit(frames, {'size': frames})", "the penalty 'size' must be a tensor of one number"),
    ],
)
def test_an_invalid_edit_is_explained(returned, says, here, tmp_path, capsys):
    (here / "odd.py").write_text(
        "from residual import Residual\n"
        "from pcmecl_fast.models import Edit\n"
        f"class Odd(Residual):\n    def edit(self, frames, target):\n        return {returned}\n"
    )
    line = wrong(capsys, *TRAIN, "--generator", "odd:Odd", "--out", tmp_path)
    assert line.startswith("pcmecl-fast train: --generator: ")
    assert says in line


def test_a_file_whose_generator_is_gone_or_has_changed_is_explained(here, tmp_path):
    path = tmp_path / "generator.safetensors"
    save_generator(path, make_generator("residual:Residual", EMOTIONS, 32, {"width": 8}))
    source = (here / "residual.py").read_text()
    (here / "residual.py").write_text(source.replace("self.paint", "self.draw"))
    del sys.modules["residual"]
    with pytest.raises(ValueError, match=r"written by the generator residual:Residual, .*\n.*Missing key.*draw.weight"):
        load_generator(path, generator=OWN[1])
    (here / "residual.py").unlink()
    del sys.modules["residual"]
    with pytest.raises(
        ValueError,
        match=r"^generator: --generator residual:Residual takes a module .*; there is no residual in either$",
    ):
        load_generator(path, generator=OWN[1])


def test_a_files_word_alone_runs_no_code(here, tmp_path, capsys):
    save_generator(tmp_path / "generator.safetensors", make_generator("residual:Residual", EMOTIONS, 32))
    write_frames(tmp_path / "face.png", torch.zeros(1, 3, 32, 32), None)
    (here / "residual.py").write_text("raise SystemExit('run')")
    del sys.modules["residual"]
    line = wrong(capsys, "edit", "--run", tmp_path, "--input", tmp_path / "face.png", "--emotion", "happy")
    assert "was written by residual:Residual, code that is not part of pcmecl_fast" in line
    assert "--generator residual:Residual lets it run" in line
    assert line.startswith(("pcmecl-fast edit: --run: ", "pcmecl-fast evaluate: --run: "))
    with pytest.raises(ValueError, match="generator=residual:Residual lets it run"):
        load_generator(tmp_path / "generator.safetensors", generator="other:Residual")


def test_the_current_directory_takes_no_modules_place(here, tmp_path):
    before = list(sys.path)
    save_generator(tmp_path / "built-in", make_generator("warp-fields", EMOTIONS, 32))
    load_generator(tmp_path / "built-in")
    assert sys.path == before
    make_generator("residual:Residual", EMOTIONS, 32)
    assert sys.path == [*before, str(here)]


# Names and options


def test_a_name_leads_to_its_class_and_back(tmp_path):
    assert generator_class("warp-fields") is WarpFields
    for name in BUILT_IN:
        generator = make_generator(name, EMOTIONS, 32)
        save_generator(tmp_path / name, generator)
        assert type(load_generator(tmp_path / name)) is type(generator)


def test_tied_weights_and_paths_are_saved(here, tmp_path):
    (here / "tied.py").write_text(
        "from dataclasses import dataclass\n"
        "from pathlib import Path\n"
        "from torch import nn\n"
        "from pcmecl_fast.models import Edit, Generator\n"
        "@dataclass\n"
        "class TiedConfig:\n"
        "    mask: Path = Path('mask.png')\n"
        "    sides: tuple[float, float] = (1.0, 2.0)\n"
        "class Tied(Generator):\n"
        "    Config = TiedConfig\n"
        "    def __init__(self, *of):\n"
        "        super().__init__(*of)\n"
        "        self.one = nn.Linear(2, 2)\n"
        "        self.other = self.one\n"
        "    def edit(self, frames, target):\n"
        "        return Edit(frames, {})\n"
    )
    options = {"mask": "other.png", "sides": [3, "1e-3"]}
    save_generator(tmp_path / "tied", make_generator("tied:Tied", EMOTIONS, 32, options))
    config = load_generator(tmp_path / "tied", generator="tied:Tied").config
    assert (config.mask, config.sides) == (Path("other.png"), (3.0, 1e-3))


def test_a_generator_without_options_has_none():
    class Nothing(Generator):
        def edit(self, frames, target):
            raise NotImplementedError

    assert dataclasses.asdict(Nothing(EMOTIONS, 32).config) == {}


@pytest.mark.parametrize("name", list(BUILT_IN))
def test_the_document_lists_the_options_of_the_built_in_ones(name):
    section = DOCUMENT.read_text().split(f"## {name}\n")[1].split("\n## ")[0]
    listed = re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE)
    own = [field.name for field in dataclasses.fields(generator_class(name).Config)]
    shared = [field.name for field in dataclasses.fields(WarpFieldsConfig)]
    assert listed == (own if name == "warp-fields" else [field for field in own if field not in shared])
