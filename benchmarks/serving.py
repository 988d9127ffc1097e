"""Tokens a second over HTTP: many streams beside one, transformers' own server, and plain `generate`.

    python benchmarks/serving.py [--model MODEL_DIR] [--streams 32] [--new 64] [--only one many transformers]

In float32 on a CPU, over loopback, greedy. `firefly serve` and `transformers serve --continuous-batching` run in
processes of their own, one after the other. Prompts are chats of `--prompt` tokens, template and all; answers are
tokenized alike for all sides, whatever a server says that it has generated.

- One stream beside plain `generate` on the same prompt, turn by turn, each second pair turned round: the median of the
  ratios must be 0.9 or more.
- Many streams at a time: four times the tokens a second of one stream or more, and no fewer than transformers'. Every
  answer must be the one that its prompt has alone; where it parts from that, the two tokens must be equally likely for
  the model (a gap of less than 1e-3 between their logits). Exit 3 otherwise.
"""

import argparse
import http.client
import json
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from measuring import versions
from processes import environment
from reporting import HERE, new_report, saver

LEAST_SPEEDUP = 4.0
LEAST_OF_PLAIN = 0.9
TIE = 1e-3
COMMAND = "from firefly.cli import run; run()"  # what the console script `firefly` does
WORDS = "river stone lamp bread cloud paper horse tower violet engine garden copper market silver window ladder".split()


@contextmanager
def started(command: list[str], ready: str, threads: int) -> Iterator[tuple[int, str]]:
    """A server in a process of its own: its port, where `ready` finds one in its log, and the log's path."""
    log = Path(tempfile.mkdtemp()) / "server.log"
    with log.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, env=environment(threads))
    try:
        end = time.monotonic() + 600
        while not (found := re.search(ready, log.read_text(errors="replace"))):
            if process.poll() is not None or time.monotonic() > end:
                raise SystemExit(f"{command[2]} did not start:\n{log.read_text(errors='replace')[-4000:]}")
            time.sleep(0.2)
        yield int(found[1]), str(log)
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()


def stream(port: int, model: str, prompt: str, new: int) -> str:
    """The text of one streamed answer."""
    body = {"model": model, "messages": [{"role": "user", "content": prompt}], "temperature": 0, "stream": True}
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=1800)
    headers = {"Content-Type": "application/json"}
    connection.request("POST", "/v1/chat/completions", json.dumps(body | {"max_tokens": new}), headers)
    response = connection.getresponse()
    if response.status != 200:
        raise SystemExit(f"{response.status}: {response.read().decode()[:2000]}")
    parts = []
    for line in response:
        if line.startswith(b"data: {"):
            for choice in json.loads(line[6:]).get("choices", ()):
                parts.append(choice["delta"].get("content") or "")
    connection.close()
    return "".join(parts)


class Plain:
    """The model itself: prompts of one length, plain `generate`, and whether two tokens are equally likely."""

    def __init__(self, folder: str, threads: int) -> None:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        torch.set_num_threads(threads)
        self.torch = torch
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def encode(self, prompt: str) -> list[int]:
        turns = [{"role": "user", "content": prompt}]
        return list(self.tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False))

    def count(self, text: str) -> int:
        return len(self.tokenizer.encode(text, add_special_tokens=False))

    def prompts(self, count: int, length: int) -> list[str]:
        """Unlike requests that all have `length` tokens."""
        found = []
        for number in range(count):
            text = f"Write a long story number {number} about"
            while len(self.encode(text)) < length:
                text += " " + WORDS[(number * 5 + len(text)) % len(WORDS)]
            found.append(text)
        return found

    def generate(self, prompt: str, new: int) -> str:
        ids = self.torch.tensor([self.encode(prompt)])
        with self.torch.no_grad():
            out = self.model.generate(
                input_ids=ids, attention_mask=self.torch.ones_like(ids), max_new_tokens=new, do_sample=False
            )
        return self.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)

    def is_tie(self, prompt: str, one: str, other: str) -> bool:
        """Whether two answers part where the model finds both tokens equally likely."""
        first, second = (self.tokenizer.encode(text, add_special_tokens=False) for text in (one, other))
        at = next((i for i, pair in enumerate(zip(first, second, strict=False)) if pair[0] != pair[1]), None)
        if at is None:  # one of them is the beginning of the other
            return False
        ids = self.torch.tensor([self.encode(prompt) + first[:at]])
        with self.torch.no_grad():
            logits = self.model(input_ids=ids).logits[0, -1].float()
        return abs(float(logits[first[at]] - logits[second[at]])) < TIE


def one_stream(plain: Plain, port: int, name: str, prompts: list[str], new: int) -> dict[str, Any]:
    """One stream and plain `generate` in turns; the answers that prompts have alone."""
    stream(port, name, prompts[0], 4)
    plain.generate(prompts[0], 4)
    pairs, answers = [], []
    for number, prompt in enumerate(prompts):
        rates: dict[str, float] = {}
        for side in ("server", "plain") if number % 2 == 0 else ("plain", "server"):
            began = time.monotonic()
            text = stream(port, name, prompt, new) if side == "server" else plain.generate(prompt, new)
            rates[side] = plain.count(text) / (time.monotonic() - began)
            if side == "server":
                answers.append(text)
        pairs.append(rates)
    return {
        "pairs": pairs,
        "tokens_per_second": statistics.median(pair["server"] for pair in pairs),
        "of_plain": statistics.median(pair["server"] / pair["plain"] for pair in pairs),
        "answers": answers,
    }


def many_streams(plain: Plain, port: int, name: str, prompts: list[str], new: int, rounds: int) -> dict[str, Any]:
    """All prompts at a time, several rounds."""
    stream(port, name, prompts[0], 4)
    rates, answers = [], []
    for _ in range(rounds):
        gate = threading.Barrier(len(prompts) + 1)

        def ask(prompt: str, gate: threading.Barrier = gate) -> str:
            gate.wait()
            return stream(port, name, prompt, new)

        with ThreadPoolExecutor(len(prompts)) as pool:
            asked = [pool.submit(ask, prompt) for prompt in prompts]
            gate.wait()
            began = time.monotonic()
            answers = [each.result() for each in asked]
            seconds = time.monotonic() - began
        rates.append(sum(map(plain.count, answers)) / seconds)
    return {"rounds": rates, "tokens_per_second": statistics.median(rates), "answers": answers}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder with safetensors and a tokenizer (Firefly's embedded model)")
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--port", type=int, default=8765, help="of transformers' server, which takes no free one")
    parser.add_argument("--only", nargs="+", default=["one", "many", "transformers"])
    parser.add_argument("--out", type=Path, default=HERE / "results" / "serving.json")
    arguments = parser.parse_args()
    if arguments.model is None:
        from firefly.models.loading import embedded_model

        arguments.model = str(embedded_model())
    report = new_report("serving", arguments) | {"versions": versions()}
    save = saver(arguments.out, report)
    plain = Plain(arguments.model, arguments.threads)
    prompts = plain.prompts(arguments.streams, arguments.prompt)
    report["prompt_tokens"] = sorted({len(plain.encode(prompt)) for prompt in prompts})
    faults: list[str] = []
    ours = [sys.executable, "-c", COMMAND, "serve", "--model_name_or_path", arguments.model, "--port", "0"]
    ours += ["--dtype", "float32"]
    alone: list[str] = []
    with started(ours, r"http://127\.0\.0\.1:(\d+)/v1", arguments.threads) as (port, _):
        name = Path(arguments.model).name
        if "one" in arguments.only:
            report["one"] = one_stream(plain, port, name, prompts, arguments.new)
            alone = report["one"]["answers"]
            save()
            if report["one"]["of_plain"] < LEAST_OF_PLAIN:
                faults.append(f"one stream has {report['one']['of_plain']:.2f} of plain generate's tokens a second")
        if "many" in arguments.only:
            report["many"] = many_streams(plain, port, name, prompts, arguments.new, arguments.rounds)
            save()
    if alone and "many" in report:
        report["speedup"] = report["many"]["tokens_per_second"] / report["one"]["tokens_per_second"]
        if report["speedup"] < LEAST_SPEEDUP:
            faults.append(f"many streams have {report['speedup']:.2f} times the tokens a second of one")
        other = [n for n, pair in enumerate(zip(alone, report["many"]["answers"], strict=True)) if pair[0] != pair[1]]
        mixed = [n for n in other if not plain.is_tie(prompts[n], alone[n], report["many"]["answers"][n])]
        report |= {"ties": len(other) - len(mixed), "mixed_up": mixed}
        if mixed:
            faults.append(f"answers {mixed} are others than alone")
    if "transformers" in arguments.only:
        theirs = [str(Path(sys.executable).parent / "transformers"), "serve", arguments.model, "--continuous-batching"]
        # Our cache and batch; by itself it would take nine tenths of the machine's memory.
        theirs += ["--cb-block-size", "32", "--cb-num-blocks", "512", "--cb-max-batch-tokens", "512"]
        theirs += ["--device", "cpu", "--dtype", "float32", "--host", "127.0.0.1", "--port", str(arguments.port)]
        with started(theirs, rf"http://127\.0\.0\.1:({arguments.port})", arguments.threads) as (port, _):
            report["transformers"] = many_streams(
                plain, port, arguments.model, prompts, arguments.new, arguments.rounds
            )
        save()
        if "many" in report:
            ratio = report["many"]["tokens_per_second"] / report["transformers"]["tokens_per_second"]
            report["of_transformers"] = ratio
            if ratio < 1:
                faults.append(f"many streams have {ratio:.2f} of transformers' tokens a second")
    report["faults"] = faults
    save()
    shown = {name: report[name]["tokens_per_second"] for name in ("one", "many", "transformers") if name in report}
    shown |= {name: report[name] for name in ("speedup", "of_transformers", "ties") if name in report}
    shown |= {"of_plain": report["one"]["of_plain"]} if "one" in report else {}
    print(json.dumps(shown, indent=1), "\n".join(faults) or "no faults", sep="\n")
    return 3 if faults else 0


if __name__ == "__main__":
    raise SystemExit(main())
