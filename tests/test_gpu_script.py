"""bench/gpu.sh is ready for a GPU: everything it names exists."""

import re
from importlib.util import find_spec
from pathlib import Path

from bench import compare

ROOT = Path(__file__).parents[1]
SCRIPT = (ROOT / "bench" / "gpu.sh").read_text()


def test_its_files_exist():
    assert re.findall(r"tests/\w+\.py", SCRIPT)
    for path in re.findall(r"\b(?:tests|bench)/\w+\.(?:py|sh)", SCRIPT):
        assert (ROOT / path).is_file(), path
    for module in re.findall(r"-m ((?:bench|pcmecl_fast)[\w.]*)", SCRIPT):
        assert find_spec(module), module


def test_what_it_selects_is_there():
    selections = re.findall(r"pytest -q (tests/\w+\.py) -k (\w+)", SCRIPT)
    assert selections
    for path, word in selections:
        assert re.search(rf"^def test_\w*{word}", (ROOT / path).read_text(), re.MULTILINE), f"{word} in {path}"


def test_its_comparisons_are_there():
    compare.load_all()
    named = re.search(r"compared=\(([a-z_ ]+) --device cpu", SCRIPT)[1].split()
    assert set(named) <= set(compare.COMPARISONS)
