"""Time and memory of ``recycle.trace``, and time of ``recycle.apply``, against the size of a network.

Every case runs in a process of its own (``python -m agents.bench.scaling "mlp 64x8"``), which prints one line of JSON.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import recycle
from agents.bench import apart
from agents.bench.apart import memory

MLPS = tuple(f"mlp {width}x4" for width in (64, 256, 1024, 4096))
"""Width: four hidden layers."""
DEEP = tuple(f"mlp 128x{depth}" for depth in (2, 20, 60, 200))
"""Depth: hidden layers of 128 units."""
LARGE = ("resnet 50", "transformer 100M")
APPLY = tuple(f"apply {width}" for width in (64, 256, 1024, 4096))
"""Width of a layer between two as wide, an eighth of whose units is edited."""


@dataclass(frozen=True)
class Cost:
    """What one case took."""

    parameters: int
    seconds: float
    """Of processor time, so that other programs do not count: of ``trace``; of one ``apply``."""
    growth: float
    """Bytes by which the process grew at its peak, over the bytes of the model's parameters and buffers."""
    copying: float = 0.0
    """Of ``apply``: seconds to copy as many bytes as it writes."""


def measured(case: str) -> Cost:
    """Run a case in a process of its own.

    Raises:
        RuntimeError: the process failed.
    """
    return Cost(**apart.measured("agents.bench.scaling", case))


def run(case: str) -> Cost:
    """Run a case here; memory is told only on Linux, NaN elsewhere."""
    kind, _, size = case.partition(" ")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    if kind == "apply":
        return _apply(int(size))
    net, batch = _network(kind, size)
    warm, example = _network("mlp", "8x2")
    recycle.trace(warm, lambda: warm(example))  # imports and caches are nobody's growth
    before = memory("VmRSS", reset=True)
    start = time.process_time()
    graph = recycle.trace(net, lambda: net(batch))
    seconds = time.process_time() - start
    growth = memory("VmHWM") - before
    if not len(graph):
        raise RuntimeError(f"nothing was found in {case!r}: {graph.frozen}")
    held = [*net.parameters(), *net.buffers()]
    return Cost(sum(t.numel() for t in held), seconds, growth / sum(t.nbytes for t in held))


def _network(kind: str, size: str) -> tuple[nn.Module, Tensor]:
    if kind == "mlp":
        width, depth = map(int, size.split("x"))
        layers = [m for _ in range(depth - 1) for m in (nn.Linear(width, width), nn.ReLU())]
        return nn.Sequential(nn.Linear(16, width), nn.ReLU(), *layers, nn.Linear(width, 4)), torch.randn(4, 16)
    if kind == "resnet":
        return ResNet50(), torch.randn(2, 3, 64, 64)
    return Transformer(), torch.randint(0, 20_000, (2, 32))


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions with BatchNorm, added to their input (He et al. 2016)."""

    def __init__(self, before: int, width: int, stride: int) -> None:
        super().__init__()
        self.convs = nn.ModuleList(
            [
                nn.Conv2d(before, width, 1, bias=False),
                nn.Conv2d(width, width, 3, stride, 1, bias=False),
                nn.Conv2d(width, 4 * width, 1, bias=False),
            ]
        )
        self.norms = nn.ModuleList([nn.BatchNorm2d(n) for n in (width, width, 4 * width)])
        self.skip = nn.Sequential()
        if stride > 1 or before != 4 * width:
            self.skip = nn.Sequential(nn.Conv2d(before, 4 * width, 1, stride, bias=False), nn.BatchNorm2d(4 * width))

    def forward(self, x: Tensor) -> Tensor:
        """Images of ``4 * width`` channels."""
        y = x
        for number, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            y = norm(conv(y)) if number == 2 else F.relu(norm(conv(y)))
        return F.relu(y + self.skip(x))


class ResNet50(nn.Module):
    """25.6 million parameters; classes of images ``(batch, 3, height, width)``."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 64, 7, 2, 3, bias=False)
        self.norm = nn.BatchNorm2d(64)
        blocks, before = [], 64
        for width, count in ((64, 3), (128, 4), (256, 6), (512, 3)):
            for number in range(count):
                blocks.append(Bottleneck(before, width, 2 if number == 0 and width > 64 else 1))
                before = 4 * width
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(before, 1000)

    def forward(self, x: Tensor) -> Tensor:
        """``(batch, 1000)``."""
        x = F.max_pool2d(F.relu(self.norm(self.stem(x))), 3, 2, 1)
        x = self.blocks(x)
        return self.head(x.mean((2, 3)))  # type: ignore[no-any-return]


class Block(nn.Module):
    """Attention and a feed-forward layer, each after a LayerNorm and added to its input."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """``(batch, time, width)``."""
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(self.first(x)).chunk(3, -1))
        weights = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1)
        x = x + self.out((weights @ v).transpose(1, 2).flatten(2))
        return x + self.down(F.relu(self.up(self.second(x))))  # type: ignore[no-any-return]


class Transformer(nn.Module):
    """12 blocks of width 768 and an embedding of 20000 words: 100 million parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(20_000, 768)
        self.blocks = nn.Sequential(*(Block(768, 12) for _ in range(12)))
        self.norm = nn.LayerNorm(768)
        self.head = nn.Linear(768, 10)

    def forward(self, words: Tensor) -> Tensor:
        """``(batch, 10)`` of word numbers ``(batch, time)``."""
        return self.head(self.norm(self.blocks(self.words(words))).mean(1))  # type: ignore[no-any-return]


def _apply(width: int) -> Cost:
    """Split an eighth of a layer's units into as many others, with Adam's moments."""
    net = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width))
    adam = torch.optim.Adam(net.parameters())
    batch = torch.randn(4, width)
    net(batch).sum().backward()
    adam.step()
    group = recycle.trace(net, lambda: net(batch))["0"]
    count = max(width // 8, 1)
    edit = recycle.Split(tuple(range(count)), tuple(range(count, 2 * count)))
    names = [(group.tensor(axis.name), axis.dim) for axis in (*group.incoming, *group.outgoing)]
    sources = [t.detach().movedim(dim, 0)[: 2 * count] for t, dim in names for _ in range(3)]  # weights, two moments
    copies = [torch.empty_like(t, memory_format=torch.contiguous_format) for t in sources]

    def copy() -> None:
        for source, place in zip(sources, copies, strict=True):
            place.copy_(source)

    seconds = _median(lambda: recycle.apply(edit, group, optimizers=[adam]))
    return Cost(sum(p.numel() for p in net.parameters()), seconds, 0.0, _median(copy))


def _median(run: Callable[[], Any], repeats: int = 15) -> float:
    times = []
    for _ in range(repeats):
        start = time.process_time()
        run()
        times.append(time.process_time() - start)
    return sorted(times)[repeats // 2]


if __name__ == "__main__":
    print(json.dumps(asdict(run(sys.argv[1]))))
