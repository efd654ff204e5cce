"""Write an attack as a function, and compare it with PGD: of the same images, which does either break?"""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy

import bench


def sign(view, x, y, threat, noise, *, share: float = 1.0):
    """Take one signed step, `share` of the radius long, up the cross-entropy (Goodfellow et al. 2015)."""
    z = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(cross_entropy(view.logits(z), y, reduction="sum"), z)
    return threat.project(x, x + share * threat.radius * gradient.sign())


digits = load_digits()
x = torch.tensor(digits.images, dtype=torch.float32).div(16)[:, None]
y = torch.tensor(digits.target)

torch.manual_seed(0)
model = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 10))
optimiser = torch.optim.Adam(model.parameters(), lr=0.01)
for _ in range(100):
    optimiser.zero_grad()
    cross_entropy(model(x[200:]), y[200:]).backward()
    optimiser.step()

own = bench.evaluate(model, x[:200], y[:200], attack=sign, radius=0.1)
pgd = bench.evaluate(model, x[:200], y[:200], attack="pgd", radius=0.1, steps=20)
print(own, pgd, sep="\n")
missed = pgd.frame["broken"] & ~own.frame["broken"]
print(f"PGD breaks {missed.sum()} images that one step does not")
