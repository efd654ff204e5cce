"""The state of a training that is not done: one safetensors file, with a digest of all its bytes.

A state is what a `state_dict` returns: mappings, lists, tuples, sets, tensors, arrays, numbers, texts. Its
tensors are the file's, sparse ones as their indices and values; all else stands in the file's metadata as
JSON. Nothing is pickled.
"""

import json
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load, save
from torch import Tensor

from bench.errors import DamagedError, InputError
from bench.results import durable

FORM = 3
"""Number of the form of these files; one of another form is not read."""

_BLANK = f"sha256:{0:064}"
"""What stands in place of the digest where that is computed."""

_MAPPINGS: Mapping[str, Callable[[dict[Any, Any]], Any]] = {
    "dict": dict,
    "OrderedDict": OrderedDict,
    "Counter": Counter,
}
_LISTS: Mapping[str, Callable[[list[Any]], Any]] = {"list": list, "tuple": tuple, "set": set}

_NUMBERS = "biufc"
"""Kinds of numpy's types that are nothing but their bytes."""


def write(path: Path, before: Path, told: Mapping[str, Any], states: Mapping[str, Any]) -> bool:
    """Store named states; a kill at any moment leaves the new file, or the old one in either place.

    Args:
        path: where the states shall lie.
        before: where the file goes that lay there.
        told: what is said of the states, as JSON: key, phase, epochs done.
        states: what each `state_dict` returned, by the name of its owner.

    Returns:
        Whether the new file can be read back as it was written.

    Raises:
        InputError: a state has a value that cannot be kept, or holds itself.
    """
    tensors: dict[str, Tensor] = {}
    try:
        tree = {name: _spelled(state, (name,), tensors) for name, state in states.items()}
    except RecursionError:
        raise InputError("fitting.epochs cannot keep a state that holds itself") from None
    text = json.dumps({"form": FORM, **told, "states": tree})
    head, body = _halves(save(tensors, {"digest": _BLANK, "plain": text}))
    digest = _digest(head, body)
    with durable.drafted(path) as draft:
        with draft.open("wb") as file:
            file.write(head.replace(_BLANK.encode(), digest.encode(), 1))
            file.write(body)
        if path.is_file():
            durable.settle(path, before)
    try:
        return _whole(path.read_bytes())["digest"] == digest
    except (OSError, DamagedError):
        return False


def read(path: Path, device: torch.device) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return what a file tells, and its states.

    Args:
        path: the file.
        device: where tensors go that did not lie on a CPU.

    Returns:
        What was told, and the states by name, equal to the bit.

    Raises:
        DamagedError: the file is missing, or not what was written, or of another form.
    """
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise DamagedError(f"cannot be read ({error.strerror})") from None
    told = json.loads(_whole(raw)["plain"])
    if told["form"] != FORM:
        raise DamagedError("is of another version")
    tensors = load(raw)
    return told, {name: _meant(each, tensors, device) for name, each in told["states"].items()}


def _whole(raw: bytes) -> dict[str, str]:
    """Return a file's metadata; raise `DamagedError` where the file is not what its digest says."""
    head, body = _halves(raw)
    try:
        metadata: dict[str, str] = json.loads(head[8:])["__metadata__"]
        digest = metadata["digest"]
        whole = digest == _digest(head.replace(digest.encode(), _BLANK.encode(), 1), body)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        whole = False
    if not whole:
        raise DamagedError("is cut short, altered, or of another version")
    return metadata


def _halves(raw: bytes) -> tuple[bytes, memoryview]:
    """Return a safetensors file's header, its length included, and its tensors."""
    size = 8 + int.from_bytes(raw[:8], "little")
    return raw[:size], memoryview(raw)[size:]


def _digest(head: bytes, body: memoryview) -> str:
    total = sha256(head)
    total.update(body)
    return f"sha256:{total.hexdigest()}"


def _spelled(value: Any, place: tuple[Any, ...], tensors: dict[str, Tensor]) -> Any:
    """Return a value as JSON, its tensors taken out; raise `InputError` where it cannot be kept."""

    def inside(part: Any, key: Any) -> Any:
        return _spelled(part, (*place, key), tensors)

    kind = type(value)
    if value is None or kind in (bool, int, float, str):
        return value
    for name, of in _MAPPINGS.items():
        if kind is of:
            return {name: [[inside(key, key), inside(part, key)] for key, part in value.items()]}
    for name, make in _LISTS.items():
        if kind is make:
            return {name: [inside(part, number) for number, part in enumerate(value)]}
    if kind is bytes:
        return {"bytes": value.hex()}
    if isinstance(value, np.generic | np.ndarray) and value.dtype.kind in _NUMBERS:
        return {"numpy": [value.dtype.str, kind is np.ndarray, value.shape, value.tobytes().hex()]}
    if isinstance(value, Tensor) and value.layout == torch.sparse_coo:
        # As they lie, coalesced or not: the order of sums goes on as it was.
        parts = value.detach()
        halves = [inside(parts._indices(), "indices"), inside(parts._values(), "values")]
        return {"sparse": [[*value.shape], value.is_coalesced(), *halves]}
    if isinstance(value, Tensor) and value.dtype == torch.complex128:
        return {"complex": inside(torch.view_as_real(value.detach().resolve_conj()), "complex")}
    if isinstance(value, Tensor) and _storable(value):
        name = ".".join(map(str, place))
        while name in tensors:
            name += "~"
        tensors[name] = value.detach().to("cpu", copy=True).contiguous()
        return {"tensor": [name, value.device.type]}
    where = f"{place[0]}.state_dict()" + "".join(f"[{key!r}]" for key in place[1:])
    raise InputError(
        f"fitting.epochs cannot keep {where}, a {kind.__module__}.{kind.__qualname__}: a state is made of "
        "dicts, lists, tuples, sets, tensors, arrays, numbers, texts and None"
    )


def _storable(value: Tensor) -> bool:
    """Return whether the file's format knows a tensor's layout and kind of number."""
    try:
        save({"none": value.detach().flatten()[:0].cpu()})
    except (KeyError, ValueError, RuntimeError, NotImplementedError):
        return False
    return not value.is_meta


def _meant(spelled: Any, tensors: Mapping[str, Tensor], device: torch.device) -> Any:
    """Return the value that was spelled; what lay on a GPU lies on the training's device."""
    if not isinstance(spelled, dict):
        return spelled
    ((name, content),) = spelled.items()
    if name in _MAPPINGS:
        pairs = ([_meant(part, tensors, device) for part in pair] for pair in content)
        return _MAPPINGS[name]({key: part for key, part in pairs})
    if name in _LISTS:
        return _LISTS[name]([_meant(part, tensors, device) for part in content])
    if name == "bytes":
        return bytes.fromhex(content)
    if name == "numpy":
        kind, many, shape, data = content
        array = np.frombuffer(bytes.fromhex(data), kind).reshape(shape).copy()
        return array if many else array[()]
    if name == "sparse":
        shape, coalesced, *halves = content
        indices, values = (_meant(each, tensors, device) for each in halves)
        return torch.sparse_coo_tensor(indices, values, shape, is_coalesced=coalesced, check_invariants=True)
    if name == "complex":
        return torch.view_as_complex(_meant(content, tensors, device))
    where, on = content
    return tensors[where] if on == "cpu" else tensors[where].to(device)
