"""Configuration: one flat file (JSON or YAML) becomes one frozen, checked `Config`."""

from firefly.config.checking import bad_choice, bad_type, missing_key
from firefly.config.loading import load_config, parse_overrides, read_config_file
from firefly.config.schema import (
    PREFERENCE_LOSS_NAMES,
    READ_AS,
    RECORDS_OF_TASK,
    SMOOTHED_LOSSES,
    UNUSED,
    AdapterConfig,
    Config,
    DataConfig,
    EvaluationConfig,
    ModelConfig,
    PrecisionConfig,
    PreferenceConfig,
    RecordKind,
    StepConfig,
    TaskType,
    names_in,
    own_fields,
    tasks_on,
)
from firefly.config.training_arguments import TRAINING_DEFAULTS
