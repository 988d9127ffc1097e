r"""What a step costs besides its mathematics: Firefly's own Python, on a model too small for anything else to count.

    python benchmarks/step_overhead.py --against COMMIT

A step of a model of two layers, 32 wide, less the same forward, backward and fused AdamW called bare on the same packed
batch, in microseconds. The working tree and COMMIT (in a worktree of its own) take turns in fresh processes.
"""

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from measuring import versions
from processes import environment
from reporting import new_report, saver

HERE = Path(__file__).resolve().parent
STEPS, WARM = 400, 100
WORDS = ("red", "blue", "one", "two", "three", "four", "five", "six")


def main() -> None:
    """Measure both in turns and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--against", required=True, help="a commit, which takes turns with the working tree")
    parser.add_argument("--modes", nargs="+", default=["full", "lora"])
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--out", type=Path, default=HERE / "results" / "step_overhead.json")
    parser.add_argument("--measure", nargs=2, metavar=("FOLDER", "MODE"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(Path(arguments.measure[0]), arguments.measure[1])))
        return
    del arguments.measure
    report = new_report("step_overhead", arguments) | {"versions": versions(), "modes": {}}
    save = saver(arguments.out, report)
    with tempfile.TemporaryDirectory() as scratch:
        other = Path(scratch, "tree")
        subprocess.run(["git", "worktree", "add", "--detach", other, arguments.against], cwd=HERE, check=True)
        try:
            for mode in arguments.modes:
                rounds = report["modes"][mode] = {"rounds": []}
                for number in range(arguments.rounds):
                    sides = {"new": HERE.parent, "old": other}
                    order = list(sides) if number % 2 == 0 else list(reversed(sides))
                    rounds["rounds"].append({side: in_a_process(sides[side], scratch, mode) for side in order})
                    save()
                    print(json.dumps({mode: rounds["rounds"][-1]}), flush=True)
                for side in ("new", "old"):
                    rounds[side] = statistics.median(each[side]["own"] for each in rounds["rounds"])
                rounds["ratio"] = round(rounds["new"] / rounds["old"], 3)
                save()
                print(f"{mode}: new {rounds['new']} µs, old {rounds['old']} µs, ratio {rounds['ratio']}")
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", other], cwd=HERE, check=True)


def in_a_process(tree: Path, scratch: str, mode: str) -> dict[str, float]:
    """`measure` with a tree's code, in a fresh process of one thread with an empty cache."""
    folder = tempfile.mkdtemp(dir=scratch)
    variables = environment(1) | {"PYTHONPATH": str(tree / "src"), "FIREFLY_CACHE": f"{folder}/cache"}
    command = [sys.executable, __file__, "--against", "", "--measure", folder, mode]
    done = subprocess.run(command, env=os.environ | variables, check=True, capture_output=True)
    return json.loads(done.stdout.decode().splitlines()[-1])


def measure(folder: Path, mode: str) -> dict[str, float]:
    """Microseconds of a step, of its mathematics, and of what is left: its own. Medians."""
    import torch
    from torch.optim.optimizer import register_optimizer_step_post_hook
    from transformers import LlamaForCausalLM

    write_inputs(folder)
    config = {
        "model_name_or_path": str(folder / "model"),
        "train_file": str(folder / "train.jsonl"),
        "output_dir": str(folder / "out"),
        "template_name": "default",
        "train_mode": mode,
        "per_device_train_batch_size": 4,
        "max_steps": STEPS,
        "logging_steps": STEPS,
        "save_strategy": "no",
        "compare": False,
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "tokens_per_microbatch": 4096,
    } | ({"lora_rank": 8, "lora_dropout": 0.0} if mode == "lora" else {})
    (folder / "config.json").write_text(json.dumps(config))
    steps: list[float] = []
    bare: list[float] = []
    seen: dict[str, Any] = {"ended": 0.0, "steps": 0, "within": False}

    def after_step(*_: Any) -> None:
        """Behind each step, which it ends, the same mathematics alone: both see the same moment of a shared machine."""
        if seen["within"]:  # the bare optimizer's own step
            return
        seen["steps"] += 1
        if seen["steps"] == WARM // 2:
            watch_one_pass(next(one for one in gc.get_objects() if isinstance(one, LlamaForCausalLM)), seen)
        if seen["steps"] > WARM:
            steps.append(time.perf_counter() - seen["ended"])
        if seen["steps"] >= WARM:
            seen["within"] = True
            bare.append(bare_step(seen))
            seen["within"] = False
        seen["ended"] = time.perf_counter()

    register_optimizer_step_post_hook(after_step)
    torch.set_num_threads(1)
    from firefly.cli import main as firefly

    assert firefly(["train", str(folder / "config.json")]) == 0
    own = [step - alone for step, alone in zip(steps, bare[1:], strict=True)]
    medians = {"step": steps, "bare": bare, "own": own}
    return {name: round(1e6 * statistics.median(each), 1) for name, each in medians.items()}


def bare_step(seen: dict[str, Any]) -> float:
    """Seconds of forward, backward and fused AdamW at a rate of 0, which leaves the weights as they are."""
    import torch

    model, inputs = seen["model"], seen["inputs"]
    if "optimizer" not in seen:
        seen["trained"] = [p for p in model.parameters() if p.requires_grad]
        seen["optimizer"] = torch.optim.AdamW(seen["trained"], lr=0.0, weight_decay=0.0, fused=True)
    for p in seen["trained"]:  # those of the step, which has been taken
        p.grad = None
    started = time.perf_counter()
    (model(**inputs)["loss"] / len(inputs["targets"])).backward()
    seen["optimizer"].step()
    for p in seen["trained"]:
        p.grad = None
    return time.perf_counter() - started


def watch_one_pass(model: Any, seen: dict[str, Any]) -> None:
    """Keep the model and what its next pass is called with."""
    forward, own = model.forward, "forward" in vars(model)

    def once(*_: Any, **inputs: Any) -> Any:
        seen.update(model=model, inputs={name: value for name, value in inputs.items() if name != "per_token"})
        if own:
            model.forward = forward
        else:
            del model.forward
        return forward(**inputs)

    model.forward = once


def write_inputs(folder: Path) -> None:
    """A random model with a tokenizer of words, and short chats."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed

    set_seed(0)
    names = ["<unk>", "<s>", "</s>", "System", "User", "Assistant", ":", *WORDS]
    words = Tokenizer(WordLevel({name: number for number, name in enumerate(names)}, unk_token="<unk>"))
    words.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    shape = LlamaConfig(
        vocab_size=64,  # the template adds tokens
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        bos_token_id=1,
        eos_token_id=2,
    )
    LlamaForCausalLM(shape).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    rows = [
        {"conversation": [{"human": " ".join(WORDS[: 1 + n % 5]), "assistant": " ".join(WORDS[n % 4 :])}]}
        for n in range(64)
    ]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    main()
