"""Who looks on while a run trains, and what they ask of it: the flow of logs, evaluations and checkpoints,
metrics.jsonl, the trackers, early stopping, the progress line.

They are transformers' callbacks, whose trackers are taken as they are.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import EarlyStoppingCallback, TrainerCallback, TrainingArguments
from transformers.integrations.integration_utils import TensorBoardCallback, get_reporting_integration_callbacks
from transformers.trainer_callback import DefaultFlowCallback, ExportableState
from transformers.utils import logging as transformers_logging

from firefly import ranks
from firefly.config import EvaluationConfig
from firefly.runs.metrics import Guarded, ProgressLine, RunRecorder
from firefly.runs.progress import Progress
from firefly.runs.trackers import ManifestReporter, never_ask

ANSWERED = {
    "on_train_begin": ("should_training_stop",),
    "on_epoch_begin": ("should_epoch_stop",),
    "on_step_begin": ("should_log", "should_evaluate", "should_save"),
    "on_evaluate": ("should_evaluate",),
    "on_save": ("should_save",),
    "on_log": ("should_log",),
}
"""What is not asked for any more when an event is told."""


class Observers:
    """Callbacks, told one after another, each of what the ones before it asked for."""

    def __init__(
        self, callbacks: Sequence[TrainerCallback], args: TrainingArguments, progress: Progress, **told: Any
    ) -> None:
        """`told`: what every callback gets with every event: model, processing_class, optimizer, …"""
        self.callbacks = list(callbacks)
        self.args = args
        self.progress = progress
        self.told = told
        # Most callbacks wait for few events, and a step has four.
        self.listening = {
            event: [getattr(one, event) for one in self.callbacks if _listens(one, event)]
            for event in dir(TrainerCallback)
            if event.startswith("on_")
        }
        self.tell("on_init_end")

    def tell(self, event: str, **more: Any) -> None:
        progress = self.progress
        for request in ANSWERED.get(event, ()):
            setattr(progress.control, request, False)
        for listen in self.listening[event]:
            asked = listen(self.args, progress.state, progress.control, **self.told, **more)
            if asked is not None:
                progress.control = asked

    def export_states(self) -> None:
        """Put what is taken up again with a checkpoint into the state."""
        kept: Any = self.progress.state.stateful_callbacks  # a dict, whatever its annotation says
        for callback in (*self.callbacks, self.progress.control):
            if isinstance(callback, ExportableState):
                kept[type(callback).__name__] = callback.state()

    def take_up_states(self) -> None:
        """Give callbacks back the attributes that a checkpoint kept of them; their settings are today's."""
        kept: Any = self.progress.state.stateful_callbacks
        for callback in self.callbacks:
            stored = kept.get(type(callback).__name__) if isinstance(callback, ExportableState) else None
            for name, value in (stored or {}).get("attributes", {}).items():
                setattr(callback, name, value)


def _listens(callback: TrainerCallback, event: str) -> bool:
    inner = callback.callback if isinstance(callback, Guarded) else callback
    return getattr(type(inner), event, None) is not getattr(TrainerCallback, event)


def make_observers(
    args: TrainingArguments, evaluation: EvaluationConfig, recorder: RunRecorder, folder: Path
) -> list[TrainerCallback]:
    """The callbacks of a run, in the order in which they are told."""
    transformers_logging.set_verbosity_error()
    never_ask(list(args.report_to or ()))
    trackers = [
        kind() if isinstance(kind, type) else kind for kind in get_reporting_integration_callbacks(args.report_to)
    ]
    boards = [one for one in trackers if isinstance(one, TensorBoardCallback)]
    # The recorder adds its measurements to each log, so it comes behind the flow of control and before the trackers.
    found: list[TrainerCallback] = [DefaultFlowCallback(), recorder, *(Guarded(one, recorder) for one in trackers)]
    if evaluation.patience is not None:
        found.append(EarlyStoppingCallback(evaluation.patience, evaluation.threshold))
    found.append(Guarded(ManifestReporter(folder, boards), recorder))
    if ranks.is_first():
        found.append(ProgressLine(show_bar=not args.disable_tqdm and sys.stderr.isatty()))
    return found
