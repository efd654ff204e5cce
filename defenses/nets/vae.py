"""The variational autoencoders of ABS (Schott et al. 2018, arXiv:1805.09190), one for each class.

All classes lie side by side in grouped convolutions: one call encodes or decodes for every class, and a
normalisation sees the images of its own class only.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.functional import batch_norm, conv2d, conv_transpose2d, leaky_relu, pad, pixel_shuffle, relu

from bench import InputError, Shape
from defenses.nets import weights as files
from defenses.nets.chains import scaled_width

Architecture: TypeAlias = Literal["official", "supplement"]
FilePaths: TypeAlias = str | Path | Sequence[str | Path]


class Plan(NamedTuple):
    """A convolution as the papers write it."""

    outputs: int
    kernel: int
    stride: int
    padding: int


class Form(NamedTuple):
    """What an architecture is made of. The last layer of each half has neither norm nor activation."""

    side: int
    """Of the images, which are square."""
    encoder: tuple[Plan, ...]
    """Outputs of the last: 0, for there the latent decides."""
    decoder: tuple[Plan, ...]
    """Outputs of the last: 0, for there the image decides."""
    activations: tuple[str, str]
    norms: tuple[bool, bool]
    gain: float
    """Images are sigmoid(gain y); (1 + tanh y) / 2, a tanh on [-1, 1], is sigmoid(2 y)."""


FORMS: dict[Architecture, Form] = {
    # 28 -> 24 -> 11 -> 5 -> 1 and 1 -> 4 -> 11 -> 25 -> 28.
    "official": Form(
        side=28,
        encoder=(Plan(32, 5, 1, 0), Plan(32, 4, 2, 0), Plan(64, 3, 2, 0), Plan(0, 5, 1, 0)),
        decoder=(Plan(32, 4, 1, 0), Plan(16, 5, 2, 0), Plan(16, 5, 2, 0), Plan(0, 4, 1, 0)),
        activations=("elu", "elu"),
        norms=(True, True),
        gain=1.0,
    ),
    # 32 -> 16 -> 8 -> 4 -> 1, the last fully connected, and 1 -> 4 -> 8 -> 16 -> 32.
    "supplement": Form(
        side=32,
        encoder=(
            *(Plan(256, 4, 2, 1), Plan(512, 4, 2, 1), Plan(1024, 4, 2, 1), Plan(128, 4, 1, 0)),
            Plan(0, 1, 1, 0),
        ),
        decoder=(Plan(1024, 4, 1, 0), Plan(512, 4, 2, 1), Plan(256, 4, 2, 1), Plan(0, 4, 2, 1)),
        activations=("leaky", "relu"),
        norms=(False, True),
        gain=2.0,
    ),
}


def check(architecture: Architecture, shape: Shape) -> None:
    """Raise `InputError` where the decoders' images are not of the data's size."""
    side = FORMS[architecture].side
    if (shape.height, shape.width) != (side, side):
        raise InputError(
            f"architecture: the {architecture} decoders draw {side}x{side}, the data is "
            f"{shape.height}x{shape.width}; set resize: {side} for the data set"
        )


def blocks(images: int, classes: int, rows: int) -> Iterator[tuple[slice, slice]]:
    """Cut images x classes into blocks of at most `rows` codes, of few classes where images are many."""
    tall = max(1, min(images, rows))
    wide = max(1, min(classes, rows // tall))
    for top in range(0, images, tall):
        for left in range(0, classes, wide):
            yield slice(top, min(top + tall, images)), slice(left, min(left + wide, classes))


class Elu(torch.autograd.Function):
    """ELU by way of the exponential: several times faster on a CPU than torch's, equal up to rounding.

    Its backward pass is differentiable too.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        """Return x where it is positive, exp(x) - 1 elsewhere."""
        # exp(x) - 1 >= x everywhere; held at 0 from above, the maximum is the right branch.
        out = x.exp().clamp_max_(1).sub_(1)
        torch.maximum(x, out, out=out)
        ctx.save_for_backward(out)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        """Return the gradient times 1, or times exp(x) = out + 1 where x is negative."""
        (out,) = ctx.saved_tensors
        back: Tensor = torch.ops.aten.elu_backward(gradients[0], 1, 1, 1, True, out)
        return back


def _activated(x: Tensor, name: str) -> Tensor:
    if name == "elu":
        out: Tensor = Elu.apply(x)
        return out
    return relu(x) if name == "relu" else leaky_relu(x, 0.2)


class Stack(nn.Module):
    """One half of K autoencoders: convolutions, normalised and activated, with a group for each class.

    Weights lie class after class along the first axis, as grouped convolutions have them, so that
    neighbouring classes can be asked alone.
    """

    def __init__(
        self,
        classes: int,
        inputs: int,
        plans: Sequence[Plan],
        *,
        transposed: bool,
        norm: bool,
        activation: str,
    ) -> None:
        super().__init__()
        self.classes, self.plans = classes, tuple(plans)
        self.transposed, self.activation = transposed, activation
        kind = nn.ConvTranspose2d if transposed else nn.Conv2d
        self.convs, self.norms = nn.ModuleList(), nn.ModuleList()
        for outputs, kernel, stride, padding in plans:
            planes = (classes * inputs, classes * outputs)
            self.convs.append(kind(*planes, kernel, stride=stride, padding=padding, groups=classes))
            inputs = outputs
        if norm:
            self.norms.extend(nn.BatchNorm2d(classes * plan.outputs) for plan in plans[:-1])

    def forward(self, x: Tensor, classes: slice) -> Tensor:
        """Return (N, G, outputs, H', W') of (N, G, inputs, H, W), for the G classes of the slice."""
        count = classes.stop - classes.start
        h = x.flatten(1, 2)
        for conv, norm, (_, _, stride, padding) in self.layers():
            weight, bias = self.of(conv.weight, classes), self.of(conv.bias, classes)
            convolve = conv_transpose2d if self.transposed else conv2d
            h = convolve(h, weight, bias, stride, padding, groups=count)
            if norm is not None:
                parts = (norm.running_mean, norm.running_var, norm.weight, norm.bias)
                mean, variance, scale, shift = (self.of(each, classes) for each in parts)
                h = batch_norm(h, mean, variance, scale, shift, norm.training, MOMENTUM, norm.eps)
            if conv is not self.convs[-1]:
                h = _activated(h, self.activation)
        out: Tensor = h.unflatten(1, (count, -1))
        return out

    def layers(self) -> Iterator[tuple[nn.Conv2d | nn.ConvTranspose2d, nn.BatchNorm2d | None, Plan]]:
        """Yield each convolution, its normalisation if it has one, and its plan."""
        for place, (conv, plan) in enumerate(zip(self.convs, self.plans, strict=True)):
            assert isinstance(conv, nn.Conv2d | nn.ConvTranspose2d)
            norm = self.norms[place] if place < len(self.norms) else None
            assert norm is None or isinstance(norm, nn.BatchNorm2d)
            yield conv, norm, plan

    def of(self, value: Tensor | None, classes: slice) -> Tensor:
        """Return the part of a weight or buffer that is these classes'."""
        assert value is not None
        each = len(value) // self.classes
        return value[classes.start * each : classes.stop * each]


MOMENTUM = 0.1
"""How far running statistics move to a batch's, PyTorch's default."""


class Phases(NamedTuple):
    """The official decoder's last two layers on grids of a quarter and of a sixteenth of the pixels.

    A transposed convolution of stride 2 and kernel 5, and one of stride 1 and kernel 4 behind it, are slow
    on a CPU, the first in groups slower still. As plain convolutions they are faster: the first gives, for
    each cell q of 2x2 pixels, the pixels 2q + p as planes of their own, and the second reads those and
    gives the pixels 4Q + r of cells of 4x4. The first layer's 25 pixels are 12 cells and a half: what stands
    in the other half is the activation of the bias alone, whose share of the image is taken off in `level`.
    """

    inner: Tensor
    """(K, outputs * 4, inputs, 3, 3)."""
    bias: Tensor
    """(K, outputs * 4)."""
    outer: Tensor
    """(K, channels * 16, outputs * 4, 4, 4)."""
    inner_back: Tensor
    """(K, inputs, outputs * 4, 3, 3): from the gradient at cells of 2x2 to the one below."""
    outer_back: Tensor
    """(K, outputs * 4, channels, 5, 5): from the gradient at pixels to the one at cells of 2x2."""
    level: Tensor
    """(K, channels, 28, 28)."""

    @classmethod
    def of(cls, weights: Sequence[Tensor], biases: Sequence[Tensor]) -> Self:
        """Return this form of two layers' weights, (K, inputs, outputs, kernel, kernel), and biases."""
        first, second = weights
        # Which tap k of a kernel joins pixels: 1 where it does. Pixel 2q + p is made of q + t - 2.
        p, t, k = torch.meshgrid(*map(torch.arange, (2, 3, 5)), indexing="ij")
        upon = (k == p + 2 * (2 - t)).to(first)
        # Pixel 4Q + r is made of pixel 2 (2Q + t - 2) + p.
        r, p, t, k = torch.meshgrid(*map(torch.arange, (4, 2, 4, 4)), indexing="ij")
        over = (k == r - 2 * (t - 2) - p).to(first)
        # Pixel 2q + p has its share in pixel 2q + t.
        p, t, k = torch.meshgrid(*map(torch.arange, (2, 5, 4)), indexing="ij")
        down = (k == t - p).to(first)
        inner = torch.einsum("ptk,qul,gickl->gcpqitu", upon, upon, first).flatten(1, 3)
        outer = torch.einsum("rptk,squl,gcokl->gorscpqtu", over, over, second).flatten(4, 6).flatten(1, 3)
        outer_back = torch.einsum("ptk,qul,gcokl->gcpqotu", down, down, second).flatten(1, 3)
        bias = biases[0].repeat_interleave(4, dim=1)
        # The odd pixels of the last row and column of cells.
        beyond = first.new_zeros(2, 2, CELLS, CELLS)
        beyond[1, :, -1] = beyond[:, 1, :, -1] = 1
        stray = Elu.apply(bias)[:, :, None, None] * beyond.flatten(0, 1).repeat(biases[0].shape[1], 1, 1)
        share = conv2d(stray.flatten(0, 1)[None], outer.flatten(0, 1), stride=2, padding=2, groups=len(first))
        share = pixel_shuffle(share, 4)[0].unflatten(0, (len(first), -1))
        inner_back = inner.transpose(1, 2).flip(3, 4).contiguous()
        return cls(inner, bias, outer, inner_back, outer_back, biases[1][:, :, None, None] - share)

    def __call__(self, h: Tensor, classes: slice) -> Tensor:
        """Return (N, G * channels, 28, 28) of (N, G * inputs, 11, 11), for the G classes of the slice."""
        count = classes.stop - classes.start
        inner, bias, outer, inner_back, outer_back, level = (each[classes].flatten(0, 1) for each in self)
        h = _Linear.apply(
            h,
            lambda each: conv2d(each, inner, bias, padding=2, groups=count),
            lambda back: conv2d(back, inner_back, groups=count),
        )
        # A row and a column more, so that the last cell has its pixels.
        h = _Linear.apply(
            Elu.apply(h),
            lambda each: pixel_shuffle(conv2d(each, outer, stride=2, padding=2, groups=count), 4),
            lambda back: conv2d(pad(back, (0, 1, 0, 1)), outer_back, stride=2, groups=count),
        )
        return h + level


CELLS = 13
"""Of 2x2 pixels, along a side of the official decoder's third layer."""


class _Linear(torch.autograd.Function):
    """A map that is linear up to a constant, with its transpose given, where autograd's own is slower."""

    @staticmethod
    def forward(
        ctx: Any, h: Tensor, there: Callable[[Tensor], Tensor], back: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """Return what the map makes of `h`."""
        ctx.back = back
        return there(h)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        """Return what its transpose makes of the gradient."""
        return ctx.back(gradients[0]), None, None


class Folded(NamedTuple):
    """Decoders as they answer in evaluation, normalisations folded into the weights; no gradient to these."""

    weights: tuple[Tensor, ...]
    """A layer's: (K, inputs, outputs, kernel, kernel)."""
    biases: tuple[Tensor, ...]
    """A layer's: (K, outputs)."""
    plans: tuple[Plan, ...]
    activation: str
    gain: float
    phases: Phases | None
    """The last two layers once more, of the official decoder."""

    def __call__(self, codes: Tensor, classes: slice) -> Tensor:
        """Return images (N, G, C, H, W) in [0, 1] of codes (N, G, latent), for the G classes of the slice."""
        count = classes.stop - classes.start
        plain = len(self.plans) - (0 if self.phases is None else 2)
        h = codes.flatten(1)[:, :, None, None]
        for place, (_, _, stride, padding) in enumerate(self.plans[:plain]):
            kernel, level = self.weights[place][classes].flatten(0, 1), self.biases[place][classes].flatten()
            h = conv_transpose2d(h, kernel, level, stride, padding, groups=count)
            if place < len(self.plans) - 1:
                h = _activated(h, self.activation)
        if self.phases is not None:
            h = self.phases(h, classes)
        images: Tensor = (self.gain * h).sigmoid().unflatten(1, (count, -1))
        return images


class Autoencoders(nn.Module):
    """A variational autoencoder for each of the data's classes; without `encode`, decoders alone."""

    def __init__(
        self, shape: Shape, architecture: Architecture, *, latent: int, width: float, encode: bool
    ) -> None:
        super().__init__()
        form = FORMS[architecture]
        self.official = architecture == "official"
        *inner, head = form.encoder
        *outer, last = form.decoder
        self.classes, self.channels, self.gain = shape.classes, shape.channels, form.gain
        self.decoder = Stack(
            shape.classes,
            latent,
            [*_widened(outer, width), last._replace(outputs=shape.channels)],
            transposed=True,
            norm=form.norms[1],
            activation=form.activations[1],
        )
        self.encoder: Stack | None = None
        if encode:
            self.encoder = Stack(
                shape.classes,
                shape.channels,
                [*_widened(inner, width), head._replace(outputs=2 * latent)],
                transposed=False,
                norm=form.norms[0],
                activation=form.activations[0],
            )

    def losses(self, x: Tensor, noise: Tensor, classes: slice, *, beta: float) -> Tensor:
        """Return minus the evidence bound of each image and class, (N, G), in squared distances.

        `x` is (N, G, C, H, W), each class's own images, `noise` (N, G, latent) standard normal: the
        squared distance of the drawn code's image, plus `beta` times KL(q(z | x) || N(0, I)).
        """
        assert self.encoder is not None
        # A tanh network sees what it draws: [-1, 1].
        seen = x if self.gain == 1 else 2 * x - 1
        mean, log_variance = self.encoder(seen, classes).flatten(2).chunk(2, dim=2)
        codes = mean + (log_variance / 2).exp() * noise
        drawn = (self.gain * self.decoder(codes[..., None, None], classes)).sigmoid()
        divergence = (mean.square() + log_variance.exp() - log_variance - 1).sum(2) / 2
        losses: Tensor = (drawn - x).square().flatten(2).sum(2) + beta * divergence
        return losses

    @torch.no_grad()
    def folded(self) -> Folded:
        """Return the decoders as they answer in evaluation, whatever mode they are in."""
        everyone = slice(0, self.classes)
        weights, biases = [], []
        for conv, norm, _ in self.decoder.layers():
            weight = conv.weight.detach().unflatten(0, (self.classes, -1))
            bias = self.decoder.of(conv.bias, everyone).detach().view(self.classes, -1)
            if norm is not None:
                parts = (norm.running_mean, norm.running_var, norm.weight, norm.bias)
                mean, variance, scale, shift = (
                    self.decoder.of(each, everyone).detach().view(self.classes, -1) for each in parts
                )
                scale = scale * (variance + norm.eps).rsqrt()
                weight = weight * scale[:, None, :, None, None]
                bias = (bias - mean) * scale + shift
            weights.append(weight)
            biases.append(bias)
        stack = self.decoder
        phases = Phases.of(weights[-2:], biases[-2:]) if self.official else None
        return Folded(tuple(weights), tuple(biases), stack.plans, stack.activation, self.gain, phases)

    @torch.no_grad()
    def fill(self, decoders: FilePaths) -> list[str]:
        """Load decoders from the authors' files, one for each class in its order; say what was converted."""
        own, said = self.decoder.state_dict(), []
        for number, file in enumerate(released(decoders, self.classes)):
            state = decoder_state(file, self.channels)
            said += files.conversions(Path(file), state, own)
            for name, value in state.items():
                own[name].unflatten(0, (self.classes, -1))[number].copy_(value)
        return said


def _widened(plans: Sequence[Plan], width: float) -> list[Plan]:
    return [plan._replace(outputs=scaled_width(plan.outputs, width)) for plan in plans]


LATENT = 8
"""Of the released autoencoders."""

_LAYER = re.compile(r"(conv|bn)_?(\d+)\.(weight|bias|running_mean|running_var)")


def released(decoders: FilePaths, classes: int) -> list[Path]:
    """Return the authors' files; raise `InputError` where there is not one for each class."""
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
