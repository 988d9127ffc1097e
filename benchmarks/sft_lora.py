r"""LoRA fine-tuning on the CPU: Firefly against TRL, in turns, on the same token ids.

    python benchmarks/sft_lora.py --model MODEL_DIR --data alpaca_en_demo.json \
        --trl_python VENV/bin/python --sweep

README.md says what is equal, what differs and how to read the result.
"""

import argparse
import os
import shlex
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from comparing import gate, mean_of_last, memory, ratios, version_differences
from measuring import hardware
from processes import Result, Side, Tuning
from reporting import gigabytes, new_report, parse_environment, saver, too_short_to_publish
from sweeping import SftSweep
from token_dump import write_dump

HERE = Path(__file__).resolve().parent


def main() -> int:
    """Make the dump, tune TRL, run both in turns; exit 3 when the sides did not do the same work."""
    arguments = parse_arguments()
    report = new_report("sft_lora", arguments)
    save = saver(arguments.out, report)
    with tempfile.TemporaryDirectory() as folder:
        dump, sweep_dump = Path(folder, "dump.jsonl"), Path(folder, "sweep.jsonl")
        report["dump"] = dump_rows(arguments, arguments.rows, dump)
        firefly, trl = make_sides(arguments, dump)
        if arguments.sweep:
            dump_rows(arguments, arguments.sweep_rows or arguments.rows, sweep_dump)
            tuning = sweep_tunings(make_sides(arguments, sweep_dump)[1], report, save)
        else:
            given = parse_environment(arguments.trl_env)
            tuning = Tuning(name="given", arguments=arguments.trl_args, environment=given)
        report["trl_tuning"] = {
            "name": tuning.name,
            "arguments": tuning.arguments,
            "environment": dict(tuning.environment),
        }
        pairs = run_pairs(arguments, firefly, trl, tuning, report, save)
        same_steps = None if arguments.skip_gate_run else run_same_steps(pairs, trl, tuning, report, save)
    report["summary"] = summarise(pairs, same_steps)
    save()
    print_summary(report, arguments.out)
    return 0 if report["summary"]["gate"]["passed"] else 3


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--model", required=True, help="directory with safetensors weights and a tokenizer")
    parser.add_argument("--data", type=Path, required=True, help="alpaca rows, as a JSON list")
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--max_seq_length", type=int, default=512)
    parser.add_argument("--examples_per_step", type=int, default=8)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--pairs", type=int, default=3, help="runs of each side; 3 or more to publish")
    parser.add_argument("--trl_python", required=True, help="the Python of TRL's virtual environment")
    parser.add_argument("--firefly_python", default=sys.executable)
    parser.add_argument("--sweep", action="store_true", help="try TRL's tunings and run against the fastest")
    parser.add_argument(
        "--sweep_rows", type=int, help="rows of a sweep's runs: fewer save time (all of --rows when not given)"
    )
    parser.add_argument(
        "--trl_args",
        default="--precision float32 --packing --batch_size 1",
        help='tuning of TRL without --sweep, written --trl_args="..."',
    )
    parser.add_argument("--trl_env", default="", help="NAME=VALUE ... for TRL without --sweep")
    parser.add_argument(
        "--firefly_bf16",
        choices=("auto", "true", "false"),
        default="auto",
        help="auto: where this CPU has bf16 matrix instructions",
    )
    parser.add_argument("--firefly_args", default="{}", help="JSON object of further configuration keys")
    parser.add_argument("--firefly_env", default="", help="NAME=VALUE ... for Firefly")
    parser.add_argument("--skip_gate_run", action="store_true", help="leave the last steps' losses unchecked")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "sft_lora.json")
    return parser.parse_args()


def make_sides(arguments: argparse.Namespace, dump: Path) -> tuple[Side, Side]:
    """Firefly's side and TRL's, with the same values for everything both know."""
    common = [
        *("--model", arguments.model, "--dump", str(dump), "--rank", str(arguments.rank)),
        *("--max_seq_length", str(arguments.max_seq_length), "--seed", str(arguments.seed)),
        *("--examples_per_step", str(arguments.examples_per_step), "--threads", str(arguments.threads)),
    ]
    firefly = Side(
        name="Firefly",
        python=arguments.firefly_python,
        program=HERE / "firefly_sft.py",
        arguments=common,
        threads=arguments.threads,
    )
    trl = Side(
        name="TRL",
        python=arguments.trl_python,
        program=HERE / "trl_sft.py",
        arguments=common,
        threads=arguments.threads,
    )
    return firefly, trl


def dump_rows(arguments: argparse.Namespace, num_rows: int, path: Path) -> dict[str, Any]:
    """Write the first rows as token ids and labels; return what the report says about them."""
    return write_dump(
        model=arguments.model,
        data=arguments.data,
        num_rows=num_rows,
        max_seq_length=arguments.max_seq_length,
        path=path,
    )


def sweep_tunings(trl: Side, report: dict[str, Any], save: Callable[[], None]) -> Tuning:
    """Find TRL's fastest tuning, recording every attempt."""
    attempts = report["sweep"] = []

    def record(attempt: dict[str, Any]) -> None:
        attempts.append(attempt)
        save()
        rate = attempt["result"]["rows_per_second"] if "result" in attempt else None
        print(
            f"sweep  {attempt['name']:50} {attempt['outcome'] if rate is None else f'{rate:.3f} rows/s'}",
            flush=True,
        )

    return SftSweep(trl, record).run()


def firefly_tuning(arguments: argparse.Namespace) -> Tuning:
    """How Firefly runs: bf16 where the machine has it, as its own defaults would choose."""
    wants_bf16 = {"auto": hardware()["bf16_matrix_instructions"], "true": True, "false": False}
    flags = ["--bf16"] if wants_bf16[arguments.firefly_bf16] else []
    return Tuning(
        name="firefly",
        arguments=shlex.join([*flags, "--overrides", arguments.firefly_args]),
        environment=parse_environment(arguments.firefly_env),
    )


def run_pairs(
    arguments: argparse.Namespace,
    firefly: Side,
    trl: Side,
    tuning: Tuning,
    report: dict[str, Any],
    save: Callable[[], None],
) -> list[tuple[Result, Result]]:
    """Run A-B-B-A…: who goes first alternates, so a machine that drifts favours neither."""
    report["runs"] = []

    def run(side: Side, side_tuning: Tuning) -> Result:
        result = side.run(side_tuning)
        report["runs"].append(result)
        save()
        print(f"run    {result['framework']:8} {result['rows_per_second']:.3f} rows/s", flush=True)
        return result

    pairs = []
    own_tuning = firefly_tuning(arguments)
    for number in range(arguments.pairs):
        if number % 2 == 0:
            ours = run(firefly, own_tuning)
            theirs = run(trl, tuning)
        else:
            theirs = run(trl, tuning)
            ours = run(firefly, own_tuning)
        pairs.append((ours, theirs))
    return pairs


def run_same_steps(
    pairs: list[tuple[Result, Result]],
    trl: Side,
    tuning: Tuning,
    report: dict[str, Any],
    save: Callable[[], None],
) -> Result:
    """Run TRL with the rows of our steps in each of its steps, in our precision; only the losses are used.

    The compared runs already are that when their tuning keeps the dump's order in our precision.
    """
    ours, theirs = pairs[0]
    precision = ours["settings"]["precision"]
    if theirs["settings"]["rows_of_a_step_are_consecutive"] and theirs["settings"]["precision"] == precision:
        return theirs
    gate_tuning = Tuning(
        name="same steps", arguments=f"--precision {precision} --batch_size 1", environment=tuning.environment
    )
    report["gate_run"] = trl.run(gate_tuning)
    save()
    return report["gate_run"]


def summarise(pairs: list[tuple[Result, Result]], same_steps: Result | None) -> dict[str, Any]:
    """Gather everything a README may quote, and what a reader must know beside it."""
    ours, theirs = pairs[0]
    sides = {"firefly": [pair[0] for pair in pairs], "trl": [pair[1] for pair in pairs]}
    return {
        "gate": gate(ours, theirs, same_steps),
        "ratio_rows_per_second": ratios(pairs, "rows_per_second"),
        "ratio_tokens_per_second": ratios(pairs, "tokens_per_second"),
        "memory": {name: memory(results) for name, results in sides.items()},
        "losses": {
            name: {"first": results[0]["losses"][0], "mean_of_last": mean_of_last(results[0]["losses"])}
            for name, results in sides.items()
        },
        "tokens": {
            name: (results[0]["tokens"], results[0]["target_tokens"])
            for name, results in sides.items()  # whole runs, the first step included
        },
        "steps": {name: results[0]["steps"] for name, results in sides.items()},
        "precision": {name: results[0]["settings"]["precision"] for name, results in sides.items()},
        "caveats": caveats(pairs),
    }


def caveats(pairs: list[tuple[Result, Result]]) -> list[str]:
    """Say in words what is not equal, or not enough to publish."""
    ours, theirs = pairs[0]
    found = []
    if not theirs["settings"]["rows_of_a_step_are_consecutive"]:
        found.append(
            "TRL's optimizer steps hold other rows than ours (it packs or sorts), so the first and last "
            "losses of the two runs are not of the same rows; the gate compares with TRL's loss on our first "
            "rows, and with an unpacked TRL run"
        )
    if ours["settings"]["precision"] != theirs["settings"]["precision"]:
        found.append("the two sides ran in different precisions; say so beside the ratio")
    if different := version_differences(ours, theirs):
        found.append(f"versions differ (ours, theirs): {different}")
    found += too_short_to_publish(pairs)
    return found


def print_summary(report: dict[str, Any], path: Path) -> None:
    """Print the result for people."""
    summary, machine = report["summary"], report["hardware"]
    print(f"\n{machine['cpu']}, {machine['cores']} cores, commit {report['git_commit']}")
    print(f"TRL tuning: {report['trl_tuning']['name']} ({report['trl_tuning']['arguments']})")
    for name in ("ratio_rows_per_second", "ratio_tokens_per_second"):
        ratio = summary[name]
        each = " ".join(f"{value:.2f}" for value in ratio["per_pair"])
        print(f"{name}: median {ratio['median']:.2f} ({ratio['min']:.2f}–{ratio['max']:.2f}; pairs: {each})")
    for name in ("firefly", "trl"):
        peak, losses = summary["memory"][name], summary["losses"][name]
        tokens, targets = summary["tokens"][name]
        print(
            f"{name:8} {summary['precision'][name]}, peak {gigabytes(peak['peak_rss_bytes'])}, "
            f"above imports {gigabytes(peak['peak_less_imports_bytes'])}, "
            f"{tokens} tokens ({targets} trained) in {summary['steps'][name]} steps, "
            f"loss {losses['first']:.4f} → {losses['mean_of_last']:.4f}"
        )
    for name, check in summary["gate"].items():
        if name != "passed":
            figures = {key: value for key, value in check.items() if key != "passed"}
            print(f"gate {name}: {'passed' if check['passed'] else 'FAILED'} {figures or ''}")
    for caveat in summary["caveats"]:
        print(f"note: {caveat}")
    print(f"gate {'passed' if summary['gate']['passed'] else 'FAILED: quote no speed'}; details in {path}")


if __name__ == "__main__":
    sys.exit(main())
