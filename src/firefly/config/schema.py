"""Firefly's own keys of a run file, in sections of frozen dataclasses.

A key is written once, as a field made with `key`: its type is the field's annotation, beside it stand its default and
its limits, below it its description. What checks a file (`checking`), the JSON schema for editors and the tables of
keys in the documentation are made from these fields.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Literal, TypeAlias, get_args

TaskType: TypeAlias = Literal["pretrain", "sft", "dpo", "kto", "reward"]
TrainMode: TypeAlias = Literal["full", "lora", "qlora"]
PreferenceLoss: TypeAlias = Literal["sigmoid", "hinge", "ipo", "robust", "apo_zero", "apo_down", "simpo", "orpo", "cpo"]

PREFERENCE_LOSS_NAMES: tuple[str, ...] = get_args(PreferenceLoss)
"""The keys of `tasks.preference_losses.PREFERENCE_LOSSES`, which lies above this module."""

SMOOTHED_LOSSES = ("robust", "simpo", "cpo")
"""Those in which `label_smoothing` has a meaning."""

RecordKind: TypeAlias = Literal["document", "conversation", "pair", "labelled"]
"""What a record holds: plain text, messages, two answers to one prompt, messages with a verdict on the last reply."""

RECORDS_OF_TASK: dict[TaskType, RecordKind] = {
    "pretrain": "document",
    "sft": "conversation",
    "dpo": "pair",
    "kto": "labelled",
    "reward": "pair",
}
"""What each task is trained on."""

READ_AS: dict[RecordKind, tuple[RecordKind, ...]] = {
    "document": ("document",),
    "conversation": ("conversation", "labelled"),
    "pair": ("pair",),
    "labelled": ("labelled", "pair"),
}
"""What holds it, too: a good answer is a demonstration, and a pair a good and a bad answer."""


def tasks_on(*kinds: RecordKind) -> tuple[TaskType, ...]:
    """The tasks that are trained on records of these kinds."""
    return tuple(task for task, kind in RECORDS_OF_TASK.items() if kind in kinds)


CHATS = tasks_on("conversation", "pair", "labelled")
PAIRS = tasks_on("pair")
ADAPTED: tuple[TrainMode, ...] = ("lora", "qlora")


def key(
    default: Any,
    name: str | None = None,
    tasks: Sequence[TaskType] = (),
    modes: Sequence[TrainMode] = (),
    ge: float | None = None,
    lt: float | None = None,
    kind: Any = None,
) -> Any:
    """A field that a flat run file sets. The text below it is its description; the Chinese is in locale/zh.json.

    Args:
        name: of the key, where the field has another.
        tasks: those that read the key; none named: the section's `TASKS`, else all.
        modes: the train_mode values under which it is read; none named: all.
        ge: the least value.
        lt: what a value must stay below.
        kind: the type in a file, where it is narrower than the field's.
    """
    only = {"task_type": tasks, "train_mode": modes}
    return field(default=default, metadata={"key": name, "limits": {"ge": ge, "lt": lt}, "kind": kind, "only": only})


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Which model, from where."""

    name_or_path: str = key("", name="model_name_or_path")
    """Folder, hub id, or `smollm2-135m-instruct`."""
    hub: str = key("huggingface", kind=Literal["huggingface", "modelscope"])
    """The hub that names without a folder mean."""
    revision: str | None = key(None, name="model_revision")
    """Branch, tag or commit on the hub."""
    trust_remote_code: bool = key(False)
    """Run code that the model brings along."""
    add_tokens: tuple[str, ...] | None = key(None)
    """A list of special tokens that the tokenizer may lack; their embeddings are trained and saved."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which records, and how they become tokens."""

    train_file: str | tuple[Any, ...] = key("")
    """File, folder, glob, dataset id, or a list of these: see docs/data.md."""
    eval_file: str | tuple[Any, ...] | None = key(None)
    """Held-out rows; evaluated each epoch, or every `eval_steps` if set."""
    eval_ratio: float = key(0.0, ge=0, lt=1)
    """Share of the training rows to hold out instead."""
    data_format: str = key("auto")
    """A format's name, where detection finds none or several."""
    text_documents: Literal["line", "file"] = key("line")
    """What a document of a .txt file is."""
    template_name: str = key("auto", tasks=CHATS)
    """The tokenizer's own (`auto`), a name, or a .jinja file: see docs/templates.md."""
    template_date: str | None = key(None, tasks=CHATS)
    """YYYY-MM-DD, for templates that print a date."""
    on_system: Literal["merge", "error"] = key("merge", tasks=CHATS)
    """A system prompt that the template has no place for joins the first question, or is malformed."""
    thinking: Literal["keep", "strip"] = key("keep", tasks=CHATS)
    """`strip` leaves out the reasoning of replies."""
    max_seq_length: int = key(1024, ge=2)
    """Tokens of the longest example; of a block in pretraining; of prompt + answer in DPO, KTO and reward models."""
    max_prompt_length: int | None = key(512, tasks=PAIRS, ge=1)
    """Tokens of the longest prompt; null: no limit."""
    document_attention: Literal["isolated", "joined"] = key("isolated", tasks=("pretrain",))
    """`joined`: documents of a block see those before them."""
    on_too_long: Literal["cut_turns", "cut", "drop", "error"] = key("cut_turns", tasks=CHATS)
    """An example that is too long keeps the whole turns that fit, is cut, is left out, or stops the run."""
    train_on: Literal["all", "last"] = key("all", tasks=("sft",))
    """`last`: only the last reply."""
    allow_special_in_content: bool = key(False)
    """Read special tokens in texts as special tokens."""
    max_malformed_rows: int = key(0, ge=0)
    """More malformed rows stop the run."""
    max_lost_share: float = key(0.01, ge=0)
    """A larger share of rows lost otherwise stops the run (one row is always allowed)."""
    shuffle: bool = key(True)
    """false: the order of the file."""
    tokenize_num_workers: int = key(10, ge=1)
    """Threads that tokenize, at most as many as there are cores; `RAYON_NUM_THREADS` overrules it."""


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """What is updated: all weights (full), or low-rank adapters on frozen 16-bit (lora) or 4-bit (qlora) weights."""

    mode: TrainMode = key("qlora", name="train_mode")
    """All weights, or an adapter on frozen 16-bit or 4-bit weights."""
    rank: int = key(64, name="lora_rank", modes=ADAPTED, ge=1)
    """Rank of the adapter, on every linear layer and expert but the output head and MoE routers."""
    alpha: float = key(16, name="lora_alpha", modes=ADAPTED, ge=0)
    """The adapter's scale: alpha / rank."""
    dropout: float = key(0.05, name="lora_dropout", modes=ADAPTED, ge=0, lt=1)
    """Dropout before the adapter; 0 in DPO, KTO and reward models."""
    use_rslora: bool = key(False, modes=ADAPTED)
    """The scale is alpha / √rank (rsLoRA)."""
    use_dora: bool = key(False, modes=ADAPTED)
    """Directions and lengths of weights are trained apart (DoRA); slower."""
    target: str | tuple[str, ...] = key("all-linear", name="lora_target", modes=ADAPTED)
    """Every linear layer (`all-linear`), names of layers (a list, or separated by commas), or one regular
    expression for whole paths."""
    modules_to_save: str | tuple[str, ...] | None = key(None, modes=ADAPTED)
    """Names of modules that are trained whole beside the adapter, and saved with it."""
    name_or_path: str | None = key(None, name="adapter_name_or_path")
    """Folder of a LoRA adapter to go on from; rank, alpha and layers are its own: see docs/adapters.md."""
    on_other_base: bool = key(False, name="adapter_on_other_base")
    """Go on from an adapter although its run recorded another base."""


@dataclass(frozen=True, kw_only=True)
class StepConfig:
    """How many examples make an optimizer step, and how many tokens a microbatch may hold."""

    per_device_examples: int = key(8, name="per_device_train_batch_size", ge=1)
    """Times `gradient_accumulation_steps` and ranks: the examples of a step."""
    accumulation: int = key(1, name="gradient_accumulation_steps", ge=1)
    """See `per_device_train_batch_size`."""
    tokens_per_microbatch: int | Literal["auto"] = key("auto", ge=1)
    """Tokens computed at once; never less than the longest example."""
    gradient_checkpointing: bool | Literal["auto"] = key("auto")
    """auto: as few layers recomputed in backward as memory requires, often none."""
    nf4_cache: bool | Literal["auto"] = key("auto", modes=("qlora",))
    """16-bit copies of the 4-bit weights, faster and with the same result; auto: on a GPU, as many as fit beside the
    rest; true: all; false: none."""
    on_nonfinite_loss: Literal["stop", "skip"] = key("stop")
    """A step whose loss or gradients are NaN or infinite changes no weight; stop there, or leave it out."""

    @property
    def examples_per_rank(self) -> int:
        """Examples of one optimizer step for each rank."""
        return self.per_device_examples * self.accumulation


@dataclass(frozen=True, kw_only=True)
class PrecisionConfig:
    """What the user asked for; `models.precision` decides what the hardware gives. None: not said."""

    fp16: bool | None = key(None)
    """Compute in fp16 with loss scaling, or in bf16 where the hardware has it natively."""
    bf16: bool | None = key(None)
    """Compute in bf16; null: where the hardware has it natively, on a CPU by measurement. Not together with `fp16`."""


@dataclass(frozen=True, kw_only=True)
class PreferenceConfig:
    """Keys of training on preferences. Known everywhere, so that a shared file loads."""

    TASKS = ("dpo",)

    loss: PreferenceLoss = key("sigmoid", name="preference_loss")
    """The loss of a pair: see docs/tasks.md."""
    beta: float = key(0.1, tasks=("dpo", "kto"), ge=0)
    """β of the loss, above 0; the larger, the closer to the reference."""
    label_smoothing: float = key(0.0, ge=0, lt=0.5)
    """How often labels are wrong, for `robust`, `simpo` and `cpo`."""
    rpo_alpha: float = key(0.0, ge=0)
    """Weight of the chosen answers' NLL, added to any loss."""
    simpo_gamma: float = key(0.5, ge=0)
    """Target margin of `simpo`."""
    cpo_alpha: float = key(1.0, ge=0)
    """Weight of the NLL in `cpo`."""
    precompute_reference: bool = key(False)
    """The reference's log-probabilities once, before the first step."""
    desirable_weight: float = key(1.0, tasks=("kto",), ge=0)
    """Weight of the loss of good answers."""
    undesirable_weight: float = key(1.0, tasks=("kto",), ge=0)
    """Weight of the loss of bad answers."""
    center_rewards_coefficient: float = key(0.0, tasks=("reward",), ge=0)
    """Weight of the squared sum of a pair's scores, which keeps them around 0."""


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """What a run compares its result with, and when it stops because its evaluation no longer gets better."""

    compare: bool = key(True)
    """Compare the result with the model before the first step: held-out losses, answers, what was forgotten; false
    switches it off. See docs/compare.md."""
    checkpoint_samples: int = key(0, ge=0)
    """Let the model answer so many held-out prompts (of training rows, where none are held out) before the first step
    and at each checkpoint; samples.jsonl keeps what it says."""
    patience: int | None = key(None, name="early_stopping_patience", ge=1)
    """Stop after so many evaluations in a row without an improvement; keeps the best checkpoint."""
    threshold: float = key(0.0, name="early_stopping_threshold", ge=0)
    """The least improvement that counts."""


class ReadOnly(Mapping[str, Any]):
    """A mapping that nobody changes, and that can be pickled (types.MappingProxyType cannot)."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self._values = dict(values)

    def __getitem__(self, name: str) -> Any:
        return self._values[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __repr__(self) -> str:
        return repr(self._values)


@dataclass(frozen=True, kw_only=True)
class Config:
    """A whole run, resolved from one file and its overrides. Nothing in it changes afterwards."""

    task_type: TaskType = key("sft")
    """What is trained: see docs/tasks.md."""
    output_dir: str = key("")
    """Where the run writes."""
    resume_from_checkpoint: bool | str | None = key(None)
    """true, or the path of a checkpoint."""
    resume_anyway: bool = key(False)
    """Resume although something has changed since; a note says what."""
    webhook: str | None = key(None)
    """URL that is sent a notice (POST, JSON) when the run ends, fails or dies: see docs/runs.md."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    step: StepConfig = field(default_factory=StepConfig)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    preference: PreferenceConfig = field(default_factory=PreferenceConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    training: Mapping[str, Any] = field(default_factory=lambda: ReadOnly({}))
    """Keyword arguments for `TrainingArguments`, without those that Firefly consumes itself."""
    given: Mapping[str, Any] = field(default_factory=lambda: ReadOnly({}))
    """The file and its overrides as the user wrote them (saved as train_args.json)."""

    def flat(self) -> dict[str, Any]:
        """Every resolved key with its value, as one flat JSON-able object."""
        places = own_fields().items()
        own = {name: getattr(getattr(self, at) if at else self, spec.name) for name, (at, spec) in places}
        return own | dict(self.training)


SECTIONS: dict[str, type[Any]] = {
    "model": ModelConfig,
    "data": DataConfig,
    "adapter": AdapterConfig,
    "step": StepConfig,
    "precision": PrecisionConfig,
    "preference": PreferenceConfig,
    "evaluation": EvaluationConfig,
}


@cache
def own_fields() -> dict[str, tuple[str | None, dataclasses.Field[Any]]]:
    """Flat key → (section name or None for `Config` itself, dataclass field)."""
    return {
        spec.metadata["key"] or spec.name: (section, spec)
        for section, cls in ((None, Config), *SECTIONS.items())
        for spec in dataclasses.fields(cls)
        if "key" in spec.metadata
    }


def only_with(name: str) -> dict[str, tuple[str, ...]]:
    """The settings under which one of our keys is read, each with its values; {} for a key that always counts."""
    section, spec = own_fields()[name]
    only = dict(spec.metadata["only"])
    only["task_type"] = only["task_type"] or getattr(SECTIONS.get(section or ""), "TASKS", ())
    return {setting: tuple(values) for setting, values in only.items() if values}


UNUSED: tuple[tuple[str, str, tuple[str, ...]], ...] = tuple(
    (setting, value, tuple(name for name in own_fields() if value not in only_with(name).get(setting, (value,))))
    for setting, values in (("task_type", get_args(TaskType)), ("train_mode", get_args(TrainMode)))
    for value in values
)
"""Keys that a setting leaves without effect: (setting, its value, keys)."""


def names_in(value: str | Sequence[str]) -> list[str]:
    """The names of a list, or of a text that separates them by commas."""
    return [name for part in value.split(",") if (name := part.strip())] if isinstance(value, str) else list(value)
