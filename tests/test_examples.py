"""The examples: each script trains a step on a stand-in, each page's lines run, and both are about the same models."""

import importlib
import inspect
import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest
import torch

from pcmecl_fast import cli
from pcmecl_fast.data.emotions import EMOTIONS
from pcmecl_fast.data.media import write_frames
from pcmecl_fast.synthetic import SyntheticFaces
from tests.test_docs import ROOT, blocks

EXAMPLES = ROOT / "docs" / "examples"
SCRIPTS = sorted(path.stem for path in EXAMPLES.glob("*.py") if path.stem != "common")
PAGES = sorted(path.stem for path in EXAMPLES.glob("*.md"))
MODELS = [name for name in SCRIPTS if name != "own_loop"]


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    """A finished run of `pcmecl-fast prompts`, for two people and every emotion."""
    folder = tmp_path_factory.mktemp("examples")
    faces = SyntheticFaces(2, clips=1, frames_per_clip=2, size=32)
    for i in range(len(faces)):
        person, emotion = faces.individuals[faces.individual_index[i]], faces.emotions[faces.emotion_index[i]]
        write_frames(folder / "faces" / person / emotion / f"{i}.png", faces.frames([i]), None)
    small = ["--steps", "2", "--size", "32", "--device", "cpu", "--batch-individuals", "2"]
    assert (
        cli.main(["prompts", "--data", str(folder / "faces"), "--out", str(folder / "runs" / "prompts"), *small]) == 0
    )
    return folder


@pytest.fixture
def run_script(monkeypatch, capsys):
    """Run a script as `python docs/examples/NAME.py OPTIONS` does; returns what it printed."""

    def run(name, *options):
        monkeypatch.syspath_prepend(EXAMPLES)
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, options)])
        capsys.readouterr()
        runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
        return capsys.readouterr().out

    return run


# The scripts


@pytest.mark.parametrize("name", MODELS)
def test_a_script_trains_a_stand_in_and_says_what_pcmecl_did(name, run_script):
    said = run_script(name, "--steps", 1)
    assert "a stand-in with" in said
    reached = re.search(r"gradient in the generator: (\S+), in (\d+) of (\d+) tensors", said)
    assert float(reached[1]) > 0
    assert reached[2] == reached[3]
    assert re.search(r"a step takes \d+\.\d\d s, \d+% of it for PCMECL", said)


def test_the_own_loop_learns(run_script):
    losses = [float(loss) for loss in re.findall(r"loss (\S+)", run_script("own_loop", "--steps", 20))]
    assert losses[-1] < losses[0]


def test_a_script_takes_a_finished_run_and_adds_the_actors(run_script, prompts):
    assert "gradient in the generator" in run_script("icface", "--run", prompts / "runs" / "prompts", "--steps", 1)


def test_a_script_trains_the_repository_it_is_given(run_script, tmp_path, monkeypatch):
    networks = tmp_path / "manipulator" / "models" / "networks.py"
    networks.parent.mkdir(parents=True)
    networks.write_text(
        "import torch\n"
        "class StyleEncoder(torch.nn.Linear):\n"
        "    def __init__(self, style, coefficients): super().__init__(coefficients, style)\n"
        "    def forward(self, x): return super().forward(x).mean(1)\n"
        "class Generator(torch.nn.Linear):\n"
        "    def __init__(self, style, coefficients): super().__init__(coefficients + style, coefficients)\n"
        "    def forward(self, x, s):\n"
        "        return super().forward(torch.cat([x, s[:, None].expand(-1, x.shape[1], -1)], dim=2))\n"
    )
    monkeypatch.setattr(sys, "path", list(sys.path))
    said = run_script("ned", "--repository", tmp_path, "--steps", 1)
    for module in [name for name in sys.modules if name.split(".")[0] == "manipulator"]:
        del sys.modules[module]
    assert "stand-in" not in said
    assert "in 4 of 4 tensors" in said


def test_a_missing_repository_is_one_line(run_script, tmp_path):
    with pytest.raises(SystemExit, match=r"--repository: .*nowhere is no folder; clone SSERD there"):
        run_script("sserd", "--repository", tmp_path / "nowhere")


def test_icface_is_told_emotions_in_its_own_numbers(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    icface = importlib.import_module("icface")
    vectors = icface.driving_vector(list(EMOTIONS))
    assert vectors.shape == (len(EMOTIONS), 20)
    assert (vectors[:, :3] == 0.5).all()
    assert (vectors >= 0).all()
    assert (vectors <= 1).all()
    smile = 3 + icface.UNITS.index(12)
    assert vectors[:, smile].argmax() == EMOTIONS.index("happy")


# The pages


@pytest.mark.parametrize("page", PAGES)
def test_the_lines_of_a_page_run(page, prompts, monkeypatch):
    monkeypatch.chdir(prompts)
    monkeypatch.syspath_prepend(EXAMPLES)
    torch.manual_seed(0)
    run_blocks(page)


@pytest.mark.parametrize(("page", "frames"), [("sserd", "SD1"), ("ned", "x_fake"), ("scmcl", "fake_B")])
def test_the_lines_of_a_page_pull_at_the_edit(page, frames, prompts, monkeypatch):
    monkeypatch.chdir(prompts)
    torch.manual_seed(0)
    edited = run_blocks(page, first_only=True)
    (gradient,) = torch.autograd.grad(edited["loss_G" if page == "scmcl" else "loss"], edited[frames])
    assert len(gradient.abs().unique()) > 2  # that of the other loss, a mean of absolute values, is of one size


@pytest.mark.parametrize("page", ["sserd", "ned"])
def test_five_lines_do(page):
    lines = [line for line in python_of(page)[0].code.splitlines() if line.strip() and not line.startswith("#")]
    assert len(lines) <= 5


def test_your_own_loop_is_fifteen_lines():
    assert len(python_of("own_loop")[0].code.splitlines()) <= 15


def test_every_script_has_its_page_and_the_index_has_all():
    assert sorted(SCRIPTS) == sorted(set(PAGES) - {"index"})
    index = (EXAMPLES / "index.md").read_text(encoding="utf-8")
    assert all(f"]({name}.md)" in index for name in SCRIPTS)


@pytest.mark.parametrize("page", MODELS)
def test_a_page_says_weight_cost_and_what_was_run(page):
    text = (EXAMPLES / f"{page}.md").read_text(encoding="utf-8")
    assert all(f"**{word}.**" in text for word in ("The weight", "What was run", "What it costs"))


@pytest.mark.parametrize("page", SCRIPTS)
def test_the_commands_of_a_page_exist(page, monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    lines = [
        line
        for block in blocks(EXAMPLES / f"{page}.md")
        if block.language == "bash"
        for line in block.code.splitlines()
    ]
    assert lines
    for line in lines:
        python, script, *options = shlex.split(line)
        assert (python, script) == ("python", f"docs/examples/{page}.py")
        known = inspect.signature(importlib.import_module(page).main).parameters
        assert {option[2:].replace("-", "_") for option in options if option.startswith("--")} <= set(known)


def python_of(page):
    return [block for block in blocks(EXAMPLES / f"{page}.md") if block.language == "python"]


def run_blocks(page, *, first_only=False):
    namespace = {"__name__": "__main__"}
    for block in python_of(page)[: 1 if first_only else None]:
        place = f"{Path('docs/examples')}/{page}.md"
        exec(compile(block.before, f"{place}, before line {block.line}", "exec"), namespace)
        exec(compile("\n" * (block.line - 1) + block.code, place, "exec"), namespace)
    return namespace
