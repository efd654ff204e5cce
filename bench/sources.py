"""Digests of source code and files: what tells whether a stored result is yesterday's.

Code counts by its syntax tree, so that comments, docstrings and formatting do not. Reads files and
imports nothing, so that `bench report` can use it.
"""

import ast
import hashlib
import importlib
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from typing import Any

from bench.errors import InputError

SHARED = frozenset({"bench.losses", "bench.networks", "bench.noise", "bench.protocols"})
"""Modules of the harness that components calculate with. The rest of it is versioned by the key scheme."""

OURS = frozenset({"attacks", "defenses"})
"""Packages whose modules are followed wherever a component imports them."""


def file_digest(path: Path) -> str:
    """Return the sha256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def located(path: str, folder: Path) -> Path:
    """Return the place of a file or folder that a suite names, relative to the suite's."""
    try:
        return folder / Path(path).expanduser()
    except RuntimeError:
        raise InputError(f"there is no user of that name: {path}") from None


def code_digest(path: Path) -> str:
    """Return the sha256 of a Python file's syntax tree, its docstrings left out."""
    stat = path.stat()
    return _code_digest(path, (stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino))


@cache
def _code_digest(path: Path, state: tuple[int, ...]) -> str:
    tree = parsed(path)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[0] if node.body else None
            if (
                isinstance(first, ast.Expr)
                and isinstance(first.value, ast.Constant)
                and isinstance(first.value.value, str)
            ):
                node.body = node.body[1:]
    return hashlib.sha256(_spelled(tree).encode()).hexdigest()[:16]


def _spelled(node: object) -> str:
    """Spell a syntax tree without its empty fields: a newer Python has more of them, and means the same."""
    if isinstance(node, ast.AST):
        fields = ((name, value) for name, value in ast.iter_fields(node) if value is not None and value != [])
        inside = ",".join(f"{name}={_spelled(value)}" for name, value in fields)
        return f"{type(node).__name__}({inside})"
    if isinstance(node, list):
        return "[" + ",".join(map(_spelled, node)) + "]"
    return repr(node)


def parsed(path: Path) -> ast.Module:
    """Return a file's syntax tree."""
    try:
        return ast.parse(path.read_bytes(), str(path))
    except (SyntaxError, ValueError) as error:
        raise InputError(f"{path}:{getattr(error, 'lineno', 1)}: not Python: {error}") from None


class _SuiteFinder(MetaPathFinder):
    """Finds modules in the suite's folder, for those who may mean them, where nobody else has found any.

    Asked by what a defense names, and by modules of the folder for each other, it answers. A library that
    tries whether it can import ``uarray`` does not mean the user's file of that name, and runs none.
    """

    def __init__(self) -> None:
        self.folder: Path | None = None
        self.named: set[str] = set()
        """Modules that a defense's code is made of."""
        self.given: set[str] = set()
        """Modules that were found here."""

    def move(self, folder: Path) -> None:
        """Serve a suite's folder; the modules of another suite's are forgotten."""
        if folder != self.folder:
            for name in [each for each in sys.modules if each.partition(".")[0] in self.given]:
                del sys.modules[name]
            self.folder, self.named, self.given = folder, set(), set()

    def look(self, name: str) -> ModuleSpec | None:
        """Return where a module lies in the folder, whoever asks."""
        return None if self.folder is None else PathFinder.find_spec(name, [str(self.folder)])

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        """Return where a module lies for `import`; what lies in a package, its own path tells."""
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
    """Make the modules of a suite's folder importable, so that no file in it hides a module."""
    _SUITE.move(folder)
    if sys.meta_path[-1] is not _SUITE:
        sys.meta_path[:] = [*(each for each in sys.meta_path if each is not _SUITE), _SUITE]


def _spec(top: str) -> ModuleSpec | None:
    """Return where a top-level module lies, importing nothing."""
    if top in sys.modules and top not in _SUITE.given:
        return getattr(sys.modules[top], "__spec__", None)
    finders = (each for each in sys.meta_path if each is not _SUITE)
    found = (each.find_spec(top, None) for each in finders)
    return next(filter(None, found), None) or _SUITE.look(top)


def module_file(module: str) -> Path | None:
    """Return the file of a module, without importing it or its parents."""
    top, *rest = module.split(".")
    spec = _spec(top)
    if spec is None:
        return None
    if not rest:
        return Path(spec.origin) if spec.origin and Path(spec.origin).is_file() else None
    for place in spec.submodule_search_locations or ():
        below = Path(place).joinpath(*rest)
        for candidate in (below.with_suffix(".py"), below / "__init__.py"):
            if candidate.is_file():
                return candidate
    return None


def code_digests(path: str, folder: Path) -> dict[str, str]:
    """Return the digests of the code that ``package.module:function`` names, importing nothing.

    Counted are its module, and what that imports in turn from the same package or the suite's folder.
    """
    if not re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", path):
        raise InputError(f"expected 'package.module:function', found {path!r}")
    importable(folder)
    importlib.invalidate_caches()
    start = path.partition(":")[0]
    if module_file(start) is None:
        raise InputError(f"module {start!r} is neither in {folder} nor installed")
    top = start.partition(".")[0]
    made_of = _reached(start, lambda name, file: name.partition(".")[0] == top or _written_in(folder, file))
    _SUITE.named |= {name.partition(".")[0] for name in made_of}
    return {name: code_digest(file) for name, file in sorted(made_of.items())}


def _written_in(folder: Path, file: Path) -> bool:
    """Return whether a file is of a folder's own: a virtual environment in it is not."""
    installed = {"site-packages", "dist-packages"}
    return file.is_relative_to(folder) and installed.isdisjoint(file.relative_to(folder).parts)


def _imports(module: str, file: Path) -> Iterator[str]:
    """Yield the names of the modules that a file may import."""
    package = module if file.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(parsed(file)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, *([base] if base else [])])
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)


@cache
def closure(module: str) -> frozenset[str]:
    """Return a component's module and what it imports in turn from its own package, attacks and defenses."""
    tops = OURS | {module.partition(".")[0]}
    return frozenset(_reached(module, lambda name, file: name.partition(".")[0] in tops))


def _reached(start: str, ours: Callable[[str, Path], bool]) -> dict[str, Path]:
    """Return the modules that a module is made of, and their files, by the imports in their source."""
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
    """Return the digest of each module's code; modules without a file are left out."""
    found = {}
    for name in sorted(modules):
        if (path := module_file(name)) is not None:
            found[name] = code_digest(path)
    return found
