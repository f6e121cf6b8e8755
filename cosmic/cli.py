"""`cosmic`: find refusal directions from the command line."""

from __future__ import annotations

import sys

import typer

from cosmic.commands.compare import compare
from cosmic.commands.explain import explain
from cosmic.commands.extract import extract
from cosmic.commands.harmfulness import harmfulness
from cosmic.commands.steer import steer
from cosmic.errors import InputError

app = typer.Typer(
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="markdown"
)
app.command()(extract)
app.command()(explain)
app.command()(steer)
app.command()(compare)
app.command()(harmfulness)


@app.callback()
def about() -> None:
    """Where does a chat model keep its refusal?"""


def main() -> None:
    """The console script: a user's mistake ends it with one line and exit code 2."""
    try:
        app()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
