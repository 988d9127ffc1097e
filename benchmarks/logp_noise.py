r"""How far bf16 sets log-ratios of preference pairs off: what a gate of DPO losses has to allow.

    python benchmarks/logp_noise.py [--data_dir ../shared/data] [--pairs 60]

One adapter, fixed at random, on SmolLM2-135M. Of each answer log π(answer) − log π_ref(answer), the policy being the
model with the adapter and the reference the one without, is computed in fp32 and in bf16: by Firefly, and by
transformers and peft under autocast, as TRL runs them. What is recorded is the error against fp32 by transformers.
"""

import argparse
import json
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measuring import versions
from pair_dump import encode_pair
from peft import LoraConfig, get_peft_model
from reporting import new_report, saver
from transformers import AutoModelForCausalLM, AutoTokenizer

from firefly.config import AdapterConfig
from firefly.data.batching import pack
from firefly.data.schema import IGNORE, Tokens
from firefly.models.adapters import ALL_LINEAR, attach_adapter, target_layers
from firefly.models.attention import choose_layout
from firefly.models.forwards import install_training_forwards
from firefly.models.loading import embedded_model

HERE = Path(__file__).resolve().parent
RANK, ALPHA = 16, 32
SPREAD = 5e-4
"""Of B's numbers: as large as some tens of steps at a rate of 1e-4 make them."""

Answer = tuple[list[int], list[int]]
"""Tokens of the prompt, tokens of the answer."""
LogP = Callable[[Answer], float]


def main() -> None:
    """Compute all log-ratios by each way and write what they are off by."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data_dir", type=Path, default=HERE.parents[1] / "shared" / "data")
    parser.add_argument("--pairs", type=int, default=60)
    parser.add_argument("--max_tokens", type=int, default=512)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=HERE / "results" / "logp_noise.json")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    model = str(embedded_model())
    pairs = read_pairs(model, arguments.data_dir / "dpo_en_demo.json", arguments.pairs, arguments.max_tokens)
    report = new_report("logp_noise", arguments) | {"versions": versions(), "errors": {}}
    report["tokens_of_an_answer"] = statistics.fmean(len(tokens) for pair in pairs for _, tokens in pair)
    save = saver(arguments.out, report)
    exact = log_ratios(*transformers_way(model, torch.float32, "sdpa"), pairs)
    ways: dict[str, Callable[[], tuple[Any, LogP]]] = {
        "firefly": lambda: firefly_way(model),
        "transformers, eager": lambda: transformers_way(model, torch.bfloat16, "eager"),
        "transformers, sdpa": lambda: transformers_way(model, torch.bfloat16, "sdpa"),
    }
    for name, make in ways.items():
        found = report["errors"][name] = describe(log_ratios(*make(), pairs) - exact)
        save()
        print(name, json.dumps(found), flush=True)


def read_pairs(model: str, data: Path, count: int, max_tokens: int) -> list[tuple[Answer, Answer]]:
    """The first pairs of `data` whose sequences fit: (chosen, rejected)."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    found = []
    for record in json.loads(data.read_text(encoding="utf-8")):
        pair = encode_pair(tokenizer, record)
        if pair is None or len(found) == count:
            continue
        prompt, *answers = pair["prompt_ids"], pair["chosen_ids"], pair["rejected_ids"]
        if len(prompt) + max(map(len, answers)) <= max_tokens:
            found.append(((prompt, answers[0]), (prompt, answers[1])))
    return found


def log_ratios(model: Any, log_p: LogP, pairs: Sequence[tuple[Answer, Answer]]) -> np.ndarray:
    """log π(answer) − log π_ref(answer), (pairs, 2)."""
    with torch.no_grad():
        policy = [[log_p(answer) for answer in pair] for pair in pairs]
        with model.disable_adapter():
            return np.array(policy) - [[log_p(answer) for answer in pair] for pair in pairs]


def describe(errors: np.ndarray) -> dict[str, dict[str, float]]:
    """Mean, standard deviation and count of the errors of answers, and of margins, in nats."""
    of = {"answers": errors.ravel(), "margins": errors[:, 0] - errors[:, 1]}
    return {name: {"mean": x.mean(), "deviation": x.std(ddof=1), "count": len(x)} for name, x in of.items()}


def firefly_way(path: str) -> tuple[Any, LogP]:
    """Our model in bf16, and an answer's log-probability by it."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
    choose_layout(model)
    model = filled(attach_adapter(model, AdapterConfig(mode="lora", rank=RANK, alpha=ALPHA)))
    install_training_forwards(model)

    def log_p(answer: Answer) -> float:
        ids = np.array([*answer[0], *answer[1]], dtype=np.int32)
        labels = ids.copy()
        labels[: len(answer[0])] = IGNORE
        return float(model(**pack([Tokens(ids, labels)]).model_inputs(), per_token=True)["logps"].double().sum())

    return model, log_p


def transformers_way(path: str, dtype: torch.dtype, attention: str) -> tuple[Any, LogP]:
    """transformers' and peft's model, and an answer's log-probability by it, under autocast in 16 bit."""
    base = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, attn_implementation=attention)
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=target_layers(base, ALL_LINEAR), task_type="CAUSAL_LM")
    model = filled(get_peft_model(base, config))

    def log_p(answer: Answer) -> float:
        prompt, tokens = answer
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            logits = model(torch.tensor([[*prompt, *tokens]])).logits[0, len(prompt) - 1 : -1]
        found = torch.log_softmax(logits.float(), -1).gather(1, torch.tensor(tokens)[:, None])
        return float(found.double().sum())

    return model, log_p


def filled(model: Any) -> Any:
    """Fill the adapter with the same numbers on every side."""
    generator = torch.Generator().manual_seed(1)
    for name, weight in model.named_parameters():
        if "lora_" in name:
            reach = SPREAD if "lora_B" in name else weight.shape[1] ** -0.5
            weight.data.copy_(reach * (torch.rand(weight.shape, generator=generator) * 2 - 1))
    return model.eval()


if __name__ == "__main__":
    main()
