"""The server's own description, narrowed to requests that it has to answer, for a fuzzer that is to reach the engine.

The description says what each field may be. What goes with what (`stream_options` with `stream`, a tool's message with
a call before it) it leaves to the server's errors, where nearly everything made up from it ends.
"""

from __future__ import annotations

from typing import Any

Schema = dict[str, Any]

# What may be given whatever else is.
_FREE = (
    "temperature top_p top_k min_p seed presence_penalty frequency_penalty repetition_penalty "
    "user xray n stop logit_bias"
)


def _object(required: Schema, optional: Schema | None = None) -> Schema:
    properties = {**(optional or {}), **required}
    return {"type": "object", "properties": properties, "required": list(required), "additionalProperties": False}


def _list(items: Schema, least: int, most: int) -> Schema:
    return {"type": "array", "items": items, "minItems": least, "maxItems": most}


_BOOLEAN = {"type": "boolean"}
_TEXT = {"type": "string", "maxLength": 40}
# Whole numbers one by one: to JSON schema 1.0 is one too, and the server takes nothing for what it is not.
_FEW = {"enum": list(range(6))}
_SOON = {"enum": list(range(1, 9))}
_ID = {"enum": list(range(301))}
# A grammar cannot be made of just any schema.
_ANSWER = {
    "enum": [
        {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
        {"type": "object", "properties": {"n": {"type": "integer"}, "deep": {"type": "boolean"}}},
        {"type": "array", "items": {"enum": ["a", 1, None]}},
    ]
}
_ARGUMENTS = {"enum": _ANSWER["enum"][:2]}


def narrowed(description: Schema, model: str) -> Schema:
    """A copy of the description, in which the two kinds of request are sound and end soon."""
    described = description["components"]["schemas"]
    narrow = {
        "ChatRequest": _chats(_free(described["ChatRequest"]), {"const": model}),
        "CompletionRequest": _completions(_free(described["CompletionRequest"]), {"const": model}),
    }
    return {**description, "components": {**description["components"], "schemas": {**described, **narrow}}}


def _free(described: Schema) -> Schema:
    return {name: described["properties"][name] for name in _FREE.split()} | {
        "n": {"enum": [None, 1, 2, 4]},
        "seed": {"enum": [None, 0, 7, -(2**63), 2**63 - 1]},
        "top_k": {"enum": [None, 0, 1, 5, 2**64]},
        "stop": _list({"type": "string", "minLength": 1, "maxLength": 5}, 0, 3),
        "logit_bias": _object(
            {}, {str(token): {"type": "number", "minimum": -100, "maximum": 100} for token in (1, 99)}
        ),
    }


def _chats(free: Schema, model: Schema) -> Schema:
    part = _object({"type": {"const": "text"}, "text": _TEXT})
    asked = _object(
        {"role": {"enum": ["system", "developer", "user"]}, "content": {"anyOf": [_TEXT, _list(part, 1, 2)]}}
    )
    said = _object({"role": {"const": "assistant"}, "content": _TEXT}, {"reasoning_content": _TEXT})
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    called = [
        {"role": "user", "content": "?"},
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c", "content": "!"},
    ]
    base = {
        "model": model,
        "max_tokens": _SOON,
        "messages": {"anyOf": [_list({"anyOf": [asked, said]}, 1, 4), {"const": called}]},
    }
    schema = _object({"name": {"const": "answer"}, "schema": _ANSWER}, {"strict": _BOOLEAN})
    answer_format = [
        _object({"type": {"enum": ["text", "json_object"]}}),
        _object({"type": {"const": "json_schema"}, "json_schema": schema}),
    ]
    function = _object({"name": {"const": "f"}}, {"description": _TEXT, "parameters": _ARGUMENTS})
    named = {"type": "function", "function": {"name": "f"}}
    tools = _list(_object({"type": {"const": "function"}, "function": function}), 1, 1)
    tool_choice = {"enum": ["none", "auto", "required", named]}
    return {
        "anyOf": [
            _object(base, free | {"stream": _BOOLEAN}),
            _object(base | {"stream": {"const": True}, "stream_options": _object({"include_usage": _BOOLEAN})}, free),
            _object(base | {"logprobs": {"const": True}}, free | {"top_logprobs": _FEW, "stream": _BOOLEAN}),
            _object(base | {"response_format": {"anyOf": answer_format}}, free | {"stream": _BOOLEAN}),
            _object(
                base | {"tools": tools, "tool_choice": tool_choice},
                free | {"parallel_tool_calls": _BOOLEAN, "stream": _BOOLEAN},
            ),
        ]
    }


def _completions(free: Schema, model: Schema) -> Schema:
    ids = _list(_ID, 1, 12)
    anything = {"anyOf": [_TEXT, _list(_TEXT, 1, 3), ids, _list(ids, 1, 3)]}
    more = free | {"logprobs": _FEW, "stream": _BOOLEAN}
    return {
        "anyOf": [
            _object({"model": model, "max_tokens": _SOON, "prompt": anything}, more),
            _object({"model": model, "max_tokens": _SOON, "prompt": _TEXT, "suffix": _TEXT}, more),
        ]
    }
