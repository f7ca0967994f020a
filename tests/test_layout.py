"""The package's structure: imports go one way without cycles, and files stay readable."""

import ast
import graphlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "pcmecl_fast"
# From the bottom layer to the top. Files of one layer may import each other.
LAYERS = (
    ("files", "wording", "libraries", "options", "hub", "machine", "progress", "workers", "distributed"),
    ("ops", "kernels"),
    ("towers", "preprocessing", "weights", "clip"),
    ("prompts",),
    ("criterion", "criterion_parts", "explanation", "frames_in", "labels"),
    ("data",),
    ("lengths", "synthetic"),
    ("models",),
    ("train",),
    ("evaluate",),
    ("run", "run_folder", "edit", "edit_faces", "edit_media", "prepare", "measure", "ablation"),
    ("commands",),
    ("cli", "__main__"),
)
SOURCES = sorted(PACKAGE.rglob("*.py")) + sorted((ROOT / "kernels").glob("*.py"))


def module_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE if path.is_relative_to(PACKAGE) else ROOT).with_suffix("").parts
    return ".".join(("pcmecl_fast", *parts)).removesuffix(".__init__")


MODULES = {module_of(path): path for path in SOURCES}


def imports_of(path: Path, *, types_too: bool = False) -> set[str]:
    """The package's modules that a file imports when it is imported or when its functions run, or for types alone."""
    found: set[str] = set()
    tree = ast.parse(path.read_text())
    for_types = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in for_types and not types_too:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name in MODULES}
        elif isinstance(node, ast.ImportFrom) and node.module in MODULES:
            named = {f"{node.module}.{alias.name}" for alias in node.names}
            inside = named & set(MODULES)
            found |= inside if inside == named else inside | {node.module}
    return found - {module_of(path)}


def test_there_are_no_import_cycles():
    graph = {name: imports_of(path, types_too=True) for name, path in MODULES.items()}
    # A package's __init__ imports the files below it: importing one of them through the package is not a cycle.
    graph = {name: {n for n in needs if not name.startswith(f"{n}.")} for name, needs in graph.items()}
    assert list(graphlib.TopologicalSorter(graph).static_order())


@pytest.mark.parametrize("module", [name for name in MODULES if name != "pcmecl_fast"])
def test_nobody_imports_upwards(module):
    rank = {name: k for k, layer in enumerate(LAYERS) for name in layer}
    own = rank[module.split(".")[1]]
    above = [name for name in imports_of(MODULES[module]) if name == "pcmecl_fast" or rank[name.split(".")[1]] > own]
    assert not above


@pytest.mark.parametrize("path", [*SOURCES, *sorted((ROOT / "csrc").rglob("*.*"))], ids=lambda path: path.name)
def test_a_file_tells_one_story(path):
    assert len(path.read_text().splitlines()) <= 600
