"""The decoders that the authors of ABS released: ten files, read without running code."""

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeAlias

import torch
from torch import Tensor

from bench import InputError
from defenses.nets import weights as files
from defenses.nets.abs.architectures import FORMS, LATENT

FilePaths: TypeAlias = str | Path | Sequence[str | Path]

_LAYER = re.compile(r"(conv|bn)_?(\d+)\.(weight|bias|running_mean|running_var)")


def released(decoders: FilePaths, classes: int) -> list[Path]:
    """Return the authors' files; raise `InputError` where there is not one for each class.

    Args:
        decoders: the files, in the order of the classes.
        classes: number of classes.
    """
    given = [decoders] if isinstance(decoders, str | Path) else decoders
    if len(given) != classes:
        raise InputError(
            f"decoders: expected a file for each of {classes} classes, in their order, found {len(given)}"
        )
    return [Path(each) for each in given]


def decoder_state(file: Path | str, channels: int) -> dict[str, Tensor]:
    """Return the decoder in one of the authors' files, by the names that it has in a `Stack`.

    The file is a plain state dict with keys ``Encoder.*`` and ``Decoder.conv_i.*``, ``Decoder.bn_i.*``,
    counted from any number; it is read without running code. Raise `InputError` where it is no such
    thing, or its shapes are not the official decoder's.

    Args:
        file: the file.
        channels: channels of the images.
    """
    try:
        state = files.read(file)
    except InputError as error:
        raise InputError(f"decoders: {str(error).removeprefix('weights: ')}") from None
    named = dict(_renamed(state))
    expected = dict(_expected(channels))
    if missing := [name for name in expected if name not in named]:
        raise InputError(
            f"decoders: {file}: expected the state dict of a released ABS autoencoder, with four layers "
            f"Decoder.conv_i and three Decoder.bn_i; found {', '.join(sorted(state)[:4]) or 'nothing'}"
            f"{', ...' if len(state) > 4 else ''}, and no counterpart of {missing[0]}"
        )
    if extra := [name for name in named if name not in expected]:
        raise InputError(f"decoders: {file}: the official decoder has no counterpart of {extra[0]}")
    for name, shape in expected.items():
        if tuple(named[name].shape) != shape:
            raise InputError(
                f"decoders: {file}: {name} has the shape {tuple(named[name].shape)}, in the official "
                f"decoder for {channels}-channel images it has {shape}"
            )
        try:
            files.cast(Path(file), name, named[name], torch.empty(shape))
        except InputError as error:
            raise InputError(f"decoders: {str(error).removeprefix('weights: ')}") from None
    return named


def _renamed(state: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Yield the decoder's tensors as ``convs.i.weight`` and so on, counted from 0."""
    half = "Decoder."
    inside = {name.removeprefix(half): each for name, each in state.items() if name.startswith(half)}
    found = {name: match for name in inside if (match := _LAYER.fullmatch(name))}
    for kind, plural in (("conv", "convs"), ("bn", "norms")):
        numbers = sorted({int(each[2]) for each in found.values() if each[1] == kind})
        for name, each in found.items():
            if each[1] == kind:
                yield f"{plural}.{numbers.index(int(each[2]))}.{each[3]}", inside[name]
    for name in inside:
        # Batches seen are counted, and never looked at.
        if name not in found and not name.endswith("num_batches_tracked"):
            yield f"Decoder.{name}", inside[name]


def _expected(channels: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    inputs = LATENT
    *outer, last = FORMS["official"].decoder
    for place, plan in enumerate([*outer, last._replace(outputs=channels)]):
        yield f"convs.{place}.weight", (inputs, plan.outputs, plan.kernel, plan.kernel)
        yield f"convs.{place}.bias", (plan.outputs,)
        if place < len(outer):
            for name in ("weight", "bias", "running_mean", "running_var"):
                yield f"norms.{place}.{name}", (plan.outputs,)
        inputs = plan.outputs
