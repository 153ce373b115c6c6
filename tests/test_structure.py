"""Modules lie on floors: imports point downwards and never in a circle."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parent.parent
# From the top down, with what the names of their modules begin with.
FLOORS = """
preprocess run_tokenflow evaluate
tokenflow.editing
tokenflow.inversion
tokenflow.evaluation
tokenflow_utils tokenflow.motion tokenflow.control
tokenflow.config
tokenflow.diffusion tokenflow.propagation
util tokenflow.video tokenflow.cli tokenflow.options
tokenflow.runtime
tokenflow.errors
"""


def imports_of(path: Path) -> set[str]:
    """The modules that a file imports, also within functions."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return names


def depth_of(name: str) -> int:
    """On which floor a module lies, counted from the top."""
    floors = enumerate(FLOORS.strip().split("\n"))
    return next(depth for depth, rooms in floors if name.startswith(tuple(rooms.split())))


def test_imports_point_downwards():
    paths = [*ROOT.glob("*.py"), *(ROOT / "tokenflow").rglob("*.py")]
    modules = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in paths}
    modules = {name: path for name, path in modules.items() if not name.endswith("__init__")}
    graph = {name: imports_of(path) & set(modules) for name, path in modules.items()}
    assert len(graph) > 30 and sum(map(len, graph.values())) > 60
    list(TopologicalSorter(graph).static_order())  # raises where there is a circle
    for name, imported in graph.items():
        assert all(depth_of(other) >= depth_of(name) for other in imported), name
        assert modules[name].read_text().count("\n") <= 400, name
