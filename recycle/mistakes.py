"""Where a traced network is wrong, seen from the input of one of its layers: what folding it there needs to know."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from recycle.folding import Examples, Mistakes, Score, boundary
from recycle.graph import Axis, NotRecyclable, UnitGroup, plain
from recycle.samples import is_plain_convolution, patches
from recycle.tracing import undisturbed

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_Hook: TypeAlias = Callable[[Tensor, Tensor], Tensor | None]
"""Input and output of a layer to another output, or None."""
_STEPS = 50
"""Of conjugate gradients, at most; among k units and a Linear layer k are exact."""


def mistakes_of(group: UnitGroup, examples: Examples) -> Mistakes:
    """What :func:`recycle.folding.fold` needs to know of the layer that makes a group's units.

    The network runs in evaluation mode and is left as it was. What stands before the layer is taken as it is: the
    functional is that of the tail, by what the layer reads of one example (of a convolution: by one patch). The scores
    hold whatever stands between the units and their consumers, since candidates are run in the units' places.

    Raises:
        NotRecyclable: the units are not ReLU-like ones that one Linear or plain convolution makes, a hook cannot see a
            consumer, or ``examples`` returns something else than it should.
    """
    layer, axis = _producer(group)
    consumers = [(_consumer(group, each), each) for each in group.outgoing]
    tail = _Tail(group, examples, layer, axis, consumers)
    owned = axis.read(group.tensor(axis.name).detach(), torch.arange(group.width))
    places = len(tail.rows) // len(tail.losses)
    return Mistakes(
        inputs=tail.rows[None],
        losses=tail.losses.repeat_interleave(places)[None],
        wrong=tail.wrong.repeat_interleave(places)[None],
        margin=tail.margin,
        score=tail.score,
        beside=tail.beside,
        length=owned.flatten(1).norm(dim=1).mean()[None],
        bias=any(each.role == "bias" for each in group.incoming),
    )


class _Tail:
    """The network behind one layer, whose output is in our hands."""

    def __init__(
        self,
        group: UnitGroup,
        examples: Examples,
        layer: nn.Module,
        axis: Axis,
        consumers: list[tuple[nn.Module, Axis]],
    ) -> None:
        self.group, self.examples, self.layer, self.axis = group, examples, layer, axis
        self.features = -1 if isinstance(layer, nn.Linear) else 1
        made: dict[nn.Module, Tensor] = {}
        read: dict[nn.Module, Tensor] = {}

        def keep(of: nn.Module) -> _Hook:
            def hook(x: Tensor, y: Tensor) -> None:
                made[of], read[of] = y, x.detach()

            return hook

        outputs, losses, targets = self._run({each: keep(each) for each in (layer, *(c for c, _ in consumers))})
        if layer not in read or len(read) == 1:
            raise NotRecyclable(
                f"no example is mispredicted because of {self._name(layer)!r}: examples() does not run it, or nothing "
                "that reads it (of an agent: only the actor does, which predicts no value)"
            )
        self.consumers = [(each, axis) for each, axis in consumers if each in read]
        self.read = read[layer]
        if not losses.requires_grad or len(self.read) != len(losses):
            raise NotRecyclable(
                f"folding needs {len(self.read)} losses with their gradients, one for each example that "
                f"{self._name(layer)!r} reads: got {len(losses)}, requires_grad={losses.requires_grad}"
            )
        if targets.is_floating_point():  # twin critics: what another one says is right in this one's eyes
            targets = torch.where(_moved_by(made[layer], outputs), targets, outputs.detach())
        watched = [made[each] for each, _ in self.consumers]
        slopes = torch.autograd.grad(losses.mean(), watched, allow_unused=True)
        self.slopes = [torch.zeros_like(y) if g is None else g for y, g in zip(watched, slopes, strict=True)]
        self.losses = losses.detach()
        self.coefficients, self.offset, self.wrong = boundary(outputs.detach(), targets)
        self.rows = patches(layer, self.read) if isinstance(layer, _CONVOLUTIONS) else self.read.flatten(0, -2)

    def margin(self, row: Tensor, point: Tensor) -> Tensor:
        """See :attr:`recycle.folding.Mistakes.margin`; of one network."""
        weight = self.group.tensor(self.axis.name).detach().flatten(1)
        bias = dict(self.layer.named_parameters()).get("bias")

        def move(x: Tensor, y: Tensor) -> Tensor:
            self._compare(x)
            response = weight @ point[0] + (0 if bias is None else bias.detach())
            return self._put(y.detach(), lambda flat: flat.index_copy(0, row, response[None]))

        outputs, _, _ = self._run({self.layer: move})
        example = torch.div(row, len(self.rows) // len(self.losses), rounding_mode="floor")
        found: Tensor = (self.coefficients[example] * outputs[example]).sum(1) + self.offset[example]
        return found

    def score(self, point: Tensor, directions: Tensor) -> Tensor:
        """See :attr:`recycle.folding.Mistakes.score`; of one network. Candidates stand in the units' places."""
        values = (self.rows - point) @ directions[0].T
        parts = [self._gradient_norms(part) for part in torch.split(values, self.group.width, dim=1)]
        return torch.cat(parts)[None]

    def beside(self, rows: Tensor) -> Score:
        """See :attr:`recycle.folding.Mistakes.beside`; of one network."""
        values = self.rows @ rows[0, :, :-1].T + rows[0, :, -1]
        reads = [(part.shape[1], self._read_of(part)) for part in torch.split(values, self.group.width, dim=1)]
        rest = copy.copy(self)
        rest.slopes = [
            _unexplained(slope, [_Outgoing(layer, axis, read[layer].detach(), count) for count, read in reads])
            for (layer, axis), slope in zip(self.consumers, self.slopes, strict=True)
        ]
        return rest.score

    def _gradient_norms(self, values: Tensor) -> Tensor:
        """Squared gradient of the outgoing weights of units with these pre-activations, ``(rows, units)``."""
        read = self._read_of(values)
        total = values.new_zeros(values.shape[1])
        for (layer, axis), slope in zip(self.consumers, self.slopes, strict=True):
            total = total + _Outgoing(layer, axis, read[layer], len(total)).gradient(slope).square().sum((1, 2))
        return total

    def _read_of(self, values: Tensor) -> dict[nn.Module, Tensor]:
        """What each consumer reads if units with these pre-activations ``(rows, units)`` stand in the first places."""
        units = torch.arange(values.shape[1])
        read: dict[nn.Module, Tensor] = {}

        def replace(x: Tensor, y: Tensor) -> Tensor:
            self._compare(x)
            channels = self.axis.entries(units, y.device)
            return self._put(y.detach(), lambda flat: flat.index_copy(1, channels, values))

        def keep(of: nn.Module) -> _Hook:
            return lambda x, y: read.update({of: x})

        self._run({self.layer: replace, **{layer: keep(layer) for layer, _ in self.consumers}})
        return read

    def _put(self, output: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
        """The layer's output with its values changed as ``(rows, channels)``."""
        moved = output.movedim(self.features, -1)
        return change(moved.reshape(-1, moved.shape[-1])).reshape(moved.shape).movedim(-1, self.features)

    def _compare(self, read: Tensor) -> None:
        if not torch.equal(read, self.read):
            raise NotRecyclable(
                "examples() ran other examples when it was called again; it must run the same ones at one event"
            )

    def _run(self, hooks: dict[nn.Module, _Hook]) -> tuple[Tensor, Tensor, Tensor]:
        with _hooked(self.group.module, hooks) as calls:
            found = self.examples()
        for layer, count in calls.items():
            if count > 1:
                raise NotRecyclable(f"examples() runs {self._name(layer)!r} {count} times, expected once")
        return _checked(found)

    def _name(self, layer: nn.Module) -> str:
        names: dict[nn.Module, str] = {each: name for name, each in self.group.module.named_modules()}
        return names[layer]


class _Outgoing:
    """The outgoing weights of the first so many units at one layer that reads them, ``(units, span, everything else)``.

    Args:
        layer: a Linear or convolution.
        axis: of its weight.
        read: its input.
        count: units.
    """

    def __init__(self, layer: nn.Module, axis: Axis, read: Tensor, count: int) -> None:
        self.layer, self.axis, self.read, self.units = layer, axis, read, torch.arange(count)

    def gradient(self, slope: Tensor) -> Tensor:
        """Of ``(output * slope).sum()``; by what is read it can be differentiated again."""
        with torch.enable_grad():
            weight = self._weight.detach().requires_grad_()
            said = (self._output(weight) * slope).sum()
            (gradient,) = torch.autograd.grad(said, weight, create_graph=self.read.requires_grad)
        return self.axis.read(gradient, self.units)

    def image(self, values: Tensor) -> Tensor:
        """What the layer would say were its weights these, and zero elsewhere; without its bias."""
        weight = torch.zeros_like(self._weight)
        self.axis.write(weight, self.units, values)
        return self._output(weight, bias=None)

    @property
    def _weight(self) -> Tensor:
        weight: Tensor = self.layer._parameters["weight"]  # type: ignore[assignment]
        return weight.detach()

    def _output(self, weight: Tensor, **others: Tensor | None) -> Tensor:
        twin: Any = copy.copy(self.layer)  # without the hooks: this is no pass of the network
        twin._parameters = {**self.layer._parameters, "weight": weight, **others}
        said: Tensor = type(self.layer).forward(twin, self.read)
        return said


@torch.no_grad()
def _unexplained(slope: Tensor, parts: list[_Outgoing]) -> Tensor:
    """What is left of a layer's slopes of their least squares by what units say there: conjugate gradients (CGLS)."""
    left = slope
    pull = [part.gradient(left) for part in parts]
    step, size = pull, _squared(pull)
    enough = torch.finfo(slope.dtype).eps * size
    for _ in range(_STEPS):
        if size <= enough:
            break
        image = torch.stack([part.image(along) for part, along in zip(parts, step, strict=True)]).sum(0)
        left = left - size / image.square().sum() * image
        pull = [part.gradient(left) for part in parts]
        before, size = size, _squared(pull)
        step = [new + size / before * old for new, old in zip(pull, step, strict=True)]
    return left


def _squared(parts: list[Tensor]) -> Tensor:
    return torch.stack([part.square().sum() for part in parts]).sum()


def _producer(group: UnitGroup) -> tuple[nn.Module, Axis]:
    """The layer that makes the units, and its weight.

    Raises:
        NotRecyclable: its rows say less than all about a unit, or are not what :func:`patches` gives.
    """
    roles = [axis.role for axis in group.incoming]
    found = group.producers()
    if roles.count("weight") != 1 or len(roles) > 1 + roles.count("bias") or len(found) != 1:
        names = ", ".join(axis.name for axis in group.incoming)
        raise NotRecyclable(f"folding needs units with one weight and at most a bias; {group.name!r} has {names}")
    layer, axis = found[0]
    if isinstance(layer, _CONVOLUTIONS) and not is_plain_convolution(layer):
        raise NotRecyclable(f"folding needs convolutions in one group, padded with zeros by numbers: {axis.name!r}")
    if not isinstance(layer, (nn.Linear, *_CONVOLUTIONS)):
        raise NotRecyclable(f"folding needs a Linear or convolution, {axis.name!r} is of a {type(layer).__name__}")
    if not group.exact:
        raise NotRecyclable(f"a unit added to {group.name!r} would change the others: {group.why}")
    if not group.homogeneous:
        raise NotRecyclable(f"folding needs units with a hinge (ReLU, leaky ReLU); those of {group.name!r} have none")
    return layer, axis


def _consumer(group: UnitGroup, axis: Axis) -> nn.Module:
    owner, _, leaf = axis.name.rpartition(".")
    layer = group.module.get_submodule(owner)
    if not (axis.hooked and leaf == "weight" and plain(layer)):
        raise NotRecyclable(f"folding must see what {axis.name!r} reads, and no hook does")
    return layer


@contextmanager
def _hooked(module: nn.Module, hooks: dict[nn.Module, _Hook]) -> Iterator[dict[nn.Module, int]]:
    """Run in evaluation mode, with gradients, and with hooks on layers; how often each was called."""
    calls = dict.fromkeys(hooks, 0)

    def called(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor | None:
        calls[layer] += 1
        return hooks[layer](args[0] if args else kwargs["input"], output)

    modes = [(layer, layer.training) for layer in module.modules()]
    handles = [layer.register_forward_hook(called, with_kwargs=True) for layer in hooks]
    try:
        module.eval()
        with undisturbed(module), torch.enable_grad():
            yield calls
    finally:
        for handle in handles:
            handle.remove()
        for layer, mode in modes:
            layer.training = mode


def _moved_by(made: Tensor, outputs: Tensor) -> Tensor:
    """Which outputs ``(examples, outputs)`` depend on what a layer made, bool ``(outputs,)``; all, if none does."""
    found = torch.zeros(outputs.shape[1], dtype=torch.bool, device=outputs.device)
    if made.requires_grad and outputs.requires_grad:
        for i, y in enumerate(outputs.unbind(1)):
            (slope,) = torch.autograd.grad(y.sum(), made, retain_graph=True, allow_unused=True)
            found[i] = slope is not None and slope.any()
    return found | ~found.any()


def _checked(found: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Outputs ``(examples, outputs)``, losses and targets, of what ``examples`` returned."""
    if not (isinstance(found, tuple) and len(found) == 3 and all(isinstance(each, Tensor) for each in found)):
        raise NotRecyclable("examples() must return three tensors: outputs, the loss of each example, and targets")
    outputs, losses, targets = found
    outputs = outputs[:, None] if outputs.dim() == 1 else outputs
    classes = not targets.is_floating_point()
    targets = targets[:, None] if targets.dim() == 1 and not classes else targets
    if outputs.dim() != 2 or losses.shape != outputs.shape[:1]:
        raise NotRecyclable(
            "examples() must return outputs (examples, outputs) and losses (examples,), got "
            f"{tuple(outputs.shape)} and {tuple(losses.shape)}"
        )
    if targets.shape != (outputs.shape[:1] if classes else outputs.shape):
        raise NotRecyclable(
            f"targets are integers of shape {tuple(losses.shape)}, or numbers shaped like the outputs "
            f"{tuple(outputs.shape)}: got {targets.dtype} of shape {tuple(targets.shape)}"
        )
    if not bool((losses.isfinite() & (losses >= 0)).all()):
        raise NotRecyclable("folding weighs examples with their losses, which must be finite and not negative")
    return outputs, losses, targets
