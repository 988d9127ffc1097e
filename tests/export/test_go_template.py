"""Our interpreter of Go's text/template: what it renders is what Go renders, and it refuses what it does not know."""

from __future__ import annotations

from typing import Any

import pytest

from firefly.export.go_template import GoTemplate, GoTemplateError
from go_renderer import Go

MESSAGES = [{"Role": "system", "Content": "be kind"}, {"Role": "user", "Content": "héllo"}, {"Role": "user"}]
DATA: dict[str, Any] = {
    "Messages": MESSAGES,
    "System": "S",
    "Tools": [],
    "Map": {"b": 1, "a": [1.5, True, None, {"z": "<&>\u2028"}], "ä": "\u3000 '\"\\\n\x07"},
    "Think": False,
}

CASES = {
    "": "",
    "plain }} text { x": "plain }} text { x",
    "a {{- .System -}} b": "aSb",
    "a \n {{- /* said */ -}} \n b": "ab",
    "{{ .System }} {{ .Nothing }}": "S <no value>",
    '{{ "{{" }}{{ "\\"\\u4e2d\\U0001f600\\n\\x41" }}{{ `raw \\n` }}': '{{"中😀\nAraw \\n',
    "{{ range .Messages }}[{{ .Role }}]{{ else }}none{{ end }}": "[system][user][user]",
    "{{ range .Tools }}x{{ else }}none {{ $.System }}{{ end }}": "none S",
    "{{ range $i, $m := .Messages }}{{ $i }}{{ $m.Role }}{{ .Content }};{{ end }}": (
        "0systembe kind;1userhéllo;2user<no value>;"
    ),
    "{{ range $key, $value := .Map }}{{ $key }}={{ json $value }} {{ end }}": (
        'a=[1.5,true,null,{"z":"\\u003c\\u0026\\u003e\\u2028"}] b=1 ä="\u3000 \'\\"\\\\\\n\\u0007" '
    ),
    '{{ $x := "" }}{{ range .Messages }}{{ $x }}{{ $x = .Role }}{{ end }}|{{ $x }}': "systemuser|user",
    "{{ $x := 1 }}{{ if true }}{{ $x := 2 }}{{ end }}{{ $x }}{{ if true }}{{ $x = 3 }}{{ end }}{{ $x }}": "13",
    '{{ if eq .System "T" }}t{{ else if eq .System "S" "U" }}s{{ else }}n{{ end }}': "s",
    "{{ if and .System (not .Tools) }}a{{ end }}{{ if or .Tools .Nothing }}b{{ else }}c{{ end }}": "ac",
    '{{ or .System .Nothing.Deeper }}{{ and .System "" .Nothing.Deeper }}{{ and 1 2 }}': "S2",
    "{{ with .System }}[{{ . }}]{{ end }}{{ with .Nothing }}x{{ else }}y{{ end }}": "[S]y",
    "{{ len .Messages }}{{ len .Tools }}{{ len (slice .Messages 1) }}{{ index .Messages 0 | json }}": (
        '302{"Content":"be kind","Role":"system"}'
    ),
    "{{ len .Map.ä }}{{ .System | len }}": "91",
    "{{ ge 2 2 }}{{ gt 2 2 }}{{ lt 1 2 }}{{ le 3 2 }}{{ ne 1 2 }}{{ eq -1 -1 }}": "truefalsetruefalsetruetrue",
    '{{ printf "%s-%q-%v-%%-%.1s" .System .Map.ä 3 "杭州" }}': 'S-"\\u3000 \'\\"\\\\\\n\\a"-3-%-杭',
    '{{ range $v := .Map.a }}{{ printf "%T" $v }} {{ end }}{{ printf "%T %T" .Map .Map.a }}': (
        "float64 bool <nil> map[string]interface {} map[string]interface {} []interface {}"
    ),
    '{{ define "x" }}<{{ . }}{{ $ }}>{{ end }}{{ template "x" .System }}{{ template "x" 1 }}': "<SS><11>",
    '{{ define "v" }}{{ json . }}{{ end }}{{ range .Map.a }}{{ template "v" . }};{{ end }}': (
        '1.5;true;null;{"z":"\\u003c\\u0026\\u003e\\u2028"};'
    ),
    '{{ range .Messages }}{{ if eq .Role "system" }}{{ continue }}{{ end }}{{ .Content }}{{ break }}{{ end }}': "héllo",
    "{{ if .Think }}t{{ end }}{{ json .Think }}{{ json .Nothing }}{{ true }}": "falsenulltrue",
}

REFUSED = (
    "{{ if .System }}",
    "{{ end }}",
    "{{ else }}",
    "{{ .System",
    "{{ upper .System }}",
    '{{ template "missing" . }}',
    "{{ eq .System 1 }}",
    "{{ .System.Deeper }}",
    "{{ .Nothing.Deeper }}",
    "{{ $missing }}",
    "{{ slice .Messages 4 }}",
    "{{ len 1 }}",
    "{{ range .System }}{{ end }}",
    "{{ | json }}",
    '{{ "\\q" }}',
    "{{ (.Map }}",
)


def test_templates_render_as_their_documentation_says():
    for text, expected in CASES.items():
        assert GoTemplate.parse(text).execute(DATA) == expected, text


@pytest.mark.parametrize("text", REFUSED)
def test_what_go_refuses_is_refused(text):
    with pytest.raises(GoTemplateError):
        GoTemplate.parse(text).execute(DATA)


@pytest.mark.parametrize("text", ["{{ html .System }}", "{{ (index .Messages 0).Role }}", "{{ 1.5 }}", "{{ .Map }}"])
def test_what_is_not_known_here_is_refused_although_go_knows_it(text):
    with pytest.raises(GoTemplateError):
        GoTemplate.parse(text).execute(DATA)


def test_a_template_that_calls_itself_without_end_is_refused():
    with pytest.raises(GoTemplateError, match="too deeply"):
        GoTemplate.parse('{{ define "x" }}{{ template "x" . }}{{ end }}{{ template "x" . }}').execute(DATA)


def test_the_fields_that_a_template_uses_are_found_wherever_they_stand():
    text = (
        '{{ define "x" }}{{ if and .A (not $.B) }}{{ end }}{{ end }}{{ range .C.D }}{{ else }}{{ $x := .E }}{{ end }}'
    )
    template = GoTemplate.parse(text)
    assert [name for name in "ABCDEFx" if template.uses(name)] == list("ABCDE")


@pytest.mark.slow
def test_go_renders_every_template_of_this_file_alike(tmp_path):
    go = Go(tmp_path)
    answers = go.render([{"Template": text, "Data": DATA} for text in (*CASES, *REFUSED)])
    for (text, expected), answer in zip(CASES.items(), answers, strict=False):
        assert (answer["error"], answer["text"]) == ("", expected), text
    for text, answer in zip(REFUSED, answers[len(CASES) :], strict=True):
        assert answer["error"], text
