"""Run folders side by side: what a resumed run must have in common with one that never stopped."""

import csv
import io
import json
import shutil
import zipfile

import numpy as np
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from agents.train import main

BARE = ["--num-threads", "1", "--device", "cpu"]
DIGITS = [*BARE, "--env", "DigitsBandit-v1", "--env-kwargs", "episode_length:5", "images:60"]
DRIFT = ["--drift", "relabel", "--change", "every:50"]
RANDOM = ["--method", "random", "--method-kwargs", "count:1", "--every", "48"]
NET = ["--policy-kwargs", "net_arch:[12,12]", "activation_fn:relu"]
ROLLOUTS = ["--hyperparams", "n_steps:16", "batch_size:16", "n_epochs:2"]
REPLAY = ["--hyperparams", "learning_starts:20", "buffer_size:80", "batch_size:8", "train_freq:4"]
PPO = [*DIGITS, *DRIFT, *RANDOM, *NET, *ROLLOUTS, "-n", "160"]
DQN = [*DIGITS, *DRIFT, *RANDOM, *NET, *REPLAY, "--algo", "dqn", "-n", "160"]


def train(root, *argv):
    """Train in this process; the run's folder."""
    assert main([*argv, "--log-folder", str(root)]) == 0
    (config,) = root.rglob("config.yaml")
    return config.parent


def stopped_at(folder, steps, to):
    """A copy of a finished run as if its process had been killed some time after the checkpoint of that step."""
    shutil.copytree(folder, to)
    (to / "model.zip").unlink()
    for path in (to / "checkpoints").iterdir():
        if int(path.stem.split("_")[1]) > steps:
            path.unlink()
    return to


def weights(path):
    """All tensors of a model's zip: networks and optimizers."""
    with zipfile.ZipFile(path) as archive:
        names = sorted(name for name in archive.namelist() if name.endswith(".pth"))
        return {name: torch.load(io.BytesIO(archive.read(name)), weights_only=True) for name in names}


def state(path):
    """All else that a checkpoint holds, without the wall clock."""
    with zipfile.ZipFile(path) as archive:
        found = torch.load(io.BytesIO(archive.read("state.pt")), weights_only=True)
        found["replay"] = {name: archive.read(name) for name in archive.namelist() if name.startswith("replay")}
    for key in ("elapsed", "logs"):
        del found[key]
    for episode in found["model"]["ep_info_buffer"]["__deque__"]:
        del episode["t"]
    return found


def differences(one, other, path=""):
    """Where two nested values are not the same, bit by bit."""
    if type(one) is not type(other):
        return [f"{path}: {type(one).__name__} and {type(other).__name__}"]
    if isinstance(one, dict):
        keys = [f"{path}.{key}: on one side only" for key in one.keys() ^ other.keys()]
        return keys + [d for k in one.keys() & other.keys() for d in differences(one[k], other[k], f"{path}.{k}")]
    if isinstance(one, (list, tuple)):
        if len(one) != len(other):
            return [f"{path}: {len(one)} and {len(other)} items"]
        return [d for i, (a, b) in enumerate(zip(one, other, strict=True)) for d in differences(a, b, f"{path}[{i}]")]
    if isinstance(one, torch.Tensor):
        same = one.dtype == other.dtype and one.shape == other.shape
        same = same and np.array_equal(one.detach().numpy(), other.detach().numpy(), equal_nan=one.is_floating_point())
        return [] if same else [f"{path}: {one} and {other}"]
    same = one == other or (one != one and other != other)
    return [] if same else [f"{path}: {one!r} and {other!r}"]


def tables(folder):
    """Every log of a run but for the wall clock."""
    found = {name: (folder / name).read_text() for name in ("episodes.csv", "edits.jsonl", "evaluations.csv")
             if (folder / name).exists()}  # fmt: skip
    with (folder / "progress.csv").open(newline="") as file:
        timed = ("time/fps", "time/time_elapsed")
        found["progress.csv"] = [{k: v for k, v in row.items() if k not in timed} for row in csv.DictReader(file)]
    return found


def points(folder):
    """What TensorBoard shows: the steps and values of every curve, and the steps of every histogram."""
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "histograms": 0}).Reload()
    tags = events.Tags()
    curves = {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in tags["scalars"] if tag != "time/fps"}
    shapes = {t: [(e.step, list(e.histogram_value.bucket)) for e in events.Histograms(t)] for t in tags["histograms"]}
    return json.loads(json.dumps([curves, shapes]))


def all_differences(one, other):
    """Between two finished runs."""
    found = differences(weights(one / "model.zip"), weights(other / "model.zip"), "weights")
    found += differences(tables(one), tables(other), "tables") + differences(points(one), points(other), "points")
    first, second = ({p.name for p in (run / "checkpoints").glob("*.zip")} for run in (one, other))
    assert first & second
    for name in first & second:
        found += differences(state(one / "checkpoints" / name), state(other / "checkpoints" / name), name)
    return found
