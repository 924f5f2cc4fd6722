"""Pull parameters towards where they began, from inside the optimizer's step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from recycle.graph import NotRecyclable, tensor_at
from recycle.interventions import Pull


class Anchor:
    """The initial values that a :class:`recycle.interventions.Pull` draws to, and the hooks that do it.

    Costs a copy of the parameters and, at every step, one pass over them.
    """

    def __init__(self, pull: Pull, module: nn.Module, optimizers: tuple[Optimizer, ...]) -> None:
        self.pull, self.module, self.optimizers = pull, module, optimizers
        self.initial: dict[str, Tensor] = {}
        """Parameter name -> its value when recycling began."""
        for path in pull.layers:
            for leaf, parameter in module.get_submodule(path)._parameters.items():
                if parameter is not None and parameter.requires_grad:
                    self.initial[f"{path}.{leaf}" if path else leaf] = parameter.detach().clone()
        self._handles: list[Any] = []
        self._gradients: list[tuple[Tensor, Tensor | None]] = []

    def attach(self) -> None:
        """Pull from the next step on; a second call does nothing."""
        if not self._handles:
            for optimizer in self.optimizers:
                self._handles.append(optimizer.register_step_pre_hook(self._before_step))
                self._handles.append(optimizer.register_step_post_hook(self._after_step))

    def detach(self) -> None:
        """Pull no more."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    @torch.no_grad()
    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if self.pull.mode == "penalty" and closure is not None:
            raise NotRecyclable(
                "l2_init adds its gradient before optimizer.step(), and a closure computes another inside. "
                "Pass mode='decoupled'"
            )
        starts = {id(tensor_at(self.module, name)): value for name, value in self.initial.items()}
        for group in optimizer.param_groups:
            pulled = [p for p in group["params"] if id(p) in starts and p.grad is not None]
            if not pulled:
                continue
            away = torch._foreach_sub(pulled, [starts[id(p)] for p in pulled])
            if self.pull.mode == "decoupled":
                torch._foreach_mul_(away, -2 * self.pull.strength * float(group["lr"]))
                torch._foreach_add_(pulled, away)
                continue
            torch._foreach_mul_(away, 2 * self.pull.strength)
            for parameter, towards in zip(pulled, away, strict=True):
                self._gradients.append((parameter, parameter.grad))
                parameter.grad = towards.add_(parameter.grad)

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        for parameter, gradient in self._gradients:
            parameter.grad = gradient
        self._gradients.clear()

    def state_dict(self) -> dict[str, Tensor]:
        """The initial values, on the CPU."""
        return {name: value.cpu() for name, value in self.initial.items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Draw to the values of :meth:`state_dict`.

        Raises:
            ValueError: they are those of other parameters.
        """
        mine, theirs = ({k: tuple(v.shape) for k, v in held.items()} for held in (self.initial, state))
        if mine != theirs:
            raise ValueError(f"the initial values were saved for {theirs}, this network has {mine}")
        self.initial = {k: state[k].to(v, copy=True) for k, v in self.initial.items()}
