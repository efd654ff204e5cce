"""Train the network on adversarial images, and write its weights."""

import argparse

import torch
from model import build
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torchvision.datasets import ImageFolder
from torchvision.transforms import functional


def worst(model: nn.Module, x: Tensor, y: Tensor, radius: float) -> Tensor:
    """Return images that were moved against the network, by four steps of PGD in the l-infinity ball.

    Args:
        model: The network.
        x: Images in [0, 1], (N, 1, 8, 8).
        y: Their classes, (N,).
        radius: How far a pixel may move, 0 or more.

    Returns:
        The moved images.
    """
    z = x
    for _ in range(4 if radius else 0):
        z = z.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(cross_entropy(model(z), y), z)
        z = torch.clamp(x + (z + radius / 2 * gradient.sign() - x).clamp(-radius, radius), 0, 1)
    return z.detach()


parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--epochs", type=int, default=8)
parser.add_argument("--radius", type=float, default=0.1, help="0: no adversarial training")
asked = parser.parse_args()

images = ImageFolder("data/train")
x = torch.stack([functional.to_tensor(image.convert("L")) for image, _ in images])
y = torch.tensor(images.targets)
torch.manual_seed(0)
model = build()
optimizer = torch.optim.Adam(model.parameters(), lr=0.005)
for _ in range(asked.epochs):
    for rows in torch.randperm(len(x)).split(64):
        z = worst(model, x[rows], y[rows], asked.radius)
        loss = cross_entropy(model(z), y[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
save_file(model.state_dict(), "weights.safetensors")
print(f"weights.safetensors: {asked.epochs} epochs, radius {asked.radius:g}")
