"""Optimizer state of single units: which tensors there are, what "fresh" means, how they scale."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from torch import Tensor, nn
from torch.optim import Adagrad, Optimizer

from recycle.graph import NotRecyclable

_POWERS = {
    "exp_avg": 1, "exp_avg_sq": 2, "max_exp_avg_sq": 2, "exp_inf": 1, "square_avg": 2, "grad_avg": 1, "sum": 2,
    "acc_delta": 0, "momentum_buffer": 1, "prev": 1, "step_size": 0, "ax": 0,
}  # fmt: skip
"""State key -> how it scales with the gradient: 1 for a mean of it, 2 for a mean of its square."""

REFUSED = {
    "LBFGS": "it keeps one flat history of all parameters",
    "Adafactor": "it factorises its second moment",
    "ZeroRedundancyOptimizer": "each process keeps that of other parameters",
}
"""Optimizers that have no state of single units, and why."""


def check(optimizers: Sequence[Optimizer], parameters: Iterable[Tensor]) -> None:
    """Raise :class:`NotRecyclable` if some state cannot be edited unit by unit. Nothing is changed."""
    parameters = list(parameters)
    for optimizer in optimizers:
        name = type(optimizer).__name__
        if name in REFUSED:
            raise NotRecyclable(
                f"{name} has no state of single units: {REFUSED[name]}. Use Adam, AdamW, SGD or RMSprop"
            )
        for parameter in parameters:
            for key, value in optimizer.state.get(parameter, {}).items():
                if not isinstance(value, Tensor) or value.dim() == 0:
                    continue
                if value.shape != parameter.shape or key not in _POWERS:
                    raise NotRecyclable(
                        f"{name} keeps {key!r} of shape {tuple(value.shape)} for a parameter of shape "
                        f"{tuple(parameter.shape)}, and no rule says what that means for one unit. "
                        "Use Adam, AdamW, SGD or RMSprop"
                    )


def states(optimizers: Sequence[Optimizer], parameter: Tensor) -> Iterator[tuple[Tensor, int, float]]:
    """Every state tensor shaped like ``parameter``: the tensor, its power of the gradient, its fresh value."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            if not any(p is parameter for p in group["params"]):
                continue
            for key, value in optimizer.state.get(parameter, {}).items():
                if isinstance(value, Tensor) and value.dim() and value.shape == parameter.shape:
                    yield value, _power(optimizer, key), _fresh(optimizer, key, group)


def _power(optimizer: Optimizer, key: str) -> int:
    if key == "momentum_buffer" and "RMSprop" in type(optimizer).__name__:
        return 0  # a mean of normalised gradients
    return _POWERS[key]


def _fresh(optimizer: Optimizer, key: str, group: dict[str, Any]) -> float:
    """The value that this optimizer's own first step starts from."""
    if key == "square_avg" and type(optimizer).__name__ == "RMSpropTFLike":
        return 1.0
    if key == "sum":
        return float(group.get("initial_accumulator_value", 0.0))
    if key == "step_size":
        return float(group["lr"])
    return 0.0


def add_beside(
    optimizer: Optimizer,
    born: Sequence[nn.Parameter],
    neighbours: Sequence[nn.Parameter],
    order: Sequence[nn.Parameter],
    undo: list[Callable[[], None]],
) -> None:
    """Let an optimizer hold newborn parameters, in the group that holds the first of ``neighbours`` that it knows.

    They take the places in it that they have among ``order``, as if it had been built with them: its state dict
    names parameters by their places. Their state is fresh. An optimizer that knows no neighbour is left alone.
    ``undo`` gets what takes it back.
    """
    home = next((g for n in neighbours for g in optimizer.param_groups if any(p is n for p in g["params"])), None)
    if home is None:
        return
    before = list(home["params"])
    undo.append(lambda: home.update(params=before))
    places = {id(parameter): place for place, parameter in enumerate(order)}
    params = list(before)
    for parameter in born:
        known = [i for i, held in enumerate(params) if id(held) in places]
        earlier = [i for i in known if places[id(params[i])] < places[id(parameter)]]
        params.insert(earlier[-1] + 1 if earlier else known[0], parameter)
    home["params"] = params
    if isinstance(optimizer, Adagrad):  # the others begin a parameter's state at its first step
        begun = Adagrad(born, initial_accumulator_value=home["initial_accumulator_value"])
        for parameter in born:
            optimizer.state[parameter] = begun.state[parameter]
            undo.append(_forget(optimizer, parameter))


def _forget(optimizer: Optimizer, parameter: nn.Parameter) -> Callable[[], None]:
    def step() -> None:
        optimizer.state.pop(parameter, None)

    return step
