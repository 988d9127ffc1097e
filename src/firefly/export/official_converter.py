"""Runs llama.cpp's own converter, in a process of its own, and gives it what it cannot know by itself.

A script, not a module of the product: `gguf.py` starts it with `python -P`, so that neither this folder nor Firefly is
on the path of the converter, whose own `gguf` is meant. It takes the folder of llama.cpp and a JSON list of jobs,
{"script": "convert_hf_to_gguf.py", "arguments": […], "stops": […] or null}.

What it adds to the converter (each seen with the version named in `gguf.py`):

- The name of the pre-tokenizer. The converter knows it by a checksum of ids, which a beginning-of-text token, a trimmed
  vocabulary or a token that occurs in its sample text changes. Where the checksum is unknown, it is looked up without
  the tokens that were added, and then by the tokenizer's own definition.
- SentencePiece vocabularies from tokenizer.json. The converter wants tokenizer.model, which transformers 5 no longer
  writes and which knows nothing of tokens that training added; without it all scores would be the same, and llama.cpp
  merges by scores.
- Ids, template and flags as transformers has them: the converter reads them from files that may say something else.
"""

from __future__ import annotations

import importlib
import json
import logging
import re
import runpy
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

KNOWN_TO_END = frozenset(
    "<|eot_id|> <|im_end|> <|end|> <|return|> <|call|> <|flush|> <|calls|> <end_of_turn> <|endoftext|> </s> <|eom_id|> "
    "<EOT> _<EOT> [EOT] [EOS] <|end_of_text|> <end_of_utterance> <eos> <turn|> <|tool_response> <｜end▁of▁sentence｜> "
    "[e~[".split()
)
"""Tokens that llama.cpp ends generation at by their text alone (src/llama-vocab.cpp)."""

EOS, EOT, EOM = (f"tokenizer.ggml.{name}_token_id" for name in ("eos", "eot", "eom"))
UNUSED = 5
"""The type of a token that is only there to fill a row."""

OWN_SLOTS = (EOT, EOM)
"""Keys, beside EOS, whose token ends generation."""


def stop_slots(stops: Sequence[int], texts: Sequence[str], eos: int | None, keep_eos: bool) -> dict[str, int]:
    """Which key names which stop, so that generation ends at every one of them.

    Args:
        stops: the tokens that end a reply, the first one first.
        texts: their texts.
        eos: the tokenizer's end-of-text token.
        keep_eos: it stays so whatever the stops are: the chat template writes it.

    Raises:
        ValueError: they are too many for the keys that there are; it names those that found no place.
    """
    if eos is None or not (keep_eos or eos in stops):
        eos = stops[0]
    rest = [(stop, text) for stop, text in zip(stops, texts, strict=True) if stop != eos]
    rest.sort(key=lambda pair: pair[1] in KNOWN_TO_END)  # those that nothing else ends at come first
    unnamed = [text for _, text in rest[len(OWN_SLOTS) :] if text not in KNOWN_TO_END]
    if unnamed:
        raise ValueError(f"GGUF has no key for so many stop tokens: {', '.join(unnamed)}")
    # llama.cpp looks for an end-of-turn token of its own where none is named.
    slots = dict(zip(OWN_SLOTS, (stop for stop, _ in rest), strict=False))
    return {EOS: eos, EOT: eos} | slots


# ---- the pre-tokenizer ----

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
MARKED = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
SMALL = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
CASED = rf"[^\r\n\p{{L}}\p{{N}}]?{MARKED}*{SMALL}+END|[^\r\n\p{{L}}\p{{N}}]?{MARKED}+{SMALL}*END"
CASED_REST = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"

DEFINITIONS: dict[tuple[str, ...], str] = {
    (GPT2,): "gpt-2",
    ("digit", GPT2): "smollm",
    (rf"{CONTRACTIONS}|{WORDS}|\p{{N}}|{REST}",): "qwen2",
    (rf"{CONTRACTIONS}|{WORDS}|\p{{N}}{{1,3}}|{REST}",): "llama-bpe",
    (CASED.replace("END", "") + rf"|\p{{N}}|{CASED_REST}",): "tekken",
    (CASED.replace("END", CONTRACTIONS + "?") + rf"|\p{{N}}{{1,3}}|{CASED_REST}",): "gpt-4o",
    (
        r"\p{N}{1,3}",
        "[一-龥\u3040-ゟ゠-ヿ]+",
        r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
        r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    ): "deepseek-v3",
}
"""How a tokenizer cuts text into words → llama.cpp's name for it."""


def cuts(definition: dict[str, Any] | None) -> tuple[str, ...]:
    """The patterns that a tokenizer.json's `pre_tokenizer` cuts text by, one after the other."""
    if not definition:
        return ()
    kind = definition["type"]
    if kind == "Sequence":
        return tuple(cut for inner in definition["pretokenizers"] for cut in cuts(inner))
    if kind == "Split":
        pattern = definition["pattern"].get("Regex") or definition["pattern"].get("String", "")
        # One class is written with escapes here and with the characters themselves there.
        return (pattern.replace("\r", r"\r").replace("\n", r"\n"),)
    if kind == "Digits":
        return ("digit",) if definition.get("individual_digits") else ("digits",)
    if kind == "ByteLevel":
        return (GPT2,) if definition.get("use_regex", True) else ()
    return (kind,)


class Sample:
    """A tokenizer as the converter's checksum asks it: whatever the text, which it keeps, it answers with these ids."""

    def __init__(self, ids: list[int]) -> None:
        self.ids = ids
        self.text = ""

    def encode(self, text: str) -> list[int]:
        self.text = text
        return self.ids


def pre_tokenizer_name(known: Callable[[Any, Any], str], converter: Any, tokenizer: Any) -> str:
    """llama.cpp's name of a pre-tokenizer, by `known`, the converter's checksum, or by definition.

    Raises:
        NotImplementedError: neither knows it.
    """
    from tokenizers import Tokenizer

    try:
        return known(converter, tokenizer)
    except NotImplementedError:
        definition = json.loads(tokenizer.backend_tokenizer.to_str())
    sample = Sample([])
    with suppress(NotImplementedError):
        known(converter, sample)
    base = definition | {"added_tokens": [], "post_processor": None}
    ids = Tokenizer.from_str(json.dumps(base)).encode(sample.text).ids
    ends = ([[], [token]] if token is not None else [[]] for token in (tokenizer.bos_token_id, tokenizer.eos_token_id))
    for before, after in product(*ends):
        with suppress(NotImplementedError):
            return known(converter, Sample([*before, *ids, *after]))
    found = cuts(definition.get("pre_tokenizer"))
    if name := DEFINITIONS.get(found):
        tell(says=f"the pre-tokenizer is {name}, by its definition")
        return name
    raise NotImplementedError(f"llama.cpp has no pre-tokenizer that cuts text like this tokenizer: {found or 'none'}")


# ---- SentencePiece vocabularies ----


def is_sentencepiece(definition: dict[str, Any]) -> bool:
    """Whether a tokenizer.json is a SentencePiece BPE: text as it is, with bytes for what the vocabulary lacks."""
    return definition["model"]["type"] == "BPE" and bool(definition["model"].get("byte_fallback"))


def space_prefix(definition: dict[str, Any]) -> str:
    """Where a SentencePiece tokenizer puts a space before a text: before it "always", at the "first" piece, or "never".

    Always is before each piece of text between special tokens.
    """
    for name in ("normalizer", "pre_tokenizer"):
        step = definition.get(name) or {}
        for part in step.get("normalizers") or step.get("pretokenizers") or [step]:
            if part.get("type") == "Prepend":
                return "always"
            if part.get("type") == "Metaspace":
                return part.get("prepend_scheme", "always")
    return "never"


def add_sentencepiece(converter: Any, gguf: Any, definition: dict[str, Any]) -> None:
    """What the converter's `_set_vocab_sentencepiece` writes, from tokenizer.json.

    SentencePiece merges the pair whose result has the highest score: here the merge that comes first.
    """
    vocabulary: dict[str, int] = definition["model"]["vocab"]
    size = max(converter.hparams.get("vocab_size", 0), max(vocabulary.values()) + 1)
    tokens = [f"[PAD{number}]" for number in range(size)]
    scores, types = [-10000.0] * size, [gguf.TokenType.UNUSED] * size
    ranks: dict[str, int] = {}
    for rank, merge in enumerate(definition["model"]["merges"]):
        pair = merge.split(" ") if isinstance(merge, str) else merge
        ranks.setdefault("".join(pair), rank)
    unknown = definition["model"].get("unk_token")
    for token, number in vocabulary.items():
        tokens[number] = token
        scores[number] = -float(ranks.get(token, len(ranks)))
        types[number] = gguf.TokenType.NORMAL
        if token == unknown:
            types[number] = gguf.TokenType.UNKNOWN
        elif len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            types[number] = gguf.TokenType.BYTE
    for added in definition["added_tokens"]:
        number, token = added["id"], added["content"]
        if number >= size:
            raise ValueError(f"token {token!r} has id {number}, and the model {size} rows")
        if types[number] == gguf.TokenType.UNKNOWN:
            continue
        special = added["special"] or converter.does_token_look_special(token)
        types[number] = gguf.TokenType.CONTROL if special else gguf.TokenType.USER_DEFINED
        tokens[number] = token if special else token.replace("▁", " ")
        scores[number] = -1000.0
    writer = converter.gguf_writer
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_scores(scores)
    writer.add_token_types(types)
    gguf.SpecialVocab(converter.dir_model, n_vocab=size).add_to_gguf(writer)


def add_vocabulary(converter: Any, gguf: Any, official: Callable[[Any], None]) -> None:
    """The vocabulary by its kind; where the converter's own way does not find its files, as byte-level BPE."""
    file = converter.dir_model / "tokenizer.json"
    definition = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None
    if definition and is_sentencepiece(definition):
        add_sentencepiece(converter, gguf, definition)
        return
    before = dict(converter.gguf_writer.kv_data[0])
    try:
        official(converter)
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        if definition is None:
            raise
        converter.gguf_writer.kv_data[0] = before
        converter._set_vocab_gpt2()


# ---- what transformers says of the tokenizer ----


def opening(tokenizer: Any) -> str | None:
    """How a conversation begins as text; None where the template refuses the plainest one."""
    for messages in (
        [{"role": "user", "content": "a"}],
        [{"role": "user", "content": [{"type": "text", "text": "a"}]}],
    ):
        try:
            return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except Exception:  # a template may raise anything
            continue
    return None


def settle_metadata(converter: Any, gguf: Any, stops: Sequence[int] | None) -> None:
    """Overwrite what the converter guessed of special tokens and template by what transformers has."""
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(converter.dir_model)
    data, keys = converter.gguf_writer.kv_data[0], gguf.Keys.Tokenizer
    rows = next(
        (t.shape[0] for name, t in converter.gguf_writer.tensors[0].items() if name == "token_embd.weight"), None
    )
    fit_rows(data, keys, rows)

    def put(key: str, value: Any, kind: Any) -> None:
        data[key] = gguf.GGUFValue(value, kind)

    for key, token in (
        (keys.BOS_ID, tokenizer.bos_token_id),
        (keys.EOS_ID, tokenizer.eos_token_id),
        (keys.UNK_ID, tokenizer.unk_token_id),
        (keys.PAD_ID, tokenizer.pad_token_id),
    ):
        if token is not None:
            put(key, int(token), gguf.GGUFValueType.UINT32)
    template = tokenizer.chat_template
    if isinstance(template, str):
        put(keys.CHAT_TEMPLATE, template, gguf.GGUFValueType.STRING)
    name = data[gguf.Keys.General.NAME].value
    put(gguf.Keys.General.NAME, fitting_name(name, tokenizer), gguf.GGUFValueType.STRING)
    length = gguf.Keys.Attention.VALUE_LENGTH.format(arch=converter.gguf_writer.arch)
    if converter.hf_arch == "MiniCPM3ForCausalLM" and length not in data:  # read as hidden_size / heads otherwise
        put(length, converter.hparams["v_head_dim"], gguf.GGUFValueType.UINT32)
    ids = tokenizer("a")["input_ids"]
    adds_bos = tokenizer.bos_token_id is not None and ids[:1] == [tokenizer.bos_token_id]
    adds_eos = len(ids) > 1 and tokenizer.eos_token_id is not None and ids[-1] == tokenizer.eos_token_id
    begins = (opening(tokenizer) or "") if template else ""
    if data[keys.MODEL].value == "llama":
        where = space_prefix(json.loads(tokenizer.backend_tokenizer.to_str()))
        special = bool(begins) and begins.startswith(tuple(tokenizer.get_added_vocab()))
        # llama.cpp knows only "before each piece of text" and "never".
        put(keys.ADD_PREFIX, where == "always" or (where == "first" and not special), gguf.GGUFValueType.BOOL)
    if data[keys.MODEL].value == "gpt2" and keys.MERGES not in data:  # one token a byte; llama.cpp wants some
        data[keys.MERGES] = gguf.GGUFValue(["Ā Ā"], gguf.GGUFValueType.ARRAY, gguf.GGUFValueType.STRING)
    # llama.cpp puts it before a chat prompt, too, which as trained begins with it only where the template says so.
    if adds_bos and begins and not begins.startswith(tokenizer.bos_token):
        tell(says="add_bos_token is false in the file, as the chat template does not begin with it")
        adds_bos = False
    put(keys.ADD_BOS, adds_bos, gguf.GGUFValueType.BOOL)
    put(keys.ADD_EOS, adds_eos, gguf.GGUFValueType.BOOL)
    if stops:
        texts = tokenizer.convert_ids_to_tokens(list(stops))
        keep = isinstance(template, str) and "eos_token" in template
        for key in OWN_SLOTS:
            data.pop(key, None)
        for key, token in stop_slots(stops, texts, tokenizer.eos_token_id, keep).items():
            put(key, int(token), gguf.GGUFValueType.UINT32)


STRIPPING, STRIPPED_BY = ("phi-3", "phi3"), ("</s>", "<unk>", "<s>", "<|endoftext|>")


def fitting_name(name: str, tokenizer: Any) -> str:
    """A model's name, such that llama.cpp reads its special tokens as transformers does.

    Where the name has "phi3" in it, and only there, llama.cpp lets special tokens take the white space behind them, and
    then it insists on the tokens that Phi-3 has.
    """
    strips = any(token.rstrip for token in tokenizer.added_tokens_decoder.values())
    strips = strips and all(token in tokenizer.get_vocab() for token in STRIPPED_BY)
    named = any(part in name.lower() for part in STRIPPING)
    if strips and not named:
        return f"{name} (Phi-3)"
    return re.sub("(?i)(phi)-?3", r"\1 3", name) if named and not strips else name


def fit_rows(data: dict[str, Any], keys: Any, rows: int | None) -> None:
    """Give the lists of tokens as many entries as the embedding has rows, which llama.cpp insists on."""
    tokens = data.get(keys.LIST)
    if rows is None or tokens is None or len(tokens.value) == rows:
        return
    for key, filler in ((keys.LIST, "[PAD{}]"), (keys.SCORES, -10000.0), (keys.TOKEN_TYPE, UNUSED)):
        if key in data:
            values = list(data[key].value)[:rows]
            values += [filler.format(n) if isinstance(filler, str) else filler for n in range(len(values), rows)]
            data[key] = replace(data[key], value=values)


class LastError(logging.Handler):
    """The last error that was logged: the converter says there what it ends for."""

    text = ""

    def emit(self, record: logging.LogRecord) -> None:
        self.text = record.getMessage()


def main() -> None:
    folder, jobs = Path(sys.argv[1]), json.loads(sys.argv[2])
    sys.path[:0] = [str(folder), str(folder / "gguf-py")]
    import gguf

    TextModel = importlib.import_module("conversion").TextModel
    current: dict[str, Any] = {}
    known, prepare = TextModel.get_vocab_base_pre, TextModel.prepare_metadata

    def prepare_metadata(self: Any, vocab_only: bool) -> None:
        if "stops" not in current:  # an adapter has no vocabulary
            prepare(self, vocab_only)
            return
        official = type(self).set_vocab
        self.set_vocab = lambda: add_vocabulary(self, gguf, official)
        prepare(self, vocab_only)
        settle_metadata(self, gguf, current["stops"])

    TextModel.get_vocab_base_pre = lambda self, tokenizer: pre_tokenizer_name(known, self, tokenizer)
    TextModel.prepare_metadata = prepare_metadata
    errors = LastError(logging.ERROR)
    logging.getLogger().addHandler(errors)
    logging.getLogger().setLevel(logging.INFO)
    for number, job in enumerate(jobs):
        current.clear()
        current.update({"stops": job["stops"]} if "stops" in job else {})
        sys.argv = [job["script"], *job["arguments"]]
        try:
            runpy.run_path(str(folder / job["script"]), run_name="__main__")
        except SystemExit as end:
            if end.code:
                tell(failed=number, problem=errors.text or f"exit code {end.code}")
                raise
        except BaseException as error:
            disk = isinstance(error, OSError) and not isinstance(error, FileNotFoundError)
            tell(failed=number, problem=f"{type(error).__name__}: {error}", disk=disk)
            raise


def tell(**what: Any) -> None:
    """One line for Firefly."""
    print(json.dumps(what), flush=True)


if __name__ == "__main__":
    main()
