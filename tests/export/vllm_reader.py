"""What vLLM's parsers make of replies: run by an interpreter that has vLLM, with cases as JSON on its input.

A case has `tokens` (name → whether special), `tools`, `prompt` and `text` of a reply, and the parsers' names. The
answer has, whole and streamed token by token as a server gets them, `[thought, content, [[name, arguments], …]]`, or an
error.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

os.environ["VLLM_LOGGING_LEVEL"] = "CRITICAL"


def make_tokenizer(tokens: dict[str, bool]) -> Any:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={letter: number for number, letter in enumerate(letters)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_tokens([AddedToken(name, special=special, normalized=False) for name, special in tokens.items()])
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def read(case: dict[str, Any], stream: bool) -> list[Any]:
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.parser.parser_manager import ParserManager

    tokenizer = make_tokenizer(case["tokens"])
    made = ParserManager.get_parser(
        tool_parser_name=case["tool_parser"],
        reasoning_parser_name=case["reasoning_parser"],
        enable_auto_tools=case["tool_parser"] is not None,
        tokenizer=tokenizer,
    )
    offered = {"tools": case["tools"], "tool_choice": "auto"} if case["tools"] and case["tool_parser"] else {}
    request = ChatCompletionRequest(
        model="model", messages=[{"role": "user", "content": "?"}], stream=stream, **offered
    )
    parser = made(tokenizer, request.tools, chat_template_kwargs={})
    request = parser.adjust_request(request)
    hidden = request.skip_special_tokens
    prompt, ids = (tokenizer.encode(case[part], add_special_tokens=False) for part in ("prompt", "text"))
    parser.set_prompt_token_ids(prompt)
    if not stream:
        text = tokenizer.decode(ids, skip_special_tokens=hidden)
        auto = case["tool_parser"] is not None
        thought, content, calls = parser.parse(text, request, enable_auto_tools=auto, model_output_token_ids=ids)
        return [thought or "", content or "", [[call.name, json.loads(call.arguments)] for call in calls or ()]]
    thought = content = written = ""
    calls = {}
    for number, token in enumerate(ids):
        text = tokenizer.decode(ids[: number + 1], skip_special_tokens=hidden)
        new, written = text[len(written) :], text
        last = number == len(ids) - 1
        delta = parser.parse_delta(new, [token], request, prompt_token_ids=prompt, finished=last)
        if delta is None:
            continue
        thought += getattr(delta, "reasoning", None) or ""
        content += delta.content or ""
        for call in delta.tool_calls or ():
            found = calls.setdefault(call.index, ["", ""])
            if call.function is not None:
                found[0] += call.function.name or ""
                found[1] += call.function.arguments or ""
    return [thought, content, [[name, json.loads(arguments)] for name, arguments in calls.values()]]


def main() -> None:
    from vllm.reasoning import ReasoningParserManager
    from vllm.tool_parsers import ToolParserManager

    given = json.load(sys.stdin)
    answers = []
    for case in given:
        answer = {}
        for way in ("whole", "streamed"):
            try:
                answer[way] = read(case, way == "streamed")
            except Exception as error:
                answer[way] = f"{type(error).__name__}: {error}"
        answers.append(answer)
    names = {
        "tools": sorted(ToolParserManager.list_registered()),
        "thoughts": sorted(ReasoningParserManager.list_registered()),
    }
    print("\n" + json.dumps({"answers": answers, "names": names}))


if __name__ == "__main__":
    main()
