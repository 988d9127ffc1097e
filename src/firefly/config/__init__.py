"""Configuration: one flat file (JSON or YAML) becomes one frozen, checked `Config`."""

from firefly.config.arguments import TRAINING_DEFAULTS
from firefly.config.loading import load_config, parse_overrides, read_config_file
from firefly.config.schema import (
    PREFERENCE_LOSS_NAMES,
    SMOOTHED_LOSSES,
    UNUSED,
    AdapterConfig,
    Config,
    DataConfig,
    EvaluationConfig,
    ModelConfig,
    PrecisionConfig,
    PreferenceConfig,
    StepConfig,
    TaskType,
    names_in,
    own_fields,
)
