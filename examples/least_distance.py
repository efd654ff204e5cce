"""Ask how far images must be moved at the least, and read one attack at every radius."""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy

import bench

digits = load_digits()
x = torch.tensor(digits.images, dtype=torch.float32).div(16)[:, None]
y = torch.tensor(digits.target)

torch.manual_seed(0)
model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
optimiser = torch.optim.Adam(model.parameters(), lr=0.05)
for _ in range(100):
    optimiser.zero_grad()
    cross_entropy(model(x[100:]), y[100:]).backward()
    optimiser.step()

result = bench.evaluate(model, x[:100], y[:100], attack="deepfool", norm="l2", radius=None, steps=50)
median = result.score("distance")
print(f"median l2 distance {median.value:.3f} [{median.low:.3f}-{median.high:.3f}], n = {median.n}")
least = result.frame["distance"].where(result.frame["broken"], float("inf"))
for radius in (0.25, 0.5, 1.0):
    print(f"robust accuracy at {radius}: {100 * (least > radius).mean():.1f} %")
