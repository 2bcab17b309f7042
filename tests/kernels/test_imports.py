"""The imports inside kernels_pallas: arrows run one way, and none leads to deepseek_jax."""

import ast
import graphlib
import importlib.util
import pathlib

ROOT = pathlib.Path(importlib.util.find_spec("kernels_pallas").origin).parent


def imported(path: pathlib.Path) -> set[str]:
    """Full names of all modules and attributes that a file imports, wherever in it the import stands."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def room(parts: tuple[str, ...]) -> str:
    """The folder in kernels_pallas, or the file directly in it, that a dotted name under kernels_pallas belongs to."""
    here = ROOT.joinpath(*parts[:1])
    return parts[0] if parts and (here.is_dir() or here.with_suffix(".py").is_file()) else "__init__"


def arrows() -> dict[str, set[str]]:
    """Each folder and each file of the package's top level -> those that it imports."""
    found: dict[str, set[str]] = {}
    for path in ROOT.rglob("*.py"):
        source = room(path.relative_to(ROOT).with_suffix("").parts)
        targets = {
            room(tuple(name.split(".")[1:])) for name in imported(path) if name.split(".")[0] == "kernels_pallas"
        }
        found.setdefault(source, set()).update(targets - {source})
    return found


def test_kernels_import_nothing_of_the_rest_of_the_project():
    files = list(ROOT.rglob("*.py"))
    assert len(files) > 30
    outside = {(path.name, name) for path in files for name in imported(path) if name.split(".")[0] == "deepseek_jax"}
    assert not outside


def test_arrows_between_the_folders_run_one_way():
    """`static_order` raises CycleError, which names the cycle. Each operation is imported by what stands above it."""
    order = list(graphlib.TopologicalSorter(arrows()).static_order())
    assert order.index("qtensor") < order.index("quantize") < order.index("linear") < order.index("__init__")
    assert order.index("hopper") < order.index("matmul") < order.index("grouped") < order.index("linear")
