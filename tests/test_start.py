"""How a command starts: answers that need no PyTorch come without it, and its threads share the cores."""

import os
import subprocess
import sys

import pytest

import pcmecl_fast
from pcmecl_fast import machine
from pcmecl_fast.commands import COMMANDS

HEAVY = ("torch", "open_clip", "numpy", "torchvision", "matplotlib", "transformers")
START = f"""
import sys
from pcmecl_fast.cli import main
try:
    main(sys.argv[1:])
finally:
    print("imported", [name for name in {HEAVY} if name in sys.modules])
"""


def started(*arguments: str) -> str:
    """What a command prints in a process of its own, and which heavy libraries it imported."""
    done = subprocess.run([sys.executable, "-c", START, *arguments], capture_output=True, text=True, check=False)
    assert "Traceback" not in done.stderr.replace("PCMECL_TRACEBACK", "")
    return done.stdout + done.stderr


@pytest.mark.parametrize("name", ["", *COMMANDS])
def test_help_comes_without_pytorch(name):
    assert "imported []" in started(*name.split(), "--help")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["train", "--sizze", "3"], "did you mean --size?"),
        (["trian"], "did you mean train?"),
        (["--version"], "pcmecl-fast "),
        (["train", "--config", "nowhere.yaml"], "pcmecl-fast train: --config: there is no file nowhere.yaml"),
        (["prompts", "--data", "nowhere"], "pcmecl-fast prompts: --data: nowhere does not exist"),
        (["train", "--prompts", "nowhere"], "pcmecl-fast train: --prompts: there is no folder nowhere"),
        (["evaluate", "--run", "nowhere"], "pcmecl-fast evaluate: --run: there is no folder nowhere"),
        (["edit", "--run", ".", "--input", "no.png", "--emotion", "sad"], "edit: --input: there is no file no.png"),
    ],
)
def test_mistakes_are_seen_before_pytorch_is_imported(arguments, says):
    shown = started(*arguments)
    assert says in " ".join(shown.replace("│", " ").split())
    assert "imported []" in shown


def test_the_package_imports_its_names_when_they_are_used():
    code = f"import sys, pcmecl_fast; print([name for name in {HEAVY} if name in sys.modules], dir(pcmecl_fast))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("[] ")
    assert all(f"'{name}'" in done.stdout for name in pcmecl_fast.__all__)
    assert all(getattr(pcmecl_fast, name) is not None for name in pcmecl_fast.__all__)
    with pytest.raises(AttributeError, match="module 'pcmecl_fast' has no attribute 'Promts'"):
        _ = pcmecl_fast.Promts


@pytest.mark.parametrize(
    ("given", "expected"), [({}, str(machine.SPINS)), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "a"}, "")]
)
def test_threads_wait_briefly_unless_the_environment_says_otherwise(given, expected):
    code = (
        "import os; from pcmecl_fast.cli import main; main(['backends']); print(os.environ.get('GOMP_SPINCOUNT', ''))"
    )
    rest = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "GOMP_"))}
    done = subprocess.run([sys.executable, "-c", code], env=rest | given, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == expected


def test_the_seconds_of_a_command_count_from_its_start(monkeypatch):
    from pcmecl_fast import run

    monkeypatch.setattr(machine, "_began", [])
    now = machine.time.monotonic()
    assert run._seconds(now - 3, "") == pytest.approx(3, abs=0.5)
    machine.begin_clock()
    machine._began[0] -= 20
    assert run._seconds(now - 3, "pcmecl-fast train") == pytest.approx(20, abs=0.5)
    assert run._seconds(now - 3, "") == pytest.approx(3, abs=0.5)


@pytest.mark.parametrize(
    ("load", "cores", "busy"), [(1.4, 1, False), (1.4, 2, False), (1.5, 2, True), (11, 16, False), (12, 16, True)]
)
def test_a_busy_machine_is_pointed_out(monkeypatch, load, cores, busy):
    monkeypatch.setattr(machine, "cores", lambda: cores)
    monkeypatch.setattr(os, "getloadavg", lambda: (load, 0.0, 0.0))
    notice = machine.busy_notice()
    assert (notice is not None) == busy
    assert not busy or f"load {load:.1f} on {cores} cores" in notice
