"""docs/settings.md has the table of the settings as they are declared; `pytest --golden-update` writes it again."""

from pathlib import Path

import pytest

from meshd.state.settings import DEFAULTS, OPTIONS, Option, Scope

BEGIN, END = "<!-- settings: begin -->\n", "<!-- settings: end -->\n"
# `make test` copies the tests away from the sources, into a folder of the checkout.
PAGE = next(page for up in Path(__file__).resolve().parents if (page := up / "docs" / "settings.md").exists())


def table() -> str:
    """Return the table: an option a row, in the order of the help."""
    rows = [("Option", "Environment", "Default", "Meaning"), ("---",) * 4]
    rows += [_row(option, DEFAULTS[name]) for name, option in OPTIONS.items()]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def _row(option: Option, value: object) -> tuple[str, str, str, str]:
    no = option.flag.partition("/")[2]
    options = f"`{option.name}`" + (f", `{no}`" if no else "")
    default = option.default or (f"`{option.name if value else no}`" if no else f"`{value}`")
    only = " Only at `init`: the others get it from the invitation." if option.scope is Scope.MESH else ""
    return options, f"`{option.variable}`", default, option.help + only


def test_the_page_has_the_table_of_the_declared_settings(request: pytest.FixtureRequest) -> None:
    text = PAGE.read_text()
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    wanted = f"{before}{BEGIN}{table()}{END}{after}"
    if request.config.getoption("--golden-update"):
        PAGE.write_text(wanted)
    assert text == wanted, f"differs from {PAGE}; --golden-update writes it again"


def test_no_two_settings_share_an_option_or_a_variable() -> None:
    assert len({option.name for option in OPTIONS.values()}) == len(OPTIONS)
    assert len({option.variable for option in OPTIONS.values()}) == len(OPTIONS)
