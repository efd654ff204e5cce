"""The two architectures of ABS' autoencoders: as the authors released them, and as a later study has them."""

from typing import Literal, NamedTuple, TypeAlias

from bench import InputError, Shape

Architecture: TypeAlias = Literal["official", "supplement"]

LATENT = 8
"""Dimensions of the released autoencoders' codes."""


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


def check_shape(architecture: Architecture, shape: Shape) -> None:
    """Raise `InputError` where the decoders' images are not of the data's size.

    Args:
        architecture: of the autoencoders.
        shape: channels, height, width and classes of the data.
    """
    side = FORMS[architecture].side
    if (shape.height, shape.width) != (side, side):
        raise InputError(
            f"architecture: the {architecture} decoders draw {side}x{side}, the data is "
            f"{shape.height}x{shape.width}; set resize: {side} for the data set"
        )
