"""Stand-ins for the Python tokenizers of ChatGLM2/3, Qwen 1 and Baichuan, after their published code.

Attributes, methods and their quirks are theirs: properties instead of named special tokens, commands beside the
vocabulary, special tokens taken from any text. Only the model underneath is small: it takes the longest piece it knows.
Models carry such a file beside their weights, so it imports nothing of ours.
"""

import base64
import json
import re
from pathlib import Path

from transformers import PreTrainedTokenizer


def longest_pieces(text, known, unknown):
    """The longest known piece again and again; `unknown` spells a character that is in none."""
    pieces = []
    while text:
        end = next((end for end in range(len(text), 0, -1) if text[:end] in known), 0)
        pieces += [text[:end]] if end else unknown(text[0])
        text = text[end or 1 :]
    return pieces


class SentencePieces:
    """The part of sentencepiece.SentencePieceProcessor that the models' code calls."""

    def __init__(self, model_file):
        spec = json.loads(Path(model_file).read_text(encoding="utf-8"))
        self.pieces = spec["pieces"]
        self.dummy_prefix = spec["dummy_prefix"]
        self.ids = {piece: number for number, piece in enumerate(self.pieces)}
        # User-defined symbols are found in any text, control symbols (<s>) and bytes in none.
        self.user_defined = [piece for piece in self.pieces if piece.startswith("<reserved_")]
        self.ordinary = {piece for piece in self.pieces if not re.fullmatch(r"<.+>", piece)}

    def vocab_size(self):
        return len(self.pieces)

    def encode(self, text, out_type=int):
        if not text:
            return []
        text = "▁" * self.dummy_prefix + text.replace(" ", "▁")
        pieces = []
        for part in re.split("(" + "|".join([*self.user_defined, "(?!)"]) + ")", text):
            pieces += [part] if part in self.user_defined else longest_pieces(part, self.ordinary, self._bytes)
        return pieces if out_type is str else [self.piece_to_id(piece) for piece in pieces]

    def _bytes(self, character):
        return [f"<0x{byte:02X}>" for byte in character.encode()]

    def piece_to_id(self, piece):
        return self.ids.get(piece, 0)

    def id_to_piece(self, number):
        return self.pieces[number]

    def decode_pieces(self, pieces):
        spelled = [bytes([int(piece[3:5], 16)]) if piece.startswith("<0x") else piece.encode() for piece in pieces]
        text = b"".join(spelled).decode("utf-8", errors="replace").replace("▁", " ")
        return text[1:] if self.dummy_prefix and text.startswith(" ") else text


class SPTokenizer:
    """What ChatGLM's tokenizer holds as `tokenizer`."""

    def __init__(self, model_path, commands):
        self.sp_model = SentencePieces(model_path)
        self.n_words = self.sp_model.vocab_size()
        self.bos_id, self.eos_id, self.pad_id = 1, 2, 0
        self.special_tokens, self.index_special_tokens = {}, {}
        for token in commands:
            self.special_tokens[token] = self.n_words
            self.index_special_tokens[self.n_words] = token
            self.n_words += 1

    def tokenize(self, s):
        return self.sp_model.encode(s, out_type=str)

    def encode(self, s, bos=False, eos=False):
        return [self.bos_id] * bos + self.sp_model.encode(s) + [self.eos_id] * eos

    def convert_token_to_id(self, token):
        return self.special_tokens[token] if token in self.special_tokens else self.sp_model.piece_to_id(token)

    def convert_id_to_token(self, index):
        if index in self.index_special_tokens or index in [self.eos_id, self.bos_id, self.pad_id] or index < 0:
            return ""
        return self.sp_model.id_to_piece(index)


class ChatGLM2Tokenizer(PreTrainedTokenizer):
    vocab_files_names = {"vocab_file": "tokenizer.model"}  # noqa: RUF012
    model_input_names = ["input_ids", "attention_mask", "position_ids"]  # noqa: RUF012
    commands = ("[MASK]", "[gMASK]", "[sMASK]", "sop", "eop")

    def __init__(self, vocab_file, padding_side="left", **kwargs):
        self.name = "GLMTokenizer"
        self.vocab_file = vocab_file
        self.tokenizer = SPTokenizer(vocab_file, self.commands)
        self.special_tokens = {
            "<bos>": self.tokenizer.bos_id,
            "<eos>": self.tokenizer.eos_id,
            "<pad>": self.tokenizer.pad_id,
        }
        super().__init__(padding_side=padding_side, **kwargs)

    def get_command(self, token):
        if token in self.special_tokens:
            return self.special_tokens[token]
        assert token in self.tokenizer.special_tokens, f"{token} is not a special token for {self.name}"
        return self.tokenizer.special_tokens[token]

    @property
    def unk_token(self):
        return "<unk>"

    @property
    def pad_token(self):
        return "<unk>"

    @property
    def eos_token(self):
        return "</s>"

    @property
    def eos_token_id(self):
        return self.get_command("<eos>")

    @property
    def vocab_size(self):
        return self.tokenizer.n_words

    def get_vocab(self):
        return {self._convert_id_to_token(i): i for i in range(self.vocab_size)} | self.added_tokens_encoder

    def _tokenize(self, text, **kwargs):
        return self.tokenizer.tokenize(text)

    def _convert_token_to_id(self, token):
        return self.tokenizer.convert_token_to_id(token)

    def _convert_id_to_token(self, index):
        return self.tokenizer.convert_id_to_token(index)

    def convert_tokens_to_string(self, tokens):
        return self.tokenizer.sp_model.decode_pieces(tokens)

    def save_vocabulary(self, save_directory, filename_prefix=None):
        path = Path(save_directory) / "tokenizer.model"
        path.write_bytes(Path(self.vocab_file).read_bytes())
        return (str(path),)

    def get_prefix_tokens(self):
        return [self.get_command("[gMASK]"), self.get_command("sop")]

    def build_inputs_with_special_tokens(self, token_ids_0, token_ids_1=None):
        token_ids_0 = self.get_prefix_tokens() + token_ids_0
        return token_ids_0 if token_ids_1 is None else token_ids_0 + token_ids_1 + [self.get_command("<eos>")]

    def build_prompt(self, query, history=None):
        prompt = ""
        for i, (old_query, response) in enumerate(history or []):
            prompt += f"[Round {i + 1}]\n\n问：{old_query}\n\n答：{response}\n\n"
        return prompt + f"[Round {len(history or []) + 1}]\n\n问：{query}\n\n答："


class ChatGLM3Tokenizer(ChatGLM2Tokenizer):
    commands = (*ChatGLM2Tokenizer.commands, "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>")

    def build_single_message(self, role, metadata, message):
        role_tokens = [self.get_command(f"<|{role}|>"), *self.tokenizer.encode(f"{metadata}\n")]
        return role_tokens + self.tokenizer.encode(message)

    def build_chat_input(self, query, history=None, role="user"):
        ids = []
        for item in history or []:
            ids += self.build_single_message(item["role"], item.get("metadata", ""), item["content"])
        ids += self.build_single_message(role, "", query)
        return self.get_prefix_tokens() + ids + [self.get_command("<|assistant|>")]


ENDOFTEXT, IMSTART, IMEND = "<|endoftext|>", "<|im_start|>", "<|im_end|>"


class QWenTokenizer(PreTrainedTokenizer):
    vocab_files_names = {"vocab_file": "qwen.tiktoken"}  # noqa: RUF012

    def __init__(self, vocab_file, errors="replace", **kwargs):
        super().__init__(**kwargs)
        self.errors = errors
        lines = Path(vocab_file).read_bytes().splitlines()
        self.mergeable_ranks = {base64.b64decode(line.split()[0]): int(line.split()[1]) for line in lines}
        specials = (ENDOFTEXT, IMSTART, IMEND, *(f"<|extra_{i}|>" for i in range(205)))
        self.special_tokens = {token: i for i, token in enumerate(specials, start=len(self.mergeable_ranks))}
        self.decoder = {
            number: token for token, number in (*self.mergeable_ranks.items(), *self.special_tokens.items())
        }
        self.eod_id = self.special_tokens[ENDOFTEXT]
        self.im_start_id = self.special_tokens[IMSTART]
        self.im_end_id = self.special_tokens[IMEND]

    def __len__(self):
        return len(self.decoder)

    @property
    def vocab_size(self):
        return len(self.decoder)

    def get_vocab(self):
        return self.mergeable_ranks

    def convert_tokens_to_ids(self, tokens):
        if isinstance(tokens, (str, bytes)):
            return self.special_tokens.get(tokens, self.mergeable_ranks.get(tokens))
        return [self.convert_tokens_to_ids(token) for token in tokens]

    def _add_tokens(self, new_tokens, special_tokens=False):
        if not special_tokens and new_tokens:
            raise ValueError("Adding regular tokens is not supported")
        for token in new_tokens:
            if str(token) not in (ENDOFTEXT, IMSTART, IMEND):
                raise ValueError("Adding unknown special tokens is not supported")
        return 0

    def save_vocabulary(self, save_directory, **kwargs):
        path = Path(save_directory) / "qwen.tiktoken"
        lines = (base64.b64encode(token) + b" %d\n" % rank for token, rank in self.mergeable_ranks.items())
        path.write_bytes(b"".join(lines))
        return (str(path),)

    def tokenize(self, text, allowed_special="all", disallowed_special=(), **kwargs):
        specials = self.special_tokens if allowed_special == "all" else allowed_special
        tokens = []
        for part in re.split("(" + "|".join([*map(re.escape, specials), "(?!)"]) + ")", text):
            if part in specials:
                tokens.append(part)
            else:
                for word in re.findall(r" ?\w+|[^\w\s]+|\s*\n+|\s+", part):
                    tokens += longest_pieces(word.encode(), self.mergeable_ranks, lambda byte: [byte])
        return tokens

    def _decode(self, token_ids, skip_special_tokens=False, errors=None, **kwargs):
        ids = [token_ids] if isinstance(token_ids, int) else token_ids
        if skip_special_tokens:
            ids = [i for i in ids if i < self.eod_id]
        tokens = [self.decoder[i] for i in ids]
        text = b"".join(token.encode() if isinstance(token, str) else token for token in tokens)
        return text.decode("utf-8", errors=errors or self.errors)


class BaichuanTokenizer(PreTrainedTokenizer):
    vocab_files_names = {"vocab_file": "tokenizer.model"}  # noqa: RUF012
    model_input_names = ["input_ids", "attention_mask"]  # noqa: RUF012

    def __init__(self, vocab_file, unk_token="<unk>", bos_token="<s>", eos_token="</s>", add_bos_token=False, **kwargs):
        self.vocab_file = vocab_file
        self.add_bos_token = add_bos_token
        self.sp_model = SentencePieces(vocab_file)
        super().__init__(
            bos_token=bos_token, eos_token=eos_token, unk_token=unk_token, add_bos_token=add_bos_token, **kwargs
        )

    @property
    def vocab_size(self):
        return self.sp_model.vocab_size()

    def get_vocab(self):
        return {self.convert_ids_to_tokens(i): i for i in range(self.vocab_size)} | self.added_tokens_encoder

    def _tokenize(self, text):
        return self.sp_model.encode(text, out_type=str)

    def _convert_token_to_id(self, token):
        return self.sp_model.piece_to_id(token)

    def _convert_id_to_token(self, index):
        return self.sp_model.id_to_piece(index)

    def convert_tokens_to_string(self, tokens):
        return self.sp_model.decode_pieces(tokens)

    def save_vocabulary(self, save_directory, filename_prefix=None):
        path = Path(save_directory) / "tokenizer.model"
        path.write_bytes(Path(self.vocab_file).read_bytes())
        return (str(path),)

    def build_inputs_with_special_tokens(self, token_ids_0, token_ids_1=None):
        return [self.bos_token_id] * self.add_bos_token + token_ids_0
