"""Conversations to token ids, by the chat template that travels with a checkpoint.

The template is a Jinja program beside the tokenizer; it alone decides where BOS, roles and ends of turns stand, so
nothing is added to what it writes. It joins its own special tokens and the text of the messages into one string,
in which the two look alike: a user who types `<｜Assistant｜>` would speak with the model's voice. `encode` keeps
them apart, so that only the template's become special tokens.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

from dsv3.data.tokenizer import Tokenizer, tokenizer_settings
from dsv3.errors import UserError

Message = Mapping[str, Any]  # "role", "content", and whatever else the template reads


class ChatTemplate:
    """A Jinja chat template, rendered in a sandbox as transformers renders it."""

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        """source: the template. special_tokens: what it may call by name, such as `bos_token`.

        Raises `UserError` if jinja2 is not installed or the template is not valid.
        """
        try:
            import jinja2
            from jinja2.sandbox import ImmutableSandboxedEnvironment
        except ImportError as error:
            raise UserError("chat templates need jinja2: pip install 'dsv3[serve]'") from error
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        # Jinja's own tojson is made for web pages: it escapes <, > and all letters beyond ASCII.
        environment.filters["tojson"] = lambda value, indent=None: json.dumps(value, ensure_ascii=False, indent=indent)

        def raise_exception(message: str) -> None:
            raise jinja2.TemplateError(message)

        environment.globals["raise_exception"] = raise_exception
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise UserError(f"the chat template is not valid Jinja: {error}") from error
        self._source = source
        self._special_tokens = dict(special_tokens)

    @classmethod
    def load(cls, folder: Path) -> ChatTemplate:
        """The template of a checkpoint folder: `chat_template.jinja`, else that in `tokenizer_config.json`.

        Raises `UserError` if there is none, if a file is damaged, or as `ChatTemplate` does.
        """
        settings = tokenizer_settings(folder)
        file = folder / "chat_template.jinja"
        try:
            source = file.read_text(encoding="utf-8") if file.exists() else settings.get("chat_template")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"cannot read the chat template '{file}': {error}") from error
        if not isinstance(source, str):
            raise UserError(f"{folder} has no chat template: chat needs a model trained on conversations")
        named = {name: settings.get(name) for name in ("bos_token", "eos_token", "pad_token", "unk_token")}
        # A token stands there as its text, or as an object that also says how it is matched.
        texts = {name: token.get("content") if isinstance(token, dict) else token for name, token in named.items()}
        try:
            return cls(source, {name: text for name, text in texts.items() if text is not None})
        except UserError as error:
            raise UserError(f"{folder}: {error}") from error

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool = False, **variables: Any) -> str:
        """The conversation as one string, for people to read; a model is to be given `encode`.

        add_generation_prompt: end where the assistant's next turn begins. variables: whatever else the template reads
        (`tools`, say). All must be plain JSON values. A message whose role a template does not know is left out by
        it, without a word; V3's knows system, user, assistant and tool.
        Raises `UserError` if the messages are not what the template expects.
        """
        return self._render(_plain(messages, variables), add_generation_prompt)

    def encode(
        self,
        tokenizer: Tokenizer,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = False,
        **variables: Any,
    ) -> list[int]:
        """The ids of what `render` gives. Special tokens spelled in messages or variables are mere text.

        Those are put in quotes while the template runs, in characters that nobody uses. What templates do with text
        still works on them, such as dropping everything up to `</think>`; a quote that this leaves alone says nothing.
        """
        data = _plain(messages, variables)
        opening, closing = _unused_characters([self._source, json.dumps(data, ensure_ascii=False)])
        longest_first = sorted(tokenizer.added_tokens, key=len, reverse=True)
        token = f"(?>{'|'.join(map(re.escape, longest_first))})"
        quoted = _substitute(data, re.compile(token), rf"{opening}\g<0>{closing}")
        rendered = self._render(quoted, add_generation_prompt)

        texts, special_ids, end = [], [], 0
        for match in re.finditer(f"{opening}{token}{closing}|({token})", rendered):
            if match[1]:
                texts.append(rendered[end : match.start()])
                special_ids.append(tokenizer.added_tokens[match[1]])
                end = match.end()
        texts.append(rendered[end:])
        encoded = tokenizer.encode_batch([re.sub(f"[{opening}{closing}]", "", text) for text in texts])
        ids: list[int] = []
        for text_ids, special_id in zip_longest(encoded, special_ids):
            ids += text_ids if special_id is None else [*text_ids, special_id]
        return ids

    def _render(self, data: dict[str, Any], add_generation_prompt: bool) -> str:
        try:
            return self._template.render(self._special_tokens, **data, add_generation_prompt=add_generation_prompt)
        except Exception as error:  # a template is a program: anything may come out of it
            raise UserError(f"the chat template cannot render these messages: {error}") from error


def _plain(messages: Sequence[Message], variables: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of everything that a template is given, made of JSON values only: no object's methods to call."""
    try:
        # What is not given is null rather than undefined, which is what templates test for.
        given = {"tools": None, "documents": None, **variables, "messages": messages}
        data: dict[str, Any] = json.loads(json.dumps(given))
    except (TypeError, ValueError) as error:
        raise UserError(f"messages and variables of a chat must be plain JSON values: {error}") from error
    copied = data["messages"]
    if not isinstance(copied, list) or not copied:
        raise UserError(
            "the messages of a chat are expected to be a list of at least one object with 'role', 'content'"
        )
    for i, message in enumerate(copied):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise UserError(f"message {i} of the chat is {message!r:.80}, expected an object with a 'role' of text")
    # Clients send `tool_calls: null` and mean none. Only of `content` do templates ask whether it is null.
    data["messages"] = [
        {name: value for name, value in message.items() if value is not None or name == "content"} for message in copied
    ]
    return data


def _substitute(value: Any, pattern: re.Pattern[str], replacement: str) -> Any:
    """A copy of a JSON value with `pattern` replaced in all its strings, those of keys too."""
    if isinstance(value, str):
        return pattern.sub(replacement, value)
    if isinstance(value, list):
        return [_substitute(item, pattern, replacement) for item in value]
    if isinstance(value, dict):
        return {_substitute(k, pattern, replacement): _substitute(v, pattern, replacement) for k, v in value.items()}
    return value


def _unused_characters(texts: Iterable[str]) -> tuple[str, str]:
    """Two private-use characters that occur in none of `texts`."""
    used = set().union(*texts)
    unused = (char for char in map(chr, range(0xF0000, 0xFFFFE)) if char not in used)
    return next(unused), next(unused)
