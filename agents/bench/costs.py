"""What each method costs an update, over the plain update: watching it, and its events spread over its schedule."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from gymnasium import spaces
from stable_baselines3.common.torch_layers import NatureCNN
from torch import Tensor, nn

import recycle
from agents.bench.inside import inside
from agents.method_names import build_method

EVERY: Mapping[str, int] = {"redo": 1000, "regrama": 1000, "cbp": 100}
"""Updates from event to event as published, where that is said; CBP's running averages remember 100 updates."""

OFTEN = 1000
"""Updates from event to event of the methods for which no schedule was published."""


@dataclass(frozen=True)
class MethodCost:
    """What one method cost on one network."""

    every: int
    """Updates from event to event."""
    watching: float
    """Median ratio of a watched update to a plain one."""
    hooks: float
    """Time spent in hooks, of an update and on average, over that of a plain one; steadier than the ratio."""
    event: float
    """Median time of an event over that of a plain update."""

    @property
    def amortised(self) -> float:
        """An update with its hooks and its share of an event, over a plain update."""
        return 1 + self.hooks + self.event / self.every


def mlp() -> tuple[nn.Module, Tensor]:
    """Two hidden layers of 256 units on 24 inputs, and a batch of 64."""
    net = nn.Sequential(nn.Linear(24, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 6))
    return net, torch.randn(64, 24)


def nature_cnn() -> tuple[nn.Module, Tensor]:
    """stable-baselines3's NatureCNN on four stacked frames with a head of 6, and a batch of 32."""
    frames = spaces.Box(0.0, 1.0, (4, 84, 84), np.float32)
    return nn.Sequential(NatureCNN(frames, 512, normalized_image=True), nn.Linear(512, 6)), torch.rand(32, 4, 84, 84)


NETWORKS: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {"MLP 2x256": mlp, "NatureCNN": nature_cnn}


def cost_of(method: str, network: str, pairs: int, updates: int = 16, events: int = 5) -> MethodCost:
    """Measure one method on one network, Adam, an eighth of every layer's units dead at every event.

    Args:
        method: a name in :data:`recycle.METHODS`.
        network: a name in :data:`NETWORKS`.
        pairs: alternating pairs of plain and watched stretches of training.
        updates: length of a stretch, a multiple of the 8 updates of which one is sampled.
        events: events that are timed.
    """
    torch.manual_seed(0)
    net, batch = NETWORKS[network]()
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-5)
    graph = recycle.trace(net, lambda: net(batch))
    recycler = recycle.Recycler(graph, build_method(method), optimizers=[optimizer])

    def stretch(watched: bool) -> float:
        if watched:
            recycler.attach()
        start = time.process_time()
        for _ in range(updates):
            net(batch).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        took = time.process_time() - start
        recycler.detach()
        return took

    stretch(False), stretch(True)
    plain, ratios, hooks = [], [], []
    for pair in range(pairs):
        took = {watched: stretch(watched) for watched in (pair % 2 == 0, pair % 2 == 1)}
        plain.append(took[False] / updates)
        ratios.append(took[True] / took[False])
        with inside() as clock:
            took[True] = stretch(True)
        hooks.append(clock.seconds / (took[True] - clock.seconds))
    times = []
    for _ in range(events):
        _kill(recycler.graph)
        recycler.tracker.clear()
        stretch(True)
        start = time.process_time()
        recycler.step()
        times.append(time.process_time() - start)
    event = float(np.median(times) / np.median(plain))
    return MethodCost(EVERY.get(method, OFTEN), float(np.median(ratios)), float(np.median(hooks)), event)


@torch.no_grad()
def _kill(graph: recycle.Graph) -> None:
    """An eighth of each layer's units get biases so low that no input wakes them."""
    for group in graph:
        for axis in group.incoming:
            if axis.role == "bias":
                group.tensor(axis.name)[: group.width // 8] = -1e3
