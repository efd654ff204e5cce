"""Digests of source code and files: what tells whether a stored result is yesterday's.

Code counts by its syntax tree, so that comments, docstrings and formatting do not. Reads files and
imports nothing, so that `bench report` can use it.
"""

import ast
import hashlib
import importlib.util
import sys
from collections.abc import Iterable
from functools import cache
from pathlib import Path

NEUTRAL = frozenset({"bench", "bench.protocols", "bench.registry", "bench.errors", "bench.quantities"})
"""Modules of the harness that components import but that decide no number."""


def file_digest(path: Path) -> str:
    """Return the sha256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def code_digest(path: Path) -> str:
    """Return the sha256 of a Python file's syntax tree, its docstrings left out."""
    stat = path.stat()
    return _code_digest(path, stat.st_size, stat.st_mtime_ns)


@cache
def _code_digest(path: Path, size: int, changed: int) -> str:
    tree = ast.parse(path.read_bytes(), str(path))
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[0] if node.body else None
            if (
                isinstance(first, ast.Expr)
                and isinstance(first.value, ast.Constant)
                and isinstance(first.value.value, str)
            ):
                node.body = node.body[1:]
    return hashlib.sha256(ast.dump(tree).encode()).hexdigest()[:16]


def module_file(module: str) -> Path | None:
    """Return the file of a module, without importing it or its parents below the top."""
    top, *rest = module.split(".")
    if top in sys.modules and getattr(sys.modules[top], "__file__", None):
        base = Path(str(sys.modules[top].__file__))
    else:
        spec = importlib.util.find_spec(top)
        if spec is None or spec.origin is None:
            return None
        base = Path(spec.origin)
    if not rest:
        return base
    if base.name != "__init__.py":
        return None
    below = base.parent.joinpath(*rest)
    for candidate in (below.with_suffix(".py"), below / "__init__.py"):
        if candidate.is_file():
            return candidate
    return None


@cache
def closure(module: str) -> frozenset[str]:
    """Return a module and those of its own package and of the harness that it is made of."""
    found: set[str] = set()
    todo = [module]
    while todo:
        name = todo.pop()
        loaded = sys.modules.get(name)
        if name in found or loaded is None:
            continue
        found.add(name)
        for value in vars(loaded).values():
            other = getattr(value, "__module__", None) or getattr(value, "__name__", None)
            if not isinstance(other, str) or other in NEUTRAL:
                continue
            if other.partition(".")[0] in {module.partition(".")[0], "attacks", "defenses", "bench"}:
                todo.append(other)
    return frozenset(found)


def digests(modules: Iterable[str]) -> dict[str, str]:
    """Return the digest of each module's code; modules without a file are left out."""
    found = {}
    for name in sorted(modules):
        if (path := module_file(name)) is not None:
            found[name] = code_digest(path)
    return found
