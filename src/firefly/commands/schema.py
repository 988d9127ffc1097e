"""`firefly schema`: the JSON schema of a run file."""

from __future__ import annotations

import json

import typer

from firefly.commands.options import lasting_imports
from firefly.console import print_json

app = typer.Typer(add_completion=False)


@app.command()
def schema_command() -> None:
    with lasting_imports():
        from firefly.config.json_schema import json_schema

        print_json(json.dumps(json_schema(), ensure_ascii=False, indent=2))
