"""The list of methods says what their classes say, and nothing else."""

from __future__ import annotations

import inspect
import re
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path

import pytest

import recycle
from agents import methods
from agents.method_names import build_method

README = Path(__file__).resolve().parents[2] / "README.md"


def printed(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    assert methods.main(argv) == 0
    return capsys.readouterr().out


def test_every_method_is_listed_with_every_option_and_its_default(capsys: pytest.CaptureFixture[str]) -> None:
    entries = printed(capsys).split("\n\n")
    assert [entry.partition(":")[0] for entry in entries] == list(recycle.METHODS)
    for name, entry in zip(recycle.METHODS, entries, strict=True):
        kind = recycle.find(name)
        for option in (f for f in fields(kind) if f.init):  # type: ignore[arg-type]
            assert f"\n    {option.name} = {option.default!r}  " in entry
        for private in (f.name for f in fields(kind) if not f.init):  # type: ignore[arg-type]
            assert private not in entry


@pytest.mark.parametrize("name", list(recycle.METHODS))
def test_what_is_listed_can_be_passed(name: str) -> None:
    given = {option.name: option.default for option in methods.options(recycle.find(name))}
    assert build_method(name, given) == recycle.find(name)()


@pytest.mark.parametrize("name", list(recycle.METHODS))
def test_every_option_is_described(name: str) -> None:
    assert all(len(option.text) > 10 for option in methods.options(recycle.find(name)))


@pytest.mark.parametrize(
    ("name", "cited"),
    [
        ("redo", "Sokar, Agarwal, Castro and Evci 2023"),
        ("cbp", "Dohare et al. 2024"),
        ("snr", "Farias & Jozefiak 2024, arXiv 2410.20098"),
        ("regrama", "Liu et al. 2025"),
        ("monitor", ""),
    ],
)
def test_the_paper_stands_in_the_list(name: str, cited: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert methods.paper(recycle.find(name)).startswith(cited)
    assert cited in printed(capsys, name)
    assert (methods.paper(recycle.find(name)) == "") == (cited == "")


@dataclass(frozen=True)
class Own:
    """A method of one's own,
    on two lines.

    And more that is not listed.
    """

    must: int
    """Has no default."""
    bare: float = 0.5
    several: list[int] = field(default_factory=lambda: [1])
    """Made ``anew``
    each time."""


def test_a_method_of_ones_own(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recycle, "find", {"mine:Own": Own, "mine:plain": test_what_is_listed_can_be_passed}.get)
    assert printed(capsys, "mine:Own") == (
        "mine:Own: A method of one's own, on two lines.\n"
        "    must  Has no default.\n"
        "    bare = 0.5\n"
        "    several = [1]  Made anew each time.\n"
    )
    assert printed(capsys, "mine:plain") == "mine:plain: not described\n"
    assert next(methods.options(Own)).default is MISSING


def test_a_name_that_is_no_method_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert methods.main(["spilt"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: no method 'spilt': did you mean 'split'?") and said.count("\n") == 1


def test_the_readme_s_table_has_a_row_for_every_method_and_names_only_options_that_exist() -> None:
    text = README.read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `(\w+)` \| .* \| (.*) \|$", text[text.index("## Methods") :].split("\n### ")[0], re.M))
    assert list(rows) == list(recycle.METHODS)
    for name, told in rows.items():
        assert set(re.findall(r"`(\w+)`", told)) <= {option.name for option in methods.options(recycle.find(name))}


def test_there_is_no_second_list() -> None:
    source = inspect.getsource(methods)
    assert not [name for name in recycle.METHODS if f'"{name}"' in source]
