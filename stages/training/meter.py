"""Numbers that a loop's losses leave behind, over micro-batches, updates and processes."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from accelerate import Accelerator


class Meter:
    """Sums of shares (a micro-batch's part of its minibatch's mean) and largest values, until they are read."""

    def __init__(self) -> None:
        self.sums: dict[str, torch.Tensor] = {}
        self.largest: dict[str, torch.Tensor] = {}

    def add(self, shares: Mapping[str, torch.Tensor]) -> None:
        """Add parts of means."""
        for name, value in shares.items():
            self.sums[name] = self.sums.get(name, 0.0) + value.detach().double()

    def top(self, name: str, value: torch.Tensor) -> None:
        """Note a value of which the largest counts."""
        value = value.detach().double()
        self.largest[name] = torch.maximum(self.largest[name], value) if name in self.largest else value

    def read(self, accelerator: Accelerator, updates: int) -> dict[str, float]:
        """Means over updates and the largest values, over all processes."""
        names, tops = sorted(self.sums), sorted(self.largest)
        sums = torch.stack([self.sums[name] for name in names])
        means = accelerator.reduce(sums, reduction="sum") / updates  # pyright: ignore[reportOperatorIssue]
        found = dict(zip(names, means.tolist(), strict=True))
        if tops:
            every = accelerator.gather(torch.stack([self.largest[name] for name in tops])[None])
            found |= dict(zip(tops, every.max(0).values.tolist(), strict=True))  # pyright: ignore[reportAttributeAccessIssue]
        return found
