r"""Which causal architectures of transformers Firefly trains right: one step of each against plain transformers.

    python benchmarks/architectures.py [--only llama gemma2] [--again]
    python benchmarks/architectures.py --table      # the tables of docs/models.md from the recorded results

Every architecture that transformers builds small (`tiny_architectures.py`) runs one step of full fine-tuning and of
LoRA in fp32 and in bf16 (`architecture_steps.py`), in a process of its own with a time limit. What counts as right:

fp32  the loss within 1e-4 of plain transformers', as a share of it; and the gradient of every trained tensor within
      1e-4 of its length (of a thousandth of the whole gradient's, for a tensor that is shorter than that). With every
      layer checkpointed, too.
bf16  our distance to plain transformers in fp32 at most twice that of plain transformers in bf16: of the targets'
      log-probabilities (root mean square) and of the whole gradient, over three draws of rows together; over twelve
      where three give more than twice: where rounding turns a router's choice over, a few tokens are far off on either
      side. A distance of plain transformers below bf16's rounding (2^-9) counts as that.

Results are kept by architecture in `results/architectures.json`; those of another commit are computed again with
`--again`, the others only where they are missing.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import select
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

from measuring import git_commit, versions
from reporting import new_report, saver

HERE = Path(__file__).resolve().parent
DOCS = {"en": HERE.parent / "docs" / "models.md", "zh": HERE.parent / "docs" / "zh" / "models.md"}
CELLS = (("full", "fp32"), ("full", "bf16"), ("lora", "fp32"), ("lora", "bf16"))
EXACT, ROUNDED, UNIT = 1e-4, 2.0, 2**-9
DRAWS, MORE_DRAWS = 3, 12

Record = dict[str, Any]


def main() -> int:
    """Run what is asked for; exit 3 if something is wrong that neither Firefly nor transformers refuses."""
    arguments = parse_arguments()
    path = arguments.out / "architectures.json"
    if arguments.table:
        write_tables(json.loads(path.read_text(encoding="utf-8")))
        return 0
    report = new_report("architectures", arguments) | {"versions": versions(), "architectures": {}}
    report["arguments"].pop("only", None)
    if path.is_file() and not arguments.fresh:
        report["architectures"] = json.loads(path.read_text(encoding="utf-8"))["architectures"]
    save = saver(path, report)
    names = arguments.only or all_architectures()
    commit = git_commit(HERE.parent)
    load_once()
    running: dict[int, tuple[str, int, float]] = {}
    waiting = [name for name in names if arguments.again or arguments.only or name not in report["architectures"]]
    while waiting or running:
        while waiting and len(running) < arguments.jobs:
            name = waiting.pop(0)
            reader, child = start(name)
            running[reader] = (name, child, time.monotonic())
        ready, _, _ = select.select(list(running), [], [], 1)
        late = [one for one, (_, _, began) in running.items() if time.monotonic() - began > arguments.seconds]
        for reader in {*ready, *late}:
            name, child, began = running.pop(reader)
            record = finish(reader, child, late=reader not in ready)
            record |= {"seconds": round(time.monotonic() - began, 1), "git_commit": commit}
            report["architectures"][name] = record
            save()
            print(f"{name:28}{words_of(record)}", flush=True)
    report["architectures"] = dict(sorted(report["architectures"].items()))
    save()
    wrong = [name for name in names if any(verdict(report["architectures"][name], *cell) == "wrong" for cell in CELLS)]
    print(f"{len(names)} architectures, {len(wrong)} wrong: {', '.join(wrong)}")
    return 3 if wrong else 0


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--only", nargs="+", help="model types to compute again, whatever is recorded")
    parser.add_argument("--again", action="store_true", help="compute what is recorded already, too")
    parser.add_argument("--fresh", action="store_true", help="begin with an empty result file")
    parser.add_argument("--table", action="store_true", help="write the tables from the recorded results, run nothing")
    parser.add_argument("--jobs", type=int, default=1, help="architectures at a time, a thread each")
    parser.add_argument("--seconds", type=float, default=120, help="for one architecture")
    parser.add_argument("--out", type=Path, default=HERE / "results")
    return parser.parse_args()


def all_architectures() -> list[str]:
    """The model types that transformers has a causal language model for."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


# ---- a process for each ----


def load_once() -> None:
    """Import what every process needs, so that forked ones need not."""
    import architecture_steps  # noqa: F401
    import peft  # noqa: F401
    import torch
    import transformers
    from transformers import Trainer, TrainingArguments  # noqa: F401

    with contextlib.suppress(ImportError):
        import deepspeed  # noqa: F401  # accelerate imports it where it is

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()


def start(name: str) -> tuple[int, int]:
    """Fork a process for one architecture; return where its record is read, and the process's number."""
    reader, writer = os.pipe()
    child = os.fork()
    if child:
        os.close(writer)
        return reader, child
    os.close(reader)
    silent = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silent, 1)
    os.dup2(silent, 2)
    with os.fdopen(writer, "w", encoding="utf-8") as out:
        out.write(json.dumps(record_of(name)))
    os._exit(0)


def finish(reader: int, child: int, late: bool) -> Record:
    """Read a process's record and wait for its end."""
    if late:
        os.kill(child, signal.SIGKILL)
    with os.fdopen(reader, encoding="utf-8") as file:
        text = file.read()
    os.waitpid(child, 0)
    if late:
        return {"error": "took too long"}
    return json.loads(text) if text else {"error": "its process died"}


def record_of(name: str, draws: tuple[int, int] = (DRAWS, MORE_DRAWS)) -> Record:
    """Build the architecture and run its four cells, in bf16 over so many draws of rows, and at most so many."""
    from tiny_architectures import ENCODERS, LEFT_OUT, save_tiny_model, tiny_model

    if name in LEFT_OUT:
        return {"not_built": LEFT_OUT[name]}
    with tempfile.TemporaryDirectory(prefix="architectures.") as scratch:
        os.environ["FIREFLY_CACHE"] = f"{scratch}/cache"
        folder = Path(scratch) / "base"
        try:
            model = save_tiny_model(name, folder)
            record: Record = {"class": type(model).__name__, "parameters": sum(p.numel() for p in model.parameters())}
            del model
            plain_works(folder)
        except Exception as error:
            return {"not_built": short(error)}
        for mode in ("full", "lora"):
            record |= cells_of(folder, mode, Path(scratch), draws)
        if name in ENCODERS:
            record["switch"] = ENCODERS[name]
            record["without_switch"] = refusal_of(tiny_model(name, **{ENCODERS[name]: False}))
        return record


def refusal_of(model: Any) -> str | None:
    """The code with which a model is refused when it is loaded; None if it is not."""
    from firefly.errors import FireflyError
    from firefly.models.attention import choose_layout

    try:
        choose_layout(model)
    except FireflyError as error:
        return error.code
    return None


def plain_works(folder: Path) -> None:
    """Run plain transformers on one row of ids, loaded from disk."""
    import torch
    from architecture_steps import Plain, random_rows

    Plain(folder, None, torch.float32).step(random_rows(0)[:2])


def cells_of(folder: Path, mode: str, scratch: Path, draws: tuple[int, int]) -> Record:
    """fp32 and bf16 of one mode."""
    import architecture_steps as steps
    import torch

    from firefly.errors import FireflyError

    found: Record = {}
    try:
        ours = steps.Ours(folder, mode, torch.float32, scratch)
        found |= {"layout": ours.layout, "reason": ours.reason, "head": ours.head}
        rows = steps.random_rows(0)
        adapted = ours.model if mode == "lora" else None
        exact = steps.Plain(folder, adapted, torch.float32)
        expected, computed = exact.step(rows), ours.step(rows)
        found[f"{mode}_fp32"] = compared(computed, expected)
        again = ours.step_with_layers_computed_again(rows)
        if again is not None:
            found[f"{mode}_fp32"]["checkpointed"] = compared(again, expected)
    except FireflyError as error:
        return found | {f"{mode}_{kind}": {"refused": error.code, "words": str(error)} for kind in ("fp32", "bf16")}
    except Exception as error:
        return found | {f"{mode}_fp32": {"error": short(error)}, f"{mode}_bf16": {"error": "fp32 ended"}}
    try:
        rounded = steps.Ours(folder, mode, torch.bfloat16, scratch)
        plain = steps.Plain(folder, adapted, torch.bfloat16)
        gaps: list[list[tuple[float, float]]] = []
        cell: Record = {}
        for count in draws:
            for draw in range(len(gaps), count):
                rows = steps.random_rows(draw)
                expected = exact.step(rows)
                pair = [side.step(rows) for side in (rounded, plain)]
                gaps.append([(steps.logp_gap(one, expected), steps.gradient_gap(one, expected)) for one in pair])
            cell = {"layout": rounded.layout, "reason": rounded.reason, "draws": count} | ratios(gaps)
            if max(cell["logps_ratio"], cell["gradient_ratio"]) <= ROUNDED:
                break
        found[f"{mode}_bf16"] = cell
    except FireflyError as error:
        found[f"{mode}_bf16"] = {"refused": error.code, "words": str(error)}
    except Exception as error:
        found[f"{mode}_bf16"] = {"error": short(error)}
    return found


def compared(found: Any, expected: Any) -> Record:
    """The two distances of an fp32 cell."""
    import architecture_steps as steps

    share, name = steps.worst_gradient(found, expected)
    return {"loss": digits(steps.loss_gap(found, expected)), "gradient": digits(share), "tensor": name}


def ratios(gaps: list[list[tuple[float, float]]]) -> Record:
    """Our distances and plain transformers', over all draws together (root mean square)."""
    over: Record = {}
    for number, what in enumerate(("logps", "gradient")):
        ours, plain = ((sum(draw[side][number] ** 2 for draw in gaps) / len(gaps)) ** 0.5 for side in (0, 1))
        over |= {f"{what}_ours": digits(ours), f"{what}_plain": digits(plain)}
        over[f"{what}_ratio"] = digits(ours / max(plain, UNIT))
    return over


def digits(number: float) -> float:
    """Three significant ones: more would be noise in a recorded result."""
    return float(f"{number:.3g}")


def short(error: Exception) -> str:
    """The error in one line, with the place that it comes from."""
    place = traceback.extract_tb(error.__traceback__)[-1]
    words = " ".join(str(error).split())
    return f"{type(error).__name__}: {words[:200]} ({Path(place.filename).name}:{place.lineno})"


# ---- verdicts and tables ----


def verdict(record: Record, mode: str, kind: str) -> str:
    """right, wrong, refused or not built."""
    if "not_built" in record:
        return "not built"
    cell = record.get(f"{mode}_{kind}", {"error": record.get("error", "missing")})
    if "refused" in cell:
        return "refused"
    if "error" in cell:
        return "wrong"
    if kind == "bf16":
        right = max(cell["logps_ratio"], cell["gradient_ratio"]) <= ROUNDED
    else:
        passes = [cell, *([cell["checkpointed"]] if "checkpointed" in cell else [])]
        right = all(max(one["loss"], one["gradient"]) <= EXACT for one in passes)
    return "right" if right else "wrong"


def words_of(record: Record) -> str:
    """One line for the screen."""
    if "not_built" in record:
        return f"not built: {record['not_built']}"
    parts = [f"{record.get('layout', '?'):9}{record.get('head', '?'):7}"]
    for mode, kind in CELLS:
        cell = record.get(f"{mode}_{kind}", {"error": record.get("error", "missing")})
        if "refused" in cell:
            parts.append(f"{mode} {kind} refused: {cell['words']}")
        elif "error" in cell:
            parts.append(f"{mode} {kind}: {cell['error']}")
        elif kind == "bf16":
            other = "" if cell["layout"] == record["layout"] else f" {cell['layout']}: {cell['reason']}"
            parts.append(f"{mode} bf16 {cell['logps_ratio']:.2f} {cell['gradient_ratio']:.2f}{other}")
        else:
            again = cell.get("checkpointed")
            parts.append(f"{mode} fp32 {cell['loss']:.0e} {cell['gradient']:.0e}")
            if again and max(again["loss"], again["gradient"]) > EXACT:
                parts.append(f"checkpointed {again['loss']:.0e} {again['gradient']:.0e} {again['tensor']}")
            if cell["gradient"] > EXACT:
                parts.append(cell["tensor"])
    wrong = any(verdict(record, *cell) == "wrong" for cell in CELLS)
    return ("WRONG  " if wrong else "") + "  ".join(parts) + f"  {record.get('reason', '')}"


WORDS = {
    "en": {
        "head": "| model type | class | layout | full fp32 | full bf16 | LoRA fp32 | LoRA bf16 | notes |",
        "right": "yes",
        "wrong": "**no**",
        "refused": "refused",
        "switch": 'with `"{switch}": true` in its config.json; without it refused ({code})',
        "refusal": "{cells} refused: `{code}`",
        "error": "{cell}: {error}",
        "not_built": "| model type | why it is not here |",
        "summary": "{right} of {built} architectures are right in all four; {refused} are refused in some or all. "
        "{not_built} more are not built small by transformers {transformers} itself, for the reasons below. "
        "(torch {torch}, peft {peft}, {cpu}, commit {commit})",
    },
    "zh": {
        "head": "| model_type | 类 | 布局 | 全参数 fp32 | 全参数 bf16 | LoRA fp32 | LoRA bf16 | 说明 |",
        "right": "对",
        "wrong": "**不对**",
        "refused": "拒绝",
        "switch": '须在 config.json 中写 `"{switch}": true`，否则拒绝（{code}）',
        "refusal": "{cells} 拒绝：`{code}`",
        "error": "{cell}：{error}",
        "not_built": "| model_type | 为何不在表中 |",
        "summary": "{built} 种架构中，{right} 种四项全对；{refused} 种在部分或全部项中被拒绝。"
        "另有 {not_built} 种，transformers {transformers} 自身无法构建其小模型，原因见下。"
        "（torch {torch}，peft {peft}，{cpu}，提交 {commit}）",
    },
}
BEGIN, END = "<!-- written by benchmarks/architectures.py --table -->", "<!-- end -->"


def write_tables(report: Record) -> None:
    """Put the tables between the marks of both languages' pages."""
    for language, page in DOCS.items():
        text = page.read_text(encoding="utf-8")
        before, rest = text.split(BEGIN)
        behind = rest.split(END)[1]
        page.write_text(f"{before}{BEGIN}\n\n{tables(report, WORDS[language])}\n{END}{behind}", encoding="utf-8")


def tables(report: Record, words: dict[str, str]) -> str:
    """A summary, the table of what was built, and the list of what was not."""
    records = report["architectures"]
    built = {name: record for name, record in records.items() if "not_built" not in record}
    verdicts = {name: [verdict(record, *cell) for cell in CELLS] for name, record in built.items()}
    commits = sorted({record["git_commit"][:7] for record in records.values()})
    lines = [
        words["summary"].format(
            right=sum(set(each) == {"right"} for each in verdicts.values()),
            refused=sum("refused" in each for each in verdicts.values()),
            built=len(built),
            not_built=len(records) - len(built),
            commit=", ".join(commits),
            cpu=report["hardware"]["cpu"],
            **{name: report["versions"].get(name, "?") for name in ("transformers", "torch", "peft")},
        ),
        "",
        words["head"],
        "|" + "---|" * 8,
    ]
    for name, record in built.items():
        cells = " | ".join(words[each] for each in verdicts[name])
        notes = "; ".join(notes_of(record, words))
        lines.append(f"| {name} | {record['class']} | {record.get('layout', '–')} | {cells} | {notes} |")
    lines += ["", words["not_built"], "|---|---|"]
    lines += [f"| {name} | {cut(record['not_built'])} |" for name, record in records.items() if name not in built]
    return "\n".join(lines) + "\n"


def notes_of(record: Record, words: dict[str, str]) -> list[str]:
    """What stands behind an architecture's verdicts."""
    notes = (
        [words["switch"].format(switch=record["switch"], code=record["without_switch"])] if "switch" in record else []
    )
    if record.get("reason"):
        notes.append(cut(record["reason"]))
    refusals: dict[str, list[str]] = {}
    for mode, kind in CELLS:
        cell = record.get(f"{mode}_{kind}", {})
        if "refused" in cell:
            refusals.setdefault(cell["refused"], []).append(f"{mode} {kind}")
        elif "error" in cell:
            notes.append(words["error"].format(cell=f"{mode} {kind}", error=cut(cell["error"])))
    for code, cells in refusals.items():
        every = len(cells) == len(CELLS)
        notes.append(words["refusal"].format(cells="" if every else ", ".join(cells), code=code).strip())
    return notes


def cut(text: str, length: int = 160) -> str:
    """A text for a table's cell."""
    text = text.replace("|", "\\|").replace("\n", " ")
    return text if len(text) <= length else f"{text[:length]}…"


if __name__ == "__main__":
    sys.exit(main())
