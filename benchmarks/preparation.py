r"""Data preparation against the tokenizer alone: chat rows to cached examples, the same texts through `encode_batch`.

    python benchmarks/preparation.py --model MODEL_DIR --data alpaca_en_demo.json [MORE …] --rows 7000

Both sides run in turns in one process (the tokenizer's own threads included). `encode_batch` is asked for the texts
that preparation renders, offsets with them, in one call. The duplicate search and the writing of the cache are inside
our time.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

from measuring import git_commit, hardware, versions
from transformers import AutoTokenizer

from firefly.config import DataConfig
from firefly.data import dataset
from firefly.data.encoding import Encoder
from firefly.data.formats import parse_record
from firefly.data.templates import bind_template

HERE = Path(__file__).resolve().parent


def main() -> None:
    """Time both sides `--rounds` times and write the result."""
    arguments = parse_arguments()
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    encoder = Encoder(tokenizer, bind_template(arguments.template, tokenizer))
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder, "rows.jsonl")
        rows = write_rows(arguments.data, arguments.rows, data)
        texts = [text.text for row in rows for text in encoder.render(row)]
        config = DataConfig(train_file=str(data), max_seq_length=arguments.max_seq_length, max_lost_share=1.0)
        rounds = []
        for number in range(arguments.rounds):
            cache = Path(folder, f"cache{number}")
            dataset.cache_folder = lambda cache=cache: cache  # type: ignore[assignment]
            ours = timed(lambda: dataset.load_split(config, encoder))
            again = timed(lambda: dataset.load_split(config, encoder))
            alone = timed(lambda: tokenizer.backend_tokenizer.encode_batch(texts, add_special_tokens=False))
            rounds.append({"firefly": ours, "from_cache": again, "encode_batch": alone, "ratio": ours / alone})
            print(json.dumps(rounds[-1]), flush=True)
    report = {
        "benchmark": "preparation",
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
        "git_commit": git_commit(HERE.parent),
        "hardware": hardware(),
        "versions": versions(),
        "rows": len(rows),
        "characters": sum(map(len, texts)),
        "rounds": rounds,
        "median_ratio": statistics.median(item["ratio"] for item in rounds),
        "median_seconds_from_cache": statistics.median(item["from_cache"] for item in rounds),
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    cached = f"{report['median_seconds_from_cache']:.2f} s"
    print(f"{len(rows)} rows: {report['median_ratio']:.2f} × encode_batch; from the cache {cached}")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", type=Path, nargs="+", required=True, help="JSON lists or JSON lines of chat records")
    parser.add_argument("--rows", type=int, default=7000, help="records, numbered to differ where the files have fewer")
    parser.add_argument("--template", default="auto")
    parser.add_argument("--max_seq_length", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=HERE / "results" / "preparation.json")
    return parser.parse_args()


def write_rows(files: list[Path], count: int, path: Path) -> list:
    """Write `count` records of the files, round after round; numbers keep them from being duplicates."""
    records = []
    for file in files:
        text = file.read_text(encoding="utf-8")
        records += (
            json.loads(text) if text.lstrip().startswith("[") else [json.loads(line) for line in text.splitlines()]
        )
    parsed = []
    with path.open("w", encoding="utf-8") as out:
        for number in range(count):
            record = dict(records[number % len(records)])
            question = next(key for key in ("instruction", "input", "question", "query") if key in record)
            record[question] = f"{number}. {record[question]}"
            out.write(json.dumps(record, ensure_ascii=False) + "\n")
            parsed.append(parse_record(record, "sft")[1])
    return parsed


def timed(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
