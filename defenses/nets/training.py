"""How networks are trained here: one loop, what it is told, and attacks on the network in training."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from torch.optim import SGD, Adam, Optimizer

from bench import Attack, Crafted, Fitting, Images, InputError, Labels, Randomness, Threat, View

Objective: TypeAlias = Callable[[Images, Labels, Randomness], Tensor]
"""The loss of a batch, a scalar: of its images (augmented, if they are), labels, and draws for them."""

Loss: TypeAlias = Callable[[Images, Images | None, Labels], Tensor]
"""The loss of clean images, the same images attacked (None in standard training), and labels."""

Schedule: TypeAlias = Callable[[int, int], float]
"""What the learning rate is multiplied by in a step (from 0), of so many."""

Mode: TypeAlias = Literal["eval", "train"]
"""Of batch normalisation and dropout: running statistics and no dropout, or as in a training step."""


def constant(step: int, total: int) -> float:
    """Return 1: the rate stays as it is.

    Args:
        step: the step, from 0.
        total: number of all steps.
    """
    return 1.0


def polynomial(step: int, total: int) -> float:
    """Return a factor that falls from 1 to 0, with power 0.9.

    Args:
        step: the step, from 0.
        total: number of all steps.
    """
    return float((1 - step / total) ** 0.9)


def staged(epochs: int, milestones: Sequence[int], warmup: int = 0) -> Schedule:
    """Return a schedule that changes between epochs: the rate falls to a tenth after each milestone.

    In the first `warmup` epochs the rate is 1/3 of what it would be, and then rises linearly, epoch by
    epoch: with three, it is 1/3, 5/9, 7/9, then 1.

    Args:
        epochs: epochs of the whole training.
        milestones: epochs done after which the rate falls to a tenth, rising.
        warmup: first epochs in which the rate rises, 0 or more.
    """

    def factor(step: int, total: int) -> float:
        done = step * epochs // total
        rise = 1 / 3 + 2 / 3 * done / warmup if done < warmup else 1.0
        return float(rise * 0.1 ** sum(done >= each for each in milestones))

    return factor


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What a training is told, whatever its loss."""

    epochs: int
    batch: int
    drop_last: bool = False
    augment: bool = False
    """Flip and crop, see `augmented`."""
    optimiser: Literal["sgd", "adam"] = "adam"
    lr: float
    schedule: Schedule = constant
    momentum: float = 0.9
    """Of SGD."""
    weight_decay: float = 0.0
    clip: float | None = None
    """The norm that gradients are clipped to, all together; None: they are not."""
    double_decay: tuple[type[nn.Module], ...] = ()
    """Kinds of layer whose `weight` decays twice (D-39)."""

    def optimiser_of(self, model: nn.Module) -> Optimizer:
        """Return SGD or Adam over the parameters that are learned.

        Args:
            model: what is trained.
        """
        doubled = {id(each.weight) for each in model.modules() if isinstance(each, self.double_decay)}
        groups = [
            {
                "params": [each for each in _learned(model) if (id(each) in doubled) is twice],
                "weight_decay": self.weight_decay * (2 if twice else 1),
            }
            for twice in (False, True)
        ]
        groups = [group for group in groups if group["params"]]
        if self.optimiser == "adam":
            return Adam(groups, lr=self.rate(0, 1))
        return SGD(groups, lr=self.rate(0, 1), momentum=self.momentum)

    def rate(self, step: int, total: int) -> float:
        """Return the learning rate of a step.

        Args:
            step: the step, from 0.
            total: number of all steps.
        """
        return self.lr * self.schedule(step, total)


def check_milestones(milestones: Sequence[int]) -> None:
    """Raise `InputError` where epochs after which the rate falls do not rise.

    Args:
        milestones: numbers of epochs done, each 1 or more.
    """
    if list(milestones) != sorted(set(milestones)):
        raise InputError(f"milestones must be numbers of epochs that rise, found {list(milestones)}")


def train(
    model: nn.Module,
    fitting: Fitting,
    objective: Objective,
    recipe: Recipe,
    *,
    fewest: int = 1,
    ended: Callable[[Tensor], None] | None = None,
) -> None:
    """Train a model, epoch by epoch, and leave it in evaluation mode.

    A step depends on its number alone, so that a training that is resumed ends the same. Batches of
    less than `fewest` images are left out: batch normalisation of single values needs two.

    Args:
        model: what is trained.
        fitting: gives epochs and batches.
        objective: the loss of a batch.
        recipe: epochs, batches, optimiser and schedule.
        fewest: images that a batch must have, see `fewest_of`; smaller ones are left out.
        ended: told the mean loss of each epoch before its state is saved.

    Raises:
        InputError: an epoch has no batch of `fewest` images.
    """
    optimiser = recipe.optimiser_of(model)
    steps = fitting.steps(recipe.batch, drop_last=recipe.drop_last)
    model.train()
    for epoch in fitting.epochs(recipe.epochs, model, optimiser):
        losses: list[Tensor] = []
        batches = epoch.batches(recipe.batch, drop_last=recipe.drop_last)
        for step, (x, y, noise) in enumerate(batches, epoch.number * steps):
            if len(x) < fewest:
                continue
            for group in optimiser.param_groups:
                group["lr"] = recipe.rate(step, recipe.epochs * steps)
            value = objective(augmented(x, noise) if recipe.augment else x, y, noise)
            optimiser.zero_grad()
            value.backward()
            if recipe.clip is not None:
                nn.utils.clip_grad_norm_(_learned(model), recipe.clip)
            optimiser.step()
            losses.append(value.detach())
            epoch.report(losses[-1])
        if not losses:
            raise InputError(
                f"no batch has the {fewest} images that batch normalisation needs, so that nothing would be "
                f"learned: batch is {recipe.batch}"
            )
        if ended is not None:
            ended(torch.stack(losses).mean())
    model.eval()


def fewest_of(model: nn.Module) -> int:
    """Return how many images a batch must have: with batch normalisation two, of one has no deviation.

    Args:
        model: any module.
    """
    norms = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
    return 2 if any(isinstance(each, norms) for each in model.modules()) else 1


def _learned(model: nn.Module) -> list[nn.Parameter]:
    return [each for each in model.parameters() if each.requires_grad]


def attacked(
    network: nn.Module, loss: Loss, attack: Attack | None, threat: Threat, *, mode: Mode = "eval"
) -> Objective:
    """Return the objective of adversarial training: `loss` of images and what `attack` makes of them.

    Without an attack, that of standard training.

    Args:
        network: images (N, C, H, W) to logits (N, K).
        loss: of clean images, attacked ones and labels.
        attack: what attacks each batch; None trains on clean images alone.
        threat: norm and radius of the attack.
        mode: mode of batch normalisation and dropout while the network is attacked.
    """

    def objective(x: Images, y: Labels, noise: Randomness) -> Tensor:
        z = None if attack is None else craft(attack, network, x, y, threat, noise, mode=mode)
        return loss(x, z, y)

    return objective


def craft(
    attack: Attack,
    network: nn.Module,
    x: Images,
    y: Labels,
    threat: Threat,
    noise: Randomness,
    *,
    mode: Mode = "eval",
) -> Images:
    """Attack the network's plain forward pass, without gradients of parameters; its dtype may be any.

    Args:
        attack: what attacks.
        network: images (N, C, H, W) to logits (N, K).
        x: images (N, C, H, W) in [0, 1].
        y: labels (N,).
        threat: norm and radius.
        noise: draws for these images.
        mode: mode of batch normalisation and dropout meanwhile.
    """

    def logits(z: Tensor) -> Tensor:
        answer: Tensor = network(z)
        return answer.to(z.dtype)

    with frozen(network, mode):
        made = attack(View(logits, exact=False), x, y, threat, noise)
    return made.images if isinstance(made, Crafted) else made


@contextmanager
def frozen(network: nn.Module, mode: Mode = "eval") -> Iterator[None]:
    """Put a network in evaluation mode (or in another) with fixed parameters, and back.

    Args:
        network: any module.
        mode: ``eval``, or ``train``.
    """
    modes = [(each, each.training) for each in network.modules()]
    flags = [(each, each.requires_grad) for each in network.parameters()]
    network.train(mode == "train").requires_grad_(False)
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
        for each, flag in flags:
            each.requires_grad_(flag)


def augmented(x: Images, noise: Randomness, border: int = 4) -> Images:
    """Flip each image with chance 1/2, then cut it out of itself with a black border of 4 pixels.

    Black is 0, which is -1 to CNN-F's networks, as in the released code: its border is added before
    scaling.

    Args:
        x: images (N, C, H, W) in [0, 1].
        noise: draws for these images.
        border: width of the border in pixels, 0 or more.
    """
    count, _, height, width = x.shape
    flipped = noise.integers((), 2).bool()
    top, left = noise.integers((2,), 2 * border + 1).unbind(1)
    rows = top[:, None] + torch.arange(height, device=x.device)
    columns = left[:, None] + torch.arange(width, device=x.device)
    columns = torch.where(flipped[:, None], width + 2 * border - 1 - columns, columns)
    image = torch.arange(count, device=x.device)[:, None, None]
    cut = pad(x, [border] * 4)[image, :, rows[:, :, None], columns[:, None, :]]
    return cut.permute(0, 3, 1, 2).contiguous()
