"""A form for a run file, made from its JSON schema: every key of ours and those of transformers that people set."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import gradio as gr

from firefly.config import load_config
from firefly.config.json_schema import json_schema
from firefly.console import take_notices
from firefly.errors import UsageError
from firefly.translation import Phrase, language

SECTIONS = {
    "model": Phrase("Model"),
    "data": Phrase("Data"),
    "adapter": Phrase("Adapter"),
    "schedule": Phrase("Schedule"),
    "step": Phrase("Steps and memory"),
    "preference": Phrase("Preferences and rewards"),
    "evaluation": Phrase("Evaluation"),
    "precision": Phrase("Numbers"),
    "run": Phrase("Run"),
}
"""The parts of the form, and what stands above each. Those of `firefly schema` and, of transformers' keys, schedule."""

OF_TRANSFORMERS = {
    "schedule": (
        "learning_rate",
        "num_train_epochs",
        "max_steps",
        "lr_scheduler_type",
        "warmup_steps",
        "optim",
        "weight_decay",
        "max_grad_norm",
        "seed",
    ),
    "evaluation": ("eval_strategy", "eval_steps", "load_best_model_at_end", "metric_for_best_model"),
    "run": ("logging_steps", "save_strategy", "save_steps", "save_total_limit", "report_to"),
}
"""Any other can be written into the configuration's text."""

FIRST = ("task_type", "train_mode", "model_name_or_path", "train_file", "template_name", "output_dir")
"""Keys that every run needs or that decide about others: above the sections."""

TRUTH = ("true", "false")

WRITING = """(shown, text) => {
  const key = %s, standard = %s, kinds = %s;
  let config;
  try { config = JSON.parse(text || "{}"); } catch { return text; }
  let value = shown;
  if (typeof value === "string") {
    const numeric = kinds.includes("integer") || kinds.includes("number");
    if (kinds.includes("boolean") && (value === "true" || value === "false")) value = value === "true";
    else if (numeric && value.trim() !== "" && Number.isFinite(Number(value))) value = Number(value);
    else if (/^\\s*[\\[{]/.test(value)) { try { value = JSON.parse(value); } catch { /* typed by half */ } }
  }
  const empty = value === null || value === undefined || value === "";
  const plain = !(key in config) && JSON.stringify(value) === JSON.stringify(standard);
  if (empty) delete config[key];
  else if (!plain) config[key] = value;
  return JSON.stringify(config, null, 2);
}"""


@dataclass(frozen=True)
class Field:
    """A key in the form.

    Attributes:
        schema: of the key.
        only: settings under which it is read, each with its values.
    """

    name: str
    schema: Mapping[str, Any]
    section: str
    only: Mapping[str, tuple[str, ...]]

    @property
    def choices(self) -> list[str]:
        """What it may be, where that is a list."""
        kinds = self.schema.get("anyOf", [self.schema])
        words = [str(word) for kind in kinds for word in kind.get("enum", [kind["const"]] if "const" in kind else [])]
        types = {kind.get("type") for kind in kinds}
        if types & {"integer", "number", "array"} or ("string" in types and not words):
            return []
        return [*words, *(TRUTH if "boolean" in types else ())]

    @property
    def is_number(self) -> bool:
        kinds = {kind.get("type") for kind in self.schema.get("anyOf", [self.schema])}
        return bool(kinds & {"integer", "number"}) and kinds <= {"integer", "number", "null"}

    def make(self, value: Any, visible: bool) -> Any:
        """The field on the page, with a value to begin with; None: the default."""
        named: dict[str, Any] = {"label": self.name, "info": self.describe(), "elem_id": f"key-{self.name}"}
        named["visible"] = visible
        default = self.shown(value)
        if self.choices:
            return gr.Dropdown(["", *self.choices], value=default, **named)
        return gr.Number(default, **named) if self.is_number else gr.Textbox(default, **named)

    def describe(self) -> str:
        both = self.schema.get("x-description")
        text = both[language()] if both else self.schema.get("description", "")
        return text if len(text) < 300 else text[:297] + "…"

    def shown(self, value: Any) -> Any:
        """A value of the configuration (None: its default) as the field shows it."""
        value = self.schema.get("default") if value is None else value
        if self.is_number:
            return value if isinstance(value, (int, float)) else None
        if value is None:
            return ""
        return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)

    def writing(self) -> str:
        """JavaScript that puts what the field says into the configuration's text: no key waits for the server. A key at
        its default is left out, unless it is there already; so is one that is emptied."""
        kinds = {kind.get("type") for kind in self.schema.get("anyOf", [self.schema])}
        kinds |= {"boolean"} if self.choices and kinds & {"boolean"} else set()
        return WRITING % tuple(map(json.dumps, (self.name, self.schema.get("default"), sorted(map(str, kinds)))))

    def is_read(self, config: Mapping[str, Any], defaults: Mapping[str, Any]) -> bool:
        """Whether the key counts beside the others."""
        return all(config.get(key, defaults.get(key)) in values for key, values in self.only.items())


def fields() -> list[Field]:
    """The keys of the form, in the order of its sections."""
    properties = json_schema()["properties"]
    sections = {name: item["x-section"] for name, item in properties.items() if "x-section" in item}
    sections |= {name: section for section, names in OF_TRANSFORMERS.items() for name in names}
    made = [
        Field(name, properties[name], section, {key: tuple(v) for key, v in properties[name].get("x-only", {}).items()})
        for name, section in sections.items()
    ]
    order = list(SECTIONS)
    places = {name: number for number, name in enumerate(FIRST)}
    return sorted(made, key=lambda field: (places.get(field.name, len(FIRST)), order.index(field.section)))


def parse(text: str) -> dict[str, Any]:
    """The configuration that is typed.

    Raises:
        UsageError: it is no JSON object.
    """
    try:
        value = json.loads(text or "{}")
    except (ValueError, RecursionError) as error:
        raise UsageError("studio.bad_json", "the configuration is no JSON: {problem}.", problem=error) from None
    if not isinstance(value, dict):
        raise UsageError("studio.no_object", "the configuration has to be one object of keys and values.")
    return value


def as_text(config: Mapping[str, Any]) -> str:
    return json.dumps(config, ensure_ascii=False, indent=2)


def judge(config: Mapping[str, Any]) -> list[str]:
    """Check a configuration as `firefly train` does; returns the notes that it would print.

    Raises:
        UsageError: a key or a value is at fault.
    """
    load_config(config)
    return [note["message"] for note in take_notices()]
