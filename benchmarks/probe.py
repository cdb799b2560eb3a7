"""Compare the linear probe with autograd and torch.optim.SGD: CPU seconds of the same training.

    OMP_NUM_THREADS=1 python benchmarks/probe.py

Features of noise around class means: 20,000 of 96 values in 100 classes, the grid of `hpm eval
linear` (24 settings, two copies of each), batches of 1,024. Both ways in turns, in one process.
"""

from __future__ import annotations

import statistics
import time

import torch
from results import machine, write_section
from torch import Tensor
from torch.nn import functional as F

from hpm.evals import linear
from hpm.evals.linear_heads import LinearHeads
from hpm.evals.probing import CHOOSING, grid

IMAGES, DIM, CLASSES, BATCH, STEPS, ROUNDS = 20_000, 96, 100, 1024, 40, 5


class Recorded(torch.nn.Module):
    """The same heads by autograd, with an optimiser group for each setting."""

    def __init__(self, settings: list, batch_size: int):
        super().__init__()
        self.norm = torch.nn.BatchNorm1d(DIM, eps=1e-6, momentum=None, affine=False)
        self.weights = [torch.zeros(DIM, 2 * CLASSES, requires_grad=True) for _ in settings]
        self.biases = [torch.zeros(2 * CLASSES, requires_grad=True) for _ in settings]
        self.optimizer = torch.optim.SGD(
            [
                {"params": [w, b], "lr": s.lr * batch_size / 256, "weight_decay": s.weight_decay}
                for w, b, s in zip(self.weights, self.biases, settings, strict=True)
            ],
            momentum=0.9,
            nesterov=True,
        )

    def learn(self, features: Tensor, labels: Tensor, seen: Tensor, rate: float) -> None:
        weight, bias = torch.cat(self.weights, 1), torch.cat(self.biases)
        logits = torch.addmm(bias, self.norm(features), weight)
        logits = logits.view(len(features), -1, 2, CLASSES).permute(1, 2, 0, 3)
        expected = labels.repeat(logits.shape[0] * 2)
        entropy = F.cross_entropy(logits.flatten(0, 2), expected, reduction="none")
        entropy = entropy.view(logits.shape[:3])
        loss = (entropy[:, CHOOSING] * seen).sum() / seen.sum() + entropy[:, 1].mean(1).sum()
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def main() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, CLASSES, (IMAGES,), generator=generator)
    means = 0.5 * torch.randn(CLASSES, DIM, generator=generator)
    features = means[labels] + torch.randn(IMAGES, DIM, generator=generator)
    seen = torch.rand(IMAGES, generator=generator) < 0.8
    defaults = linear.Options("run", "data")
    settings = grid(defaults.lr, defaults.weight_decay)
    seconds: dict[str, list[float]] = {"recorded": [], "written down": []}
    for _ in range(ROUNDS):
        for name in seconds:
            heads = (
                Recorded(settings, BATCH)
                if name == "recorded"
                else LinearHeads(torch.Size([DIM]), CLASSES, settings, BATCH)
            )
            start = time.process_time()
            for step in range(STEPS):
                ids = torch.arange(step * BATCH, (step + 1) * BATCH) % IMAGES
                heads.learn(features[ids], labels[ids], seen[ids], 0.5)
            seconds[name].append(time.process_time() - start)
    ratios = [a / b for a, b in zip(*seconds.values(), strict=True)]
    write_section(
        "The linear probe",
        "## The linear probe\n\n"
        f"`OMP_NUM_THREADS=1 python benchmarks/probe.py`, {machine()}. {STEPS} steps of the grid "
        f"of `hpm eval linear` on features of {DIM} values and {CLASSES} classes, CPU time, in "
        f"turns, median of {ROUNDS}: "
        f"{statistics.median(seconds['recorded']):.2f} s with autograd and "
        f"torch.optim.SGD, {statistics.median(seconds['written down']):.2f} s with the gradient "
        f"written down; within a round, {statistics.median(ratios):.2f} times as fast (median; "
        f"{min(ratios):.2f} to {max(ratios):.2f}).",
    )


if __name__ == "__main__":
    main()
