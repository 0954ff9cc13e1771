"""docs/settings.md has the table of the settings as they are declared; `pytest --golden-update` writes it again."""

from pathlib import Path

import pytest

from meshd.state.settings import DEFAULTS, OPTIONS, REJOIN, Option, Scope

BEGIN, END = "<!-- settings: begin -->\n", "<!-- settings: end -->\n"
# `make test` copies the tests away from the sources, into a folder of the checkout.
PAGE = next(page for up in Path(__file__).resolve().parents if (page := up / "docs" / "settings.md").exists())


def table() -> str:
    """Return the table: an option a row, in the order of the help."""
    rows: list[tuple[str, ...]] = [("Option", "Environment", "Default", "Meaning", "Changed later by"), ("---",) * 5]
    rows += [_row(option, DEFAULTS[name]) for name, option in OPTIONS.items()]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def _row(option: Option, value: object) -> tuple[str, ...]:
    no = option.flag.partition("/")[2]
    options = f"`{option.name}`" + (f", `{no}`" if no else "")
    default = option.default or (f"`{option.name if value else no}`" if no else f"`{value}`")
    only = " Only at `init`: the others get it from the invitation." if option.scope is Scope.MESH else ""
    later = f"`{option.later}`" if option.later != REJOIN else "a new join"
    return options, f"`{option.variable}`", default, option.help + only, later


def test_settings_page_is_current(request: pytest.FixtureRequest) -> None:
    """The table in docs/settings.md is the one that the declarations give."""
    text = PAGE.read_text()
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    wanted = f"{before}{BEGIN}{table()}{END}{after}"
    if request.config.getoption("--golden-update"):
        PAGE.write_text(wanted)
    assert text == wanted, f"differs from {PAGE}; --golden-update writes it again"


def test_settings_have_distinct_options() -> None:
    """No two settings share an option or a variable."""
    assert len({option.name for option in OPTIONS.values()}) == len(OPTIONS)
    assert len({option.variable for option in OPTIONS.values()}) == len(OPTIONS)
