"""`firefly train`"""

from __future__ import annotations

from typing import Annotated

import typer

from firefly import ranks
from firefly.commands.options import ANY_KEY, ConfigArgument, given_configuration, imports_without_gc
from firefly.errors import UsageError

app = typer.Typer(add_completion=False)


@app.command(context_settings=ANY_KEY)
def train_command(
    context: typer.Context,
    config: ConfigArgument = "",
    train_args_file: Annotated[
        str, typer.Option("--train_args_file", help="The same file, as the tutorial names it.")
    ] = "",
) -> None:
    if not train_args_file and (not config or config.startswith("--")):
        raise UsageError("cli.no_config", "no configuration given. Usage: firefly train CONFIG [--key value …]")
    source, overrides = given_configuration(context, config)
    if source and train_args_file:
        raise UsageError(
            "cli.unexpected_argument",
            "unexpected argument {argument!r}; options are written --key value.",
            argument=source,
        )
    with imports_without_gc():
        from firefly.config import load_config

        resolved = load_config(source or train_args_file, overrides)
        from firefly.training import train
    output_dir = train(resolved)
    if ranks.is_first():
        print(output_dir)
