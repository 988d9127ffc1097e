"""The part of Go's text/template in which `firefly.export.ollama_template` writes, executed in Python.

Ollama renders prompts with Go's text/template. What we write for it is proved where there is no Go: this interpreter
renders it, and a test holds interpreter and Go equal, byte by byte. What it does not know it refuses; it never guesses.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

DEEPEST = 100
"""Templates that call themselves deeper than this are refused (Go stops at 100,000)."""


class GoTemplateError(ValueError):
    """The template is none, or uses what this interpreter does not know."""


@dataclass(frozen=True)
class Struct:
    """A Go struct.

    Attributes:
        fields: by their Go names; any other field is an error, as in Go.
        members: keys and values as `json` writes them, in the order of the struct.
        text: what its `String` method gives; None: it has none that we know.
    """

    fields: Mapping[str, Any]
    members: tuple[tuple[str, Any], ...] = ()
    text: str | None = None


# ---- what a template consists of

Operand = tuple[str, Any]
"""("string" | "number" | "constant" | "name" | "field" | "variable" | "pipe", what it is)."""


@dataclass(frozen=True)
class Pipe:
    """`$a, $b := command | command`."""

    commands: tuple[tuple[Operand, ...], ...]
    variables: tuple[str, ...] = ()
    declares: bool = False


@dataclass(frozen=True)
class Node:
    """A piece of a template: its kind, the pipeline, the text or name, and the bodies of a branch."""

    kind: str
    pipe: Pipe | None = None
    text: str = ""
    body: tuple[Node, ...] = ()
    otherwise: tuple[Node, ...] = ()


@dataclass(frozen=True)
class GoTemplate:
    """A parsed template: its own nodes, and those of every `define`."""

    root: tuple[Node, ...]
    defined: Mapping[str, tuple[Node, ...]]

    @classmethod
    def parse(cls, text: str) -> GoTemplate:
        """Parse a template.

        Raises:
            GoTemplateError: it is none, or uses what is not known here.
        """
        parser = _Parser(text)
        nodes, end = parser.nodes()
        if end:
            raise GoTemplateError(f"unexpected {{{{ {end} }}}}")
        return cls(nodes, parser.defined)

    def execute(self, data: Mapping[str, Any]) -> str:
        """The text of the template for `data`, a map as Ollama gives it.

        Raises:
            GoTemplateError: Go would stop with an error, or the template does what is not known here.
        """
        written: list[str] = []
        _Execution(self.defined, written).run(self.root, data, [("$", data)])
        return "".join(written)

    def uses(self, name: str) -> bool:
        """Whether a field of that name, such as `ToolCalls`, stands anywhere in it."""

        def operands(pipe: Pipe) -> Iterator[Operand]:
            for command in pipe.commands:
                for operand in command:
                    yield operand
                    if operand[0] == "pipe":
                        yield from operands(operand[1])

        def found(nodes: Sequence[Node]) -> bool:
            return any(
                (node.pipe is not None and any(kind in "field variable" and name in value for kind, value in given))
                or found(node.body)
                or found(node.otherwise)
                for node in nodes
                for given in [list(operands(node.pipe)) if node.pipe else []]
            )

        return found(self.root) or any(map(found, self.defined.values()))


# ---- parsing

_TOKEN = re.compile(
    r'(?P<space>[ \t\r\n]+)|(?P<string>"(?:[^"\\\n]|\\.)*"|`[^`]*`)|(?P<number>-?\d+)|(?P<declare>:=)|(?P<mark>[=|(),])'
    r"|(?P<variable>\$\w*(?:\.[^\W\d]\w*)*)|(?P<field>(?:\.[^\W\d]\w*)+)|(?P<dot>\.)|(?P<name>[^\W\d]\w*)"
)
_WHITE = " \t\r\n"
_ESCAPE = re.compile(r"\\(?:u([0-9a-fA-F]{4})|U([0-9a-fA-F]{8})|x([0-7][0-9a-fA-F])|(.))", re.DOTALL)
_ESCAPED = {"n": "\n", "t": "\t", "r": "\r", "\\": "\\", '"': '"', "a": "\a", "b": "\b", "f": "\f", "v": "\v"}


def _unquote(token: str) -> str:
    if token[0] == "`":
        return token[1:-1].replace("\r", "")

    def character(match: re.Match[str]) -> str:
        code = match[1] or match[2] or match[3]
        if code:
            return chr(int(code, 16))
        if match[4] not in _ESCAPED:
            raise GoTemplateError(f"unknown escape \\{match[4]}")
        return _ESCAPED[match[4]]

    return _ESCAPE.sub(character, token[1:-1])


class _Parser:
    def __init__(self, text: str) -> None:
        self._pieces = list(_pieces(text))
        self._at = 0
        self.defined: dict[str, tuple[Node, ...]] = {}

    def nodes(self) -> tuple[tuple[Node, ...], str]:
        """The nodes up to an `end` or an `else`, and the text of that action; "" at the end of the template."""
        found: list[Node] = []
        while self._at < len(self._pieces):
            is_action, text = self._pieces[self._at]
            self._at += 1
            if not is_action:
                found.append(Node("text", text=text))
                continue
            word, _, rest = text.partition(" ")
            if word in ("end", "else"):
                return tuple(found), text
            if word in ("if", "range", "with"):
                found.append(self._branch(word, rest))
            elif word == "define":
                body, end = self.nodes()
                if end != "end":
                    raise GoTemplateError("define without end")
                self.defined[_unquote(rest.strip())] = body
            elif word == "template":
                tokens = _tokens(rest)
                if not tokens or tokens[0][0] != "string":
                    raise GoTemplateError("template without a name")
                pipe = _pipe(tokens[1:]) if tokens[1:] else None
                found.append(Node("template", pipe, _unquote(tokens[0][1])))
            elif word in ("break", "continue"):
                found.append(Node(word))
            else:
                found.append(Node("action", _pipe(_tokens(text))))
        return tuple(found), ""

    def _branch(self, kind: str, condition: str) -> Node:
        pipe = _pipe(_tokens(condition))
        body, end = self.nodes()
        otherwise: tuple[Node, ...] = ()
        word, _, rest = end.partition(" ")
        if word == "else":
            chained, _, inner = rest.strip().partition(" ")
            if chained:  # `else if` takes the one `end` of both
                if chained != "if" or kind != "if":
                    raise GoTemplateError(f"{{{{ {end} }}}} in {kind}")
                return Node(kind, pipe, body=body, otherwise=(self._branch("if", inner),))
            otherwise, end = self.nodes()
        if end != "end":
            raise GoTemplateError(f"{kind} without end")
        return Node(kind, pipe, body=body, otherwise=otherwise)


def _pieces(text: str) -> Iterator[tuple[bool, str]]:
    """Texts (False, …) and actions (True, …) in their order, white space trimmed as `{{-` and `-}}` say."""
    at, trim = 0, False
    while True:
        start = text.find("{{", at)
        plain = text[at:] if start < 0 else text[at:start]
        inside = start + 2
        trims_left = start >= 0 and text[inside : inside + 1] == "-" and text[inside + 1 : inside + 2] in tuple(_WHITE)
        if trim:
            plain = plain.lstrip(_WHITE)
        if trims_left:
            plain = plain.rstrip(_WHITE)
            inside += 1
        if plain:
            yield False, plain
        if start < 0:
            return
        is_comment = text[inside:].lstrip(_WHITE).startswith("/*")
        end = text.find("*/", inside) if is_comment else inside
        if end < 0:
            raise GoTemplateError("unclosed comment")
        end = _action_end(text, end)
        inner = text[inside:end]
        trim = inner.endswith("-") and inner[-2:-1] in tuple(_WHITE)
        if not is_comment:
            yield True, (inner[:-1] if trim else inner).strip(_WHITE)
        at = end + 2


def _action_end(text: str, at: int) -> int:
    """Where the `}}` of an action stands, outside its strings."""
    while at < len(text):
        if text.startswith("}}", at):
            return at
        match = _TOKEN.match(text, at) if text[at] in '"`' else None
        at = match.end() if match else at + 1
    raise GoTemplateError("unclosed action")


def _tokens(text: str) -> list[tuple[str, str]]:
    found: list[tuple[str, str]] = []
    at = 0
    while at < len(text):
        match = _TOKEN.match(text, at)
        if match is None or match.lastgroup is None:
            raise GoTemplateError(f"unexpected {text[at:]!r}")
        if match.lastgroup == "field" and at and text[at - 1] == ")":
            raise GoTemplateError("a field of a pipeline in parentheses is not known here")
        if match.lastgroup != "space":
            found.append((match.lastgroup, match[0]))
        at = match.end()
    return found


def _pipe(tokens: list[tuple[str, str]]) -> Pipe:
    variables: list[str] = []
    declares = False
    for number, (kind, text) in enumerate(tokens):
        if kind == "declare" or (kind, text) == ("mark", "="):
            named = tokens[:number]
            variables = [text for kind, text in named if kind == "variable"]
            if [text for kind, text in named if kind != "variable"] != [","] * (len(variables) - 1):
                raise GoTemplateError("unexpected assignment")
            declares = kind == "declare"
            tokens = tokens[number + 1 :]
            break
    commands: list[tuple[Operand, ...]] = []
    operands: list[Operand] = []
    at = 0
    while at < len(tokens):
        kind, text = tokens[at]
        if (kind, text) == ("mark", "|"):
            commands.append(tuple(operands))
            operands = []
        elif (kind, text) == ("mark", "("):
            depth, end = 1, at
            while depth:
                end += 1
                if end == len(tokens):
                    raise GoTemplateError("unclosed parenthesis")
                depth += (tokens[end] == ("mark", "(")) - (tokens[end] == ("mark", ")"))
            operands.append(("pipe", _pipe(tokens[at + 1 : end])))
            at = end
        else:
            operands.append(_operand(kind, text))
        at += 1
    commands.append(tuple(operands))
    if not all(commands):
        raise GoTemplateError("a pipeline without a command")
    return Pipe(tuple(commands), tuple(variables), declares)


def _operand(kind: str, text: str) -> Operand:
    if kind == "string":
        return "string", _unquote(text)
    if kind == "number":
        return "number", int(text)
    if kind == "name" and text in ("true", "false", "nil"):
        return "constant", {"true": True, "false": False, "nil": None}[text]
    if kind == "name":
        if text not in FUNCTIONS and text not in ("and", "or"):
            raise GoTemplateError(f"function {text!r} is not known here")
        return "name", text
    if kind == "dot":
        return "field", ()
    if kind == "field":
        return "field", tuple(text[1:].split("."))
    if kind == "variable":
        return "variable", tuple(text.split("."))
    raise GoTemplateError(f"unexpected {text!r}")


# ---- executing


class _Break(Exception):
    """`break` in a range."""


class _Continue(Exception):
    """`continue` in a range."""


@dataclass
class _Execution:
    defined: Mapping[str, tuple[Node, ...]]
    written: list[str]
    depth: int = field(default=0)

    def run(self, nodes: Sequence[Node], dot: Any, variables: list[tuple[str, Any]]) -> None:
        for node in nodes:
            if node.kind == "text":
                self.written.append(node.text)
            elif node.kind == "break":
                raise _Break
            elif node.kind == "continue":
                raise _Continue
            elif node.kind == "action" and node.pipe is not None:
                value = self._evaluate(node.pipe, dot, variables)
                if not node.pipe.variables:
                    self.written.append(show(value))
            elif node.kind == "template":
                self._call(node, dot, variables)
            elif node.pipe is not None:
                mark = len(variables)
                if node.kind == "range":
                    self._range(node, node.pipe, dot, variables)
                else:
                    value = self._evaluate(node.pipe, dot, variables)
                    inner = value if node.kind == "with" and is_true(value) else dot
                    self.run(node.body if is_true(value) else node.otherwise, inner, variables)
                del variables[mark:]

    def _call(self, node: Node, dot: Any, variables: list[tuple[str, Any]]) -> None:
        if node.text not in self.defined:
            raise GoTemplateError(f"template {node.text!r} is not defined")
        if self.depth == DEEPEST:
            raise GoTemplateError(f"template {node.text!r} calls itself too deeply")
        value = None if node.pipe is None else self._evaluate(node.pipe, dot, variables)
        self.depth += 1
        self.run(self.defined[node.text], value, [("$", value)])
        self.depth -= 1

    def _range(self, node: Node, pipe: Pipe, dot: Any, variables: list[tuple[str, Any]]) -> None:
        value = self._evaluate(Pipe(pipe.commands), dot, variables)
        if value is None:
            items: list[tuple[Any, Any]] = []
        elif isinstance(value, Mapping):
            items = sorted(value.items())  # Go ranges over a map in the order of its keys
        elif isinstance(value, list | tuple):
            items = list(enumerate(value))
        else:
            raise GoTemplateError(f"range can't iterate over {value!r}")
        if not items:
            self.run(node.otherwise, dot, variables)
        for key, item in items:
            mark = len(variables)
            given = (key, item) if len(pipe.variables) == 2 else (item,) * len(pipe.variables)
            variables += zip(pipe.variables, given, strict=True)
            try:
                self.run(node.body, item, variables)
            except _Continue:
                continue
            except _Break:
                break
            finally:
                del variables[mark:]

    def _evaluate(self, pipe: Pipe, dot: Any, variables: list[tuple[str, Any]]) -> Any:
        last: tuple[Any, ...] = ()
        for command in pipe.commands:
            last = (self._command(command, last, dot, variables),)
        (value,) = last
        for name in pipe.variables:
            if pipe.declares:
                variables.append((name, value))
                continue
            place = next((i for i in range(len(variables) - 1, -1, -1) if variables[i][0] == name), None)
            if place is None:
                raise GoTemplateError(f"undefined variable {name!r}")
            variables[place] = (name, value)
        return value

    def _command(
        self, command: Sequence[Operand], last: tuple[Any, ...], dot: Any, variables: list[tuple[str, Any]]
    ) -> Any:
        (kind, value), *rest = command
        if kind != "name":
            if rest or last:
                raise GoTemplateError("can't give an argument to what is no function")
            return self._value(kind, value, dot, variables)
        if value in ("and", "or"):  # which stop at the first argument that decides, since Go 1.18
            result = None
            for other, item in rest:
                result = self._value(other, item, dot, variables)
                if is_true(result) == (value == "or"):
                    return result
            return last[0] if last else result
        arguments = [self._value(other, item, dot, variables) for other, item in rest]
        return FUNCTIONS[value](*arguments, *last)

    def _value(self, kind: str, value: Any, dot: Any, variables: list[tuple[str, Any]]) -> Any:
        if kind == "pipe":
            return self._evaluate(value, dot, variables)
        if kind == "name":
            return FUNCTIONS[value]()
        if kind == "field":
            return _field(dot, value)
        if kind == "variable":
            name, *path = value
            for known, item in reversed(variables):
                if known == name:
                    return _field(item, path)
            raise GoTemplateError(f"undefined variable {name!r}")
        return value


def _field(value: Any, path: Sequence[str]) -> Any:
    for name in path:
        if isinstance(value, Struct):
            if name not in value.fields:
                raise GoTemplateError(f"can't evaluate field {name}")
            value = value.fields[name]
        elif isinstance(value, Mapping):
            value = value.get(name)  # Ollama's option missingkey=zero
        else:
            raise GoTemplateError(f"can't evaluate field {name} of {value!r}")
    return value


def is_true(value: Any) -> bool:
    """What `if` takes for true: all but zero values and empty texts, lists and maps; a struct always is."""
    return isinstance(value, Struct) or bool(value)


def show(value: Any) -> str:
    """What an action prints."""
    if isinstance(value, str):
        return value
    if value is None:
        return "<no value>"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return str(value)
    if isinstance(value, Struct) and value.text is not None:
        return value.text
    raise GoTemplateError(f"how Go prints {value!r} is not known here")


# ---- functions

_JSON_ESCAPES = {'"': '\\"', "\\": "\\\\", "\n": "\\n", "\r": "\\r", "\t": "\\t"}
_QUOTE_ESCAPES = _JSON_ESCAPES | {"\a": "\\a", "\b": "\\b", "\f": "\\f", "\v": "\\v"}


def to_json(value: Any) -> str:
    """Ollama's `json`: Go's json.Marshal, which sorts the keys of maps and escapes `<`, `>` and `&`."""
    if isinstance(value, str):
        escaped = (
            _JSON_ESCAPES.get(c) or (f"\\u{ord(c):04x}" if c < " " or c in "<>&\u2028\u2029" else c) for c in value
        )
        return '"' + "".join(escaped) + '"'
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):  # Go decodes every number to a float64
        number = float(value)
        if number.is_integer() and abs(number) < 1e21:
            return str(int(number))
        if not 1e-6 <= abs(number) < 1e21:
            return re.sub(r"e([+-])0(\d)$", r"e\1\2", repr(number))
        return format(number, "f") if "e" in repr(number) and len(repr(number)) < 9 else repr(number)
    if isinstance(value, Struct | Mapping):
        pairs = value.members if isinstance(value, Struct) else sorted(value.items())
        return "{" + ",".join(f"{to_json(key)}:{to_json(item)}" for key, item in pairs) + "}"
    if isinstance(value, list | tuple):
        return "[" + ",".join(map(to_json, value)) + "]"
    raise GoTemplateError(f"json of {value!r} is not known here")


def quote(text: str) -> str:
    """`%q`: a Go string, in which only what prints stands as it is."""

    def escaped(character: str) -> str:
        if character in _QUOTE_ESCAPES:
            return _QUOTE_ESCAPES[character]
        if character.isprintable():
            return character
        code = ord(character)
        if code < 0x20 or code == 0x7F:
            return f"\\x{code:02x}"
        return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"

    return '"' + "".join(map(escaped, text)) + '"'


def go_type(value: Any) -> str:
    """`%T` of what Go's JSON decoder makes."""
    kinds = {str: "string", bool: "bool", dict: "map[string]interface {}", list: "[]interface {}", type(None): "<nil>"}
    if type(value) in (int, float):
        return "float64"
    if type(value) not in kinds:
        raise GoTemplateError(f"the type of {value!r} is not known here")
    return kinds[type(value)]


def _printf(form: str, *values: Any) -> str:
    given = iter(values)

    def written(match: re.Match[str]) -> str:
        if match[0] == "%%":
            return "%"
        value = next(given, given)
        if value is given:
            raise GoTemplateError(f"printf {form!r} lacks a value")
        if match[0] == "%T":
            return go_type(value)
        if match[0] == "%q" and isinstance(value, str):
            return quote(value)
        if match[0] == "%.1s" and isinstance(value, str):
            return value[:1]
        if (match[0] == "%s" and isinstance(value, str)) or match[0] == "%v":
            return show(value)
        raise GoTemplateError(f"printf {match[0]} of {value!r} is not known here")

    text = re.sub(r"%(?:\.\d)?.", written, form)
    if next(given, given) is not given:
        raise GoTemplateError(f"printf {form!r} has too many values")
    return text


def _kind(value: Any) -> type:
    if isinstance(value, bool) or not isinstance(value, str | int):
        return bool if isinstance(value, bool) else type(value)
    return str if isinstance(value, str) else int


def _equal(first: Any, *others: Any) -> bool:
    if not others or any(_kind(first) is not _kind(other) for other in others):
        raise GoTemplateError("incompatible types for comparison")
    return any(first == other for other in others)


def _less(first: Any, second: Any) -> bool:
    if _kind(first) is not _kind(second) or _kind(first) not in (str, int):
        raise GoTemplateError("incompatible types for comparison")
    return first < second


def _length(value: Any) -> int:
    if isinstance(value, str):
        return len(value.encode())
    if isinstance(value, list | tuple | Mapping):
        return len(value)
    raise GoTemplateError(f"len of {value!r}")


def _index(value: Any, *places: Any) -> Any:
    for place in places:
        if isinstance(value, Mapping):
            value = value.get(place)
        elif isinstance(value, list | tuple) and isinstance(place, int) and 0 <= place < len(value):
            value = value[place]
        else:
            raise GoTemplateError(f"index {place!r} of {value!r}")
    return value


def _slice(value: Any, *borders: int) -> Any:
    if not isinstance(value, list | tuple) or len(borders) > 2:
        raise GoTemplateError(f"slice of {value!r}")
    start, end = (*borders, len(value))[:2] if borders else (0, len(value))
    if not 0 <= start <= end <= len(value):
        raise GoTemplateError("slice index out of range")
    return value[start:end]


FUNCTIONS: dict[str, Callable[..., Any]] = {
    "eq": _equal,
    "ne": lambda first, second: not _equal(first, second),
    "lt": _less,
    "le": lambda first, second: not _less(second, first),
    "gt": lambda first, second: _less(second, first),
    "ge": lambda first, second: not _less(first, second),
    "not": lambda value: not is_true(value),
    "len": _length,
    "index": _index,
    "slice": _slice,
    "printf": _printf,
    "json": to_json,
}
