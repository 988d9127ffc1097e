r"""DPO with LoRA on the CPU: Firefly against TRL and LLaMA-Factory, in turns, on the same token ids.

    python benchmarks/dpo_lora.py --model MODEL_DIR --data dpo_en_demo.json \
        --trl_python VENV/bin/python --llamafactory_python VENV/bin/python --sweep

README.md says what is equal, what differs and how to read the result.
"""

import argparse
import json
import os
import shlex
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from comparing import mean_of_last, memory, preference_gate, ratios, version_differences
from measuring import hardware
from pair_dump import write_adapter, write_pairs
from processes import Result, Side, Tuning
from reporting import gigabytes, new_report, parse_environment, saver, too_short_to_publish
from sweeping import PreferenceSweep

HERE = Path(__file__).resolve().parent


@dataclass(frozen=True, kw_only=True)
class Peer:
    """What there is to know of a peer before it runs."""

    label: str
    program: str
    default: str
    """What its user gets who sets only the batch size, where those instructions are there."""


PEERS = {
    "trl": Peer(
        label="TRL",
        program="trl_dpo.py",
        default="--precision autocast --batch_size 1 --gradient_checkpointing",
    ),
    "llamafactory": Peer(
        label="LLaMA-Factory",
        program="llamafactory_dpo.py",
        default="--precision autocast --batch_size 1 --gradient_checkpointing",
    ),
}
BF16_PRECISIONS = ("bfloat16", "autocast")
"""Tried besides float32 where the CPU has bf16 matrix instructions."""
Runs = dict[str, list[Result]]


def main() -> int:
    """Make dump and adapter, tune the peers, run all in turns; exit 3 when the sides did not do the same work."""
    arguments = parse_arguments()
    report = new_report("dpo_lora", arguments)
    save = saver(arguments.out, report)
    with tempfile.TemporaryDirectory() as folder:
        dump, sweep_dump, adapter = (Path(folder, name) for name in ("dump.jsonl", "sweep.jsonl", "adapter"))
        report["dump"] = dump_pairs(arguments, dump, arguments.max_pairs)
        print(f"dump   {report['dump']}", flush=True)
        write_adapter(model=arguments.model, rank=arguments.rank, seed=arguments.seed, folder=adapter)
        if arguments.sweep or arguments.sweep_only:
            dump_pairs(arguments, sweep_dump, arguments.sweep_pairs)
        tunings = {}
        for name in arguments.peers:
            if arguments.sweep or arguments.sweep_only:
                tunings[name] = sweep(arguments, name, peer_side(arguments, name, sweep_dump, adapter), report, save)
            else:
                tunings[name] = given_tuning(arguments, name)
        report["tunings"] = {name: as_json(tuning) for name, tuning in tunings.items()}
        save()
        if arguments.sweep_only:
            print(f"fastest tunings: {report['tunings']}; details in {arguments.out}")
            return 0
        sides = {name: peer_side(arguments, name, dump, adapter) for name in arguments.peers}
        sides["firefly"] = make_side(arguments, "Firefly", arguments.firefly_python, "firefly_dpo.py", dump)
        tunings["firefly"] = firefly_tuning(arguments, adapter)
        runs = run_rounds(arguments, sides, tunings, report, save)
    report["summary"] = {
        name: summarise(arguments, list(zip(runs["firefly"], runs[name], strict=True))) for name in arguments.peers
    }
    save()
    print_summary(report, arguments.out)
    return 0 if all(summary["gate"]["passed"] for summary in report["summary"].values()) else 3


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--model", required=True, help="directory with safetensors weights and a tokenizer")
    parser.add_argument("--data", type=Path, required=True, help="ShareGPT preference pairs, as a JSON list")
    parser.add_argument("--records", type=int, default=64, help="first records of --data; those that fit are taken")
    parser.add_argument("--max_pairs", type=int, help="fewer pairs, for a trial (all that fit when not given)")
    parser.add_argument("--max_seq_length", type=int, default=1024)
    parser.add_argument("--pairs_per_step", type=int, default=4)
    parser.add_argument("--beta", type=float, default=0.1)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rounds", type=int, default=3, help="runs of each side; 3 or more to publish")
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=list(PEERS))
    parser.add_argument("--trl_python", help="the Python of TRL's virtual environment")
    parser.add_argument("--llamafactory_python", help="the Python of LLaMA-Factory's virtual environment")
    parser.add_argument("--firefly_python", default=sys.executable)
    parser.add_argument("--sweep", action="store_true", help="try the peers' tunings and run against the fastest")
    parser.add_argument("--sweep_only", action="store_true", help="try them and stop")
    parser.add_argument("--sweep_pairs", type=int, default=12, help="pairs of a sweep's runs")
    parser.add_argument("--sweep_limit", type=int, help="at most so many tunings of each peer")
    parser.add_argument("--skip_defaults", action="store_true", help="leave the peers' defaults out of the sweep")
    for name, peer in PEERS.items():
        tuning = parser.add_argument_group(f"{peer.label} without --sweep")
        tuning.add_argument(f"--{name}_args", default="--precision float32 --batch_size 1", help='--x_args="..."')
        tuning.add_argument(f"--{name}_env", default="", help="NAME=VALUE ...")
    parser.add_argument(
        "--firefly_bf16",
        choices=("auto", "true", "false"),
        default="auto",
        help="auto: where this CPU has bf16 matrix instructions",
    )
    parser.add_argument("--firefly_args", type=json.loads, default={}, help="JSON object of further keys")
    parser.add_argument("--firefly_env", default="", help="NAME=VALUE ... for Firefly")
    parser.add_argument(
        "--own_adapter",
        action="store_true",
        help="let Firefly draw its own adapter; first gradients are not compared then",
    )
    parser.add_argument("--out", type=Path, default=HERE / "results" / "dpo_lora.json")
    arguments = parser.parse_args()
    for name in arguments.peers:
        if not getattr(arguments, f"{name}_python"):
            parser.error(f"--{name}_python is missing; --peers names the peers to run against")
    return arguments


def dump_pairs(arguments: argparse.Namespace, path: Path, max_pairs: int | None) -> dict[str, Any]:
    """Write the pairs as token ids; return what the report says about them."""
    return write_pairs(
        model=arguments.model,
        data=arguments.data,
        records=arguments.records,
        max_seq_length=arguments.max_seq_length,
        pairs_per_step=arguments.pairs_per_step,
        path=path,
        max_pairs=max_pairs,
    )


def make_side(arguments: argparse.Namespace, label: str, python: str, program: str, dump: Path, *more: str) -> Side:
    """One side, with the same values for everything all of them know."""
    common = [
        *("--model", arguments.model, "--dump", str(dump), "--rank", str(arguments.rank)),
        *("--max_seq_length", str(arguments.max_seq_length), "--seed", str(arguments.seed)),
        *("--examples_per_step", str(arguments.pairs_per_step), "--threads", str(arguments.threads)),
    ]
    return Side(
        name=label, python=python, program=HERE / program, arguments=[*common, *more], threads=arguments.threads
    )


def peer_side(arguments: argparse.Namespace, name: str, dump: Path, adapter: Path) -> Side:
    """A peer's side; it always starts from the adapter given."""
    peer, python = PEERS[name], getattr(arguments, f"{name}_python")
    more = ("--beta", str(arguments.beta), "--adapter", str(adapter))
    return make_side(arguments, peer.label, python, peer.program, dump, *more)


def given_tuning(arguments: argparse.Namespace, name: str) -> Tuning:
    """A peer's tuning as the command line gives it."""
    environment = parse_environment(getattr(arguments, f"{name}_env"))
    return Tuning(name="given", arguments=getattr(arguments, f"{name}_args"), environment=environment)


def firefly_tuning(arguments: argparse.Namespace, adapter: Path) -> Tuning:
    """How Firefly runs: bf16 where the machine has it, as its own defaults would choose."""
    wants_bf16 = {"auto": hardware()["bf16_matrix_instructions"], "true": True, "false": False}
    flags = ["--bf16"] if wants_bf16[arguments.firefly_bf16] else []
    overrides = {"beta": arguments.beta} | ({} if arguments.own_adapter else {"adapter_name_or_path": str(adapter)})
    return Tuning(
        name="firefly",
        arguments=shlex.join([*flags, "--overrides", json.dumps(overrides | arguments.firefly_args)]),
        environment=parse_environment(arguments.firefly_env),
    )


def sweep(
    arguments: argparse.Namespace, name: str, side: Side, report: dict[str, Any], save: Callable[[], None]
) -> Tuning:
    """Find a peer's fastest tuning, recording every attempt."""
    attempts = report.setdefault("sweep", {}).setdefault(name, [])

    def record(attempt: dict[str, Any]) -> None:
        attempts.append(attempt)
        save()
        rate = attempt["result"]["rows_per_second"] if "result" in attempt else None
        outcome = attempt["outcome"] if rate is None else f"{rate:.3f} pairs/s"
        print(f"sweep  {name:13} {attempt['name']:50} {outcome}", flush=True)

    peer, has_bf16 = PEERS[name], hardware()["bf16_matrix_instructions"]
    default = peer.default if has_bf16 else peer.default.replace("autocast", "float32")
    return PreferenceSweep(
        side,
        record,
        precisions=("float32", *(BF16_PRECISIONS if has_bf16 else ())),
        default=None if arguments.skip_defaults else Tuning(name="default", arguments=default),
        limit=arguments.sweep_limit,
    ).run()


def as_json(tuning: Tuning) -> dict[str, Any]:
    """Return a tuning as the report keeps it."""
    return {"name": tuning.name, "arguments": tuning.arguments, "environment": dict(tuning.environment)}


def run_rounds(
    arguments: argparse.Namespace,
    sides: dict[str, Side],
    tunings: dict[str, Tuning],
    report: dict[str, Any],
    save: Callable[[], None],
) -> Runs:
    """Run every side once a round. Firefly runs next to each of two peers, and every second round is turned round.

    With any one peer the order is A-B-B-A…, so a machine that drifts favours neither.
    """
    report["runs"] = []
    runs: Runs = {name: [] for name in sides}
    half = len(arguments.peers) // 2
    order = [*arguments.peers[:half], "firefly", *arguments.peers[half:]]
    for number in range(arguments.rounds):
        for name in order if number % 2 == 0 else reversed(order):
            result = sides[name].run(tunings[name])
            runs[name].append(result)
            report["runs"].append(result)
            save()
            print(f"run    {name:13} {result['rows_per_second']:.3f} pairs/s", flush=True)
    return runs


def summarise(arguments: argparse.Namespace, pairs: list[tuple[Result, Result]]) -> dict[str, Any]:
    """Gather everything a README may quote about one peer, and what a reader must know beside it."""
    ours, theirs = pairs[0]
    sides = {"firefly": [pair[0] for pair in pairs], theirs["framework"]: [pair[1] for pair in pairs]}
    return {
        "gate": preference_gate(ours, theirs, same_adapter=not arguments.own_adapter),
        "ratio_pairs_per_second": ratios(pairs, "rows_per_second"),
        "pairs_per_second": {
            name: sorted(result["rows_per_second"] for result in results) for name, results in sides.items()
        },
        "tokens_per_second": {
            name: sorted(result["tokens_per_second"] for result in results) for name, results in sides.items()
        },
        "memory": {name: memory(results) for name, results in sides.items()},
        "losses": {
            name: {"first": results[0]["losses"][0], "mean_of_last": mean_of_last(results[0]["losses"])}
            for name, results in sides.items()
        },
        "precision": {name: results[0]["settings"]["precision"] for name, results in sides.items()},
        "caveats": caveats(pairs),
    }


def caveats(pairs: list[tuple[Result, Result]]) -> list[str]:
    """Say in words what is not equal, or not enough to publish."""
    ours, theirs = pairs[0]
    found = []
    if ours["settings"]["precision"] != theirs["settings"]["precision"]:
        found.append("the two sides ran in different precisions; say so beside the ratio")
    if different := version_differences(ours, theirs):
        found.append(f"versions differ (ours, theirs): {different}")
    return found + too_short_to_publish(pairs)


def print_summary(report: dict[str, Any], path: Path) -> None:
    """Print the result for people."""
    machine = report["hardware"]
    print(f"\n{machine['cpu']}, {machine['cores']} cores, commit {report['git_commit']}")
    for name, summary in report["summary"].items():
        tuning, ratio = report["tunings"][name], summary["ratio_pairs_per_second"]
        each = " ".join(f"{value:.2f}" for value in ratio["per_pair"])
        print(f"\nagainst {PEERS[name].label}, {tuning['name']} ({tuning['arguments']} {tuning['environment'] or ''})")
        print(f"pairs/s: median ratio {ratio['median']:.2f} ({ratio['min']:.2f}–{ratio['max']:.2f}; pairs: {each})")
        for side, peak in summary["memory"].items():
            losses = summary["losses"][side]
            rates = " ".join(f"{value:.3f}" for value in summary["pairs_per_second"][side])
            print(
                f"{side:13} {summary['precision'][side]}, {rates} pairs/s, peak {gigabytes(peak['peak_rss_bytes'])}, "
                f"above imports {gigabytes(peak['peak_less_imports_bytes'])}, "
                f"loss {losses['first']:.4f} → {losses['mean_of_last']:.4f}"
            )
        for check_name, check in summary["gate"].items():
            if check_name != "passed":
                figures = {key: value for key, value in check.items() if key != "passed"}
                print(f"gate {check_name}: {'passed' if check['passed'] else 'FAILED'} {figures or ''}")
        for caveat in summary["caveats"]:
            print(f"note: {caveat}")
        print(f"gate {'passed' if summary['gate']['passed'] else 'FAILED: quote no speed'}")
    print(f"\ndetails in {path}")


if __name__ == "__main__":
    sys.exit(main())
