"""Train a small classifier with bounded, spread-out weights, then fold the parametrization away. Runs in a few seconds."""

import torch
from sklearn.datasets import load_digits
from torch import nn

import whatmatters as wm

data = load_digits()
images, labels = torch.from_numpy(data.data / 16).float(), torch.from_numpy(data.target)
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 10))

wm.nn.weight_compander(model, slope=2.0, learnable=True)
optimizer = torch.optim.SGD(wm.nn.compander_groups(model, lr=0.05, weight_decay=5e-4), momentum=0.9)
for _ in range(200):
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(images[:1000]), labels[:1000]).backward()
    optimizer.step()

wm.nn.fold_weight_compander(model)
accuracy = (model(images[1000:]).argmax(1) == labels[1000:]).float().mean()
print(f"accuracy {accuracy:.3f}, largest weight {model[0].weight.abs().max():.3f}, parameters {sorted(model.state_dict())}")
