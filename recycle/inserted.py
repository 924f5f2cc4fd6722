"""What a hidden layer consists of that is the identity when it is born."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import skip_init

from recycle.graph import NotRecyclable
from recycle.interventions import Deepen
from recycle.names import did_you_mean

_KINDS: tuple[Any, ...] = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_NORMS: tuple[Any, ...] = (nn.BatchNorm1d, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
"""By how many axes of positions the signal has."""


class Blend(nn.Module):
    """``x + p (s(x) - x)``: the identity where ``p`` is 0, the activation ``s`` where it is 1.

    ``p`` is learned for each unit and begins at 0. For a ReLU this is a PReLU whose slope begins at 1.
    """

    def __init__(self, activation: nn.Module, weight: Tensor) -> None:
        """``weight`` is that of the layer before it: each of its rows gets a ``p``."""
        super().__init__()
        self.activation = activation
        self.p = nn.Parameter(weight.new_zeros(len(weight)))
        self.positions = weight.dim() - 2

    def forward(self, x: Tensor) -> Tensor:
        """``(..., units)``, or ``(batch, units, *positions)`` behind a convolution, to the same shape."""
        p = self.p.view(-1, *[1] * self.positions)
        result: Tensor = x + p * (self.activation(x) - x)
        return result


class Branch(nn.Module):
    """``x + V s(U x + c)``: a residual branch, silent while ``V`` (``out``) is zero."""

    def __init__(self, into: nn.Module, activation: nn.Module, out: nn.Module) -> None:
        super().__init__()
        self.into, self.activation, self.out = into, activation, out

    def forward(self, x: Tensor) -> Tensor:
        """To the same shape."""
        result: Tensor = x + self.out(self.activation(self.into(x)))
        return result


def parts_of(edit: Deepen, like: Any, width: int, front: nn.Module | None) -> list[nn.Module]:
    """The modules of a new layer, one behind the other. Draws no random number: a branch's ``U`` is zero as well.

    Args:
        edit: says which kind of layer.
        like: a Linear layer or convolution whose kind, precision and device it has, and bias if that has one.
        width: units of the signal, in features or channels.
        front: the activation that the signal comes from, where it is known.

    Raises:
        NotRecyclable: such a layer is never the identity.
    """
    activation = _activation(edit, like, front)
    if edit.kernel < 1 or edit.kernel % 2 == 0:
        raise NotRecyclable(f"a kernel of even size has no middle for Dirac's; pass an odd one, got {edit.kernel}")
    norm = [_NORMS[like.weight.dim() - 2](width * (1 + (edit.kind == "pair")))] * edit.batch_norm
    for layer in norm:
        layer.to(like.weight)
    eye = torch.eye(width)
    if edit.kind == "pair":
        both = torch.cat([eye, -eye])
        return [_layer(edit, like, both), *norm, nn.ReLU(), _layer(edit, like, both.T)]
    if edit.kind == "residual":
        zeros = [_layer(edit, like, torch.zeros(width, width)) for _ in range(2)]
        return [Branch(zeros[0], nn.Sequential(*norm, activation) if norm else activation, zeros[1])]
    layer = _layer(edit, like, eye)
    if edit.kind == "blend":
        if hasattr(activation, "inplace"):
            activation.inplace = False  # it is compared with what it reads
        return [layer, *norm, Blend(activation, layer.weight)]
    _check_identity(activation, front)
    return [layer, *norm, activation]


def _layer(edit: Deepen, like: Any, matrix: Tensor) -> Any:
    """A layer with these weights, in the middle of a convolution's kernel, and no bias but zero."""
    out, into = matrix.shape
    positions = like.weight.dim() - 2
    how: dict[str, Any] = {"bias": like.bias is not None, "device": like.weight.device, "dtype": like.weight.dtype}
    if positions:
        how |= {"kernel_size": edit.kernel, "padding": edit.kernel // 2}
    layer: Any = skip_init(_KINDS[positions], into, out, **how)  # type: ignore[no-untyped-call]
    for parameter in layer.parameters():
        parameter.detach().zero_()
    layer.weight.detach()[(slice(None), slice(None), *[edit.kernel // 2] * positions)] = matrix.to(like.weight)
    return layer


def _activation(edit: Deepen, like: Any, front: nn.Module | None) -> Any:
    if edit.activation is None:
        activation = nn.ReLU() if front is None else copy.deepcopy(front)
    else:
        known = nn.modules.activation.__all__
        if edit.activation not in known:
            raise NotRecyclable(
                f"torch.nn has no activation {edit.activation!r}; {did_you_mean(edit.activation, known)}"
            )
        try:
            activation = getattr(nn, edit.activation)().to(like.weight)
        except TypeError as error:
            raise NotRecyclable(f"{edit.activation} needs arguments: name an activation without") from error
    if isinstance(activation, nn.PReLU) and edit.kind == "identity":
        activation.weight.detach().fill_(1.0)
    return activation


def _check_identity(activation: nn.Module, front: nn.Module | None) -> None:
    """Refuse ``s`` unless ``s(x) = x`` for all that comes out of the activation before it.

    Where that is not known it is taken for a ReLU: whether there are negative values too the trial tells, not how
    large they grow.
    """
    if isinstance(activation, nn.PReLU) or (front is not None and next(front.parameters(), None) is not None):
        return  # the trial on random parameters tells
    before = nn.ReLU() if front is None else copy.deepcopy(front).eval()
    grid = torch.logspace(-3, 3, 121, dtype=torch.double)
    signal = before(torch.cat([-grid.flip(0), grid]))
    off = (copy.deepcopy(activation).eval()(signal.clone()) - signal).abs() / signal.abs().clamp_min(1.0)
    if not float(off.max()) <= 1e-12:
        value = f"{float(signal[off.argmax()]):.3g}"
        now, given = type(activation).__name__, type(before).__name__
        raise NotRecyclable(f"{now} is not the identity on what {given} gives, such as {value}, with any weights")
