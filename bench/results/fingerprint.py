"""Digests of source code and files, which tell whether a stored result is out of date.

Code counts by its syntax tree, so that comments, docstrings and formatting do not matter. The module reads
files and imports none of them, so that `bench report` can use it.
"""

import ast
import hashlib
import importlib
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from typing import Any, NamedTuple

from bench import ours
from bench.errors import InputError

SHARED = frozenset({"bench.losses", "bench.networks", "bench.noise", "bench.protocols"})
"""Modules of the harness that attacks and defenses calculate with. The rest of the harness is versioned by
the scheme of the keys.
"""


def file_digest(path: Path) -> str:
    """Return the digest of the content of a file.

    Args:
        path: The file.

    Returns:
        SHA-256 in hexadecimal digits.
    """
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def located(path: str, folder: Path) -> Path:
    """Return the path of a file or folder that a task file names.

    Args:
        path: The path as it is written: absolute, relative to the task file, or with ``~``.
        folder: The folder of the task file.

    Returns:
        The path.

    Raises:
        InputError: The path begins with ``~`` and a name that no user has.
    """
    try:
        return folder / Path(path).expanduser()
    except RuntimeError:
        raise InputError(f"there is no user of that name: {path}") from None


def code_digest(path: Path) -> str:
    """Return the digest of the syntax tree of a Python file, without its docstrings.

    Args:
        path: The file.

    Returns:
        The first 16 hexadecimal digits of a SHA-256.

    Raises:
        InputError: The file is not Python.
    """
    return _read(path, _state(path)).digest


class _Code(NamedTuple):
    """What is known of a Python file."""

    digest: str
    names: tuple[tuple[int, str, tuple[str, ...]], ...]
    """Its imports: how many packages above, the module, and the names from it."""


def _state(path: Path) -> tuple[int, ...]:
    """Return what changes with the content of a file."""
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino


@cache
def _read(path: Path, state: tuple[int, ...]) -> _Code:
    """Return what is known of a file; to parse it takes most of the time of a plan."""
    names: list[tuple[int, str, tuple[str, ...]]] = []
    text = _spelled(parsed(path), names)
    return _Code(hashlib.sha256(text.encode()).hexdigest()[:16], tuple(names))


def _is_text(statement: ast.stmt) -> bool:
    """Return whether a statement is a text alone."""
    value = statement.value if isinstance(statement, ast.Expr) else None
    return isinstance(value, ast.Constant) and isinstance(value.value, str)


_WITH_DOCSTRING = frozenset({ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef})


def _spelled(node: object, names: list[tuple[int, str, tuple[str, ...]]]) -> str:
    """Return a syntax tree as text, and add its imports to `names`: one walk, since a plan waits for it.

    Empty fields are left out, of which newer versions of Python have more; and so are docstrings, those of
    fields and of constants, too: a text that stands for itself does nothing.
    """
    if isinstance(node, ast.AST):
        kind = type(node)
        if isinstance(node, ast.Import):
            names.extend((0, alias.name, ()) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            names.append((node.level, node.module or "", tuple(alias.name for alias in node.names)))
        inside = []
        for name in kind._fields:
            value: Any = getattr(node, name, None)
            if name == "body" and kind in _WITH_DOCSTRING:
                value = [each for each in value if not _is_text(each)]
            if value is not None and value != []:
                inside.append(f"{name}={_spelled(value, names)}")
        return f"{kind.__name__}({','.join(inside)})"
    if isinstance(node, list):
        return "[" + ",".join([_spelled(each, names) for each in node]) + "]"
    return repr(node)


def parsed(path: Path) -> ast.Module:
    """Parse a Python file.

    Args:
        path: The file.

    Returns:
        Its syntax tree.

    Raises:
        InputError: The file is not Python.
    """
    try:
        return ast.parse(path.read_bytes(), str(path))
    except (SyntaxError, ValueError) as error:
        raise InputError(f"{path}:{getattr(error, 'lineno', 1)}: not Python: {error}") from None


class _SuiteFinder(MetaPathFinder):
    """An import finder for the folder of the task file, asked after all others.

    It answers for modules that the code of a defense consists of, and for modules of the folder that import
    each other. A library that tests whether it can import ``uarray`` does not mean the user's file of that
    name, and does not run it.
    """

    def __init__(self) -> None:
        self.folder: Path | None = None
        self.named: set[str] = set()
        """Top-level names of the modules that the code of a defense consists of."""
        self.given: set[str] = set()
        """Top-level names of the modules that were found here."""

    def move(self, folder: Path) -> None:
        """Change to the folder of another task file; modules of the previous folder are forgotten."""
        if folder != self.folder:
            for name in [each for each in sys.modules if each.partition(".")[0] in self.given]:
                del sys.modules[name]
            self.folder, self.named, self.given = folder, set(), set()

    def look(self, name: str) -> ModuleSpec | None:
        """Return where a module lies in the folder, whoever imports it."""
        return None if self.folder is None else PathFinder.find_spec(name, [str(self.folder)])

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        """Return where a module lies, for an import; the modules of a package are found by its own path."""
        if path is not None or not (fullname in self.named or _importer() in self.given):
            return None
        if (spec := self.look(fullname)) is not None:
            self.given.add(fullname)
        return spec


def _importer() -> str:
    """Return the top-level name of the module that is importing another one."""
    frame = sys._getframe(2)
    while frame.f_back is not None and _importing(str(frame.f_globals.get("__name__"))):
        frame = frame.f_back
    return str(frame.f_globals.get("__name__")).partition(".")[0]


def _importing(name: str) -> bool:
    return name.partition(".")[0] in ("importlib", "_frozen_importlib", "_frozen_importlib_external")


_SUITE = _SuiteFinder()


def importable(folder: Path) -> None:
    """Make the modules of a task file's folder importable, without hiding any other module.

    Args:
        folder: The folder.
    """
    _SUITE.move(folder)
    if sys.meta_path[-1] is not _SUITE:
        sys.meta_path[:] = [*(each for each in sys.meta_path if each is not _SUITE), _SUITE]


def _spec(top: str) -> ModuleSpec | None:
    """Return where a top-level module lies, without importing anything."""
    if top in ours.OURS:
        return ours.spec_of(top)
    if top in sys.modules and top not in _SUITE.given:
        return getattr(sys.modules[top], "__spec__", None)
    finders = (each for each in sys.meta_path if each is not _SUITE)
    found = (each.find_spec(top, None) for each in finders)
    return next(filter(None, found), None) or _SUITE.look(top)


def module_file(module: str) -> Path | None:
    """Return the file of a module, without importing it or its parents.

    Args:
        module: The dotted name of the module.

    Returns:
        The file; None where there is no such module, or none with a file.
    """
    top, *rest = module.split(".")
    spec = _spec(top)
    if spec is None:
        return None
    if not rest:
        return Path(spec.origin) if spec.origin and Path(spec.origin).is_file() else None
    for place in spec.submodule_search_locations or ():
        # Asked some thousand times in a plan, for which paths as objects are slow.
        below = os.path.join(place, *rest)
        for candidate in (f"{below}.py", os.path.join(below, "__init__.py")):
            if os.path.isfile(candidate):
                return Path(candidate)
    return None


def code_digests(path: str, folder: Path) -> dict[str, str]:
    """Return the digests of the code that ``package.module:function`` names, without importing anything.

    They cover the module, and what it imports, directly or not, from its package or from the folder of the
    task file.

    Args:
        path: The name, ``package.module:function``.
        folder: The folder of the task file.

    Returns:
        Digests as `code_digest` returns them, by module.

    Raises:
        InputError: The name has another form, there is no such module, or a file is not Python.
    """
    if not re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", path):
        raise InputError(f"expected 'package.module:function', found {path!r}")
    importable(folder)
    importlib.invalidate_caches()
    start = path.partition(":")[0]
    _check_hidden(start, folder)
    if module_file(start) is None:
        raise InputError(f"module {start!r} is neither in {folder} nor installed")
    top = start.partition(".")[0]
    made_of = _reached(start, lambda name, file: name.partition(".")[0] == top or _written_in(folder, file))
    for name, file in made_of.items():
        if _written_in(folder, file):
            for imported in _imports(name, file):
                _check_hidden(imported, folder)
    _SUITE.named |= {name.partition(".")[0] for name in made_of}
    return {name: code_digest(file) for name, file in sorted(made_of.items())}


def _check_hidden(module: str, folder: Path) -> None:
    """Raise where a module of the task file's folder cannot be imported, for a package of the same name."""
    top = module.partition(".")[0]
    below = folder.joinpath(*module.split("."))
    places = below.with_suffix(".py"), below / "__init__.py"
    file = next((each for each in places if each.is_file()), None)
    if file is not None and top != module and module_file(module) is None:
        whose = "Crossfire's own" if top in ours.OURS | {"bench"} else "another"
        raise InputError(
            f"module {module!r} cannot be {file}: {top!r} is the name of {whose} package, which is found "
            "first; call the folder something else"
        )


def _written_in(folder: Path, file: Path) -> bool:
    """Return whether a file belongs to a folder, and not to a virtual environment in it."""
    installed = {"site-packages", "dist-packages"}
    return file.is_relative_to(folder) and installed.isdisjoint(file.relative_to(folder).parts)


def _imports(module: str, file: Path) -> Iterator[str]:
    """Yield the names of the modules that a file may import."""
    package = module if file.name == "__init__.py" else module.rpartition(".")[0]
    for level, base, names in _read(file, _state(file)).names:
        if level:
            above = package.split(".")[: len(package.split(".")) - level + 1]
            base = ".".join([*above, *([base] if base else [])])
        yield base
        yield from (f"{base}.{name}" for name in names)


@cache
def closure(module: str) -> frozenset[str]:
    """Return the modules that a component consists of: its own, and what that imports, directly or not.

    Args:
        module: The module of the component.

    Returns:
        Names of modules from its own package, from `attacks` and from `defenses`.
    """
    tops = ours.OURS | {module.partition(".")[0]}
    return frozenset(_reached(module, lambda name, file: name.partition(".")[0] in tops))


def _reached(start: str, ours: Callable[[str, Path], bool]) -> dict[str, Path]:
    """Return a module and those that it imports, directly or not, as far as `ours` accepts them."""
    found: dict[str, Path] = {}
    todo = [start]
    while todo:
        name = todo.pop()
        if name in found or (file := module_file(name)) is None or not ours(name, file):
            continue
        found[name] = file
        todo.extend(_imports(name, file))
    return found


def digests(modules: Iterable[str]) -> dict[str, str]:
    """Return the digests of modules.

    Args:
        modules: Dotted names.

    Returns:
        Digests as `code_digest` returns them, by module; modules without a file are left out.
    """
    found = {}
    for name in sorted(modules):
        if (path := module_file(name)) is not None:
            found[name] = code_digest(path)
    return found
