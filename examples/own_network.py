"""Attack a network of torchvision with PGD, in five lines once there are images and labels."""

import torch
from sklearn.datasets import load_digits
from torchvision.models import squeezenet1_1

import bench

# Digits as colour images of 32x32: data that is installed with scikit-learn.
digits = load_digits()
x = torch.tensor(digits.images[:64], dtype=torch.float32).div(16)[:, None].repeat(1, 3, 1, 1)
x = torch.nn.functional.interpolate(x, size=32)
y = torch.tensor(digits.target[:64])

torch.manual_seed(0)
model = squeezenet1_1(num_classes=10)  # Untrained, so that nothing is downloaded.
result = bench.evaluate(model, x, y, attack="pgd", norm="linf", radius="8/255", steps=5, mean=0.5, std=0.5)
print(result)
print(result.frame[["index", "truth", "clean_label", "label", "broken", "distance"]].head())
