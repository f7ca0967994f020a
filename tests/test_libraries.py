"""The dependencies of the package and of its commands: the criterion works without the commands' libraries."""

import subprocess
import sys
from pathlib import Path

import pytest

from pcmecl_fast.libraries import LIBRARIES

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # which pytest brings

PROJECT = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
WITHOUT = "import sys; sys.modules.update(dict.fromkeys({!r}.split()))\n"
THE_COMMANDS_ALONE = [
    name for name in LIBRARIES if name not in ("jinja2", "yaml")
]  # torch and open_clip depend on these
LEARNING_AND_LOSS = """
import torch
from pcmecl_fast import PCMECLCriterion, PersonalizedPrompts, PromptBank, load_clip, ops
from pcmecl_fast.lengths import real_lengths

clip = load_clip()
prompts = PersonalizedPrompts(clip, ["neutral", "happy"])
bank = PromptBank.build(prompts, torch.randn(2, clip.embed_dim), ["anna", "ben"], ["neutral", "happy"], clip=clip)
edited = torch.zeros(2, 3, 64, 64, requires_grad=True)
index = torch.tensor([0, 1])
PCMECLCriterion(clip, bank)(torch.rand(2, 3, 64, 64) * 2 - 1, edited, index, index, 1 - index).backward()
"""


def run(*command: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *command], capture_output=True, text=True, check=False)


def test_learning_prompts_and_the_loss_need_none_of_the_commands_libraries():
    done = run("-c", WITHOUT.format(" ".join(THE_COMMANDS_ALONE)) + LEARNING_AND_LOSS)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("command", "library"), [("backends", "tyro"), ("backends", "dacite"), ("demo", "tensorboard")]
)
def test_a_command_without_its_libraries_says_so_in_one_line(command, library, tmp_path):
    script = WITHOUT.format(library) + f"from pcmecl_fast.cli import main; sys.exit(main({[command]!r} + sys.argv[1:]))"
    done = run("-c", script, *(["--out", str(tmp_path)] if command == "demo" else []))
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("pcmecl-fast")
    assert f"{library} is not installed; pip install 'pcmecl_fast[train]'" in last
    assert "Traceback" not in done.stderr


def test_the_package_itself_requires_five_libraries():
    names = [need.partition(">")[0] for need in PROJECT["dependencies"]]
    assert names == ["torch", "open_clip_torch", "safetensors", "numpy", "tqdm"]
