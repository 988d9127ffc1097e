"""Configuration: one flat file (JSON or YAML) becomes one frozen, checked `Config`.

Keys are Firefly's own (the fields of the dataclasses below, under the names given by `key`) and every field of
transformers' `TrainingArguments`. Anything else is an error that names the nearest known key.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from firefly import arguments, legacy
from firefly.console import notice, take_notices
from firefly.errors import UsageError
from firefly.translation import Phrase


def key(
    name: str,
    default: Any,
    kind: type | tuple[type, ...],
    choices: tuple[Any, ...] = (),
    minimum: float | None = None,
    below: float | None = None,
    nullable: bool = False,
) -> Any:
    """A dataclass field that is read from the flat configuration key `name`; where `nullable`, null switches it off."""
    limits = {"choices": choices, "minimum": minimum, "below": below, "nullable": nullable or default is None}
    return field(default=default, metadata={"key": name, "kind": kind, **limits})


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Which model, from where."""

    name_or_path: str = key("model_name_or_path", "", str)
    hub: str = key("hub", "huggingface", str, ("huggingface", "modelscope"))
    revision: str | None = key("model_revision", None, str)
    trust_remote_code: bool = key("trust_remote_code", False, bool)
    add_tokens: tuple[str, ...] | None = key("add_tokens", None, list)


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which records, and how they become tokens."""

    train_file: str | tuple[Any, ...] = key("train_file", "", (str, list))
    eval_file: str | tuple[Any, ...] | None = key("eval_file", None, (str, list))
    eval_ratio: float = key("eval_ratio", 0.0, float, minimum=0, below=1)
    data_format: str = key("data_format", "auto", str)
    text_documents: Literal["line", "file"] = key("text_documents", "line", str, ("line", "file"))
    template_name: str = key("template_name", "auto", str)
    template_date: str | None = key("template_date", None, str)
    on_system: str = key("on_system", "merge", str, ("merge", "error"))
    thinking: str = key("thinking", "keep", str, ("keep", "strip"))
    max_seq_length: int = key("max_seq_length", 1024, int, minimum=2)
    max_prompt_length: int | None = key("max_prompt_length", 512, int, minimum=1, nullable=True)
    document_attention: str = key("document_attention", "isolated", str, ("isolated", "joined"))
    on_too_long: str = key("on_too_long", "cut_turns", str, ("cut_turns", "cut", "drop", "error"))
    train_on: str = key("train_on", "all", str, ("all", "last"))
    allow_special_in_content: bool = key("allow_special_in_content", False, bool)
    max_malformed_rows: int = key("max_malformed_rows", 0, int, minimum=0)
    max_lost_share: float = key("max_lost_share", 0.01, float, minimum=0)
    shuffle: bool = key("shuffle", True, bool)
    tokenize_num_workers: int = key("tokenize_num_workers", 10, int, minimum=1)


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """What is updated: all weights (full), or low-rank adapters on frozen 16-bit (lora) or 4-bit (qlora) weights."""

    mode: str = key("train_mode", "qlora", str, ("full", "lora", "qlora"))
    rank: int = key("lora_rank", 64, int, minimum=1)
    alpha: float = key("lora_alpha", 16, float, minimum=0)
    dropout: float = key("lora_dropout", 0.05, float, minimum=0, below=1)
    use_rslora: bool = key("use_rslora", False, bool)
    use_dora: bool = key("use_dora", False, bool)
    target: str | tuple[str, ...] = key("lora_target", "all-linear", (str, list))
    modules_to_save: str | tuple[str, ...] | None = key("modules_to_save", None, (str, list))
    name_or_path: str | None = key("adapter_name_or_path", None, str)
    on_other_base: bool = key("adapter_on_other_base", False, bool)


@dataclass(frozen=True, kw_only=True)
class StepConfig:
    """How many examples make an optimizer step, and how many tokens a microbatch may hold."""

    per_device_examples: int = key("per_device_train_batch_size", 8, int, minimum=1)
    accumulation: int = key("gradient_accumulation_steps", 1, int, minimum=1)
    tokens_per_microbatch: int | str = key("tokens_per_microbatch", "auto", (int, str), minimum=1)
    gradient_checkpointing: bool | str = key("gradient_checkpointing", "auto", (bool, str), (True, False, "auto"))
    nf4_cache: bool | str = key("nf4_cache", "auto", (bool, str), (True, False, "auto"))
    on_nonfinite_loss: str = key("on_nonfinite_loss", "stop", str, ("stop", "skip"))

    @property
    def examples_per_rank(self) -> int:
        """Examples of one optimizer step for each rank."""
        return self.per_device_examples * self.accumulation


@dataclass(frozen=True, kw_only=True)
class PrecisionConfig:
    """What the user asked for; `models.precision` decides what the hardware gives. None: not said."""

    fp16: bool | None = key("fp16", None, bool)
    bf16: bool | None = key("bf16", None, bool)


PREFERENCE_LOSS_NAMES = ("sigmoid", "hinge", "ipo", "robust", "apo_zero", "apo_down", "simpo", "orpo", "cpo")
"""The keys of `objectives.preference.PREFERENCE_LOSSES`, which lies above this module."""

SMOOTHED_LOSSES = ("robust", "simpo", "cpo")
"""Those in which `label_smoothing` has a meaning."""


RecordKind = Literal["document", "conversation", "pair", "labelled"]
"What a record holds: plain text, messages, two answers to one prompt, messages with a verdict on the last reply."

RECORDS_OF_TASK: dict[str, RecordKind] = {
    "pretrain": "document",
    "sft": "conversation",
    "dpo": "pair",
    "kto": "labelled",
    "reward": "pair",
}
"""The names of tasks, and what each is trained on."""

READ_AS: dict[RecordKind, tuple[RecordKind, ...]] = {
    "document": ("document",),
    "conversation": ("conversation", "labelled"),
    "pair": ("pair",),
    "labelled": ("labelled", "pair"),
}
"""What holds it, too: a good answer is a demonstration, and a pair a good and a bad answer."""


def tasks_on(*kinds: RecordKind) -> str:
    """The names of the tasks that are trained on records of these kinds, for messages."""
    return " / ".join(task for task, kind in RECORDS_OF_TASK.items() if kind in kinds)


@dataclass(frozen=True, kw_only=True)
class PreferenceConfig:
    """Keys of preference training (task_type dpo). Known everywhere, so that a shared file loads."""

    loss: str = key("preference_loss", "sigmoid", str, PREFERENCE_LOSS_NAMES)
    beta: float = key("beta", 0.1, float, minimum=0)
    label_smoothing: float = key("label_smoothing", 0.0, float, minimum=0, below=0.5)
    rpo_alpha: float = key("rpo_alpha", 0.0, float, minimum=0)
    simpo_gamma: float = key("simpo_gamma", 0.5, float, minimum=0)
    cpo_alpha: float = key("cpo_alpha", 1.0, float, minimum=0)
    precompute_reference: bool = key("precompute_reference", False, bool)
    desirable_weight: float = key("desirable_weight", 1.0, float, minimum=0)
    undesirable_weight: float = key("undesirable_weight", 1.0, float, minimum=0)
    center_rewards_coefficient: float = key("center_rewards_coefficient", 0.0, float, minimum=0)


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """When a run stops because its evaluation no longer gets better; null: never."""

    patience: int | None = key("early_stopping_patience", None, int, minimum=1)
    threshold: float = key("early_stopping_threshold", 0.0, float, minimum=0)


@dataclass(frozen=True, kw_only=True)
class Config:
    """A whole run, resolved from one file and its overrides. Nothing in it changes afterwards."""

    task_type: str = key("task_type", "sft", str, tuple(RECORDS_OF_TASK))
    output_dir: str = key("output_dir", "", str)
    resume_from_checkpoint: bool | str | None = key("resume_from_checkpoint", None, (bool, str))
    resume_anyway: bool = key("resume_anyway", False, bool)
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    step: StepConfig = field(default_factory=StepConfig)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    preference: PreferenceConfig = field(default_factory=PreferenceConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    training: Mapping[str, Any] = field(default_factory=dict)
    """Keyword arguments for `TrainingArguments`, without those that Firefly consumes itself."""
    given: Mapping[str, Any] = field(default_factory=dict)
    """The file and its overrides as the user wrote them (saved as train_args.json)."""

    def flat(self) -> dict[str, Any]:
        """Every resolved key with its value, as one flat JSON-able object."""
        own = {name: value for section in self.sections() for name, value in _flat_fields(section).items()}
        return own | dict(self.training)

    def sections(self) -> tuple[Any, ...]:
        return (self, *(getattr(self, name) for name in SECTIONS))


SECTIONS: dict[str, type] = {
    "model": ModelConfig,
    "data": DataConfig,
    "adapter": AdapterConfig,
    "step": StepConfig,
    "precision": PrecisionConfig,
    "preference": PreferenceConfig,
    "evaluation": EvaluationConfig,
}

# Firefly's own choices for TrainingArguments; the user's file overrides them.
TRAINING_DEFAULTS: dict[str, Any] = {"logging_steps": 10, "report_to": "tensorboard", "optim": "adamw_torch_fused"}

# The least values of TrainingArguments that transformers and torch would only refuse with a traceback.
TRAINING_MINIMUM: dict[str, float] = {
    "learning_rate": 0,
    "weight_decay": 0,
    "max_grad_norm": 0,
    "num_train_epochs": 0,
    "warmup_steps": 0,
    "seed": 0,
    "data_seed": 0,
    "dataloader_num_workers": 0,
    "per_device_eval_batch_size": 1,
}

TRAINING_BELOW: dict[str, int] = {"seed": 2**32}  # what numpy's generator takes

REQUIRED = ("output_dir", "model_name_or_path", "train_file")


def load_config(
    source: str | os.PathLike[str] | Mapping[str, Any],
    overrides: Mapping[str, Any] | None = None,
    required: tuple[str, ...] = REQUIRED,
    to_train: bool = True,
) -> Config:
    """Read a configuration file (or a mapping), apply overrides, check everything, return a frozen `Config`.

    Args:
        required: keys that must be there; a command that does not train needs fewer.
        to_train: refuse what this version cannot train yet.

    Raises:
        UsageError: unreadable file, unknown key, wrong type or value, missing required key, or a feature that
            this version does not have.
    """
    if to_train:
        take_notices()  # a run that was refused leaves its own behind
    file = dict(source) if isinstance(source, Mapping) else read_config_file(Path(source))
    overrides = dict(overrides or {})
    known = known_keys()
    # Each in today's spelling first: an override wins under whichever name the file has the key.
    values = legacy.translate(file, known, notice) | legacy.translate(overrides, known, notice)
    for name in values:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
            raise UsageError(
                "config.unknown_key",
                "unknown key {key!r}; did you mean {near!r}? Remove or correct it.",
                key=name,
                near=near[0] if near else "output_dir",
            )
    missing = [name for name in required if not values.get(name)]
    if missing:
        raise UsageError(
            "config.missing_key",
            "required: {key}. Set it in the configuration or as --key value.",
            key=", ".join(missing),
        )
    overridden = set(map(legacy.today, overrides))
    given = {name: value for name, value in file.items() if legacy.today(name) not in overridden} | overrides
    config = _build(values, given)
    if to_train:
        refuse_what_is_not_done(config)
        check_preference(config)
        note_unused(config, values)
    return config


def read_config_file(path: Path) -> dict[str, Any]:
    """Read one flat JSON or YAML object; duplicate and nested surprises are named with file and line."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UsageError("config.no_file", "configuration file {path} does not exist.", path=path) from None
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(
            "config.unreadable", "cannot read configuration {path}: {problem}.", path=path, problem=error
        ) from None
    parse = _parse_yaml if path.suffix.lower() in (".yaml", ".yml") else _parse_json
    try:
        return _checked_object(path, parse(path, text))
    except RecursionError:
        raise UsageError(
            "config.unreadable", "cannot read configuration {path}: {problem}.", path=path, problem="nested too deeply"
        ) from None
    except ValueError as error:  # a number of thousands of digits, a date that is none
        raise UsageError(
            "config.unreadable", "cannot read configuration {path}: {problem}.", path=path, problem=error
        ) from None


def _parse_json(path: Path, text: str) -> Any:
    def build(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for name, value in pairs:
            if name in result:
                places = [match.start() for match in re.finditer(re.escape(json.dumps(name)) + r"\s*:", text)]
                line = text.count("\n", 0, places[-1] if places else 0) + 1
                raise UsageError(
                    "config.duplicate_key",
                    "{path}:{line}: duplicate key {key!r}. Keep one.",
                    path=path,
                    line=line,
                    key=name,
                )
            result[name] = value
        return result

    try:
        return json.loads(text, object_pairs_hook=build)
    except json.JSONDecodeError as error:
        raise UsageError(
            "config.bad_json",
            "{path}:{line}: the configuration is not valid: {problem}. Correct the syntax near this line.",
            path=path,
            line=error.lineno,
            problem=error.msg,
        ) from None


def _parse_yaml(path: Path, text: str) -> Any:
    import yaml

    class Loader(yaml.SafeLoader):
        """YAML's own loader lets the last of two equal keys win in silence."""

        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            names: set[str] = set()
            for name_node, _ in node.value:
                name = str(name_node.value)
                if name in names:
                    raise UsageError(
                        "config.duplicate_key",
                        "{path}:{line}: duplicate key {key!r}. Keep one.",
                        path=path,
                        line=name_node.start_mark.line + 1,
                        key=name,
                    )
                names.add(name)
            return super().construct_mapping(node, deep)

    # A date stays the text that it is.
    Loader.add_constructor("tag:yaml.org,2002:timestamp", yaml.SafeLoader.construct_scalar)
    try:
        return yaml.load(text, Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = mark.line + 1 if mark else 1
        problem = getattr(error, "problem", None) or error
        raise UsageError(
            "config.bad_json",
            "{path}:{line}: the configuration is not valid: {problem}. Correct the syntax near this line.",
            path=path,
            line=line,
            problem=problem,
        ) from None


def _checked_object(path: Path, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict) or not all(isinstance(name, str) for name in value):
        raise UsageError(
            "config.not_an_object", '{path} must hold one object of keys and values: {{"key": value, …}}.', path=path
        )
    return value


def parse_overrides(arguments: list[str]) -> dict[str, Any]:
    """Turn `--key value`, `--key=value` and bare `--flag` into a mapping; what is plainly JSON is read as JSON."""
    overrides: dict[str, Any] = {}
    position = 0
    while position < len(arguments):
        argument = arguments[position]
        if not argument.startswith("--") or argument == "--":
            raise UsageError(
                "cli.unexpected_argument",
                "unexpected argument {argument!r}; options are written --key value.",
                argument=argument,
            )
        name, equals, value = argument[2:].partition("=")
        position += 1
        if not equals:
            if position < len(arguments) and not arguments[position].startswith("--"):
                value = arguments[position]
                position += 1
            else:
                value = "true"
        overrides[name.replace("-", "_")] = _parse_value(value)
    return overrides


def _parse_value(text: str) -> Any:
    if text in ("True", "False", "None"):
        return {"True": True, "False": False, "None": None}[text]
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return text
    # `--model_revision 1.10` or `--output_dir 1e3` may be a name: a number stays text unless it reads back the same.
    # The key's type decides later.
    return text if type(value) in (int, float) and str(value) != text else value


def own_fields() -> dict[str, tuple[str | None, dataclasses.Field[Any]]]:
    """Flat key → (section name or None for `Config` itself, dataclass field)."""
    result: dict[str, tuple[str | None, dataclasses.Field[Any]]] = {}
    for section, cls in ((None, Config), *SECTIONS.items()):
        for spec in dataclasses.fields(cls):
            if "key" in spec.metadata:
                result[spec.metadata["key"]] = (section, spec)
    return result


def training_fields() -> dict[str, str]:
    """Fields of transformers' TrainingArguments with their annotations as text."""
    from transformers import TrainingArguments

    return {spec.name: str(spec.type) for spec in dataclasses.fields(TrainingArguments) if spec.init}


def known_keys() -> list[str]:
    return sorted(own_fields().keys() | training_fields().keys())


def _build(values: Mapping[str, Any], given: Mapping[str, Any]) -> Config:
    own = own_fields()
    sections: dict[str | None, dict[str, Any]] = {None: {}} | {name: {} for name in SECTIONS}
    training = dict(TRAINING_DEFAULTS)
    annotations = training_fields()
    for name, value in values.items():
        if name in own:
            section, spec = own[name]
            sections[section][spec.name] = _checked(name, value, spec)
        else:
            training[name] = _checked_training(name, value, annotations[name])
    parts = {name: cls(**sections[name]) for name, cls in SECTIONS.items()}
    _check_together(parts["step"], parts["precision"], parts["data"], parts["evaluation"], training)
    _check_names(parts["model"], parts["adapter"])
    # Held-out data is there to be used: without a strategy it is evaluated every `eval_steps`, else each epoch.
    if has_held_out(parts["data"]) and "eval_strategy" not in training:
        training["eval_strategy"] = "steps" if training.get("eval_steps") else "epoch"
    if parts["evaluation"].patience is not None:
        stop_early(training)
    return Config(
        **sections[None],
        **parts,
        training=MappingProxyType(training),
        given=MappingProxyType(dict(given)),
    )


def has_held_out(data: DataConfig) -> bool:
    """Whether a run evaluates on examples that it does not train."""
    return bool(data.eval_file) or data.eval_ratio > 0


def stop_early(training: dict[str, Any]) -> None:
    """Early stopping keeps the best checkpoint: save when evaluating, by loss unless another metric is named."""
    if training.get("eval_strategy") == "no":
        raise UsageError(
            "config.no_evaluation",
            'early_stopping_patience watches the evaluation, but eval_strategy is "no"; remove eval_strategy.',
        )
    training.setdefault("load_best_model_at_end", True)
    if training.get("metric_for_best_model") is None:
        training["metric_for_best_model"] = "loss"
    if "save_strategy" not in training:
        training["save_strategy"] = training.get("eval_strategy")
        if training["save_strategy"] == "epoch" and "save_steps" in training:
            notice(
                "key.no_effect", "{key} has no effect with {setting}.", key="save_steps", setting="eval_strategy epoch"
            )
    if training["save_strategy"] == "no" and training["load_best_model_at_end"]:
        raise UsageError(
            "config.no_saving",
            'early_stopping_patience keeps the best checkpoint, but save_strategy is "no"; remove save_strategy.',
        )
    if training["save_strategy"] == training.get("eval_strategy") == "steps":
        training.setdefault("save_steps", training.get("eval_steps") or training["logging_steps"])


def _check_together(
    step: StepConfig,
    precision: PrecisionConfig,
    data: DataConfig,
    evaluation: EvaluationConfig,
    training: Mapping[str, Any],
) -> None:
    if isinstance(step.tokens_per_microbatch, str) and step.tokens_per_microbatch != "auto":
        raise bad_type("tokens_per_microbatch", step.tokens_per_microbatch, 'integer or "auto"')
    if precision.fp16 and precision.bf16:
        raise UsageError("config.two_precisions", "fp16 and bf16 are both true; set one of them to false.")
    if data.eval_file and data.eval_ratio:
        raise UsageError("config.two_held_outs", "eval_file and eval_ratio are both set; keep one of them.")
    for name in ("eval_strategy", "eval_on_start", "load_best_model_at_end"):
        if not has_held_out(data) and training.get(name) not in (None, "no", False):
            raise UsageError(
                "config.no_eval_file",
                "{key} = {value} needs held-out data: set eval_file or eval_ratio, or remove {key}.",
                key=name,
                value=json.dumps(training[name], default=str),
            )
    if evaluation.patience is not None and not has_held_out(data):
        raise UsageError(
            "config.no_eval_file",
            "{key} = {value} needs held-out data: set eval_file or eval_ratio, or remove {key}.",
            key="early_stopping_patience",
            value=evaluation.patience,
        )


def _check_names(model: ModelConfig, adapter: AdapterConfig) -> None:
    if adapter.mode == "full" and adapter.name_or_path:
        raise UsageError(
            "adapter.with_full",
            "adapter_name_or_path = {value} needs train_mode lora or qlora; full trains a model. Merge the adapter "
            "first: firefly merge.",
            value=adapter.name_or_path,
        )
    for name, value in (
        ("lora_target", adapter.target),
        ("modules_to_save", adapter.modules_to_save or ()),
        ("add_tokens", model.add_tokens or ()),
    ):
        texts = names_in(value)
        if any(not isinstance(text, str) or not text for text in texts) or (name == "lora_target" and not texts):
            raise bad_type(name, json.dumps(value), Phrase("a list of names"))


def names_in(value: str | Sequence[str]) -> list[str]:
    """The names of a list, or of a text that separates them by commas."""
    return [name for part in value.split(",") if (name := part.strip())] if isinstance(value, str) else list(value)


def _checked(name: str, value: Any, spec: dataclasses.Field[Any]) -> Any:
    """Return `value` as the type of its field, or raise UsageError naming key, value and what is expected."""
    kind, choices, minimum = spec.metadata["kind"], spec.metadata["choices"], spec.metadata["minimum"]
    if value is None or (value == "" and spec.default is None):
        if spec.metadata["nullable"]:
            return None
        raise bad_type(name, json.dumps(value), _kind_name(kind))
    if name == "template_name" and value == "":
        return spec.default  # upstream writes "" for "not said"
    value = convert(name, value, kind)
    if isinstance(value, list):
        value = tuple(value)
    if choices and value not in choices:
        shown = ", ".join(json.dumps(choice) for choice in choices)
        raise UsageError(
            "config.bad_choice",
            "{key} = {value} is not valid; choose one of: {choices}.",
            key=name,
            value=json.dumps(value),
            choices=shown,
        )
    if not isinstance(value, (str, bool)):
        _check_range(name, value, minimum, spec.metadata["below"])
    return value


def convert(name: str, value: Any, kind: type | tuple[type, ...]) -> Any:
    """Convert a JSON, YAML or command-line value to the one of `kind` that it plainly is (YAML reads 1e-4 as text)."""
    kinds = kind if isinstance(kind, tuple) else (kind,)
    for candidate in kinds:
        if candidate in (int, float):
            number = _number(value, candidate)
            if number is not None:
                return number
            continue
        if type(value) is candidate:
            return value
        if isinstance(value, str) and candidate is bool and value.lower() in ("true", "false"):
            return value.lower() == "true"
        if candidate is str and isinstance(value, os.PathLike):
            return os.fspath(value)
        # A path or name made of digits comes off the command line as a number.
        if candidate is str and kinds == (str,) and type(value) in (int, float):
            return str(value)
    raise bad_type(name, json.dumps(value, default=str), _kind_name(kind))


def bad_type(key: str, value: object, expected: object) -> UsageError:
    return UsageError(
        "config.bad_type",
        "{key} = {value} is not valid: expected {expected}.",
        key=key,
        value=value,
        expected=expected,
    )


def _check_range(key: str, value: Any, minimum: float | None, below: float | None) -> None:
    if minimum is not None and not value >= minimum:
        raise UsageError(
            "config.too_small",
            "{key} = {value} is too small; the least is {minimum}.",
            key=key,
            value=value,
            minimum=minimum,
        )
    if below is not None and not value < below:
        raise UsageError(
            "config.bad_range",
            "{key} = {value} is not valid; it must be at least {minimum} and less than {below}.",
            key=key,
            value=value,
            minimum=minimum or 0,
            below=below,
        )


def _number(value: Any, kind: type) -> int | float | None:
    """`value` as an int or a float if it plainly is one; None if it is not, and for NaN, which no key means."""
    if type(value) is int and kind is int:
        return value
    if type(value) not in (int, float, str):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    if kind is int:
        return int(number) if number.is_integer() else None
    return None if math.isnan(number) else number


def _checked_training(name: str, value: Any, annotation: str) -> Any:
    """Light conversion by TrainingArguments' annotation; its own checks follow when it is built."""
    if value is None:
        if "None" in annotation:
            return None
        raise bad_type(name, "null", Phrase("a value"))
    if value is False and "Strategy" in annotation:
        return "no"  # what YAML makes of `eval_strategy: no`
    for word, kind in (("float", float), ("int", int), ("bool", bool)):
        if annotation in (f"<class '{word}'>", f"{word} | None"):
            value = convert(name, value, kind)
    if annotation in ("<class 'str'>", "str | None") and type(value) in (int, float):
        value = str(value)  # `--run_name 7`
    _check_range(name, value, TRAINING_MINIMUM.get(name), TRAINING_BELOW.get(name))
    if name == "lr_scheduler_kwargs" and isinstance(value, Mapping):  # YAML reads 1e-6 as text
        numbers = {part: _number(text, float) for part, text in value.items() if isinstance(text, str)}
        value = {**value, **{part: number for part, number in numbers.items() if number is not None}}
    return value


def _kind_name(kind: type | tuple[type, ...]) -> Phrase:
    first, *others = kind if isinstance(kind, tuple) else (kind,)
    name = KINDS[first]
    for other in others:
        name = Phrase("{first} or {second}", first=name, second=KINDS[other])
    return name


KINDS = {
    str: Phrase("text"),
    int: Phrase("integer"),
    float: Phrase("number"),
    bool: Phrase("true or false"),
    list: Phrase("list"),
}
"""What the types of values are called."""


def _flat_fields(section: Any) -> dict[str, Any]:
    return {
        spec.metadata["key"]: getattr(section, spec.name)
        for spec in dataclasses.fields(section)
        if "key" in spec.metadata
    }


IN_BACKWARD = re.compile("(ada)?lomo|.*_layerwise")
"""Optimizers that move weights within the backward pass of each microbatch."""


def refuse_what_is_not_done(config: Config) -> None:
    """Exit 2 for what Firefly does not do, by name: nothing is accepted and then ignored."""
    flat = config.flat()
    for name, treatment in arguments.FIELDS.items():
        if treatment.how == "refused" and arguments.asks_for_something(name, flat.get(name)):
            text = arguments.REFUSALS[name].text
            raise UsageError(f"refused.{name}", text, key=name, value=json.dumps(flat[name], default=str))
    if IN_BACKWARD.fullmatch(str(flat.get("optim"))):
        raise UsageError(
            "refused.optim",
            "{key} = {value} is not supported: it moves the weights within the backward pass of each microbatch, "
            "where a step here is clipped, looked at and applied whole. Choose another optimizer.",
            key="optim",
            value=json.dumps(flat["optim"]),
        )
    if "tpu_metrics_debug" in (flat.get("debug") or ""):
        raise UsageError(
            "refused.debug",
            "{key} = {value} is not supported: there are no TPUs here. Remove it.",
            key="debug",
            value=json.dumps(flat["debug"]),
        )


PREFERENCE_KEYS = (*(spec.metadata["key"] for spec in dataclasses.fields(PreferenceConfig)), "max_prompt_length")
KTO_KEYS = ("desirable_weight", "undesirable_weight")
CHAT_KEYS = ("template_name", "template_date", "on_system", "thinking", "train_on")


def check_preference(config: Config) -> None:
    """A preference loss needs a beta above 0; label smoothing where it means nothing is said."""
    settings = config.preference
    if config.task_type in ("dpo", "kto") and not settings.beta:
        raise UsageError(
            "config.beta_zero",
            "beta = 0 leaves {setting} without a signal; set it above 0.",
            setting="task_type kto" if config.task_type == "kto" else f"preference_loss {settings.loss}",
        )
    if config.task_type != "dpo":
        return
    if settings.label_smoothing and settings.loss not in SMOOTHED_LOSSES:
        notice(
            "preference.no_smoothing",
            "label_smoothing has no effect with preference_loss {loss}; robust, simpo and cpo use it.",
            loss=settings.loss,
        )


# Keys that a setting leaves without effect: (setting, its value, keys).
UNUSED: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("task_type", "sft", (*PREFERENCE_KEYS, "document_attention")),
    ("task_type", "pretrain", (*PREFERENCE_KEYS, *CHAT_KEYS, "on_too_long")),
    ("task_type", "dpo", ("document_attention", "train_on", "center_rewards_coefficient", *KTO_KEYS)),
    (
        "task_type",
        "reward",
        (
            *("document_attention", "train_on"),
            *(name for name in PREFERENCE_KEYS if name not in ("max_prompt_length", "center_rewards_coefficient")),
        ),
    ),
    (
        "task_type",
        "kto",
        ("document_attention", "train_on", *(name for name in PREFERENCE_KEYS if name not in ("beta", *KTO_KEYS))),
    ),
    (
        "train_mode",
        "full",
        (
            *("lora_rank", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "lora_target", "modules_to_save"),
            "nf4_cache",
        ),
    ),
    ("train_mode", "lora", ("nf4_cache",)),
)

# TrainingArguments of a tracker of transformers': (tracker, keys).
TRACKER_KEYS: dict[str, tuple[str, ...]] = {
    "trackio": ("project", "trackio_space_id", "trackio_bucket_id", "trackio_static_space_id", "hub_private_repo"),
}

# Keys of preference training that mean something under some of its losses alone.
LOSSES_OF_KEY: dict[str, tuple[str, ...]] = {
    "simpo_gamma": ("simpo",),
    "cpo_alpha": ("cpo",),
    "precompute_reference": tuple(name for name in PREFERENCE_LOSS_NAMES if name not in ("simpo", "orpo", "cpo")),
}


def note_unused(config: Config, values: Mapping[str, Any]) -> None:
    """Say which of the given keys do nothing in this run."""
    flat = config.flat()
    own = own_fields()
    for name in values:
        treatment = arguments.FIELDS.get(name)
        if treatment is None and name not in own:
            notice(
                "key.new",
                "{key} is new in the transformers that is installed: it is handed on, and this version of Firefly may "
                "not honour it.",
                key=name,
            )
        elif treatment and treatment.how == "without effect" and arguments.asks_for_something(name, flat[name]):
            notice("key.unused", "{key} has no effect: Firefly decides it by itself or has no use for it.", key=name)
    for tracker, names in TRACKER_KEYS.items():
        for name in names if tracker not in str(flat["report_to"]) else ():
            if name in values and arguments.asks_for_something(name, flat[name]):
                notice(
                    "key.no_effect",
                    "{key} has no effect with {setting}.",
                    key=name,
                    setting=f"report_to without {tracker}",
                )
    if values.get("optim_target_modules") and not re.match("galore|apollo", str(flat["optim"])):
        notice(
            "key.no_effect",
            "{key} has no effect with {setting}.",
            key="optim_target_modules",
            setting=f"optim {flat['optim']}",
        )
    if config.evaluation.patience is None and config.evaluation.threshold:
        notice(
            "key.no_effect",
            "{key} has no effect with {setting}.",
            key="early_stopping_threshold",
            setting="early_stopping_patience null",
        )
    if config.task_type == "dpo":
        loss = config.preference.loss
        for name, losses in LOSSES_OF_KEY.items():
            if values.get(name) and loss not in losses:
                notice(
                    "key.no_effect", "{key} has no effect with {setting}.", key=name, setting=f"preference_loss {loss}"
                )
    for setting, value, names in UNUSED:
        for name in names:
            if flat[setting] == value and name in values:
                notice("key.no_effect", "{key} has no effect with {setting}.", key=name, setting=f"{setting} {value}")
