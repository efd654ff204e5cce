"""Weights from files that others made: safetensors, or checkpoints that need no code to be read."""

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from difflib import get_close_matches
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.serialization import get_unsafe_globals_in_checkpoint

from bench import InputError

NESTED = ("state_dict", "model_state_dict", "model")
"""Keys under which training scripts keep the weights in a checkpoint, for a message: any key will do."""

NESTING = 32
"""How many keys deep a state dict is looked for."""

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""Kinds of numbers that weights are published in, and that become each other."""

LEGACY = b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19."
"""How `torch.save` began its files before they were zip archives: a pickled magic number."""


def check(file: Path | str) -> Literal["safetensors", "checkpoint"]:
    """Return what kind of file it is, from its headers; raise `InputError` where it is not to be read.

    A checkpoint is a file of `torch.save` that holds nothing but tensors and plain values. Of its pickle
    nothing is run here.

    Args:
        file: the file.
    """
    file = Path(file)
    try:
        with file.open("rb") as opened:
            head = opened.read(64)
    except FileNotFoundError:
        there = [each.name for each in file.parent.iterdir()] if file.parent.is_dir() else []
        near = get_close_matches(file.name, there, n=1)
        raise InputError(
            f"weights: no such file: {file}" + (f"; did you mean {near[0]!r}?" if near else "")
        ) from None
    except OSError as error:
        raise InputError(f"weights: {file} cannot be read: {error.strerror}") from None
    # Safetensors come first: the length that begins them may look like a pickle's first byte.
    if head[8:9] == b"{":
        _check_length(file, int.from_bytes(head[:8], "little"))
        return "safetensors"
    if head.startswith(b"PK\x03\x04"):
        _check_archive(file)
        return "checkpoint"
    if head.startswith(LEGACY):
        _read(file)
        return "checkpoint"
    if head.startswith(b"\x80"):
        raise _pickled(file, "a pickle")
    if head.startswith(b"version https://git-lfs"):
        raise InputError(f"weights: {file} is a pointer of Git LFS, not the file itself: git lfs pull")
    raise InputError(
        f"weights: {file} is neither safetensors nor a checkpoint of torch.save; it begins with {head[:16]!r}"
    )


def fill(network: nn.Module, file: Path | str, prefix: str = "", key: str = "") -> list[str]:
    """Load a file's weights into a network; every name, shape and kind of number must fit.

    Args:
        network: what is filled.
        file: safetensors, or a checkpoint.
        prefix: what names must begin with; they are taken less that.
        key: the dotted keys that lead to the state dict in a checkpoint; empty: the only one that fits.

    Returns:
        A sentence for each thing that a reader of the numbers should know.

    Raises:
        InputError: the file is damaged, or a name, shape or kind of number does not fit.
    """
    file = Path(file)
    own = network.state_dict()
    state = _chosen(file, own, prefix, key)
    for name, value in own.items():
        if name in state and isinstance(value, Tensor) and value.shape != state[name].shape:
            raise InputError(
                f"weights: {file}: {name} has the shape {tuple(state[name].shape)}, "
                f"in the network it has {tuple(value.shape)}"
            )
    whole = {
        name: cast(file, name, value, own[name]) if isinstance(own.get(name), Tensor) else value
        for name, value in state.items()
    }
    try:
        missing, unexpected = network.load_state_dict(whole, strict=False)
    except RuntimeError as error:
        reason = str(error).split("\n\t")[-1]
        raise InputError(f"weights: {file} does not fit the network: {reason}") from None
    trouble = {"missing": missing, "unexpected": unexpected}
    if said := "; ".join(f"{kind} {_few(names)}" for kind, names in trouble.items() if names):
        raise InputError(f"weights: {file} does not fit the network: {said}{_advice(own, state)}")
    return conversions(file, state, own)


def cast(file: Path, name: str, value: Tensor, own: Tensor) -> Tensor:
    """Return a tensor of a file as the network has it; raise `InputError` where that would be another number.

    Floats of 16, 32 and 64 bits become each other. Everything else keeps its value or is refused.

    Args:
        file: where the tensor is from, for messages.
        name: its name there.
        value: the tensor.
        own: the network's tensor of that name.
    """
    where = f"weights: {file}: {name} is {_kind(value)}"
    if value.layout != torch.strided:
        raise InputError(f"{where} and sparse, expected every value of it")
    if value.dtype in FLOATS and own.dtype in FLOATS:
        converted = value.to(own.dtype)
        if not converted.isfinite().all():
            fits = "" if not value.isfinite().all() else f" as {_kind(own)}"
            raise InputError(f"weights: {file}: {name} is not finite{fits}")
        return converted
    if own.dtype in FLOATS:
        raise InputError(f"{where}, expected {_kind(own)} (or {' or '.join(map(_short, FLOATS))})")
    if value.dtype != own.dtype:
        converted = value.to(own.dtype)
        if not torch.equal(converted.to(value.dtype), value):
            raise InputError(f"{where}, expected {_kind(own)}, which cannot hold its values")
        return converted
    return value


def conversions(file: Path, state: Mapping[str, Tensor], own: Mapping[str, Any]) -> list[str]:
    """Return a sentence for each kind of number that was converted.

    Args:
        file: where the tensors are from.
        state: the file's tensors by name.
        own: the network's tensors by name.
    """
    found: dict[str, list[str]] = {}
    for name, value in state.items():
        if value.dtype != own[name].dtype:
            found.setdefault(f"{_kind(value)} to {_kind(own[name])}", []).append(name)
    return [f"weights: {file.name}: converted from {how}: {_few(names)}" for how, names in found.items()]


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _kind(value: Tensor) -> str:
    return _short(value.dtype)


def read(file: Path | str) -> dict[str, Tensor]:
    """Return the tensors of a file by name: a state dict, or the only one in a checkpoint.

    Args:
        file: the file.
    """
    found = _states(Path(file))
    if len(found) > 1:
        raise InputError(
            f"weights: {file} holds several state dicts: {_few(found)}; expected one: keep it in a file of "
            "its own"
        )
    return next(iter(found.values()))


def _chosen(file: Path, own: Mapping[str, Any], prefix: str, key: str) -> dict[str, Tensor]:
    """Return the state dict that is asked for; where several would do, none is chosen in silence."""
    states = _states(file)
    if key:
        if key not in states:
            near = get_close_matches(key, states, n=1)
            there = f"did you mean {near[0]!r}?" if near else f"there are {_few(filter(None, states))}"
            if not any(states):
                there = "there is one state dict, at the top"
            raise InputError(f"key: {file} holds no state dict under {key!r}; {there}")
        states = {key: states[key]}
    if prefix:
        under = {at: _under(prefix, state) for at, state in states.items()}
        if not any(under.values()):
            names = [name for state in states.values() for name in state]
            raise InputError(f"prefix: no name in {file} begins with {prefix!r}; there are {_few(names)}")
        states = {at: state for at, state in under.items() if state}
    able = {at: state for at, state in states.items() if _prefixes(own, state)} or states
    first, *others = able.values()
    if any(not _alike(first, each) for each in others):
        named = ", ".join(at or "one at the top" for at in able)
        raise InputError(
            f"weights: {file} holds several state dicts: {named}; say which: key: {next(filter(None, able))}"
        )
    if not key:
        _check_twins(file, first, able)
    return first


def _check_twins(file: Path, chosen: Mapping[str, Tensor], able: Mapping[str, Any]) -> None:
    """Raise where a checkpoint holds what may be other weights of the same network, under other names."""
    twins = [at for at in _twins(file, chosen) if at not in able]
    if twins:
        here = next(iter(able))
        way = f"key: {here}" if here else "keep the ones that you mean in a file of their own"
        raise InputError(
            f"weights: {file} holds as many tensors of the same shapes under {twins[0]}, perhaps an average "
            f"of the weights; if those {f'under {here}' if here else 'at the top'} are meant, say so: {way}"
        )


OPTIMISERS = ("optim", "momentum", "exp_avg", "scheduler", "grad")
"""What the keys are called under which trainings keep tensors that are no weights."""


def _twins(file: Path, state: Mapping[str, Tensor]) -> Iterator[str]:
    """Yield the dotted keys of lists and mappings whose tensors have the shapes of a state dict."""
    if check(file) == "safetensors":
        return
    wanted = Counter(tuple(each.shape) for each in state.values() if each.is_floating_point())
    large = Counter({shape: count for shape, count in wanted.items() if len(shape) > 1})
    for way, tensors in _holders(_read(file), ()):
        shapes = Counter(tuple(each.shape) for each in tensors if each.is_floating_point())
        known = any(word in key.lower() for key in way for word in OPTIMISERS)
        if len(tensors) > 1 and large and large <= shapes <= wanted and not known:
            yield ".".join(way)


def _holders(content: Any, way: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], list[Tensor]]]:
    """Yield every list and mapping in a checkpoint: the keys that lead to it, and its own tensors."""
    if isinstance(content, Mapping):
        pairs = [(str(name), value) for name, value in content.items()]
    elif isinstance(content, list | tuple):
        pairs = [(str(place), value) for place, value in enumerate(content)]
    else:
        return
    yield way, [value for _, value in pairs if isinstance(value, Tensor)]
    for name, value in pairs if len(way) < NESTING else ():
        yield from _holders(value, (*way, name))


def _under(prefix: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): each for name, each in state.items() if name.startswith(prefix)}


def _alike(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    """Return whether two state dicts are the same to the last bit."""
    return one.keys() == other.keys() and all(
        each.dtype == other[name].dtype and torch.equal(each, other[name]) for name, each in one.items()
    )


def _states(file: Path) -> dict[str, dict[str, Tensor]]:
    """Return the state dicts of a file by the dotted keys that lead to them; at the top: an empty key."""
    if check(file) == "safetensors":
        try:
            return {"": load_file(file)}
        except SafetensorError as error:
            raise InputError(f"weights: {file} is damaged: {error}") from None
    content = _read(file)
    found = dict(_mappings(content, ()))
    if not found:
        kind = f"the keys {_few(content)}" if isinstance(content, Mapping) else f"a {type(content).__name__}"
        raise InputError(
            f"weights: {file}: expected a state dict, or one under a key such as {' or '.join(NESTED)}, "
            f"found {kind}"
        )
    return found


def _mappings(content: Any, way: tuple[str, ...]) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Yield the mappings of names to tensors, and the keys that lead to them.

    Where the keys are no text, an optimiser counts parameters; below, nobody keeps a network. Tensors beside
    other values are a state dict if their names are those of modules.
    """
    if not isinstance(content, Mapping) or len(way) > NESTING:
        return
    if not all(isinstance(name, str) for name in content):
        return
    tensors = {name: each for name, each in content.items() if isinstance(each, Tensor)}
    if tensors and (len(tensors) == len(content) or any("." in name for name in tensors)):
        yield ".".join(way), tensors
    for name, value in content.items():
        yield from _mappings(value, (*way, name))


def _read(file: Path) -> Any:
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except UnpicklingError:
        raise _pickled(file, "a pickle of more than tensors") from None
    except (RuntimeError, ValueError, EOFError, KeyError) as error:
        raise InputError(f"weights: {file} is damaged: {str(error).partition(chr(10))[0]}") from None


def _check_length(file: Path, length: int) -> None:
    """Raise where a safetensors file is shorter or longer than its header says."""
    size = file.stat().st_size
    try:
        with file.open("rb") as opened:
            header = json.loads(opened.read(8 + min(length, size))[8:])
        ends = [each["data_offsets"][1] for name, each in header.items() if name != "__metadata__"]
        expected = 8 + length + max(ends, default=0)
    except (ValueError, AttributeError, TypeError, KeyError, IndexError):
        raise InputError(f"weights: {file} is damaged: the header of safetensors is cut or altered") from None
    if size != expected:
        raise InputError(f"weights: {file} is damaged: expected {expected} bytes, found {size}")


def _check_archive(file: Path) -> None:
    try:
        unsafe = get_unsafe_globals_in_checkpoint(file)
    except (OSError, RuntimeError, ValueError, UnpicklingError) as error:
        reason = str(error).partition("\n")[0]
        raise InputError(f"weights: {file} is no whole checkpoint of torch.save: {reason}") from None
    if unsafe:
        raise _pickled(file, f"a pickle of more than tensors ({_few(sorted(unsafe))})")


def _pickled(file: Path, what: str) -> InputError:
    return InputError(
        f"weights: {file} is {what}, which may run any code when it is read. If you trust it, convert it "
        "where it was made: safetensors.torch.save_file(network.state_dict(), 'weights.safetensors')"
    )


def _advice(own: Mapping[str, Any], state: Mapping[str, Tensor]) -> str:
    """Return the prefixes that would make names fit, if there are any."""
    found = [repr(each) for each in _prefixes(own, state) if each]
    return f"; with prefix: {' or '.join(found)} it fits" if found else ""


def _prefixes(own: Mapping[str, Any], state: Mapping[str, Tensor]) -> list[str]:
    """Return what may stand before every name of the network in a state dict, shapes considered; nothing
    (an empty text) included.
    """
    first = next(iter(own), "")
    found = [name.removesuffix(first) for name in state if name == first or name.endswith(f".{first}")]
    return [each for each in found if all(_same_form(state.get(each + name), own[name]) for name in own)]


def _same_form(value: Tensor | None, own: Any) -> bool:
    return value is not None and (not isinstance(own, Tensor) or value.shape == own.shape)


def _few(names: Iterable[Any]) -> str:
    listed = [str(each) for each in names]
    return ", ".join(listed[:4]) + (f" and {len(listed) - 4} more" if len(listed) > 4 else "")
