"""Weights from files that others made: safetensors, or checkpoints that need no code to be read."""

import json
from collections.abc import Iterable, Mapping
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
"""Keys under which training scripts keep the weights in a checkpoint."""

LEGACY = b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19."
"""How `torch.save` began its files before they were zip archives: a pickled magic number."""


def check(file: Path | str) -> Literal["safetensors", "checkpoint"]:
    """Return what kind of file it is, from its headers; raise `InputError` where it is not to be read.

    A checkpoint is a file of `torch.save` that holds nothing but tensors and plain values. Of its pickle
    nothing is run here.
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


def fill(network: nn.Module, file: Path | str, prefix: str = "") -> None:
    """Load a file's weights into a network; every name and shape must fit.

    With a prefix, only the names that begin with it count, less the prefix.
    """
    state = read(file)
    if prefix:
        under = {name.removeprefix(prefix): each for name, each in state.items() if name.startswith(prefix)}
        if not under:
            raise InputError(f"prefix: no name in {file} begins with {prefix!r}; there are {_few(state)}")
        state = under
    own = network.state_dict()
    for name, value in own.items():
        if name in state and isinstance(value, Tensor) and value.shape != state[name].shape:
            raise InputError(
                f"weights: {file}: {name} has the shape {tuple(state[name].shape)}, "
                f"in the network it has {tuple(value.shape)}"
            )
    missing, unexpected = network.load_state_dict(state, strict=False)
    trouble = {"missing": missing, "unexpected": unexpected}
    if said := "; ".join(f"{kind} {_few(names)}" for kind, names in trouble.items() if names):
        raise InputError(f"weights: {file} does not fit the network: {said}{_advice(own, state)}")


def read(file: Path | str) -> dict[str, Tensor]:
    """Return the tensors of a file by name: a state dict, or the one in a checkpoint (`NESTED`)."""
    if check(file) == "safetensors":
        try:
            return load_file(file)
        except SafetensorError as error:
            raise InputError(f"weights: {file} is damaged: {error}") from None
    content = _read(file)
    if isinstance(content, Mapping):
        content = next((content[key] for key in NESTED if isinstance(content.get(key), Mapping)), content)
    if not isinstance(content, Mapping) or not all(isinstance(each, Tensor) for each in content.values()):
        found = f"the keys {_few(content)}" if isinstance(content, Mapping) else f"a {type(content).__name__}"
        raise InputError(
            f"weights: {file}: expected a state dict, or one under {' or '.join(NESTED)}, found {found}"
        )
    return dict(content)


def _read(file: Path | str) -> Any:
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


def _pickled(file: Path | str, what: str) -> InputError:
    return InputError(
        f"weights: {file} is {what}, which may run any code when it is read. If you trust it, convert it "
        "where it was made: safetensors.torch.save_file(network.state_dict(), 'weights.safetensors')"
    )


def _advice(own: Mapping[str, Any], state: Mapping[str, Tensor]) -> str:
    """Return the prefix that would make names fit, if there is one."""
    first = next(iter(own), "")
    for name in state:
        prefix = name.removesuffix(f".{first}") + "."
        if name.endswith(f".{first}") and all(prefix + each in state for each in own):
            return f"; with prefix: {prefix!r} it fits"
    return ""


def _few(names: Iterable[Any]) -> str:
    listed = [str(each) for each in names]
    return ", ".join(listed[:4]) + (f" and {len(listed) - 4} more" if len(listed) > 4 else "")
