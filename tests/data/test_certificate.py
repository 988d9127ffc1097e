"""The template certificate: what it proves, and that another template is refused."""

from __future__ import annotations

import copy
import json
from dataclasses import replace

import pytest

from firefly.data.certificate import FILE_NAME, certify, read_certificate, recheck, trained_template_options
from firefly.data.encoding import Encoder
from firefly.data.templates import bind_template
from firefly.errors import UsageError

NAMES = ("default", "qwen", "qwen1.5", "qwen2.5", "qwen3", "smollm2", "chatml")


def bound(tokenizer, name: str, **choices) -> Encoder:
    return Encoder(tokenizer, bind_template(name, tokenizer, **choices))


@pytest.mark.parametrize("name", NAMES)
def test_our_templates_pass_every_check(chatml_tokenizer, name):
    encoder = bound(chatml_tokenizer, name)
    certificate = certify(encoder, encoder.template.stop_ids)
    assert certificate.passed, certificate.checks
    assert len(certificate.checks) == 5
    assert json.loads(json.dumps(certificate.as_dict()))["hash"] == certificate.hash


def test_a_template_whose_prompt_ends_in_a_space_passes_every_check(qwen_tokenizer):
    """One tokenization joins every reply to the space before it: `: Hello` is `:` and ` Hello`."""
    tokenizer = copy.deepcopy(qwen_tokenizer)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role + ': ' + m.content + eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    certificate = certify(bound(tokenizer, "auto"))
    assert certificate.passed, certificate.checks


def test_a_tokenizer_that_adds_tokens_of_its_own_fails(chatml_tokenizer, monkeypatch):
    encoder = bound(chatml_tokenizer, "qwen")
    prompt = Encoder.encode_prompt
    monkeypatch.setattr(Encoder, "encode_prompt", lambda self, *arguments: [0, *prompt(self, *arguments)])
    failed = [check.name for check in certify(encoder).checks if not check.passed]
    assert failed == ["ids_equal_apply_chat_template", "prompt_is_prefix_of_training"]


def test_a_stop_token_that_is_not_trained_fails(chatml_tokenizer):
    encoder = bound(chatml_tokenizer, "qwen")
    other = replace(encoder.template, stop_ids=(7,))
    failed = [check.name for check in certify(replace(encoder, template=other), [2]).checks if not check.passed]
    assert "stop_trained_in_every_reply" in failed
    assert "stop_in_generation_config" in failed


def test_another_template_or_tokenizer_is_refused_unless_forced(chatml_tokenizer, tmp_path, capsys):
    trained = bound(chatml_tokenizer, "qwen")
    recheck(tmp_path, trained)  # nothing is stored: nothing to compare
    (tmp_path / FILE_NAME).write_text(json.dumps(certify(trained).as_dict()), encoding="utf-8")
    recheck(tmp_path, trained)
    (tmp_path / "checkpoint-1").mkdir()
    recheck(tmp_path / "checkpoint-1", trained)
    larger = copy.deepcopy(chatml_tokenizer)
    larger.add_tokens(["Hello, who"])
    for other in (bound(chatml_tokenizer, "qwen2.5"), bound(larger, "qwen")):
        with pytest.raises(UsageError, match="--force"):
            recheck(tmp_path, other)
        recheck(tmp_path, other, force=True)
        assert "differ from those it learnt" in capsys.readouterr().err


def test_the_choices_of_the_run_are_kept_for_chat(chatml_tokenizer, tmp_path):
    trained = bound(chatml_tokenizer, "qwen", on_system="error", thinking="strip", date="2024-07-26")
    (tmp_path / FILE_NAME).write_text(json.dumps(certify(trained).as_dict()), encoding="utf-8")
    assert trained_template_options(tmp_path) == {"on_system": "error", "thinking": "strip", "date": "2024-07-26"}
    assert trained_template_options(tmp_path / "elsewhere" / "deeper") == {}
    (tmp_path / FILE_NAME).write_text("{", encoding="utf-8")
    assert read_certificate(tmp_path) is None
