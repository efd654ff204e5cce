"""A network of the user's own, by import path, as it is: weights and normalisation, no training."""

import ast
import importlib
import inspect
import pkgutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from bench import (
    Classifier,
    CodePath,
    ContentPath,
    Fitting,
    InputError,
    Shape,
    Split,
    check_network,
    check_normalisation,
    defense,
    module_file,
)
from defenses.nets import weights as files


def check_params(params: dict[str, Any], shape: Shape) -> None:
    """Raise `InputError` where the network cannot be as asked; runs none of the user's code.

    Looks at the normalisation, at the names that the module of `build` defines, and at what kind of
    file the weights are.

    Args:
        params: the parameters of `module`, defaults filled in, with absolute paths.
        shape: channels, height, width and classes of the data.
    """
    check_normalisation(params["mean"], params["std"], shape.channels)
    _look_for(params["build"])
    if params["weights"] is not None:
        files.check(Path(params["weights"]))
        return
    for name in ("prefix", "key"):
        if params[name]:
            raise InputError(f"{name}: {params[name]!r} is for weights:, and there are none")


@defense(
    "module",
    readouts=("label",),
    version=1,
    random=lambda params: bool(params["random"]),
    aliases=dict.fromkeys(("first", "e2e", "e2e_label", "e2e_last", "e2e_avg", "sum", "bpda"), "logits"),
    check_params=check_params,
    learns=False,
    neutral={"key": "", "random": False},
)
class Module(Classifier):
    """Any network that turns images (N, C, H, W) into logits (N, classes), as `build` returns it.

    Args:
        shape: channels, height, width and classes of the data.
        build: ``package.module:function`` that returns the network; the suite's folder is on the import path.
        arguments: the keyword arguments that it is called with.
        weights: a safetensors file, or a checkpoint of `torch.save` with nothing but tensors and plain values
            in it: a state dict, or the only one in it that fits the network. None leaves the network as
            `build` returns it, which may have loaded its own.
        prefix: what names of weights must begin with; they are taken less that.
        key: the state dict of a checkpoint that is meant, where there are several (``ema.shadow``: under
            ``shadow`` in ``ema``).
        mean: subtracted from images in [0, 1], one number or one for each channel, in [0, 1].
        std: what images are divided by then, one number or one for each channel, above 0.
        random: whether the network draws when it is asked, so that two answers may differ.
    """

    def __init__(
        self,
        shape: Shape,
        *,
        build: CodePath,
        arguments: dict[str, Any] | None = None,
        weights: ContentPath | None = None,
        prefix: str = "",
        key: str = "",
        mean: float | tuple[float, ...] = 0.0,
        std: float | tuple[float, ...] = 1.0,
        random: bool = False,
    ) -> None:
        super().__init__(_built(build, arguments or {}), mean, std, shape.channels)
        self.shape = shape
        self.build = build
        self.weights = weights
        self.prefix = prefix
        self.random = random
        self.key = key

    def fit(self, train: Split, fitting: Fitting, /) -> None:
        """Load the weights, and try the network on two images; nothing is learned.

        Args:
            train: the training images, of which two are looked at.
            fitting: takes notes.

        Raises:
            InputError: the weights do not fit, or the network does not return logits of the data's classes.
        """
        if self.weights is not None:
            for sentence in files.fill(self.network, Path(self.weights), self.prefix, self.key):
                fitting.note(sentence)
        for name, value in self.network.state_dict().items():
            if not isinstance(value, Tensor):
                raise InputError(
                    f"{self.build}: the network's state {name} is a {type(value).__name__}; "
                    "only tensors can be stored"
                )
        self.eval()
        few = train.images[:2].to(fitting.device)
        check_network(self, few, self.build, self.shape.classes)


def _built(build: str, arguments: Mapping[str, Any]) -> nn.Module:
    """Import and call what builds the network."""
    name, _, attribute = build.partition(":")
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        # Another module that is missing is the user's own error, and its traceback is theirs too.
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise
        parent, _, last = error.name.rpartition(".")
        there = [each.name for each in pkgutil.iter_modules(sys.modules[parent].__path__ if parent else None)]
        raise InputError(
            f"build: there is no module {error.name!r} beside the suite or installed{_nearest(last, there)}"
        ) from None
    if not hasattr(module, attribute):
        raise InputError(
            f"build: {_file(module)} defines no {attribute!r}{_nearest(attribute, vars(module))}"
        )
    function = getattr(module, attribute)
    if isinstance(function, nn.Module) or not callable(function):
        raise InputError(
            f"build: expected a function that returns a network, found {build}, a {type(function).__name__}"
        )
    try:
        inspect.signature(function).bind(**arguments)
    except TypeError as error:
        raise InputError(f"build: {build} does not take these arguments: {error}") from None
    network = function(**arguments)
    if not isinstance(network, nn.Module):
        raise InputError(f"build: expected {build} to return an nn.Module, found a {type(network).__name__}")
    return network


def _file(module: Any) -> str:
    return str(getattr(module, "__file__", None) or module.__name__)


def _nearest(name: str, known: Any) -> str:
    near = get_close_matches(name, [each for each in known if not each.startswith("_")], n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def _look_for(build: str) -> None:
    """Raise where the module of `build` cannot define it, as far as its source tells."""
    name, _, attribute = build.partition(":")
    source = module_file(name)
    if source is None or source.suffix != ".py":
        return
    try:
        names = set(_bound(ast.parse(source.read_bytes(), str(source)).body))
    except SyntaxError as error:
        raise InputError(f"build: {source}:{error.lineno}: {error.msg}") from None
    if attribute not in names and not names & {"*", "__getattr__"}:
        raise InputError(f"build: {source} defines no {attribute!r}{_nearest(attribute, names)}")


def _bound(statements: Sequence[ast.stmt]) -> Iterator[str]:
    """Yield the names that statements bind in their module."""
    for statement in statements:
        match statement:
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
                yield statement.name
            case ast.Import() | ast.ImportFrom():
                for alias in statement.names:
                    yield alias.asname or alias.name.partition(".")[0]
            case _:
                for node in ast.walk(statement):
                    if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                        yield node.id
                for block in ("body", "orelse", "finalbody"):
                    yield from _bound(getattr(statement, block, ()))
                for handler in getattr(statement, "handlers", ()):
                    yield from _bound(handler.body)
