"""Config files: runs the Python file of an experiment or a sweep, and reports its mistakes with file and line."""

import difflib
import importlib.util
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from deepseek_jax.errors import ConfigError, UserError


def call(path: str, function: str) -> tuple[Any, str]:
    """Runs the file -> (what its `function`() returns, "file:line" where it is defined).

    The file, and any "module:attribute" that its config names, may import the modules in its folder and in the folder
    above, so that experiments/ablations/x.py builds on experiments/r1_tiny.py. Its own folder comes first on sys.path,
    the one above last, where it hides no installed package. Raises ConfigError for a file that is missing, cannot be
    run or has no such function, and for any exception raised in it.
    """
    own = Path(path).resolve().parent
    folders = [own, own.parent]
    _require_file(path)
    sys.path[:] = [str(own), *(folder for folder in sys.path if folder != str(own))]
    if str(own.parent) not in sys.path:
        sys.path.append(str(own.parent))
    name = f"file {Path(path).resolve()}"  # no module that anyone imports
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look for the module they are defined in
    with _reported(path, folders), any_names_and_values():
        spec.loader.exec_module(module)
        made = getattr(module, function, None)
        if callable(made):
            return made(), f"{path}:{_line(made)}"
    raise ConfigError(f"{path} has no function {function}()")


def _require_file(path: str) -> None:
    if Path(path).is_dir():
        raise ConfigError(f"{path} is a folder{_suggested(sorted(Path(path).glob('*.py')))}")
    if not Path(path).is_file():
        near = sorted(
            {*Path(path).parent.glob("*.py"), *Path("experiments").glob("*.py"), *Path("experiments").glob("*/*.py")}
        )
        by_stem = {file.stem: file for file in near}
        close = difflib.get_close_matches(Path(path).stem, by_stem, n=1)
        raise ConfigError(
            f"no such file: {path}" + (f"; did you mean {by_stem[close[0]]}?" if close else _suggested(near))
        )
    if Path(path).suffix != ".py":
        raise ConfigError(f"{path} is not a Python file: its name has to end in .py")


def _suggested(files: list[Path]) -> str:
    return f"; there are {', '.join(map(str, files))}" if files else ""


def _line(function: Callable) -> int:
    return getattr(getattr(function, "__code__", None), "co_firstlineno", 1)


@contextmanager
def _reported(path: str, folders: list[Path]) -> Iterator[None]:
    """Turns an exception raised inside into a ConfigError with the last line of the person's own files."""
    try:
        yield
    except (Exception, SystemExit) as error:
        frames = [
            f"{_short(frame.filename, path)}:{frame.lineno}"
            for frame in traceback.extract_tb(error.__traceback__)
            if _own(frame.filename, folders)
        ]
        if isinstance(error, SyntaxError) and error.filename:
            frames.append(f"{_short(error.filename, path)}:{error.lineno}")
        what = (
            str(error)
            if isinstance(error, UserError)
            else f"{type(error).__name__}: {error.msg if isinstance(error, SyntaxError) else error}"
        )
        raise ConfigError(f"{frames[-1] if frames else path}: {what}") from error


def _own(file: str, folders: list[Path]) -> bool:
    return Path(file).resolve().parent in folders


def _short(file: str, path: str) -> str:
    return path if Path(file).resolve() == Path(path).resolve() else file


@contextmanager
def any_names_and_values() -> Iterator[None]:
    """Lets a ConfigDict take names that hold dots, as {"package.module:function": weight} does, and values of another
    type than before, such as {"name": "fp8_deepseek", …} where there was a name.

    ConfigDict refuses both by default; here each field's values are checked where the experiment is built.
    """
    init = ConfigDict.__init__
    before = init.__defaults__, init.__kwdefaults__
    init.__defaults__ = (None, False, True)  # initial_dictionary, type_safe, convert_dict
    init.__kwdefaults__ = before[1] | {"allow_dotted_keys": True}
    try:
        yield
    finally:
        init.__defaults__, init.__kwdefaults__ = before
