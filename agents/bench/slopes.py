"""Cost of watching, events and files against the size of a network, and of reading runs against their number.

Every case runs in a process of its own (``python -m agents.bench.slopes "watch 256"``), which prints one line of JSON.
Times are processor time of one thread, so that other programs do not count.
"""

from __future__ import annotations

import contextlib
import gc
import io
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn

import recycle
from agents import checkpoint, compare, plot, train
from agents.bench import apart
from agents.bench.apart import memory
from agents.results import find_runs, read_run
from agents.runs import run_folder

WATCH = tuple(f"watch {width}" for width in (64, 256, 1024, 4096))
"""Width of two hidden layers, Adam, batches of 64."""
FILES = tuple(f"files {size}" for size in ("64x2", "256x2", "1024x2", "64x8", "64x32"))
"""Width and depth of PPO's networks for policy and value."""
FLEET = tuple(f"fleet {count}" for count in (10, 100, 1000))
"""Copies of one small run's folder: 20480 steps, 1024 episodes, 20 events."""


def measured(case: str) -> dict[str, float]:
    """Run a case in a process of its own.

    Raises:
        RuntimeError: the process failed.
    """
    return apart.measured("agents.bench.slopes", case)


def run(case: str) -> dict[str, float]:
    """Run a case here."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    kind, _, size = case.partition(" ")
    if kind == "watch":
        return _watch(int(size))
    with tempfile.TemporaryDirectory() as root, contextlib.redirect_stdout(io.StringIO()):
        return _fleet(int(size), Path(root)) if kind == "fleet" else _files(*map(int, size.split("x")), root=Path(root))


def _watch(width: int) -> dict[str, float]:
    """Seconds of an update, of what watching adds to a sampled one, and of an event; bytes that statistics hold."""
    net = nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 8))
    adam, batch = torch.optim.Adam(net.parameters()), torch.randn(64, 64)
    graph = recycle.trace(net, lambda: net(batch))

    def updates(count: int) -> None:
        for _ in range(count):
            net(batch).square().mean().backward()
            adam.step()
            adam.zero_grad()

    updates(1)
    before = _tensor_bytes()
    recycler = recycle.Recycler(graph, recycle.find("redo")(), optimizers=[adam], sample_every=1)
    count = max(1, 4096 // width)
    plain, watched = [], []
    for _ in range(15):
        plain.append(_seconds(lambda: updates(count)) / count)
        recycler.attach()
        watched.append(_seconds(lambda: updates(count)) / count)
        recycler.detach()
    held = _tensor_bytes() - before
    events = []
    for _ in range(3):
        with recycler.listening():
            updates(1)
        events.append(_seconds(recycler.observe))
    event = float(np.median(events))
    sizes = {"units": 2 * width, "parameters": sum(p.numel() for p in net.parameters())}
    extra = float(np.median(np.array(watched) - np.array(plain)))
    return sizes | {"update": float(np.median(plain)), "hooks": extra, "event": event, "statistics": float(held)}


def _files(width: int, depth: int, *, root: Path) -> dict[str, float]:
    """Bytes of a checkpoint's weights and optimizer, of what recycling adds to it, and of logs for each event."""
    found = {}
    for method in ("none", "random"):
        own = ["--method-kwargs", "count:1", "--every", "64"] if method == "random" else []
        _train(root, 640, method, [f"net_arch:{[width] * depth}".replace(" ", "")], own, 64)
        (folder,) = root.glob(f"*/ppo-{method}/0")
        sizes = {path.name.partition(".")[0]: path.stat().st_size for path in folder.iterdir() if path.is_file()}
        found[method] = sizes | {"edits": sizes.get("edits", 0)}
    events = len((folder / "edits.jsonl").read_text(encoding="utf-8").splitlines())
    parameters = sum(t.numel() for t in checkpoint.policy_weights(folder / "model.zip").values())
    added = {name: found["random"][name] - found["none"][name] for name in ("model", "edits", "events", "progress")}
    each = {name: added[name] / events for name in ("edits", "events", "progress")}
    return {"units": 2 * width * depth, "groups": 2 * depth, "parameters": parameters} | each | {
        "weights": found["none"]["model"],
        "state": added["model"],
    }  # fmt: skip


def _fleet(count: int, root: Path) -> dict[str, float]:
    """Files and bytes of that many runs; seconds and memory of reading, plotting, comparing and of TensorBoard."""
    _train(root / "one", 20_480, "monitor", ["net_arch:[64,64]"], ["--every", "1024"], 256)
    (source,) = root.glob("one/*/*/0")
    config = yaml.safe_load((source / "config.yaml").read_text(encoding="utf-8"))
    runs = root / "runs"
    for number in range(count):
        method, seed = ("monitor", "redo")[number % 2], number // 2
        folder = run_folder(runs, env=config["env"], drift=[], algo="ppo", method=method, tag=None, seed=seed)
        shutil.copytree(source, folder)
        copied = yaml.safe_dump(config | {"method": method, "seed": seed}, sort_keys=False)
        (folder / "config.yaml").write_text(copied, encoding="utf-8")
    paths = [path for path in runs.rglob("*") if path.is_file()]
    found: dict[str, float] = {"runs": count, "files": len(paths), "bytes": sum(path.stat().st_size for path in paths)}
    board: Callable[[], Any] = lambda: [EventAccumulator(str(path)).Reload() for path in find_runs([runs])]  # noqa: E731
    cases: dict[str, Callable[[], Any]] = {
        "read": lambda: [read_run(path) for path in find_runs([runs])],
        "plot": lambda: plot.main([str(runs)]),
        "compare": lambda: compare.main([str(runs)]),
        "tensorboard": board,
    }
    for name, case in cases.items():
        gc.collect()
        start = memory("VmRSS", reset=True)
        found[name] = _seconds(case)
        found[f"{name} memory"] = memory("VmHWM") - start
    return found


def _train(root: Path, steps: int, method: str, policy: list[str], own: list[str], rollout: int) -> None:
    words = ["--env", "DigitsBandit-v1", "-n", str(steps), "--method", method, *own, "--num-threads", "1"]
    words += ["--hyperparams", f"n_steps:{rollout}", "n_epochs:1", "--save-minutes", "0", "--device", "cpu"]
    if train.main([*words, "--policy-kwargs", *policy, "activation_fn:relu", "--log-folder", str(root)]):
        raise RuntimeError(f"the run of {method} failed")


def _seconds(call: Callable[[], Any]) -> float:
    start = time.process_time()
    call()
    return time.process_time() - start


def _tensor_bytes() -> int:
    """Of all tensors that there are."""
    gc.collect()
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in _tensors()}
    return sum(storages.values())


def _tensors() -> list[Tensor]:
    return [each for each in gc.get_objects() if issubclass(type(each), Tensor)]  # isinstance would wake lazy modules


if __name__ == "__main__":
    print(json.dumps(run(sys.argv[1])))
