"""Run one experiment: ``python -m agents.experiments folding`` or ``self_expanding``."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import tyro

from agents.command_line import reported
from agents.experiments import folding, self_expanding

EXPERIMENTS: dict[str, tuple[type, Callable[[Any], None]]] = {
    "folding": (folding.Args, folding.compare),
    "self_expanding": (self_expanding.Args, self_expanding.compare),
}
"""Name of each experiment, its options, and what runs it."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the experiment that is named first; returns the exit code."""
    options: dict[str, Callable[..., Any]] = {name: kind for name, (kind, _) in EXPERIMENTS.items()}
    args = tyro.extras.subcommand_cli_from_dict(
        options, args=argv, prog="python -m agents.experiments", description=__doc__
    )
    run = next(run for kind, run in EXPERIMENTS.values() if isinstance(args, kind))
    return reported(lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
