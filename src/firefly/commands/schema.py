"""`firefly schema`: the JSON schema of a run file."""

from __future__ import annotations

import json

import typer

from firefly.commands.options import imports_without_gc
from firefly.console import print_json

app = typer.Typer(add_completion=False)


@app.command()
def schema_command() -> None:
    with imports_without_gc():
        from firefly.config.json_schema import json_schema

        print_json(json.dumps(json_schema(), ensure_ascii=False, indent=2))
