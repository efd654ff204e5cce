"""What networks are made of, noted before an attack, so that what it replaced is found and put back.

Identities are noted and no values: a look at a network costs microseconds for each of its modules. Values of
weights and buffers are compared by `bench.referee.freezing.frozen`.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

_TABLES = ("_parameters", "_buffers", "_modules")
"""The attributes of a module in which torch keeps what it is made of, by name."""

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)
"""Modules that use whatever they hold, so that a new entry changes them."""


@dataclass(frozen=True)
class Snapshot:
    """A module as it was found: its class, what it holds, its hooks, and methods that it has of its own."""

    module: nn.Module
    name: str
    """Its name in the network; empty for the network itself."""
    kind: type[nn.Module]
    tables: Mapping[str, Mapping[str, Any]]
    """What it holds, by the name of the attribute: parameters, buffers, modules, and each kind of hook."""
    methods: Mapping[str, Any]
    """Functions that were set on the object and hide those of its class, by name."""

    @classmethod
    def of(cls, modules: Iterable[nn.Module]) -> "list[Snapshot]":
        """Return a snapshot of every module of some networks.

        Args:
            modules: The networks.

        Returns:
            The snapshots; a module that stands in several places has one.
        """
        return [
            cls(each, name, type(each), {held: dict(table) for held, table in _held(each)}, _methods(each))
            for network in modules
            for name, each in network.named_modules()
        ]

    def restore(self) -> Iterator[str]:
        """Put back what was replaced, removed or hooked on since.

        A new name in a module that is no container stays: nothing that was there before uses it.

        Yields:
            A phrase for each difference: ``3.weight``, ``hooks of 3``, ``the class of 3``.
        """
        if type(self.module) is not self.kind:
            self.module.__class__ = self.kind
            yield f"the class of {self.name or 'the network'}"
        own = vars(self.module)
        for held, had in self.tables.items():
            yield from self._entries(held, had, own.setdefault(held, {}))
        methods = _methods(self.module)
        for name in {**self.methods, **methods}:
            if methods.get(name) is not self.methods.get(name):
                own.pop(name, None)
                if name in self.methods:
                    own[name] = self.methods[name]
                yield self._called(name)

    def _entries(self, held: str, had: Mapping[str, Any], now: dict[str, Any]) -> Iterator[str]:
        """Put back the entries of one attribute; yield a phrase for each that differs."""
        own, gone = vars(self.module), object()
        hooks = held not in _TABLES
        # A plain attribute of the same name would be found first.
        hidden = () if hooks else [name for name in had if own.pop(name, gone) is not gone]
        wrong = [name for name, each in had.items() if name in hidden or now.get(name, gone) is not each]
        new = [name for name in now if name not in had]
        counts = hooks or isinstance(self.module, _CONTAINERS)
        if wrong or (new and counts):
            # In the old order, in which a container uses them.
            kept = {} if counts else {name: now[name] for name in new}
            now.clear()
            now.update({**had, **kept})
            if hooks:
                yield f"hooks of {self.name or 'the network'}"
            else:
                yield from (self._called(name) for name in (*wrong, *(new if counts else ())))

    def _called(self, name: str) -> str:
        return f"{self.name}.{name}" if self.name else name


def _held(module: nn.Module) -> Iterator[tuple[str, dict[Any, Any]]]:
    """Yield the attributes of a module that hold its parts and its hooks; compiled modules have none."""
    for name, value in vars(module).items():
        if isinstance(value, dict) and (name in _TABLES or (name.startswith("_") and "hooks" in name)):
            yield name, value


def _methods(module: nn.Module) -> dict[str, Any]:
    """Return the functions that a module has of its own in the place of those of its class."""
    kind = type(module)
    return {
        name: value
        for name, value in vars(module).items()
        if not name.startswith("_") and callable(value) and callable(getattr(kind, name, None))
    }
