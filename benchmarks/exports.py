r"""What each number type of a GGUF file costs in distance from the trained model, and what exporting takes of memory.

    python benchmarks/exports.py [--types f32 f16 …] [--large] [--out results]

Each export is a `firefly` command in a fresh process; its report says how far llama.cpp's distributions are from the
trained model's. Memory is the largest sum over the command and its children of what is theirs alone (Pss_Anon), and
with the pages of mapped files, which the system takes back when it needs them (Pss); read every 50 ms.

`--large` merges and exports a random model of 2 GB in bfloat16, in files of at most 400 MB, with a LoRA of rank 16.
Needs no idle machine but for the seconds.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch
from measuring import versions
from reporting import new_report, saver

HERE = Path(__file__).resolve().parent
TYPES = ("f32", "f16", "bf16", "q8_0", "q6_k", "q5_k_m", "q4_k_m")
SHARD = "400MB"
OF_LARGE = {
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 20,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
}


def main() -> None:
    arguments = parse_arguments()
    report = new_report("exports", arguments) | {"versions": versions()}
    save = saver(arguments.out / "exports.json", report)
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as scratch:
        place = Path(scratch)
        for name in arguments.types:
            options = ["--model_name_or_path", "smollm2-135m-instruct", "--save_path", str(place / f"{name}.gguf")]
            report.setdefault("smollm2", {})[name] = run(["export", "gguf", *options, "--type", name, "--json"])
            (place / f"{name}.gguf").unlink(missing_ok=True)
            save()
        if arguments.large:
            model, adapter = make_large(place)
            files = [file.stat().st_size for file in model.glob("*.safetensors")]
            report["large"] = {"bytes": sum(files), "largest_file": max(files)}
            options = ["--model_name_or_path", str(model), "--adapter_name_or_path", str(adapter)]
            report["large"]["merge"] = run(["merge", *options, "--save_path", str(place / "merged")])
            save()
            target = ["--save_path", str(place / "large.gguf"), "--json"]
            report["large"]["export"] = run(["export", "gguf", *options, *target])
            save()
    print(json.dumps({name: shown(found) for name, found in report.get("smollm2", {}).items()}, indent=1))
    print(json.dumps(report.get("large", {}), indent=1))


def shown(found: dict[str, Any]) -> dict[str, Any]:
    return {
        key: found[key] for key in ("verified", "mean_kl", "top1_agreement", "largest_gap", "bytes") if key in found
    }


def run(command: list[str]) -> dict[str, Any]:
    """A command's report, its seconds, and its memory."""
    began, peak = time.perf_counter(), {"own": 0, "with_files": 0}
    process = subprocess.Popen(
        [sys.executable, "-m", "firefly", *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.05):
            own, with_files = memory_of(process.pid)
            peak["own"], peak["with_files"] = max(peak["own"], own), max(peak["with_files"], with_files)

    watcher = threading.Thread(target=watch)
    watcher.start()
    output, errors = process.communicate()
    done.set()
    watcher.join()
    found: dict[str, Any] = json.loads(output) if output.startswith("{") else {}
    if process.returncode not in (0, 3):
        raise SystemExit(errors)
    return found | {"rc": process.returncode, "memory": peak, "wall_seconds": round(time.perf_counter() - began, 1)}


def memory_of(pid: int) -> tuple[int, int]:
    """Bytes of a process and all below it: their own, and with mapped files."""
    own = with_files = 0
    for one in (pid, *below(pid)):
        try:
            lines = Path(f"/proc/{one}/smaps_rollup").read_text().splitlines()
        except OSError:  # it has ended
            continue
        sizes = {line.split(":")[0]: int(line.split()[1]) << 10 for line in lines[1:]}
        own, with_files = own + sizes["Pss_Anon"], with_files + sizes["Pss"]
    return own, with_files


def below(pid: int) -> list[int]:
    try:
        tasks = [Path(task) / "children" for task in Path(f"/proc/{pid}/task").iterdir()]
        children = [int(child) for task in tasks for child in task.read_text().split()]
    except OSError:
        return []
    return [found for child in children for found in (child, *below(child))]


def make_large(place: Path) -> tuple[Path, Path]:
    """A random Llama with SmolLM2's tokenizer, and a random adapter on all of its linear layers."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

    from firefly.models.loading import embedded_model

    tokenizer = AutoTokenizer.from_pretrained(embedded_model())
    torch.manual_seed(0)
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = LlamaConfig(vocab_size=len(tokenizer), dtype="bfloat16", **OF_LARGE, **ids)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(place / "model", max_shard_size=SHARD)
    tokenizer.save_pretrained(place / "model")
    wrapped = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"))
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    wrapped.peft_config["default"].base_model_name_or_path = str(place / "model")
    wrapped.save_pretrained(place / "adapter")
    return place / "model", place / "adapter"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--types", nargs="*", choices=TYPES, default=list(TYPES))
    parser.add_argument("--large", action="store_true", help="merge and export a random model of 2 GB, too")
    parser.add_argument("--scratch", type=Path, default=None, help="folder for the files; 8 GB with --large")
    parser.add_argument("--out", type=Path, default=HERE / "results")
    return parser.parse_args()


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main()
