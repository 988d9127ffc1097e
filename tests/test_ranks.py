"""Two ranks with 4 examples each train what one does with 8, on every engine, and leave the same files."""

from __future__ import annotations

import base64
import importlib.util
import json
import os
import socket
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from firefly.config import load_config
from firefly.errors import UsageError
from firefly.runs.metrics import read_metrics
from firefly.training import train
from multimodal import save_multimodal_model
from tiny import assert_same, run_settings, save_tiny_model, write_rows

HERE = Path(__file__).resolve().parent
ENGINES: dict[str, dict[str, Any]] = {
    "ddp": {},
    "fsdp2": {"fsdp": "full_shard auto_wrap"},
    "zero2": {"deepspeed": {"zero_optimization": {"stage": 2}}},
    # By default DeepSpeed keeps parameters as small as these whole.
    "zero3": {"deepspeed": {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}},
}
OFFLOADED = {"offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}}
ROWS = 17  # two full steps of 8, and a last one of a single example, which leaves one rank without any


@dataclass(frozen=True)
class Case:
    """What is trained, and how; the same on one rank and on two."""

    name: str
    engine: dict[str, Any] = field(default_factory=dict)
    changes: dict[str, Any] = field(default_factory=dict)

    def settings(self, place: Path, output_dir: Path, ranks: int) -> dict[str, Any]:
        task = self.changes.get("task_type", "sft")
        file = {"sft": "train.jsonl", "pretrain": "docs.jsonl"}.get(task, "pairs.jsonl")
        common = run_settings(
            place / "llama_tied",
            place / file,
            output_dir,
            task_type=task,
            train_mode="lora",
            lora_rank=4,
            lora_dropout=0.0,
            per_device_train_batch_size=8 // ranks,
            tokens_per_microbatch=200,
            max_seq_length=64 if task == "pretrain" else 512,
            max_prompt_length=None,
            learning_rate=0.01,
            num_train_epochs=2,
            seed=1,
            ddp_timeout=60,
        )
        model = {"model_name_or_path": str(place / self.changes["model"])} if "model" in self.changes else {}
        changes = {key: value for key, value in self.changes.items() if key != "model"}
        return common | changes | model | (self.engine if ranks > 1 else {})


CASES = [
    Case(f"{engine}-{task}-{mode}", settings, {"task_type": task, "train_mode": mode})
    for engine, settings in ENGINES.items()
    for task in ("sft", "dpo")
    for mode in ("full", "lora")
]
CASES += [
    Case("ddp-sft-qlora", changes={"train_mode": "qlora"}),
    Case("zero2-sft-qlora", ENGINES["zero2"], {"train_mode": "qlora"}),
    Case(
        "zero3-offload",
        {"deepspeed": {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0, **OFFLOADED}}},
        {"train_mode": "full"},
    ),
    *(Case(f"{engine}-pretrain", settings, {"task_type": "pretrain"}) for engine, settings in ENGINES.items()),
    *(Case(f"{engine}-solo", settings, {"model": "bloom"}) for engine, settings in ENGINES.items()),
    *(Case(f"{engine}-experts", settings, {"model": "mixtral"}) for engine, settings in ENGINES.items()),
    *(
        Case(f"{engine}-checkpointing", ENGINES[engine], {"gradient_checkpointing": True, "train_mode": "full"})
        for engine in ("ddp", "fsdp2", "zero3")
    ),
    *(  # towers that text never reaches
        Case(f"{engine}-towers-{mode}", ENGINES[engine], {"model": "gemma3", "train_mode": mode})
        for engine in ("ddp", "fsdp2", "zero3")
        for mode in ("full", "lora")
    ),
    *(  # our own files, whose sizes DeepSpeed is told by the model
        Case(
            f"zero{stage}-auto",
            {"deepspeed": str(HERE.parent / f"train_args/ds_z{stage}_config.json")},
            {"train_mode": "full"},
        )
        for stage in (2, 3)
    ),
    Case("ddp-evaluation", changes={"eval_ratio": 0.3}),
    Case("zero3-evaluation", ENGINES["zero3"], {"eval_ratio": 0.3, "train_mode": "full"}),
    Case("fsdp2-dpo-evaluation", ENGINES["fsdp2"], {"task_type": "dpo", "eval_ratio": 0.3}),
    Case("ddp-apart", changes={"task_type": "dpo", "model": "bloom"}),
    Case("ddp-kto-full", changes={"task_type": "kto", "train_mode": "full", "eval_ratio": 0.3}),
    *(Case(f"{engine}-kto", settings, {"task_type": "kto"}) for engine, settings in ENGINES.items()),
    *(
        Case(f"{engine}-reward-{mode}", ENGINES[engine], {"task_type": "reward", "train_mode": mode, "eval_ratio": 0.3})
        for engine in ("ddp", "fsdp2", "zero3")
        for mode in ("full", "lora")
    ),
]
NAMES = [case.name for case in CASES]
SAVING = {"lora_dropout": 0.1, "save_strategy": "steps", "save_steps": 2}
RESUMED = [
    Case(f"{engine}-resumed-{mode}", settings, {"train_mode": mode, **SAVING})
    for engine, settings in ENGINES.items()
    for mode in ("full", "lora")
]

# The first step throws the weights so far away that the second one's loss, or its gradients alone, are no numbers.
BROKEN = [
    Case(
        f"{engine}-broken-{what}",
        settings,
        {"train_mode": "full", "learning_rate": rate, "lr_scheduler_type": "constant"},
    )
    for engine, settings in ENGINES.items()
    for what, rate in (("loss", 1e15), ("gradients", 1e30))
]


def write_uneven_pairs(path: Path) -> Path:
    """Pairs of which some are twenty times as long as others."""
    rows = [
        {"prompt": f"question {i} " * (1 + i % 4), "chosen": "good " * (1 + 40 * (i % 5 == 0)), "rejected": "bad " * 3}
        for i in range(ROWS)
    ]
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("place")
    for name in ("llama_tied", "bloom", "mixtral"):
        save_tiny_model(folder / name, name, **({"router_aux_loss_coef": 0.1} if name == "mixtral" else {}))
    save_multimodal_model(folder / "gemma3", "gemma3")
    write_rows(folder / "train.jsonl", ROWS)
    write_uneven_pairs(folder / "pairs.jsonl")
    texts = [f"document {i} tells of " + "many things " * (i % 5) for i in range(36)]
    (folder / "docs.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts), encoding="utf-8")
    return folder


def launch(file: Path, processes: int = 2, seconds: int = 1200) -> subprocess.CompletedProcess[str]:
    """Run the trainings of a file on ranks of one thread each."""
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={processes}", "--standalone"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "FIREFLY_LANG": "en"}
    return subprocess.run(
        [*command, str(HERE / "many_ranks.py"), str(file)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=seconds,
    )


@pytest.fixture(scope="module")
def two_ranks(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of all cases as two ranks trained them."""
    if importlib.util.find_spec("deepspeed") is None:
        pytest.fail("deepspeed is not installed: make setup")
    folder = tmp_path_factory.mktemp("two")
    configurations = [case.settings(place, folder / case.name, ranks=2) for case in (*CASES, *RESUMED)]
    for case in RESUMED:
        again = case.settings(place, folder / f"{case.name}-again", ranks=2)
        configurations.append(again | {"resume_from_checkpoint": str(folder / case.name / "checkpoint-2")})
    configurations += [case.settings(place, folder / case.name, ranks=2) for case in BROKEN]
    (folder / "configurations.json").write_text(json.dumps(configurations), encoding="utf-8")
    done = launch(folder / "configurations.json")
    (folder / "log.txt").write_text(done.stdout + done.stderr, encoding="utf-8")
    return folder


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("firefly.runs.plots.draw_loss", lambda *_: None)


def values(folder: Path, key: str = "loss") -> list[float]:
    lines = read_metrics(folder / "metrics.jsonl")
    return [line[key] for line in lines if key in line and "train_loss" not in line]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: x for file in folder.glob("*.safetensors") for name, x in load_file(file).items()}


def read(file: Path) -> dict[str, Any]:
    """A settings file; peft writes sets in any order."""
    settings = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return {name: sorted(value, key=str) if isinstance(value, list) else value for name, value in settings.items()}


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if path.name not in ("loss.png", "log.txt")}


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_two_ranks_train_what_one_does(name: str, place: Path, two_ranks: Path, tmp_path: Path) -> None:
    case = CASES[NAMES.index(name)]
    found = two_ranks / name
    for error in found.glob("error-*.txt"):
        pytest.fail(error.read_text(encoding="utf-8"))
    assert found.is_dir(), (two_ranks / "log.txt").read_text(encoding="utf-8")[-3000:]
    expected = train(load_config(case.settings(place, tmp_path / "one", ranks=1)))
    assert len(values(expected)) > 3
    for key in ("loss", "eval_loss", "learning_rate", "rewards/margins", "logps/chosen"):
        assert values(found, key) == pytest.approx(values(expected, key), rel=1e-5, abs=1e-6), key
    # Of its norm, gradients of 0 have a large part of rounding.
    assert values(found, "grad_norm") == pytest.approx(values(expected, "grad_norm"), rel=1e-3)
    assert files(found) - {"loss.png"} == files(expected) - {"loss.png"}
    assert_same(weights(found), weights(expected), 2e-3)
    for name in ("config.json", "adapter_config.json", "generation_config.json"):
        assert read(found / name) == read(expected / name)
    counts = [json.loads((folder / "train_results.json").read_text()) for folder in (found, expected)]
    for key in ("steps", "examples", "input_tokens", "target_tokens"):
        assert counts[0][key] == counts[1][key]


@pytest.mark.slow
@pytest.mark.parametrize("case", RESUMED, ids=lambda case: case.name)
def test_two_ranks_resume_in_the_middle_of_an_epoch_as_if_nothing_had_been(case: Case, two_ranks: Path) -> None:
    whole, again = two_ranks / case.name, two_ranks / f"{case.name}-again"
    for error in (*whole.glob("error-*.txt"), *again.glob("error-*.txt")):
        pytest.fail(error.read_text(encoding="utf-8"))
    assert values(again) == values(whole)[2:]
    assert_same(weights(again), weights(whole), 0)


@pytest.mark.slow
@pytest.mark.parametrize("case", BROKEN, ids=lambda case: case.name)
def test_no_rank_moves_a_weight_by_a_loss_that_is_no_number(case: Case, two_ranks: Path) -> None:
    """DeepSpeed takes the optimizer's step within the last backward pass: a loss is looked at before it, and weights
    that moved by gradients that are no numbers are not saved."""
    found = two_ranks / case.name
    for rank in range(2):
        assert "UsageError: step 2: its " in (found / f"error-{rank}.txt").read_text(encoding="utf-8")
    assert len(values(found)) == 1
    if case.name.startswith("zero") and case.name.endswith("gradients"):
        assert not list(found.glob("checkpoint-*"))
        return
    kept = weights(found / "checkpoint-1").values()
    assert all(weight.isfinite().all() for weight in kept)
    assert max(weight.abs().max().item() for weight in kept) > 1e14


@pytest.mark.slow
def test_one_rank_goes_on_where_two_stopped(place: Path, two_ranks: Path, tmp_path: Path) -> None:
    """With dropout, ranks draw other masks; the losses stay near."""
    case = next(case for case in RESUMED if case.name == "ddp-resumed-lora")
    whole = two_ranks / case.name
    settings = case.settings(place, tmp_path / "one", ranks=1)
    found = train(load_config(settings | {"resume_from_checkpoint": str(whole / "checkpoint-2")}))
    assert len(values(found)) == len(values(whole)) - 2
    assert values(found) == pytest.approx(values(whole)[2:], rel=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["fsdp2", "zero2", "zero3"])
def test_a_checkpoint_of_another_engine_is_refused(engine: str, place: Path, two_ranks: Path, tmp_path: Path) -> None:
    case = next(case for case in RESUMED if case.name == f"{engine}-resumed-lora")
    checkpoint = two_ranks / case.name / "checkpoint-2"
    settings = case.settings(place, tmp_path / "one", ranks=1) | {"resume_from_checkpoint": str(checkpoint)}
    with pytest.raises(UsageError, match=f"written by {engine}"):
        train(load_config(settings))


ACCELERATE = ["-m", "accelerate.commands.launch", "--num_processes=2", "--main_process_port={port}"]
LAUNCHERS = {
    "accelerate": [*ACCELERATE, "--multi_gpu"],
    "accelerate-fsdp2": [*ACCELERATE, "--use_fsdp", "--fsdp_version=2", "--fsdp_reshard_after_forward=true"],
    "accelerate-zero2": [*ACCELERATE, "--use_deepspeed", "--zero_stage=2", "--gradient_clipping=0.5"],
    "deepspeed": ["-m", "deepspeed.launcher.launch", "--world_info={world}", "--master_port={port}"],
    "torchrun": ["-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"],
}


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_every_launcher_starts_two_ranks(launcher: str, place: Path, tmp_path: Path) -> None:
    settings = Case("door", changes={"max_steps": 2}).settings(place, tmp_path / "out", ranks=2)
    (tmp_path / "run.json").write_text(json.dumps(settings), encoding="utf-8")
    world = base64.urlsafe_b64encode(json.dumps({"localhost": [0, 1]}).encode()).decode()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    words = [word.format(world=world, port=port) for word in LAUNCHERS[launcher]]
    done = subprocess.run(
        [sys.executable, *words, str(HERE.parent / "train.py"), "--train_args_file", str(tmp_path / "run.json")],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "FIREFLY_LANG": "en"},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count(str(tmp_path / "out")) == 1  # one rank speaks
    engine = launcher.partition("-")[2] or "ddp"
    assert f"2 processes, {engine}: 4 examples a step each, 8 in all" in " ".join(done.stderr.split())
    assert json.loads((tmp_path / "out" / "train_results.json").read_text())["examples"] == 16


ENDING = """
import sys, torch
from firefly import ranks

def main():
    torch.distributed.init_process_group("gloo")
    model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(64, 64))
    for _ in range(3):
        model(torch.randn(4, 64)).sum().backward()
    numbers = torch.ones(1000)
    torch.distributed.all_reduce(numbers)
    ranks.leave()
    print("done")
    return 3

ranks.end(main())
"""


@pytest.mark.slow
@pytest.mark.parametrize("attempt", range(5))
def test_ranks_that_end_right_after_a_collective_keep_their_exit_code(attempt: int) -> None:
    """With sys.exit, a third of them were aborted."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1])}
    environment = os.environ | place | {"OMP_NUM_THREADS": "1", "WORLD_SIZE": "2"}
    command = [sys.executable, "-c", ENDING]
    processes = [
        subprocess.Popen(
            command, env=environment | {"RANK": rank}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for rank in ("0", "1")
    ]
    said = [process.communicate(timeout=120)[0] for process in processes]
    assert [(process.returncode, text) for process, text in zip(processes, said, strict=True)] == [(3, "done\n")] * 2


@pytest.mark.slow
def test_a_fault_of_the_users_is_said_once(place: Path, tmp_path: Path) -> None:
    settings = Case("fault").settings(place, tmp_path / "out", ranks=2) | {"lora_target": "nothing_like_it"}
    (tmp_path / "run.json").write_text(json.dumps(settings), encoding="utf-8")
    done = subprocess.run(
        [
            *(sys.executable, *LAUNCHERS["torchrun"], str(HERE.parent / "train.py")),
            *("--train_args_file", str(tmp_path / "run.json")),
        ],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "FIREFLY_LANG": "en"},
        timeout=300,
    )
    assert done.returncode != 0
    assert done.stderr.count("error: lora_target") == 1
    assert "exitcode  : 2" in done.stderr


def test_uneven_rows_give_every_rank_as_many_microbatches() -> None:
    from firefly.data.batching import assign, plan_microbatches

    generator = np.random.default_rng(0)
    for _ in range(200):
        ranks = int(generator.integers(1, 9))
        lengths = generator.integers(1, 400, generator.integers(1, 40)).tolist()
        budget = int(generator.integers(1, 1000))
        groups = plan_microbatches(lengths, budget, ranks)
        assigned = assign(groups, lengths, ranks)
        assert {len(mine) for mine in assigned} == {len(groups) // ranks}
        assert sorted(i for mine in assigned for group in mine for i in group) == list(range(len(lengths)))
        for mine in assigned:
            for group in mine:
                assert len(group) <= 1 or sum(lengths[i] for i in group) <= budget


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["full", "lora"])
def test_fsdp2_shards_on_cpus_too(mode: str, two_ranks: Path) -> None:
    """accelerate leaves its plugin aside there and trains with DDP, whose checkpoints hold an optimizer.pt."""
    written = {path.name for path in (two_ranks / f"fsdp2-resumed-{mode}" / "checkpoint-4").iterdir()}
    assert "optimizer.pt" not in written
    assert "optimizer.bin" in written
