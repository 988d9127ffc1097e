"""Ollama's rendering by the real Go: a small program with text/template and the structs that Ollama gives to templates.

It reads a list of requests, each a template with what Ollama makes of a request, and answers with their texts.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from firefly.data.schema import Message

PROGRAM = r"""
package main

import (
	"bytes"
	"encoding/json"
	"os"
	"text/template"
)

type Arguments map[string]any

type Function struct {
	Index     int
	Name      string
	Arguments Arguments
}

type Call struct {
	ID       string
	Function Function
}

type Message struct {
	Role, Content, Thinking string
	ToolCalls               []Call
	ToolName, ToolCallID    string
}

type Kind []string

func (k *Kind) UnmarshalJSON(text []byte) error {
	var one string
	if json.Unmarshal(text, &one) == nil {
		*k = Kind{one}
		return nil
	}
	var many []string
	err := json.Unmarshal(text, &many)
	*k = Kind(many)
	return err
}

func (k Kind) MarshalJSON() ([]byte, error) {
	if len(k) == 1 {
		return json.Marshal(k[0])
	}
	return json.Marshal([]string(k))
}

type Property struct {
	AnyOf       []Property          `json:"anyOf,omitempty"`
	Type        Kind                `json:"type,omitempty"`
	Items       any                 `json:"items,omitempty"`
	Description string              `json:"description,omitempty"`
	Enum        []any               `json:"enum,omitempty"`
	Properties  map[string]Property `json:"properties,omitempty"`
	Required    []string            `json:"required,omitempty"`
}

type Parameters struct {
	Type       string
	Required   []string
	Properties map[string]Property
}

type Described struct {
	Name, Description string
	Parameters        Parameters
}

type Tool struct {
	Type     string
	Function Described
}

type Request struct {
	Template   string
	Data       map[string]any
	System     string
	Messages   []Message
	Tools      []Tool
	Think, Set bool
}

type Answer struct {
	Text  string `json:"text"`
	Error string `json:"error"`
}

func render(request Request) Answer {
	functions := template.FuncMap{"json": func(value any) string {
		written, _ := json.Marshal(value)
		return string(written)
	}}
	parsed, err := template.New("").Option("missingkey=zero").Funcs(functions).Parse(request.Template)
	if err != nil {
		return Answer{Error: err.Error()}
	}
	data := request.Data
	if data == nil {
		var messages []*Message
		for number := range request.Messages {
			messages = append(messages, &request.Messages[number])
		}
		data = map[string]any{
			"System": request.System, "Messages": messages, "Tools": request.Tools, "Response": "",
			"Think": request.Think, "IsThinkSet": request.Set,
		}
	}
	var text bytes.Buffer
	if err := parsed.Execute(&text, data); err != nil {
		return Answer{Error: err.Error()}
	}
	return Answer{Text: text.String()}
}

func main() {
	var requests []Request
	if err := json.NewDecoder(os.Stdin).Decode(&requests); err != nil {
		panic(err)
	}
	answers := []Answer{}
	for _, request := range requests {
		answers = append(answers, render(request))
	}
	json.NewEncoder(os.Stdout).Encode(answers)
}
"""


class Go:
    """The program, built."""

    def __init__(self, folder: Path) -> None:
        go = shutil.which("go")
        if go is None:
            pytest.skip("Go is not installed: apt-get install golang-go")
        (folder / "main.go").write_text(PROGRAM, encoding="utf-8")
        self._program = folder / "render"
        environment = {**os.environ, "GO111MODULE": "off", "GOFLAGS": "", "CGO_ENABLED": "0"}
        environment.setdefault("GOCACHE", str(folder / "cache"))
        command = [go, "build", "-o", str(self._program), "main.go"]
        subprocess.run(command, cwd=folder, env=environment, check=True, timeout=600)

    def render(self, requests: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
        """For each request {"text", "error"}, one of them empty."""
        done = subprocess.run(
            [str(self._program)],
            input=json.dumps(list(requests)),
            capture_output=True,
            text=True,
            check=True,
            timeout=120,
        )
        return json.loads(done.stdout)


def request(
    template: str, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] = (), think: bool | None = None
) -> dict[str, Any]:
    """What the program takes, of a conversation whose neighbours have different roles."""
    return {
        "Template": template,
        "System": "\n\n".join(item.text for item in messages if item.role == "system"),
        "Messages": [
            {
                "Role": item.role,
                "Content": item.text,
                "Thinking": item.reasoning or "",
                "ToolCalls": [
                    {
                        "ID": call.get("id") or "",
                        "Function": {"Name": call["function"]["name"], "Arguments": call["function"]["arguments"]},
                    }
                    for call in item.tool_calls
                ],
                "ToolName": item.name or "",
                "ToolCallID": item.tool_call_id or "",
            }
            for item in messages
        ],
        "Tools": [{"Type": "function", "Function": tool["function"]} for tool in tools],
        "Think": bool(think),
        "Set": think is not None,
    }
