"""When checkpoints are written while a run trains: now and then, and when its process is asked to end."""

from __future__ import annotations

import shlex
import time
from collections.abc import Sequence
from pathlib import Path

from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.vec_env import VecEnv

from agents.checkpoint import Checkpoint, prune, write
from agents.command_line import Stopped, say
from agents.interruption import Interruption
from agents.state import restore_generators

SHARE = 20
"""A checkpoint by the clock waits for this many times as long as the last one took to write."""


def resume_command(folder: Path) -> str:
    """What a user types to go on."""
    return f"python -m agents.train --resume {shlex.quote(str(folder))}"


class Checkpoints(BaseCallback):
    """Writes checkpoints now and then, the last ones kept, and one more when the process is asked to end.

    It must be the last of the callbacks: what others do where a rollout begins belongs to the state.

    Args:
        folder: of the run.
        callbacks: all others.
        evaluation: the evaluation copies, if there are any.
        every: environment steps from checkpoint to checkpoint; 0: by the clock alone.
        minutes: the same in minutes, by a clock that does not jump; longer where writing takes longer than a
            twentieth of it. 0: by steps alone.
        keep: how many are kept.
        stop_on_nan: end the run when a weight is not finite, rather than say so and go on.
        resumed: the checkpoint from which this run goes on.
    """

    def __init__(
        self,
        folder: Path,
        callbacks: Sequence[BaseCallback],
        evaluation: VecEnv | None = None,
        *,
        every: int = 0,
        minutes: float = 0.0,
        keep: int = 2,
        stop_on_nan: bool = False,
        resumed: Checkpoint | None = None,
    ) -> None:
        super().__init__()
        self.folder, self.others, self.evaluation = folder, callbacks, evaluation
        self.every, self.seconds, self.keep, self.stop_on_nan = every, 60 * minutes, keep, stop_on_nan
        self._resumed = resumed
        self._last = 0 if resumed is None else resumed.steps
        self._at, self._took = time.monotonic(), 0.0
        self.interruption = Interruption()
        """A signal inside its block ends the run where the next rollout begins."""
        self._looked = self._told = False

    def _on_step(self) -> bool:
        return True

    def _on_rollout_start(self) -> None:
        if self._resumed is not None:
            restore_generators(self._resumed.state, self.model)
            self._resumed = None
        asked = self.interruption.asked
        if asked is not None:
            saved = self.save() if self.num_timesteps > self._last else True
            kept = "" if saved else "the last one could not be written; "
            raise Stopped(
                f"{asked.name}: stopped after {self.num_timesteps} steps; {kept}go on with {self.resume_command}",
                self.interruption.code,
            )
        if self._due():
            self.save()

    def _due(self) -> bool:
        if self.num_timesteps == self._last:
            return False
        if self.every and self.num_timesteps // self.every > self._last // self.every:  # at the same steps once resumed
            return True
        waited = time.monotonic() - self._at
        return bool(self.seconds) and waited >= max(self.seconds, SHARE * self._took)

    @property
    def resume_command(self) -> str:
        """What a user types to go on."""
        return resume_command(self.folder)

    def save(self) -> bool:
        """Write a checkpoint and delete old ones. False if it failed, which leaves the last good one as it is.

        Raises:
            RuntimeError: a weight is not finite, and ``stop_on_nan``.
        """
        began = self._at = time.monotonic()
        self._last = self.num_timesteps
        bad = not_finite(self.model)
        if bad:
            message = f"{bad} is NaN or infinite at step {self.num_timesteps}, so no checkpoint is written"
            if self.stop_on_nan:
                raise RuntimeError(f"{message}; the run ends (--stop-on-nan)")
            if not self._told:
                say(f"{message}; the ones before are kept, and --stop-on-nan would end the run")
                self._told = True
            return False
        if not self._looked:
            self._look_at_environments()
        try:
            path = write(self.folder, self.model, self.others, self.evaluation)
            prune(self.folder / "checkpoints", keep=self.keep, newest=self.num_timesteps)
        except OSError as error:
            say(f"no checkpoint at step {self.num_timesteps}: {error}. Training goes on; the ones before are kept")
            return False
        finally:
            self._at = time.monotonic()
            self._took = self._at - began
        if self.verbose:
            print(f"saved {path}")
        return True

    def _look_at_environments(self) -> None:
        self._looked = True
        for env in filter(None, (self.training_env, self.evaluation)):
            why = env.env_method("why_inexact", indices=0)[0]
            if why:
                say(f"a resumed run will begin new episodes, so it will not be bit-identical: {why}")
                return


def not_finite(model: BaseAlgorithm) -> str:
    """The name of a parameter or buffer of the policy that holds a NaN or an infinity; "" if none does."""
    for name, tensor in model.policy.state_dict().items():
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            return name
    return ""
