"""Templates render the official text, and the spans that carry loss are born with it."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from firefly.data.schema import Conversation, Message, Rendered
from firefly.data.templates import TEMPLATE_FOLDER, TEMPLATES, ChatTemplate, TemplateFailure, bind_template
from firefly.errors import UsageError

FAMILIES = {"qwen": "qwen2", "qwen1.5": "qwen1.5", "qwen2.5": "qwen2.5", "smollm2": "smollm2"}
STOP = "<|im_end|>"

# The official templates of Qwen2 and of the first Qwen1.5 revision, without marks, as tokenizers carry them.
QWEN2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
QWEN15 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content']}}"
    "{% if (loop.last and add_generation_prompt) or not loop.last %}{{ '<|im_end|>' + '\n'}}{% endif %}{% endfor %}"
    "{% if add_generation_prompt and messages[-1]['role'] != 'assistant' %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Like Qwen3's: the thinking of earlier turns is dropped once a user speaks again.
THINKING = (
    "{%- set ns = namespace(last=0) -%}{%- for m in messages -%}{%- if m.role == 'user' -%}"
    "{%- set ns.last = loop.index0 -%}{%- endif -%}{%- endfor -%}"
    "{%- for m in messages -%}{%- set text = m.content -%}"
    "{%- if m.role == 'assistant' and loop.index0 < ns.last -%}"
    "{%- set text = text.split('</think>')[-1] -%}{%- endif -%}"
    "{{- '<|im_start|>' + m.role + '\n' -}}START{{- text + '<|im_end|>' -}}END{{- '\n' -}}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}"
)
UNMARKED_THINKING = THINKING.replace("START", "").replace("END", "")
MARKED_THINKING = THINKING.replace("START{{- text + '<|im_end|>' -}}END", (
    "{%- if m.role == 'assistant' -%}{%- generation -%}{{- text + '<|im_end|>' -}}{%- endgeneration -%}"
    "{%- else -%}{{- text + '<|im_end|>' -}}{%- endif -%}"
))  # fmt: skip


def conversation(*contents: str, system: str | None = None, untrained: tuple[int, ...] = ()) -> Conversation:
    """Messages from user and assistant in turn."""
    messages = [Message.of("system", system)] if system is not None else []
    for number, content in enumerate(contents):
        role = "assistant" if number % 2 else "user"
        messages.append(Message.of(role, content, trained=number not in untrained))
    return Conversation(tuple(messages))


def trained(rendered: Rendered) -> list[str]:
    return [rendered.text[start:end] for start, end in rendered.spans]


@pytest.fixture
def with_template(chatml_tokenizer):
    """The ChatML tokenizer carrying a template of its own."""

    def carry(text: str) -> Any:
        tokenizer = copy.deepcopy(chatml_tokenizer)
        tokenizer.chat_template = text
        return tokenizer

    return carry


@pytest.fixture
def bind(with_template, tmp_path):
    """A template text bound as the tokenizer's own (auto), or as a file."""

    def bind_text(text: str, as_file: bool = False) -> ChatTemplate:
        if not as_file:
            return bind_template("auto", with_template(text))
        (tmp_path / "t.jinja").write_text(text, encoding="utf-8")
        return bind_template(str(tmp_path / "t.jinja"), with_template("unused"))

    return bind_text


NAMES = ("default", "qwen", "qwen1.5", "qwen2.5", "smollm2")
"""Templates that the tiny ChatML tokenizer has the tokens for; test_official_templates.py has all."""

# ---- official wording ----


def reference_cases(shared):
    for line in (shared / "templates" / "expected.jsonl").read_text(encoding="utf-8").splitlines():
        case = json.loads(line)
        for name, family in FAMILIES.items():
            if case["family"] == family:
                yield name, case


def test_named_templates_render_every_official_case_exactly(shared, chatml_tokenizer):
    counts = dict.fromkeys(FAMILIES, 0)
    for name, case in reference_cases(shared):
        template = bind_template(name, chatml_tokenizer)
        text, _ = template._render(case["messages"], {}, prompt=case["add_generation_prompt"])
        assert text == case["rendered"], (name, case["case"])
        counts[name] += 1
    assert counts == dict.fromkeys(FAMILIES, 5)


def test_training_text_is_the_official_one_closed_by_its_stop(shared, chatml_tokenizer):
    for name, case in reference_cases(shared):
        if case["add_generation_prompt"]:
            continue
        messages = Conversation(tuple(Message.of(item["role"], item["content"]) for item in case["messages"]))
        (rendered,) = bind_template(name, chatml_tokenizer).render(messages)
        assert rendered.text == case["rendered"] + (STOP if name == "qwen1.5" else "")
        assert trained(rendered) == [item.text + STOP for item in messages.messages if item.role == "assistant"]


def test_the_default_template_is_plain_words_and_the_tokenizers_eos(chatml_tokenizer, sentencepiece_tokenizer):
    for tokenizer, stop in ((chatml_tokenizer, "<|endoftext|>"), (sentencepiece_tokenizer, "</s>")):
        (rendered,) = bind_template("default", tokenizer).render(conversation("q1", "a1", "q2", "a2", system="s"))
        assert rendered.text == f"System: s\n\nUser: q1\nAssistant: a1 {stop}User: q2\nAssistant: a2 {stop}"
        assert trained(rendered) == [f" a1 {stop}", f" a2 {stop}"]


@pytest.mark.parametrize(("name", "text"), [("qwen", QWEN2), ("qwen1.5", QWEN15)])
def test_the_official_texts_in_this_file_are_the_official_ones(shared, with_template, name, text):
    for family, case in reference_cases(shared):
        if family == name:
            said = with_template(text).apply_chat_template(
                case["messages"], tokenize=False, add_generation_prompt=case["add_generation_prompt"]
            )
            assert said == case["rendered"]


# ---- spans ----

RESERVED = "\ufdd0\ufdd1\U000f5a1f\U000f5a20"  # set aside for marks: a text with one is refused by name
words = st.text(st.characters(exclude_categories=["Cs"], exclude_characters=RESERVED), max_size=20)


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=40)
@given(
    contents=st.lists(words, min_size=2, max_size=6).filter(lambda items: len(items) % 2 == 0), system=st.none() | words
)
def test_spans_cover_each_reply_and_its_stop_and_nothing_else(chatml_tokenizer, name, contents, system):
    template = bind_template(name, chatml_tokenizer)
    (rendered,) = template.render(conversation(*contents, system=system))
    space = " " if name == "default" else ""
    assert trained(rendered) == [space + reply + space + template.stop_tokens[0] for reply in contents[1::2]]
    assert all(left[1] < right[0] for left, right in zip(rendered.spans, rendered.spans[1:], strict=False))


@pytest.mark.parametrize("name", NAMES)
def test_a_generation_prompt_ends_where_the_reply_begins(chatml_tokenizer, name):
    template = bind_template(name, chatml_tokenizer)
    chat = conversation("q1", "a1", "q2", "a2", system="s")
    (rendered,) = template.render(chat)
    for (start, _), replied in zip(rendered.spans, (2, 4), strict=True):
        assert template.render_prompt(Conversation(chat.messages[:replied])) == rendered.text[:start]


def test_an_untrained_reply_has_no_span(chatml_tokenizer, bind):
    for template in (bind_template("qwen", chatml_tokenizer), bind(QWEN2)):
        (rendered,) = template.render(conversation("q1", "a1", "q2", "a2", untrained=(1,)))
        assert trained(rendered) == ["a2" + STOP]
        assert "a1" in rendered.text


@pytest.mark.parametrize("text", [QWEN2, QWEN15, (TEMPLATE_FOLDER / "qwen2.jinja").read_text(encoding="utf-8")])
@pytest.mark.parametrize("contents", [(), ("q",)])
def test_a_conversation_without_a_reply_renders_without_spans(bind, text, contents):
    (rendered,) = bind(text).render(conversation(*contents, system="s"))
    assert rendered.spans == ()
    assert "s<|im_end|>" in rendered.text or (text == QWEN15 and not contents)


def test_a_question_after_the_last_reply_stays_untrained(bind, chatml_tokenizer):
    for template in (bind_template("qwen1.5", chatml_tokenizer), bind(QWEN15), bind(QWEN2)):
        (rendered,) = template.render(conversation("q1", "a1", "q2"))
        assert trained(rendered) == ["a1" + STOP]
        assert "q2" in rendered.text


# ---- auto: the tokenizer's own template ----


@pytest.mark.parametrize(("name", "text"), [("qwen", QWEN2), ("qwen1.5", QWEN15)])
@settings(max_examples=40)
@given(contents=st.lists(words, min_size=1, max_size=6), system=st.none() | words)
def test_a_template_without_marks_gives_the_same_text_and_spans(chatml_tokenizer, name, text, contents, system):
    tokenizer = copy.copy(chatml_tokenizer)
    tokenizer.chat_template = text
    chat = conversation(*contents, system=system)
    assert bind_template("auto", tokenizer).render(chat) == bind_template(name, chatml_tokenizer).render(chat)


@pytest.mark.parametrize("text", [QWEN2, QWEN15])
@pytest.mark.parametrize("as_file", [True, False])
def test_a_base_models_turn_end_is_the_stop_and_its_eos_the_second(bind, chatml_tokenizer, text, as_file):
    template = bind(text, as_file)
    assert template.stop_tokens == (STOP, "<|endoftext|>")
    assert template.stop_ids == tuple(chatml_tokenizer.convert_tokens_to_ids([STOP, "<|endoftext|>"]))


@pytest.mark.parametrize(
    ("text", "stops"),
    [
        # what was said earlier is never shown again
        (QWEN2.replace("message['content']", "(message['content'] if loop.last else '')"), (STOP, "<|endoftext|>")),
        # a turn that ends with EOS
        ("{% for m in messages %}{{ m.role + ': ' + m.content + eos_token + '\n' }}{% endfor %}", ("<|endoftext|>",)),
        # a turn without an end of its own: what follows opens the next turn
        ("{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content }}{% endfor %}", ("<|endoftext|>",)),
        # plain words
        ("{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}", ("<|endoftext|>",)),
    ],
)
def test_the_stop_is_the_special_token_that_ends_a_turn_or_else_eos(bind, text, stops):
    assert bind(text).stop_tokens == stops


@pytest.mark.parametrize("text", [UNMARKED_THINKING, MARKED_THINKING])
@pytest.mark.parametrize("as_file", [True, False])
def test_a_template_that_rewrites_earlier_turns_gives_one_example_a_reply(bind, text, as_file):
    template = bind(text, as_file)
    chat = conversation("q1", "<think>x</think>a1", "q2", "<think>y</think>a2")
    first, second = template.render(chat)
    assert trained(first) == ["<think>x</think>a1" + STOP]
    assert trained(second) == ["<think>y</think>a2" + STOP]
    assert "<think>x" not in second.text
    # each as it would be served
    for rendered, replied in ((first, 1), (second, 3)):
        assert rendered.text.startswith(template.render_prompt(Conversation(chat.messages[:replied])))
    narrowed = template.render(conversation("q1", "<think>x</think>a1", "q2", "b", untrained=(1,)))
    assert [trained(item) for item in narrowed] == [["b" + STOP]]
    # without thinking nothing is rewritten, and one text holds all
    assert [trained(item) for item in template.render(conversation("q1", "a1", "q2", "a2"))] == [
        ["a1" + STOP, "a2" + STOP]
    ]


@pytest.mark.parametrize("text", [UNMARKED_THINKING, MARKED_THINKING])
def test_a_question_after_the_only_trained_reply_is_no_reason_to_refuse_it(bind, text):
    chats = [conversation("q1", "<think>x</think>a1", "q2"), conversation("q1", "a0", "q2", "a1", untrained=(1,))]
    chats.append(conversation("q1", "<think>x</think>a1", "q2", "a2", untrained=(3,)))
    for chat in chats:
        (rendered,) = bind(text).render(chat)
        (reply,) = trained(rendered)
        assert reply in ("<think>x</think>a1" + STOP, "a1" + STOP)


def test_an_untrained_reply_need_not_continue_its_prompt(bind):
    """A template whose prompt opens a thought does not take a reply without one: as context it may stand there."""
    opening = QWEN2.replace("'<|im_start|>assistant\n' }}", "'<|im_start|>assistant\n<think>\n' }}")
    chat = conversation("q1", "plain", "q2", "<think>\ny\n</think>\na2", untrained=(1,))
    (rendered,) = bind(opening).render(chat)
    assert trained(rendered) == ["y\n</think>\na2" + STOP]
    assert "plain" in rendered.text
    with pytest.raises(TemplateFailure):
        bind(opening).render(conversation("q1", "plain", "q2", "<think>\ny\n</think>\na2"))


def test_reasoning_that_a_template_does_not_write_is_refused_in_earlier_replies_too(bind):
    thinking = Message.of("assistant", "a1", reasoning="why")
    for rest in ((), (Message.of("user", "q2"),), (Message.of("user", "q2"), Message.of("assistant", "a2"))):
        with pytest.raises(TemplateFailure, match="reasoning"):
            bind(QWEN2).render(Conversation((Message.of("user", "q1"), thinking, *rest)))
        context = replace(thinking, trained=False)
        bind(QWEN2).render(Conversation((Message.of("user", "q1"), context, *rest)))


def test_text_beside_a_call_that_a_template_leaves_out_is_refused(bind):
    calls = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
        "{% if m.tool_calls %}CONTENT{{ m.tool_calls[0].function | tojson }}{% else %}{{ m.content }}{% endif %}"
        "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    call = {"type": "function", "function": {"name": "look", "arguments": {"at": 1}}}
    said, silent = (Message.of("assistant", text, tool_calls=(call,)) for text in ("Let me look.", ""))
    without, with_text = calls.replace("CONTENT", ""), calls.replace("CONTENT", "{{ m.content }}")
    for text, reply, refused in ((without, said, True), (without, silent, False), (with_text, said, False)):
        chat = Conversation((Message.of("user", "q"), reply))
        if refused:
            with pytest.raises(TemplateFailure, match="Let me look"):
                bind(text).render(chat)
            bind(text).render(Conversation((Message.of("user", "q"), replace(reply, trained=False))))
        else:
            assert '"look"' in trained(bind(text).render(chat)[0])[0]


@pytest.mark.parametrize(
    ("marked", "written"),
    [
        ("{% generation %}{{ m.content }}{% endgeneration %}<|im_end|>\n", "<|im_end|>\n"),
        ("{% generation %}{{ m.content + '<|im_end|>\n' }}{% endgeneration %}", "<|im_end|>\n"),
        ("{% generation %}{{ m.content }}{% endgeneration %}{{ '\n' }}<|im_end|>", "\n<|im_end|>"),
    ],
)
def test_marks_that_miss_the_stop_or_go_beyond_it_are_mended(bind, marked, written):
    text = (
        "{%- for m in messages -%}{{ '<|im_start|>' + m.role + '\n' }}{%- if m.role == 'assistant' -%}" + marked +
        "{%- else -%}{{ m.content + '<|im_end|>\n' }}{%- endif -%}{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}"
    )  # fmt: skip
    template = bind(text)
    (rendered,) = template.render(conversation("q1", "a1", "q2", "a2"))
    assert trained(rendered) == ["a1" + written.rstrip("\n"), "a2" + written.rstrip("\n")]
    assert rendered.text == template._render(conversation("q1", "a1", "q2", "a2").as_dicts(), {}, prompt=False)[0]


def test_marks_around_the_turns_header_do_not_train_it(bind):
    turn = "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
    text = (
        "{%- for m in messages -%}{%- if m.role == 'assistant' -%}{% generation %}" + turn + "{% endgeneration %}"
        "{%- else -%}" + turn + "{%- endif -%}{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}"
    )  # fmt: skip
    (rendered,) = bind(text).render(conversation("q1", "a1", "q2", "a2"))
    assert trained(rendered) == ["a1" + STOP, "a2" + STOP]


@pytest.mark.parametrize("reply", ["{{ m.content }}", "{% generation %}{{ m.content }}{% endgeneration %}"])
def test_a_template_without_any_turn_end_closes_each_reply_in_an_example_of_its_own(bind, reply):
    text = (
        "{%- for m in messages -%}{{ '<|im_start|>' + m.role + '\n' }}{%- if m.role == 'assistant' -%}" + reply +
        "{%- else -%}{{ m.content }}{%- endif -%}{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}"
    )  # fmt: skip
    examples = bind(text).render(conversation("q1", "a1", "q2", "a2"))
    assert [trained(rendered) for rendered in examples] == [["a1<|endoftext|>"], ["a2<|endoftext|>"]]


def test_a_short_reply_is_closed_where_it_ends_and_not_where_the_template_holds_the_same_letter(bind):
    text = (
        "{%- for m in messages -%}{%- if m.role == 'user' -%}<|im_start|>{{ m.content }}<|im_end|>"
        "{%- else -%}{{ '<think></think>' + m.content }}{%- endif -%}{%- endfor -%}"
    )
    for reply in ("t", "", "think"):
        (rendered,) = bind(text).render(conversation("q", reply))
        assert rendered.text == f"<|im_start|>q<|im_end|><think></think>{reply}<|endoftext|>"


def test_white_space_that_a_template_strips_is_no_reason_to_refuse(bind):
    template = bind(QWEN2.replace("message['content']", "message['content'] | trim"))
    (rendered,) = template.render(conversation("q", "  a b \n"))
    assert trained(rendered) == ["a b" + STOP]


def test_the_saved_template_prompts_and_stops_as_it_trained(chatml_tokenizer, with_template):
    chat = conversation("q1", "a1", "q2", "a2", system="s")
    for name in NAMES:
        named = bind_template(name, chatml_tokenizer)
        saved = bind_template("auto", with_template(named.text))
        assert saved.render(chat) == named.render(chat)
        assert saved.render_prompt(Conversation(chat.messages[:2])) == named.render_prompt(
            Conversation(chat.messages[:2])
        )
        assert saved.stop_ids[0] == named.stop_ids[0]


# ---- what is refused ----


def test_a_system_prompt_that_a_template_refuses_is_merged_or_an_error_with_its_reason(bind):
    text = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + QWEN2
    )
    template = bind(text)
    assert template.render(conversation("q", "a"))
    assert template.render(conversation("q", "a", system="s")) == template.render(conversation("s\n\nq", "a"))
    strict = replace(template, on_system="error")
    with pytest.raises(TemplateFailure, match="auto has no place for a system prompt"):
        strict.render(conversation("q", "a", system="s"))
    with pytest.raises(TemplateFailure, match=r"auto refuses this conversation: System role not supported"):
        strict.render_text(conversation("q", "a", system="s"), prompt=False)


@pytest.mark.parametrize(
    "wrong", ["{{ 1 // 0 }}", "{{ messages[99]['role']['x'] }}", "{{ range(10 ** 9) | list }}", "{{ nothing() }}"]
)
def test_whatever_a_template_raises_is_its_refusal(bind, wrong):
    template = bind("{% if messages | length == 2 %}" + wrong + "{% endif %}" + QWEN2)
    with pytest.raises(TemplateFailure, match="refuses"):
        template.render(conversation("q", "a"))


def test_a_template_cannot_reach_out_of_its_sandbox(bind):
    reach = "{{ ''.__class__.__mro__[1].__subclasses__() }}"
    with pytest.raises(UsageError, match="template_name = auto cannot be used"):
        bind(reach + QWEN2)


def test_a_template_whose_reply_does_not_continue_its_prompt_is_refused(bind):
    for text in (UNMARKED_THINKING, MARKED_THINKING):
        template = bind(text.replace("'<|im_start|>assistant\n'", "'<|im_start|>assistant\n<think>'"))
        with pytest.raises(TemplateFailure, match="generation prompt"):
            template.render(conversation("q", "a"))


def test_a_template_that_changes_a_reply_is_refused(bind):
    with pytest.raises(TemplateFailure, match="changes the text"):
        bind(QWEN2.replace("message['content']", "message['content'] | replace('z', 's')")).render(
            conversation("q", "prize")
        )
    with pytest.raises(UsageError, match="changes the text"):
        bind(QWEN2.replace("message['content']", "message['content'] | upper"))


def test_marks_around_something_else_are_refused(bind):
    text = QWEN2.replace("{{'<|im_start|>'", "{% generation %}{% endgeneration %}{{'<|im_start|>'")
    with pytest.raises(TemplateFailure, match="2 trained spans for 1 replies"):
        bind(text).render(conversation("q", "a"))


@pytest.mark.parametrize(
    ("wrong", "near"), [("qwen1", "qwen"), ("qwen2.1", "qwen2.5"), ("defualt", "default"), ("Auto", "auto")]
)
def test_an_unknown_name_names_the_nearest_and_all(chatml_tokenizer, wrong, near):
    with pytest.raises(UsageError) as caught:
        bind_template(wrong, chatml_tokenizer)
    assert caught.value.values["near"] == near
    assert all(name in str(caught.value) for name in TEMPLATES)


def test_a_missing_file_a_broken_one_and_no_template_at_all_are_refused(tmp_path, chatml_tokenizer):
    with pytest.raises(UsageError, match="does not exist"):
        bind_template(str(tmp_path / "none.jinja"), chatml_tokenizer)
    for number, content in enumerate((b"{% for m in messages %}", b"\xff\xfe", b"{{ oops( }}")):
        path = tmp_path / f"broken{number}.jinja"
        path.write_bytes(content)
        with pytest.raises(UsageError, match=f"{path.name} cannot be used"):
            bind_template(str(path), chatml_tokenizer)
    with pytest.raises(UsageError, match="has none"):
        bind_template("auto", chatml_tokenizer)


def test_a_stop_that_is_not_one_token_is_refused(sentencepiece_tokenizer):
    with pytest.raises(UsageError, match=r"'<\|im_end\|>', which is not one token"):
        bind_template("qwen", sentencepiece_tokenizer)


def test_a_stop_that_the_tokenizer_does_not_know_is_refused_though_it_is_one_unknown_token():
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1}, unk_token="<unk>"))
    with pytest.raises(UsageError, match="not one token"):
        bind_template("qwen", PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>"))


def test_a_tokenizer_without_eos_cannot_use_a_template_that_ends_with_it(chatml_tokenizer):
    tokenizer = copy.deepcopy(chatml_tokenizer)
    tokenizer.eos_token = None
    with pytest.raises(UsageError, match="EOS"):
        bind_template("default", tokenizer)


def test_further_stops_of_the_model_are_kept(chatml_tokenizer):
    template = bind_template("qwen", chatml_tokenizer, eos_ids=(7, *chatml_tokenizer.convert_tokens_to_ids([STOP])))
    assert template.stop_ids == (*chatml_tokenizer.convert_tokens_to_ids([STOP, "<|endoftext|>"]), 7)


def test_a_second_stop_that_the_tokenizer_lacks_is_left_out_and_the_rest_keep_their_ids(chatml_tokenizer, monkeypatch):
    from firefly.data import families

    spec = families.TemplateSpec("qwen2.jinja", (STOP, "<|no_such|>", "<|endoftext|>"))
    monkeypatch.setitem(families._BY_NAME, "three", spec)
    template = bind_template("three", chatml_tokenizer)
    assert template.stop_tokens == (STOP, "<|endoftext|>")
    assert list(template.stop_ids) == chatml_tokenizer.convert_tokens_to_ids(list(template.stop_tokens))
