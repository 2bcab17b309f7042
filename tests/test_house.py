"""Imports of the packages run one way."""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[1]

# From the bottom up: a package or a module imports only what stands before it. A `__main__.py` is a program and may
# import everything.
ORDER = (
    "kernels_pallas", "errors", "ranges", "atomic", "signals", "fields", "registry", "identity", "json_io", "overrides",
    "config_file", "locks", "cli", "precision", "model", "parallel", "data", "interop", "training", "generation", "rl",
    "accounting", "report", "stages", "experiment", "workdir", "dry_run", "launch",
)  # fmt: skip


def room(module: str) -> str | None:
    """The entry of `ORDER` that a module belongs to; None outside the two packages."""
    package, *inside = module.split(".")
    if package == "kernels_pallas":
        return package
    return inside[0] if package == "deepseek_jax" and inside else None


def imported(source: str) -> set[str]:
    """Modules that a file imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def arrows() -> set[tuple[str, str, str]]:
    """(from, to, file) of every import of one room by another."""
    found = set()
    for path in [*ROOT.glob("deepseek_jax/**/*.py"), *ROOT.glob("kernels_pallas/**/*.py")]:
        file = path.relative_to(ROOT)
        start = room(".".join(file.with_suffix("").parts))
        if path.name in ("__main__.py", "__init__.py") and path.parent.name == "deepseek_jax":
            continue
        if path.name == "__main__.py":
            continue
        for name in imported(path.read_text(encoding="utf-8")):
            if (end := room(name)) is not None and end != start:
                found.add((start, end, str(file)))
    return found


def test_no_import_runs_back_up():
    up = {arrow for arrow in arrows() if ORDER.index(arrow[1]) >= ORDER.index(arrow[0])}
    assert not up, "\n".join(f"{file}: {start} imports {end}" for start, end, file in sorted(up))


def test_every_package_and_module_has_its_place():
    inside = {path.stem for path in (ROOT / "deepseek_jax").iterdir() if path.suffix == ".py" or path.is_dir()}
    assert inside - {"__init__", "__main__", "__pycache__"} == set(ORDER) - {"kernels_pallas"}


def test_the_network_knows_no_mesh():
    """Modules of the network ask `ops`; they import neither kernels nor jax's sharding."""
    for path in (ROOT / "deepseek_jax/model").glob("*.py"):
        names = imported(path.read_text(encoding="utf-8"))
        assert not any(name.startswith(("jax.sharding", "jax.experimental")) for name in names), path.name
        assert not any(name.startswith("deepseek_jax.parallel") for name in names), path.name
