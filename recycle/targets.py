"""Polyak targets: which units are dead in them too, by the latest batch of a training pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from recycle.graph import Observer, UnitGroup, per_unit


class SoftTargets:
    """Those of a network's targets that follow it slowly, and a hook that keeps the batch on which to look at them.

    Args:
        module: the network that is trained.
        targets: ``(target network, tau)`` pairs; one with ``tau`` = 1 is a copy, of which nothing needs to be known.
    """

    def __init__(self, module: nn.Module, targets: Sequence[tuple[nn.Module, float]]) -> None:
        self.module = module
        self.modules = [target for target, tau in targets if tau < 1]
        self.batch: tuple[tuple[Any, ...], dict[str, Any]] | None = None
        """What the network was called with at the latest training pass, without any graph."""
        self._handle: Any = None

    @property
    def attached(self) -> bool:
        """Whether the hook is in place."""
        return self._handle is not None

    def attach(self) -> None:
        """Keep batches from now on, if there is a target that needs one; a second call does nothing."""
        if self._handle is None and self.modules:
            self._handle = self.module.register_forward_pre_hook(self._keep_batch, with_kwargs=True)

    def detach(self) -> None:
        """Remove the hook; the batch stays."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    def _keep_batch(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if module.training and torch.is_grad_enabled():
            self.batch = _mapped((args, kwargs), Tensor.detach)  # an actor's actions come with its whole graph

    def peak(self, group: UnitGroup) -> Tensor | None:
        """:func:`peak` over all of them; None where no batch was seen."""
        if self.batch is None:
            return None
        return torch.stack([peak(group, module, self.batch) for module in self.modules]).amax(0)

    def state(self) -> Any:
        """The batch, on the CPU."""
        return moved(self.batch, torch.device("cpu"))

    def load(self, state: Any) -> None:
        """Go on from :meth:`state`."""
        device = next((t.device for t in self.module.parameters()), torch.device("cpu"))
        self.batch = moved(state, device)


@torch.no_grad()
def peak(group: UnitGroup, module: nn.Module, inputs: tuple[tuple[Any, ...], dict[str, Any]]) -> Tensor:
    """Largest |output| of each of the group's units in another network of the same shape, on one batch: ``(width,)``.

    Runs ``module`` (a target network) once without gradients, in evaluation mode.
    """
    highest = torch.zeros(group.width, dtype=torch.double)

    def watch(observer: Observer, layer: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        act = observer.value(args, kwargs, output)
        seen = per_unit(act.detach(), layer, observer.index.to(act.device)).abs().amax(0).double().cpu()
        torch.maximum(highest, seen, out=highest)

    handles = []
    for observer in group.observers():
        layer = module.get_submodule(observer.name)
        handles.append(layer.register_forward_hook(partial(watch, observer), with_kwargs=True))
    modes = [(layer, layer.training) for layer in module.modules()]
    try:
        module.eval()
        module(*inputs[0], **inputs[1])
    finally:
        for layer, mode in modes:
            layer.training = mode
        for handle in handles:
            handle.remove()
    return highest


def moved(value: Any, device: torch.device) -> Any:
    """Nested tensors on another device."""
    return _mapped(value, lambda tensor: tensor.to(device))


def _mapped(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, dict):
        return {key: _mapped(item, change) for key, item in value.items()}
    if not isinstance(value, (list, tuple)):
        return value
    made: Callable[[Any], Any] = getattr(type(value), "_make", type(value))  # a named tuple takes its items one by one
    return made(_mapped(item, change) for item in value)
