"""What is bound, proved or refused before any weights are loaded: faults found here are cheap."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from firefly import ranks
from firefly.config import Config, ModelConfig, bad_choice
from firefly.console import notice
from firefly.data.certificate import Certificate, certify
from firefly.data.dataset import Split
from firefly.data.encoding import Encoder
from firefly.data.templates import bind_template, plain_template
from firefly.errors import UsageError
from firefly.models.positions import positions_for
from firefly.runs.checkpoints import missing_files, newest_complete, stored_plan


def refuse_own_source(config: Config, output_dir: Path) -> None:
    """A run must not write over the model or the adapter that it starts from."""
    sources = {"model_name_or_path": config.model.name_or_path, "adapter_name_or_path": config.adapter.name_or_path}
    for key, source in sources.items():
        if not source:
            continue
        place, output = Path(source).expanduser().resolve(), output_dir.resolve()
        if place == output or (place.parent == output and place.name.startswith("checkpoint-")):
            raise UsageError(
                "config.output_is_source",
                "{key} is output_dir, {path}, or one of its checkpoints: the run would overwrite what it starts from. "
                "Choose another output_dir.",
                key=key,
                path=output_dir,
            )


def make_output_dir(path: Path) -> None:
    """Create the output folder, and find out now rather than at the first checkpoint that it cannot be written."""
    if not ranks.is_first():
        return
    try:
        str(path).encode()  # tokenizers write to no other name, and would say so after the training
        path.mkdir(parents=True, exist_ok=True)
        probe = path / ".firefly-write-test"
        probe.touch()
        probe.unlink()
    except UnicodeEncodeError as error:
        raise UsageError(
            "cli.unencodable",
            "{name}: the encoding {encoding} has no such file name. Use a UTF-8 locale, set PYTHONUTF8=1, or give the "
            "file or folder another name.",
            name=path,
            encoding=error.encoding,
        ) from None
    except OSError as error:
        raise UsageError(
            "config.output_dir",
            "output_dir = {path} cannot be written: {problem}. Choose another folder.",
            path=path,
            problem=error.strerror or error,
        ) from None


def on_its_first_day(config: Config, output_dir: Path) -> Config:
    """A resumed run keeps the date that its template printed when it began, unless one is set."""
    request = config.resume_from_checkpoint
    if not request or config.data.template_date:
        return config
    checkpoint = Path(request).expanduser() if isinstance(request, str) else newest_complete(output_dir)
    if checkpoint is None or missing_files(checkpoint):
        return config
    date = stored_plan(checkpoint)["prepared"].get("date")
    return replace(config, data=replace(config.data, template_date=date)) if date else config


def bind_encoder(config: Config, tokenizer: Any, chats: bool) -> Encoder:
    """The template of the configuration on this tokenizer; the tokenizer carries it from here on, and saves it.

    Args:
        chats: whether rows are rendered as chats. Pretraining renders nothing: the tokenizer keeps the template it came
            with, if any.
    """
    data = config.data
    if not chats:
        return Encoder(tokenizer, plain_template(), data.allow_special_in_content)
    template = bind_template(
        data.template_name, tokenizer, on_system=data.on_system, thinking=data.thinking, date=data.template_date
    )
    if template.system_role != "rendered" and data.on_system == "merge":
        notice(
            "template.merges_system",
            "the chat template {name} has no system role; a system prompt is put in front of the first user turn "
            "(on_system: error refuses instead).",
            name=template.name,
        )
    tokenizer.chat_template = template.text
    return Encoder(tokenizer, template, config.data.allow_special_in_content)


def check_positions(model: ModelConfig, data: Split) -> None:
    """Refuse texts that the model has no positions for; a notice for those longer than it was trained on.

    Raises:
        UsageError: a text to train on or to evaluate is longer than the model's table of positions.
    """
    kept = [examples for examples in (data.train, data.held_out) if examples is not None and len(examples)]
    if not kept:
        return
    examples = max(kept, key=lambda each: each.longest_text()[0])
    longest, index = examples.longest_text()
    found, place = positions_for(model, longest), examples.place(index)
    if found.most is not None and longest > found.most:
        raise UsageError(
            "data.beyond_positions",
            "{place} has {longest:,} tokens, and the model has {most:,} positions. Set max_seq_length to {most} or "
            "less (on_too_long says what is done with longer rows), or take a model for longer texts.",
            place=place,
            longest=longest,
            most=found.most,
        )
    if found.trained is not None and longest > found.trained:
        notice(
            "data.beyond_trained",
            "the longest text has {longest:,} tokens ({place}), more than the {trained:,} positions that the model is "
            "made for: what it makes of those beyond is not known.",
            place=place,
            longest=longest,
            trained=found.trained,
        )


def prove_template(encoder: Encoder) -> Certificate:
    """Prove the template on this tokenizer; a notice lists checks that fail."""
    certificate = certify(encoder, encoder.template.stop_ids)
    for check in certificate.checks:
        if not check.passed:
            notice(
                "certificate.failed",
                "the template {name} does not pass {check}: {detail}.",
                name=encoder.template.name,
                check=check.name,
                detail=check.detail,
            )
    return certificate


def check_best_metric(config: Config, metrics: Sequence[str], data: Split) -> None:
    """Refuse a metric that no evaluation of this run will have: transformers would miss it after the first one."""
    asked = config.training.get("metric_for_best_model")
    sources = data.train.names if data.held_out is None else data.held_out.names
    known = [*metrics, *(f"loss/{name}" for name in sources if len(sources) > 1)]
    if asked and asked.removeprefix("eval_") not in known:
        raise bad_choice("metric_for_best_model", json.dumps(asked), map(json.dumps, known))
