"""Texts that a model has no positions for are refused before its weights are loaded; others are trained."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from firefly.cli import main
from firefly.config import ModelConfig
from firefly.data.blocks import Blocks
from firefly.models.positions import Positions, positions_for
from firefly.models.probing import decoder
from firefly.setup.plan import make_plan
from tiny import tiny_tokenizer

MOST = 64
SMALL: dict[str, Any] = {"vocab_size": 264, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
GPT: dict[str, Any] = SMALL | {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": MOST}
PLAIN: dict[str, Any] = SMALL | {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
WIDE: dict[str, Any] = PLAIN | {"intermediate_size": 48, "max_position_embeddings": MOST}
LIMITED: dict[str, dict[str, Any]] = {
    # learned tables, some with rows kept free at their beginning
    "gpt2": GPT,
    "gpt_bigcode": GPT,
    "openai-gpt": GPT,
    "gpt_neo": PLAIN
    | {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]], "max_position_embeddings": MOST},
    "opt": PLAIN | {"ffn_dim": 48, "word_embed_proj_dim": 32, "max_position_embeddings": MOST},
    "biogpt": WIDE,
    "roberta": WIDE | {"is_decoder": True},
    "bart": SMALL
    | {"d_model": 32, "decoder_layers": 2, "encoder_layers": 1, "decoder_attention_heads": 4, "decoder_ffn_dim": 48}
    | {"encoder_attention_heads": 4, "encoder_ffn_dim": 48, "max_position_embeddings": MOST, "is_decoder": True},
    # rotary or sine, from a table that ends
    "gptj": GPT | {"rotary_dim": 8},
    "codegen": GPT | {"rotary_dim": 8},
    "ctrl": GPT | {"dff": 48},
    "roformer": WIDE | {"is_decoder": True},
    # no positions, but slopes for so many tokens
    "mpt": {"vocab_size": 264, "d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": MOST},
}
UNLIMITED: dict[str, dict[str, Any]] = {
    "llama": WIDE,
    "gpt_neox": WIDE,
    "bloom": SMALL | {"hidden_size": 32, "n_layer": 2, "n_head": 4},
    "xglm": SMALL
    | {"d_model": 32, "num_layers": 2, "attention_heads": 4, "ffn_dim": 48, "max_position_embeddings": MOST},
    "rwkv": SMALL | {"hidden_size": 32, "num_hidden_layers": 2, "context_length": MOST},
    "mamba": SMALL | {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 8},
}


def described(folder: Path, kind: str, values: dict[str, Any]) -> Any:
    config = transformers.AutoConfig.for_model(kind, **values)
    config.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return config


def runs(model: Any, count: int) -> bool:
    """Whether plain transformers takes a row of so many tokens."""
    ids = (torch.arange(count) * 7919 % 261)[None]
    try:
        with torch.no_grad():
            decoder(model)(input_ids=ids, position_ids=torch.arange(count)[None], use_cache=False)
    except TypeError:
        with torch.no_grad():
            return _runs_without_positions(model, ids)
    except (IndexError, RuntimeError):
        return False
    return True


def _runs_without_positions(model: Any, ids: torch.Tensor) -> bool:
    try:
        decoder(model)(input_ids=ids, use_cache=False)
    except (IndexError, RuntimeError):
        return False
    return True


@pytest.mark.parametrize("kind", [*LIMITED, *UNLIMITED])
def test_the_longest_text_is_the_longest_that_transformers_runs(kind: str, tmp_path: Path) -> None:
    config = described(tmp_path, kind, (LIMITED | UNLIMITED)[kind])
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    assert runs(model, MOST)
    assert runs(model, MOST + 1) == (kind in UNLIMITED)
    settings = ModelConfig(name_or_path=str(tmp_path))
    for longest in (MOST + 1, 3 * MOST):
        assert positions_for(settings, longest).most == (MOST if kind in LIMITED else None)
    assert positions_for(settings, MOST).most is None
    assert positions_for(settings, 10).most is None


@pytest.mark.parametrize(
    ("scaling", "trained"),
    [
        (None, MOST),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": MOST}, 4 * MOST),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": MOST // 4}, MOST),
        ({"rope_type": "dynamic", "factor": 2.0}, 2 * MOST),
        ({"rope_type": "linear", "factor": 8.0}, 8 * MOST),
    ],
)
def test_rotary_positions_go_as_far_as_their_scaling(scaling: Any, trained: int, tmp_path: Path) -> None:
    described(tmp_path, "llama", WIDE | ({"rope_scaling": scaling} if scaling else {}))
    assert positions_for(ModelConfig(name_or_path=str(tmp_path)), 1000) == Positions(None, trained)


# ---- in the commands ----


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Any]:
    """A model of 64 positions whose weights are not there, a short row and one that is too long."""
    described(tmp_path / "gpt2", "gpt2", GPT)
    described(tmp_path / "llama", "llama", WIDE)
    rows = [
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a" * n}]} for n in (5, 90)
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    (tmp_path / "short.jsonl").write_text(json.dumps(rows[0]) + "\n")
    texts = [{"text": "t" * 20}] * 9
    (tmp_path / "documents.jsonl").write_text("\n".join(map(json.dumps, texts)) + "\n")
    return {
        "model_name_or_path": str(tmp_path / "gpt2"),
        "train_file": str(tmp_path / "rows.jsonl"),
        "output_dir": str(tmp_path / "out"),
        "template_name": "default",
        "train_mode": "lora",
        "max_seq_length": 256,
        "compare": False,
        "use_cpu": True,
        "report_to": "none",
    }


def command(capsys: Any, name: str, settings: dict[str, Any], **changes: Any) -> tuple[int, str]:
    """(exit code, what was said) of a command with these settings in a file."""
    path = Path(settings["output_dir"]).parent / "config.json"
    path.write_text(json.dumps(settings | changes))
    return main([name, str(path)]), capsys.readouterr().err


def test_a_row_beyond_the_positions_stops_train_before_weights_are_loaded(capsys: Any, files: dict[str, Any]) -> None:
    code, said = command(capsys, "train", files)
    assert code == 2
    assert re.search(r"rows.jsonl:2 has 1\d\d tokens, and the model has 64 positions", said)
    code, said = command(capsys, "train", files, train_file=files["train_file"].replace("rows", "short"))
    assert (code, "cannot be loaded" in said) == (2, True)  # rows that fit get as far as the weights
    code, said = command(capsys, "train", files, max_seq_length=64, on_too_long="cut")
    assert (code, "cannot be loaded" in said) == (2, True)


def test_check_says_it_with_exit_3_and_plan_with_exit_2(capsys: Any, files: dict[str, Any]) -> None:
    for name, expected in (("check", 3), ("plan", 2)):
        code, said = command(capsys, name, files)
        assert code == expected
        assert "rows.jsonl:2" in said
        assert "64 positions" in said
    assert command(capsys, "check", files, max_seq_length=64, on_too_long="cut")[0] == 0


def test_a_held_out_row_beyond_the_positions_is_refused_too(capsys: Any, files: dict[str, Any]) -> None:
    short = files["train_file"].replace("rows", "short")
    code, said = command(capsys, "check", files, train_file=short, eval_file=files["train_file"])
    assert (code, "rows.jsonl:2" in said) == (3, True)


def test_a_rotary_model_beyond_its_positions_is_a_notice(capsys: Any, files: dict[str, Any]) -> None:
    code, said = command(
        capsys, "check", files, model_name_or_path=files["model_name_or_path"].replace("gpt2", "llama")
    )
    assert code == 0
    assert "more than the 64 positions that the model is made for" in said
    assert "rows.jsonl:2" in said


def test_documents_count_one_by_one_unless_they_are_joined(capsys: Any, files: dict[str, Any]) -> None:
    documents = files["train_file"].replace("rows", "documents")
    for attention, expected in (("isolated", 0), ("joined", 3)):
        changes = {"task_type": "pretrain", "train_file": documents, "document_attention": attention}
        assert command(capsys, "check", files, **changes)[0] == expected


def test_a_plan_without_data_notes_the_positions(files: dict[str, Any]) -> None:
    given = {key: value for key, value in files.items() if key != "train_file"}
    for length, noted in ((65, True), (64, False)):
        plan = make_plan("", given | {"max_seq_length": length}, "8GB", "cpu", 1.0)
        assert any("64 positions" in note for note in plan.notes) == noted


def test_a_folder_with_a_tokenizer_alone_is_enough_for_check(
    capsys: Any, files: dict[str, Any], tmp_path: Path
) -> None:
    tiny_tokenizer().save_pretrained(tmp_path / "alone")
    assert command(capsys, "check", files, model_name_or_path=str(tmp_path / "alone"))[0] == 0


class Listed:
    """Documents of these lengths, of two sources."""

    def __init__(self, lengths: list[int], sources: list[int]) -> None:
        self.index = np.array([(n, 0) for n in lengths], dtype=[("length", "<i4"), ("digest", "<u8")])
        self.sources = np.array(sources)
        self.files, self.ledgers, self.ledger, self.names = [], [], None, []
        self.fingerprint, self.hashes = "", {}


@pytest.mark.parametrize("isolated", [True, False])
@pytest.mark.parametrize("size", [4, 7, 16, 100])
def test_the_longest_text_of_blocks_is_found_by_counting_token_by_token(isolated: bool, size: int) -> None:
    rng = np.random.default_rng(0)
    for _ in range(30):
        lengths = rng.integers(1, 15, rng.integers(1, 9)).tolist()
        sources = sorted(rng.integers(0, 2, len(lengths)).tolist())
        expected, block = (0, 0), -1
        for source in (0, 1):
            stream = [doc for doc, n in enumerate(lengths) if sources[doc] == source for _ in range(n)]
            for start in range(0, len(stream), size):
                block += 1
                part = stream[start : start + size]
                longest = max(map(part.count, set(part))) if isolated else len(part)
                expected = max(expected, (longest, -block))
        blocks = Blocks(Listed(lengths, sources), size, isolated)  # type: ignore[arg-type]
        assert blocks.longest_text() == (expected[0], -expected[1])
