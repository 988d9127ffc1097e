#!/usr/bin/env python
"""Write the tables of configuration keys in README and docs anew, from the keys themselves.

    python script/key_tables.py            write them
    python script/key_tables.py --check    exit 1 if one is out of date

A table stands between `<!-- keys: NAME -->` and `<!-- end of keys -->`; what is between them is replaced.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

from firefly.config import own_fields
from firefly.config.json_schema import describe, json_schema
from firefly.config.training_arguments import FIELDS, training_fields

ROOT = Path(__file__).resolve().parents[1]
PAGES = {
    "README.md": "en",
    "README_zh.md": "zh",
    "docs/configuration.md": "en",
    "docs/zh/configuration.md": "zh",
}
"""Pages with tables, and their languages."""

REGION = re.compile(r"(<!-- keys: (\w+) -->\n).*?(<!-- end of keys -->)", re.DOTALL)
HEADS = {
    ("own", "en"): "| key | default | values | |\n|---|---|---|---|",
    ("own", "zh"): "| 键 | 默认值 | 取值 | |\n|---|---|---|---|",
    ("transformers", "en"): "| key | default | treated as |\n|---|---|---|",
    ("transformers", "zh"): "| 键 | 默认值 | 处理方式 |\n|---|---|---|",
}
TREATMENTS = {
    "honoured": ("honoured", "按其含义执行"),
    "translated": ("Firefly's own", "Firefly 自己的键"),
    "refused": ("refused", "拒绝"),
    "without effect": ("without effect", "不起作用"),
}


def written(text: str, language: str) -> str:
    """A page with its tables as they should be."""
    return REGION.sub(lambda found: f"{found[1]}{table(found[2], language)}\n{found[3]}", text)


def table(name: str, language: str) -> str:
    """The table `own` (Firefly's keys) or `transformers` (the other fields of TrainingArguments)."""
    properties, rows = json_schema()["properties"], []
    if name == "own":
        for key in own_fields():
            text = re.sub(r"docs/[\w/-]+\.md", r"[\g<0>](\g<0>)", describe(key, language))
            rows.append(f"| `{key}` | {default(properties[key])} | {values(properties[key])} | {text} |")
    else:
        for key in sorted(training_fields().keys() - own_fields().keys()):
            how = TREATMENTS[FIELDS[key].how][language == "zh"]
            rows.append(f"| `{key}` | {default(properties[key])} | {how} |")
    return "\n".join([HEADS[name, language], *rows])


def default(item: dict[str, Any]) -> str:
    return shown(item["default"]) if "default" in item else "–"


def shown(value: Any) -> str:
    """A value as JSON has it; text as code."""
    if isinstance(value, str) and value:
        return f"`{value}`"
    return f"{value:g}" if isinstance(value, float) else json.dumps(value)


def values(item: dict[str, Any]) -> str:
    """The values that a key takes, where they are limited."""
    parts = []
    for part in item.get("anyOf", [item]):
        if part.get("deprecated"):
            continue
        least, below = part.get("minimum"), part.get("exclusiveMaximum")
        if below is not None:
            parts.append(f"{least:g} ≤ x < {below if below < 10**6 else '2³²'}")
        elif least is not None:
            parts.append(f"≥ {least:g}")
        elif "enum" in part or "const" in part:
            parts += [shown(value) for value in part.get("enum", [part.get("const")])]
        elif part["type"] == "boolean":
            parts.append("true, false")
        elif part["type"] == "null" and item["default"] is not None:
            parts.append("null")
    return ", ".join(parts) if parts != ["true, false"] else ""


if __name__ == "__main__":
    outdated = False
    for page, language in PAGES.items():
        path = ROOT / page
        text = path.read_text(encoding="utf-8")
        if (new := written(text, language)) != text:
            outdated = True
            print(f"{page}: {'out of date' if '--check' in sys.argv else 'written'}")
            if "--check" not in sys.argv:
                path.write_text(new, encoding="utf-8")
    sys.exit(outdated and "--check" in sys.argv)
