"""The documents: every Python block and every command of README.md, CONTRIBUTING.md and docs/ runs, every name exists.

A page's Python blocks run from top to bottom in one namespace; a comment `<!-- before the block: … -->` holds what a
reader's program would have done before. A block that the page goes on from with "Saved as `file`" is that file for the
page's commands. Commands run in the page's order with few steps on small pictures. Both start in a copy of one folder:
pictures in faces/, portraits/ and face.png, finished runs in runs/.
"""

import functools
import importlib
import importlib.util
import inspect
import re
import runpy
import shlex
import shutil
import sys
from dataclasses import dataclass, fields
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from packaging.requirements import Requirement

from pcmecl_fast import ablation, cli, load_clip, run
from pcmecl_fast.commands import COMMANDS
from pcmecl_fast.commands import _parse as parse
from pcmecl_fast.data.media import write_frames
from pcmecl_fast.synthetic import SyntheticFaces
from tests.raw_trees import mead_tree

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # which pytest brings

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
PUBLIC = [
    "pcmecl_fast",
    *(f"pcmecl_fast.{name}" for name in ("ops", "prompts", "models", "synthetic", "lengths", "run", "train.config")),
    *(f"pcmecl_fast.data.{name}" for name in ("base", "folder", "features")),
]
EMOTIONS = ["neutral", "happy", "sad"]

_BLOCK = re.compile(
    r"(?:^<!-- before the block:(.*?)-->\n)?^```(\w*)\n(.*?)^```$(?:\s+Saved as `([\w.]+)`)?", re.MULTILINE | re.DOTALL
)
_COMMAND = re.compile(r"(?:pcmecl-fast|make|python -m|pip install|bench/gpu\.sh)\b")

# What makes a documented command small, appended to it.
SMALL_RUN = ["--size", "32", "--device", "cpu", "--batch-individuals", "2"]
SMALL_TRAINING = [*SMALL_RUN, "--steps", "2", "--prompt-steps", "2", "--batch", "4"]
DRAWN = ["--individuals", "3", "--clips", "1", "--frames-per-clip", "1", "--emotions", *EMOTIONS]
SMALL = {
    "demo": [*SMALL_TRAINING, *DRAWN],
    "prepare": ["--crop", "centre", "--size", "32", "--skip-broken"],
    "prompts": [*SMALL_RUN, "--steps", "2"],
    "train": SMALL_TRAINING,
    "ablate": [*SMALL_TRAINING, *DRAWN, "--quick", "--quick-steps", "1", "--workers", "1"],
    "evaluate": ["--device", "cpu"],
    "measure": ["--device", "cpu", "--metrics", "psnr", "ssim", "--workers", "1"],
    "edit": ["--device", "cpu", "--crop", "centre"],
    "backends": [],
}


@dataclass
class Block:
    page: Path
    line: int  # of its first line, from 1
    language: str
    before: str
    code: str
    saved_as: str


@functools.cache
def blocks(page):
    text = page.read_text(encoding="utf-8")
    return [
        Block(page, 1 + text.count("\n", 0, found.start(3)), found[2], found[1] or "", found[3], found[4] or "")
        for found in _BLOCK.finditer(text)
    ]


def commands(page):
    """(line number, words) of each command in the page's bash blocks."""
    for block in blocks(page):
        if block.language == "bash":
            code = block.code.replace("\\\n", "  ")
            for number, line in enumerate(code.splitlines(), block.line):
                words = shlex.split(line, comments=True)
                if words:
                    yield number, words


def inline_commands(page):
    """Commands within sentences and tables, such as `make lint`."""
    prose = _BLOCK.sub("", page.read_text(encoding="utf-8"))
    return [code for code in re.findall(r"`([^`\n]+)`", prose) if _COMMAND.match(code)]


def pages_with(found):
    return [pytest.param(page, id=page.relative_to(ROOT).as_posix()) for page in PAGES if found(page)]


@pytest.fixture(scope="module", autouse=True)
def few_frames_judged():
    """Runs are judged on a few frames, and an ablation has two supervisions."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "_EVALUATED_FRAMES", 12)
        main = (ablation.MAIN[0], ablation.MAIN[-1])
        for name, few in {"MAIN": main, "REGIMES": {"scarcity": 1}, "_UNSEEN": 2, "_TRIALS": 12}.items():
            patch.setattr(ablation, name, few)
        yield


@pytest.fixture(scope="module")
def folder_of_runs(tmp_path_factory, few_frames_judged):
    """What the documents take for granted: pictures, and finished runs of both stages."""
    folder = tmp_path_factory.mktemp("documents")
    faces = SyntheticFaces(2, emotions=EMOTIONS, clips=2, frames_per_clip=2, size=40)
    for i in range(len(faces)):
        person, emotion = faces.individuals[faces.individual_index[i]], faces.emotions[faces.emotion_index[i]]
        write_frames(folder / "faces" / person / emotion / f"{i}.png", faces.frames([i]), None)
    for picture in ("face.png", "portraits/portrait.png"):
        write_frames(folder / picture, faces.frames([0]), None)

    (folder / "MEAD").mkdir()
    tree = mead_tree(folder / "MEAD")
    shutil.copy(tree.whole[0].sources[0], folder / "talk.mp4")

    data = ["--data", str(folder / "faces")]
    assert cli.main(["prompts", *data, *SMALL["prompts"], "--out", str(folder / "runs" / "prompts")]) == 0
    given = ["--prompts", str(folder / "runs" / "prompts"), "--out", str(folder / "runs" / "demo")]
    assert cli.main(["train", *data, *SMALL["train"], *given]) == 0
    return folder


@pytest.fixture
def workplace(folder_of_runs, tmp_path, monkeypatch):
    """The test runs in a copy of `folder_of_runs`; weights that would be downloaded are random."""
    monkeypatch.chdir(shutil.copytree(folder_of_runs, tmp_path / "workplace"))
    monkeypatch.setattr(sys, "path", list(sys.path))  # which the current directory joins, for somebody's generator
    for name, module in list(sys.modules.items()):
        if name.startswith("pcmecl_fast") and getattr(module, "load_clip", None) is load_clip:
            monkeypatch.setattr(module, "load_clip", load_clip_without_downloads)
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


def load_clip_without_downloads(name="tiny-face", pretrained=None, **options):
    # A smaller tower of the same kind: the documents' own takes seconds to fill with random numbers.
    return load_clip(name if pretrained is None else "ViT-S-32-alt", **options)


# What stands in the pages


@pytest.mark.parametrize("page", pages_with(lambda page: True))
def test_no_block_escapes(page):
    text = page.read_text(encoding="utf-8")
    assert len(re.findall(r"^\s*```", text, re.MULTILINE)) == 2 * len(blocks(page))
    assert {block.language for block in blocks(page)} <= {"python", "bash", "text"}
    indented = [line for line in _BLOCK.sub("", text).splitlines() if re.match(rf" {{4,}}({_COMMAND.pattern})", line)]
    assert not indented, "commands stand in ```bash blocks"


@pytest.mark.parametrize("page", pages_with(lambda page: any(block.language == "python" for block in blocks(page))))
def test_python_blocks_run(page, workplace):
    torch.manual_seed(0)
    namespace = {"__name__": "__main__"}
    for block in blocks(page):
        if block.language == "python":
            exec(compile(block.before, f"{page}, before line {block.line}", "exec"), namespace)
            # Blank lines, so that a traceback has the page's line numbers.
            exec(compile("\n" * (block.line - 1) + block.code, str(page), "exec"), namespace)


@pytest.mark.filterwarnings("ignore:.*found in sys.modules after import:RuntimeWarning")  # of runpy
@pytest.mark.parametrize("page", pages_with(lambda page: any(commands(page))))
def test_commands_run(page, workplace, capsys, monkeypatch):
    for block in blocks(page):
        if block.saved_as:
            Path(block.saved_as).write_text(block.code, encoding="utf-8")
    made = set()  # output folders: what the fixture left there would be in the way of the page's own runs
    for number, words in commands(page):
        place = f"{page.relative_to(ROOT)}:{number}: {shlex.join(words)}"
        if words[0] == "pcmecl-fast":
            if (out := output_of(words[1:])) not in made:
                shutil.rmtree(out, ignore_errors=True)
                made.add(out)
            run_command(words[1:], place)
        elif words[:2] == ["python", "-m"]:
            ask_module(words[2], words[3:], place, capsys, monkeypatch)
        elif words[:2] == ["pip", "install"]:
            check_requirements(words[2:], place)
        elif words[0] == "make":
            check_targets(words[1:], place)
        elif words[0] == "torchrun":  # whose ranks have tests of their own
            assert parse(words[words.index("--") + 1 :])[0], place
        elif words[0] == "bench/gpu.sh":
            assert (ROOT / words[0]).is_file(), place
        else:
            pytest.fail(f"{place}: no rule tests this command; add one here")


@pytest.mark.parametrize("page", pages_with(inline_commands))
def test_commands_in_sentences_exist(page):
    for command in inline_commands(page):
        words = shlex.split(command)
        if words[0] == "pcmecl-fast":
            check_options(words[1:], f"{page.name}: {command}")
        elif words[:2] == ["python", "-m"]:
            assert importlib.util.find_spec(words[2]), f"{page.name}: {command}"
        elif words[:2] == ["pip", "install"]:
            check_requirements(words[2:], f"{page.name}: {command}")
        elif words[0] == "make":
            check_targets(words[1:], f"{page.name}: {command}")
        else:
            assert (ROOT / words[0]).is_file(), f"{page.name}: {command}"


@pytest.mark.parametrize("page", pages_with(lambda page: True))
def test_files_in_sentences_exist(page):
    """A path such as tests/test_docs.py or ops/reference.py, from the repository's root or the package's."""
    prose = _BLOCK.sub("", page.read_text(encoding="utf-8"))
    words = [word for code in re.findall(r"`([^`\n]+)`", prose) for word in code.split()]
    for word in words:
        if re.fullmatch(r"(?!runs/)[\w.-]+/[\w./*-]*\.(py|cpp|cu|h|sh|md|toml|json|svg|html)", word):
            assert any(list(base.glob(word)) for base in (ROOT, ROOT / "pcmecl_fast")), f"{page.name}: {word}"


def output_of(words):
    """The folder that a command fills; none where its --config names it."""
    name, *options = words
    if "--out" in options:
        return Path(options[options.index("--out") + 1])
    default = getattr(COMMANDS[name][0], "out", None)
    return Path("none") if default is None or "--config" in options else default


def run_command(words, place):
    name, *options = words
    assert cli.main([name, *options, *SMALL[name]]) == 0, place


def ask_module(module, options, place, capsys, monkeypatch):
    """The module explains itself, and every option of the command is in what it says."""
    monkeypatch.setattr(sys, "argv", [module, "--help"])
    monkeypatch.syspath_prepend(ROOT)
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    said = capsys.readouterr().out
    assert caught.value.code in (0, None), place
    for option in options:
        if option.startswith("--"):
            assert re.search(rf"{option}\b", said), f"{place}: --help does not know {option}"


def check_options(words, place):
    """The command of a sentence exists, and so does every option that the sentence names."""
    if not words or words[0] == "COMMAND":
        return
    config, _ = COMMANDS[words[0]]
    known = {field.name for field in fields(config)} | {"help", "config"}
    asked = {word[2:].split("=")[0].replace("-", "_") for word in words[1:] if word.startswith("--")}
    assert asked <= known, f"{place}: unknown {asked - known}"


def check_requirements(words, place):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    extras = project["project"]["optional-dependencies"]
    needed = {Requirement(text).name for text in [*project["build-system"]["requires"], "torch", "torchvision", "fer"]}
    for word in (word for word in words if not word.startswith("-")):
        of_project = re.fullmatch(r"(?:\.|pcmecl_fast)(?:\[([\w,-]+)\])?", word)
        if of_project is None:
            assert Requirement(word).name in needed, f"{place}: {word}"
        elif of_project[1]:
            assert set(of_project[1].split(",")) <= set(extras), f"{place}: the extras are {', '.join(extras)}"


def check_targets(words, place):
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for word in (word for word in words if not word.startswith("-")):
        assert re.search(rf"^{word}:", makefile, re.MULTILINE), f"{place}: the Makefile has no target {word}"


# Links and names


@pytest.mark.parametrize("page", pages_with(lambda page: page.parent == ROOT))
def test_links_lead_somewhere(page):
    """In the pages beside docs/; `mkdocs build --strict` checks the others."""
    for target in re.findall(r"\]\(([^)]+)\)", page.read_text(encoding="utf-8")):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        assert (ROOT / path).exists(), target
        if anchor:
            assert anchor in anchors(ROOT / path), target


def anchors(page):
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("module", PUBLIC)
def test_public_names_are_in_the_api_pages(module):
    pages = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "docs" / "api").glob("*.md"))
    documented = set(re.findall(r"^::: ([\w.]+)$", pages, re.MULTILINE))
    for name, value in public_names(importlib.import_module(module)):
        places = {f"{place}.{name}" for place in PUBLIC} | {getattr(value, "__module__", None)}
        assert places & documented, f"{module}.{name} is on no page of docs/api"


def public_names(module):
    """What the module exports; where it does not say, the functions and classes that it defines."""
    for name, value in inspect.getmembers(module, lambda value: not inspect.ismodule(value)):
        own = inspect.isroutine(value) or inspect.isclass(value)
        own = own and value.__module__ == module.__name__ and not name.startswith("_")
        if name in getattr(module, "__all__", [name] if own else []):
            yield name, value


def test_every_command_is_documented():
    text = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    assert all(f"`pcmecl-fast {name}" in text for name in COMMANDS)


def test_the_site_has_every_page():
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    pages = [path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")]
    assert all(f": {page}\n" in navigation for page in pages)
