"""A training run that says now and then how it fares: ``python -m tests.agents.soaking ppo SECONDS STEPS FOLDER``.

It is what ``python -m agents.train`` does, edits every 500 steps included; only its checkpoint callback also writes
samples, one JSON object a line, to ``FOLDER/samples.jsonl``, and asks the process to end when the time is over.
"""

import ctypes
import gc
import json
import os
import signal
import sys
import time
from pathlib import Path

import tyro
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.logger import Logger

from agents import logs, train
from agents.build import new_model, vec_env
from agents.options import Args
from agents.saving import Checkpoints

# Every event edits the same number of units, a step of this environment always costs the same, and so do all updates
# but for what the run itself accumulates.
COMMON = [
    "--env", "DigitsBandit-v1", "--drift", "permute", "--change", "every:10000", "--method", "random",
    "--method-kwargs", "count:4", "--every", "500", "--jumps", "--save-freq", "20000", "--eval-freq", "20000",
    "--eval-episodes", "2", "--device", "cpu", "--num-threads", "1", "-n", "1000000000",
    "--policy-kwargs", "net_arch:[64,64]", "activation_fn:relu",
]  # fmt: skip
ARGS = {
    "ppo": [*COMMON, "--algo", "ppo", "--n-envs", "4", "--hyperparams", "n_steps:125", "batch_size:125", "n_epochs:4"],
    "dqn": [*COMMON, "--algo", "dqn", "--hyperparams", "train_freq:4", "buffer_size:2000", "learning_starts:200",
            "batch_size:64"],
}  # fmt: skip


PIECE = {"ppo": 500, "dqn": 100}
"""Steps of the training with which the run's speed is compared."""


class Soaking(Checkpoints):
    """Samples where a rollout begins, and ends the run when both the time is over and enough was done."""

    length = 0.0
    least = 0
    """Steps: on a busy machine little is done in a short time."""
    samples: Path
    reference: BaseAlgorithm
    """A model that nobody watches, and of which nothing is written."""
    piece: int
    began: float | None = None

    def _on_rollout_start(self):
        if self.began is None:
            gc.collect()
            gc.freeze()  # imported modules: counting those each time would be most of the work
            self.began, self.due, self.aside = time.monotonic(), 0.0, time.process_time()
        before = time.process_time()
        if before - self.aside >= self.due:
            self.due = before - self.aside + max(self.length / 720, 0.25)
            self.sample(before - self.aside)
            self.aside += time.process_time() - before
        super()._on_rollout_start()

    def yardstick(self):
        """Processor time of some training that is always the same: how fast the machine is now at such work."""
        start = time.process_time()
        self.reference.learn(self.piece, reset_num_timesteps=False)
        return time.process_time() - start

    def sample(self, cpu):
        """Write down what there is by now; ``cpu``: used so far, the time that sampling takes left out."""
        wall = time.monotonic() - self.began
        gc.collect()
        LIBC.malloc_trim(0)  # what the allocator keeps for later is nobody's leak
        logs.flush(self.model.logger)
        found = {
            "wall": wall,
            "cpu": cpu,
            "steps": self.num_timesteps,
            "updates": self.model._n_updates,
            "kilobytes": int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1024,
            "heap": allocated() / 1024,
            "blocks": sys.getallocatedblocks(),
            "objects": len(gc.get_objects()),
            "yardstick": self.yardstick(),
            "events": sum(path.stat().st_size for path in self.folder.glob(logs.EVENTS + "*")),
            "edits": sum(path.stat().st_size for path in self.folder.glob("edits.jsonl")),
            "checkpoint": max((path.stat().st_size for path in self.folder.glob("checkpoints/*.zip")), default=0),
        }
        with self.samples.open("a", encoding="utf-8") as file:
            file.write(json.dumps(found) + "\n")
        if wall >= self.length and self.num_timesteps >= self.least:
            os.kill(os.getpid(), signal.SIGTERM)


class Allocated(ctypes.Structure):
    """What ``mallinfo2`` of glibc (>= 2.33) returns."""

    NAMES = (
        "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost",
    )  # fmt: skip
    _fields_ = [(name, ctypes.c_size_t) for name in NAMES]


LIBC = ctypes.CDLL(None)


def allocated():
    """Bytes that were asked of malloc and not freed: what resident memory is without the gaps between."""
    if not hasattr(LIBC, "mallinfo2"):
        return float("nan")
    LIBC.mallinfo2.restype = Allocated
    found = LIBC.mallinfo2()
    return found.uordblks + found.hblkhd


def unwatched(words):
    """The same model without all that is ours, beyond its first steps."""
    args = tyro.cli(Args, args=words)
    model = new_model(args, vec_env(args))
    model.set_logger(Logger(None, []))
    return model.learn(500)


if __name__ == "__main__":
    algorithm, folder = sys.argv[1], Path(sys.argv[4])
    Soaking.length, Soaking.least, Soaking.samples = float(sys.argv[2]), int(sys.argv[3]), folder / "samples.jsonl"
    Soaking.reference, Soaking.piece = unwatched(ARGS[algorithm]), PIECE[algorithm]
    train.Checkpoints = Soaking
    sys.exit(train.main([*ARGS[algorithm], "--log-folder", str(folder)]))
