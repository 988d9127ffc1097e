"""`firefly schema`: the JSON schema of a run file."""

from __future__ import annotations

import json

from firefly.config.json_schema import json_schema
from firefly.console import print_json


def print_schema() -> None:
    print_json(json.dumps(json_schema(), ensure_ascii=False, indent=2))
