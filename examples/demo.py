"""`make demo`: fine-tune the embedded model on our own rows, merge it, and ask both models the same three questions.

It calls what `firefly train` and `firefly merge` call, with the configuration that users start from.
"""

from __future__ import annotations

import shutil
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from firefly.config import ModelConfig, load_config
from firefly.data.schema import Message
from firefly.errors import FireflyError
from firefly.export.merge import merge
from firefly.generation import GenerationSettings, Generator
from firefly.training import train

ROOT = Path(__file__).resolve().parent.parent
OUTPUT = ROOT / "output" / "demo"
CONFIG = ROOT / "train_args" / "sft" / "lora" / "smollm2-135m-sft-lora.json"

# None of these stands in a training row.
QUESTIONS = (
    "Who are you, and who made you?",
    "Tell me your name and who trained you.",
    "What is the capital of France?",
)


def main() -> int:
    began = time.time()
    shutil.rmtree(OUTPUT, ignore_errors=True)
    OUTPUT.mkdir(parents=True)
    rows = OUTPUT / "rows.jsonl"
    rows.write_text(
        "".join((ROOT / "data" / name).read_text("utf-8") for name in ("identity.jsonl", "general.jsonl")), "utf-8"
    )
    config = load_config(CONFIG, {"train_file": str(rows), "output_dir": str(OUTPUT / "adapter")})
    base = answers(config.model)
    adapter = train(config)
    merged = merge(ModelConfig(), str(adapter), str(OUTPUT / "merged"))
    tuned = answers(ModelConfig(name_or_path=str(merged)))
    show(base, tuned)
    print(
        f"{time.time() - began:.0f} seconds. Talk to it: .venv/bin/firefly chat --model_name_or_path output/demo/merged"
    )
    return 0


def answers(model: ModelConfig) -> list[str]:
    """One greedy answer to each question, each in a conversation of its own."""
    settings = GenerationSettings(max_new_tokens=48, temperature=0)
    with Generator.load(model) as generator:
        return [generator.answer([Message.of("user", question)], settings) for question in QUESTIONS]


def show(base: list[str], tuned: list[str]) -> None:
    table = Table(title="The same questions before and after", show_lines=True)
    for heading in ("question", "base model", "fine-tuned and merged"):
        table.add_column(heading, ratio=1)
    for row in zip(QUESTIONS, base, tuned, strict=True):
        table.add_row(*row)
    Console(width=None if sys.stdout.isatty() else 110).print(table)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except FireflyError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
