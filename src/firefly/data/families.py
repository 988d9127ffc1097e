"""The named chat templates: a file each, and what the text alone does not say.

A name means its family's official wording, default system prompt included. A new family is one .jinja file and one
entry.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class TemplateSpec:
    """A named template.

    Attributes:
        file: the Jinja file in chat_templates/.
        stop_tokens: the tokens that end a reply, the one that is trained first; none: the tokenizer's EOS.
        aliases: further names.
        stable: a longer conversation's text continues a shorter one's. Where it does not (thinking of earlier turns is
            dropped, the last turn ends differently), each reply is trained in an example of its own.
        bos, eos: the tokens that the family's own tokenizer begins and ends a text with, for rendering without one.
        preset: Jinja in front of the file's text: a variable that this name sets and the family leaves open.
    """

    file: str
    stop_tokens: tuple[str, ...] = ()
    aliases: tuple[str, ...] = ()
    stable: bool = True
    bos: str | None = None
    eos: str | None = None
    preset: str = ""


TEMPLATES: dict[str, TemplateSpec] = {
    "default": TemplateSpec("default.jinja"),
    "qwen": TemplateSpec("qwen2.jinja", ("<|im_end|>", "<|endoftext|>"), aliases=("qwen2",), eos="<|im_end|>"),
    "qwen1.5": TemplateSpec("qwen1.5.jinja", ("<|im_end|>", "<|endoftext|>"), eos="<|im_end|>"),
    "qwen2.5": TemplateSpec("qwen2.5.jinja", ("<|im_end|>", "<|endoftext|>"), eos="<|im_end|>"),
    "qwen3": TemplateSpec("qwen3.jinja", ("<|im_end|>", "<|endoftext|>"), stable=False, eos="<|im_end|>"),
    "qwen3-nothink": TemplateSpec(
        "qwen3.jinja",
        ("<|im_end|>", "<|endoftext|>"),
        stable=False,
        eos="<|im_end|>",
        preset="{%- set enable_thinking = enable_thinking | default(false) -%}\n",
    ),
    "qwen3-instruct-2507": TemplateSpec("qwen3-instruct-2507.jinja", ("<|im_end|>", "<|endoftext|>"), eos="<|im_end|>"),
    "smollm2": TemplateSpec("smollm2.jinja", ("<|im_end|>",), bos="<|im_start|>", eos="<|im_end|>"),
    "smollm3": TemplateSpec("smollm3.jinja", ("<|im_end|>",), eos="<|im_end|>"),
    "chatml": TemplateSpec("chatml.jinja", ("<|im_end|>",), eos="<|im_end|>"),
    "hermes3": TemplateSpec("hermes3.jinja", ("<|im_end|>",), bos="<|begin_of_text|>", eos="<|im_end|>"),
    "yi": TemplateSpec("chatml.jinja", ("<|im_end|>", "<|endoftext|>"), eos="<|im_end|>"),
    "yi-1.5": TemplateSpec("yi-1.5.jinja", ("<|im_end|>", "<|endoftext|>"), bos="<|startoftext|>", eos="<|im_end|>"),
    "yi-coder": TemplateSpec("yi-coder.jinja", ("<|im_end|>",), bos="<|startoftext|>", eos="<|im_end|>"),
    "internlm": TemplateSpec("internlm.jinja", ("<eoa>", "</s>"), bos="<s>", eos="</s>"),
    "internlm2": TemplateSpec("internlm2.jinja", ("<|im_end|>", "</s>"), bos="<s>", eos="</s>"),
    "orion": TemplateSpec("orion.jinja", ("</s>",), bos="<s>", eos="</s>"),
    "minicpm": TemplateSpec("minicpm.jinja", ("</s>",), bos="<s>", eos="</s>"),
    "minicpm3": TemplateSpec("minicpm3.jinja", ("<|im_end|>", "</s>"), bos="<s>", eos="</s>"),
    "gpt-oss": TemplateSpec(
        "gpt-oss.jinja", ("<|return|>", "<|call|>"), stable=False, bos="<|startoftext|>", eos="<|return|>"
    ),
    "phi4": TemplateSpec("phi4.jinja", ("<|im_end|>", "<|endoftext|>"), bos="<|endoftext|>", eos="<|im_end|>"),
    "olmo2": TemplateSpec("olmo2.jinja", ("<|endoftext|>",), bos="<|endoftext|>", eos="<|endoftext|>"),
    "tulu3": TemplateSpec("tulu3.jinja", ("<|end_of_text|>",), bos="<|begin_of_text|>", eos="<|end_of_text|>"),
    "granite3.3": TemplateSpec("granite3.3.jinja", ("<|end_of_text|>",), bos="<|end_of_text|>", eos="<|end_of_text|>"),
    "llama2": TemplateSpec("llama2.jinja", ("</s>",), bos="<s>", eos="</s>"),
    "llama3": TemplateSpec(
        "llama3.jinja", ("<|eot_id|>", "<|end_of_text|>"), bos="<|begin_of_text|>", eos="<|eot_id|>"
    ),
    "llama3.1": TemplateSpec(
        "llama3.1.jinja",
        ("<|eot_id|>", "<|eom_id|>", "<|end_of_text|>"),
        aliases=("llama3.3",),
        bos="<|begin_of_text|>",
        eos="<|eot_id|>",
    ),
    "llama3.2": TemplateSpec(
        "llama3.2.jinja", ("<|eot_id|>", "<|eom_id|>", "<|end_of_text|>"), bos="<|begin_of_text|>", eos="<|eot_id|>"
    ),
    "mistral-v0.1": TemplateSpec("mistral-v0.1.jinja", ("</s>",), bos="<s>", eos="</s>"),
    "mistral-v0.2-old": TemplateSpec("mistral-v0.2-old.jinja", ("</s>",), bos="<s>", eos="</s>"),
    "mistral-v0.2": TemplateSpec(
        "mistral-v0.2.jinja", ("</s>",), aliases=("mistral", "mixtral"), bos="<s>", eos="</s>"
    ),
    "mixtral-8x22b": TemplateSpec("mixtral-8x22b.jinja", ("</s>",), stable=False, bos="<s>", eos="</s>"),
    "mistral-nemo": TemplateSpec("mistral-nemo.jinja", ("</s>",), stable=False, bos="<s>", eos="</s>"),
    "mistral-large-2411": TemplateSpec("mistral-large-2411.jinja", ("</s>",), bos="<s>", eos="</s>"),
    "mistral-small-2501": TemplateSpec("mistral-small-2501.jinja", ("</s>",), bos="<s>", eos="</s>"),
    "mistral-small-3.2": TemplateSpec("mistral-small-3.2.jinja", ("</s>",), stable=False, bos="<s>", eos="</s>"),
    "mistral-v1-common": TemplateSpec("mistral-v1-common.jinja", ("</s>",), bos="<s>", eos="</s>"),
    "mistral-v2-common": TemplateSpec("mistral-v2-common.jinja", ("</s>",), stable=False, bos="<s>", eos="</s>"),
    "mistral-v3-common": TemplateSpec("mistral-v3-common.jinja", ("</s>",), stable=False, bos="<s>", eos="</s>"),
    "mistral-v3-tekken-common": TemplateSpec(
        "mistral-v3-tekken-common.jinja", ("</s>",), stable=False, bos="<s>", eos="</s>"
    ),
    "mistral-v7-common": TemplateSpec("mistral-v7-common.jinja", ("</s>",), stable=False, bos="<s>", eos="</s>"),
    "mistral-v7-tekken-common": TemplateSpec(
        "mistral-v7-tekken-common.jinja", ("</s>",), stable=False, bos="<s>", eos="</s>"
    ),
    "mistral-v11-common": TemplateSpec("mistral-v11-common.jinja", ("</s>",), stable=False, bos="<s>", eos="</s>"),
    "mistral-v13-common": TemplateSpec("mistral-v13-common.jinja", ("</s>",), bos="<s>", eos="</s>"),
    "gemma": TemplateSpec("gemma.jinja", ("<end_of_turn>", "<eos>"), bos="<bos>", eos="<eos>"),
    "gemma3": TemplateSpec("gemma3.jinja", ("<end_of_turn>", "<eos>"), bos="<bos>", eos="<end_of_turn>"),
    "phi3": TemplateSpec("phi3.jinja", ("<|end|>", "<|endoftext|>"), bos="<s>", eos="<|endoftext|>"),
    "phi3-mini-2024-04": TemplateSpec(
        "phi3-mini-2024-04.jinja", ("<|end|>", "<|endoftext|>"), bos="<s>", eos="<|endoftext|>"
    ),
    "phi3-medium": TemplateSpec("phi3-medium.jinja", ("<|end|>", "<|endoftext|>"), bos="<s>", eos="<|endoftext|>"),
    "phi3.5": TemplateSpec("phi3.5.jinja", ("<|end|>", "<|endoftext|>"), bos="<s>", eos="<|endoftext|>"),
    "zephyr": TemplateSpec("zephyr.jinja", ("</s>",), bos="<s>", eos="</s>"),
    "vicuna": TemplateSpec("vicuna.jinja", ("</s>",), bos="<s>", eos="</s>"),
    "deepseek-llm": TemplateSpec(
        "deepseek-llm.jinja",
        ("<｜end▁of▁sentence｜>",),
        aliases=("deepseek",),
        bos="<｜begin▁of▁sentence｜>",
        eos="<｜end▁of▁sentence｜>",
    ),
    "deepseek-v2.5": TemplateSpec(
        "deepseek-v2.5.jinja", ("<｜end▁of▁sentence｜>",), bos="<｜begin▁of▁sentence｜>", eos="<｜end▁of▁sentence｜>"
    ),
    "deepseek-v3": TemplateSpec(
        "deepseek-v3.jinja", ("<｜end▁of▁sentence｜>",), bos="<｜begin▁of▁sentence｜>", eos="<｜end▁of▁sentence｜>"
    ),
    "deepseek-r1": TemplateSpec(
        "deepseek-r1.jinja", ("<｜end▁of▁sentence｜>",), bos="<｜begin▁of▁sentence｜>", eos="<｜end▁of▁sentence｜>"
    ),
    "deepseek-r1-distill": TemplateSpec(
        "deepseek-r1-distill.jinja",
        ("<｜end▁of▁sentence｜>",),
        stable=False,
        bos="<｜begin▁of▁sentence｜>",
        eos="<｜end▁of▁sentence｜>",
    ),
    "deepseek-v3.1": TemplateSpec(
        "deepseek-v3.1.jinja", ("<｜end▁of▁sentence｜>",), bos="<｜begin▁of▁sentence｜>", eos="<｜end▁of▁sentence｜>"
    ),
    "deepseek-coder": TemplateSpec("deepseek-coder.jinja", ("<|EOT|>",), bos="<｜begin▁of▁sentence｜>", eos="<|EOT|>"),
    "glm4": TemplateSpec("glm4.jinja", ("<|user|>", "<|observation|>", "<|endoftext|>"), eos="<|endoftext|>"),
    "glm4.6": TemplateSpec(
        "glm4.6.jinja", ("<|user|>", "<|observation|>", "<|endoftext|>"), stable=False, eos="<|endoftext|>"
    ),
    "chatglm2": TemplateSpec("chatglm2.jinja", ("</s>",), eos="</s>"),
    "chatglm3": TemplateSpec("chatglm3.jinja", ("<|user|>", "<|observation|>", "</s>"), eos="</s>"),
    "baichuan": TemplateSpec("baichuan.jinja", ("</s>",), bos="<s>", eos="</s>"),
    "baichuan2": TemplateSpec("baichuan2.jinja", ("</s>",), bos="<s>", eos="</s>"),
    "xverse": TemplateSpec("xverse.jinja", ("<|endoftext|>",), bos="<|startoftext|>", eos="<|endoftext|>"),
    "ziya": TemplateSpec("ziya.jinja", ("</s>",), aliases=("ziya2",), bos="<s>", eos="</s>"),
    "openchat-3.5": TemplateSpec("openchat-3.5.jinja", ("<|end_of_turn|>",), bos="<s>", eos="<|end_of_turn|>"),
    "seed-oss": TemplateSpec("seed-oss.jinja", ("<seed:eos>",), bos="<seed:bos>", eos="<seed:eos>"),
    "exaone3.5": TemplateSpec("exaone3.5.jinja", ("[|endofturn|]",), bos="[BOS]", eos="[|endofturn|]"),
    "command-r": TemplateSpec(
        "command-r.jinja", ("<|END_OF_TURN_TOKEN|>",), bos="<BOS_TOKEN>", eos="<|END_OF_TURN_TOKEN|>"
    ),
    "kimi-k2": TemplateSpec("kimi-k2.jinja", ("<|im_end|>",), bos="[BOS]", eos="<|im_end|>"),
    "qwen3.5": TemplateSpec("qwen3.5.jinja", ("<|im_end|>", "<|endoftext|>"), stable=False, eos="<|im_end|>"),
    "llama4": TemplateSpec("llama4.jinja", ("<|eot|>", "<|end_of_text|>"), bos="<|begin_of_text|>", eos="<|eot|>"),
    "phi4-mini": TemplateSpec(
        "phi4-mini.jinja", ("<|end|>", "<|endoftext|>"), bos="<|endoftext|>", eos="<|endoftext|>"
    ),
    "minicpm5": TemplateSpec("minicpm5.jinja", ("<|im_end|>", "</s>"), stable=False, bos="<s>", eos="</s>"),
    "granite3.0": TemplateSpec("granite3.0.jinja", ("<|end_of_text|>",), bos="<|end_of_text|>", eos="<|end_of_text|>"),
    "granite3.1": TemplateSpec("granite3.1.jinja", ("<|end_of_text|>",), bos="<|end_of_text|>", eos="<|end_of_text|>"),
    "granite4.0": TemplateSpec("granite4.0.jinja", ("<|end_of_text|>",), bos="<|end_of_text|>", eos="<|end_of_text|>"),
    "gemma4": TemplateSpec("gemma4.jinja", ("<turn|>", "<eos>"), stable=False, bos="<bos>", eos="<eos>"),
}
"""Primary name to template; aliases are looked up by `find_family`."""


def find_family(name: str) -> TemplateSpec | None:
    """The template of a name or an alias; None if there is none."""
    return _BY_NAME.get(name)


def family_names() -> list[str]:
    """Every name and alias, in the order of the table."""
    return list(_BY_NAME)


_BY_NAME = {alias: spec for name, spec in TEMPLATES.items() for alias in (name, *spec.aliases)}
