"""The variational autoencoders of ABS (Schott et al. 2018, arXiv:1805.09190), one for each class.

All classes lie side by side in grouped convolutions: one call encodes or decodes for every class, and a
normalisation sees the images of its own class only.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import batch_norm, conv2d, conv_transpose2d

from bench import Shape
from defenses.nets import weights as files
from defenses.nets.abs.activations import activated
from defenses.nets.abs.architectures import FORMS, Architecture, Plan
from defenses.nets.abs.decoders import Folded, Phases
from defenses.nets.abs.released import FilePaths, decoder_state, released
from defenses.nets.common import scaled_width

MOMENTUM = 0.1
"""How far running statistics move to a batch's, PyTorch's default."""


class Stack(nn.Module):
    """One half of K autoencoders: convolutions, normalised and activated, with a group for each class.

    Weights lie class after class along the first axis, as grouped convolutions have them, so that
    neighbouring classes can be asked alone.

    Args:
        classes: K, the number of autoencoders.
        inputs: channels of each one's input.
        plans: the convolutions.
        transposed: whether they are transposed ones, as in a decoder.
        norm: whether each but the last is batch-normalised.
        activation: what follows each but the last: ``elu``, ``relu`` or ``leaky``.
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
        """Return (N, G, outputs, H', W') of (N, G, inputs, H, W), for the G classes of the slice.

        Args:
            x: inputs (N, G, inputs, H, W).
            classes: the G classes that they belong to.
        """
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
                h = activated(h, self.activation)
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
        """Return the part of a weight or buffer that is these classes'.

        Args:
            value: a weight, bias or buffer of all classes.
            classes: the classes that are asked for.
        """
        assert value is not None
        each = len(value) // self.classes
        return value[classes.start * each : classes.stop * each]


class Autoencoders(nn.Module):
    """A variational autoencoder for each of the data's classes, or its decoder alone.

    Args:
        shape: channels, height, width and classes of the data.
        architecture: ``official`` or ``supplement``.
        latent: dimensions of a code, 1 or more.
        width: factor of the number of channels, above 0.
        encode: whether there are encoders; without them nothing can be trained.
    """

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

        The squared distance of the drawn code's image, plus `beta` times KL(q(z | x) || N(0, I)).

        Args:
            x: each class's own images, (N, G, C, H, W) in [0, 1].
            noise: standard normal, (N, G, latent).
            classes: the G classes.
            beta: weight of the divergence, 0 or more.
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
        """Load decoders from the authors' files, one for each class in its order; say what was converted.

        Args:
            decoders: the files.
        """
        own, said = self.decoder.state_dict(), []
        for number, file in enumerate(released(decoders, self.classes)):
            state = decoder_state(file, self.channels)
            said += files.conversions(Path(file), state, own)
            for name, value in state.items():
                own[name].unflatten(0, (self.classes, -1))[number].copy_(value)
        return said


def _widened(plans: Sequence[Plan], width: float) -> list[Plan]:
    return [plan._replace(outputs=scaled_width(plan.outputs, width)) for plan in plans]
