"""Chat templates: transformers' ids for honest conversations, and text that stays text in others."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import Any

import pytest

from dsv3.data.chat import ChatTemplate
from dsv3.data.tokenizer import ASSISTANT, BOS, EOS, SPECIAL_TOKENS, USER, Tokenizer
from dsv3.errors import UserError
from tests.data.conftest import WriteText

pytest.importorskip("jinja2")

NAMES = {"bos_token": BOS, "eos_token": EOS}
PLAIN = (
    "{{ bos_token }}{% for m in messages %}{{ '<｜User｜>' if m.role == 'user' else '<｜Assistant｜>' }}{{ m.content }}"
    "{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<｜Assistant｜>' }}{% endif %}"
)


@pytest.fixture(scope="module")
def v3(released: Path) -> Tokenizer:
    return Tokenizer.load(released)


@pytest.fixture(scope="module")
def v3_template(released: Path) -> ChatTemplate:
    return ChatTemplate.load(released)


@pytest.fixture(scope="module")
def theirs(released: Path) -> Any:
    return pytest.importorskip("transformers").AutoTokenizer.from_pretrained(released)


def call(name: str, arguments: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


def conversations(write_text: WriteText) -> list[list[dict[str, Any]]]:
    """Of every form that V3's template knows, with fresh text in them."""
    system = {"role": "system", "content": write_text(1)}
    user, other = ({"role": "user", "content": f"  {write_text(2)}\n\n"} for _ in range(2))
    assistant = {"role": "assistant", "content": write_text(1)}
    thought = {"role": "assistant", "content": f"<think>{write_text(1)}</think>\n\n{write_text(1)}"}
    calls = {"role": "assistant", "content": None, "tool_calls": [call("add", '{"a": 1}'), call("sub", "{}")]}
    saying = calls | {"content": write_text(1), "tool_calls": [call("get", '{"text": "é"}')]}
    answers = [{"role": "tool", "content": write_text(1)} for _ in range(2)]
    return [
        [user],
        [system, user],
        [system, user, system],
        [user, assistant, other],
        [system, user, assistant, other, thought],
        [user, calls, *answers],
        [user, calls, *answers, assistant, other],
        [system, user, saying, answers[0], assistant],
        [{"role": "user", "content": ""}],
    ]


@pytest.mark.parametrize("add_generation_prompt", [False, True])
@pytest.mark.parametrize("which", range(9))
def test_conversations_have_transformers_ids(
    which: int,
    add_generation_prompt: bool,
    v3: Tokenizer,
    v3_template: ChatTemplate,
    theirs: Any,
    write_text: WriteText,
) -> None:
    messages = conversations(write_text)[which]
    before = json.dumps(messages)
    ids = v3_template.encode(v3, messages, add_generation_prompt=add_generation_prompt)
    assert json.dumps(messages) == before
    # transformers takes away a `content` of null, over which V3's template then stumbles; empty text means the same.
    for message in messages:
        message["content"] = message["content"] or ""
    expected = theirs.apply_chat_template(messages, add_generation_prompt=add_generation_prompt, tokenize=False)
    assert v3_template.render(messages, add_generation_prompt=add_generation_prompt) == expected
    assert ids == theirs.apply_chat_template(messages, add_generation_prompt=add_generation_prompt)["input_ids"]
    assert ids[0] == v3.bos_id and ids.count(v3.bos_id) == 1


def test_special_tokens_in_messages_are_mere_text(
    v3: Tokenizer, v3_template: ChatTemplate, write_text: WriteText, rng: random.Random
) -> None:
    """A conversation full of them has the special ids of the same conversation without, in the same order."""
    spelled = [*v3.added_tokens, "<｜", "｜>", "<", ">", "\n"]

    def hostile() -> str:
        return "".join(rng.choices(spelled, k=6)) + write_text(1) + "".join(rng.choices(spelled, k=6))

    def conversation(text: Any) -> list[dict[str, Any]]:
        return [
            {"role": "system", "content": text()},
            {"role": "user", "content": text()},
            {"role": "assistant", "content": text(), "tool_calls": [call(text(), text()), call("f", text())]},
            {"role": "tool", "content": text()},
            {"role": "assistant", "content": "<｜User｜>" + text()},
            {"role": "user", "content": text()},
        ]

    messages = conversation(hostile)
    ids = v3_template.encode(v3, messages, add_generation_prompt=True)
    harmless = v3_template.encode(v3, conversation(lambda: "x"), add_generation_prompt=True)
    special = set(v3.added_tokens.values())
    assert [i for i in ids if i in special] == [i for i in harmless if i in special]
    assert v3.decode(ids, skip_special=False) == v3_template.render(messages, add_generation_prompt=True)


def test_text_beside_a_special_token_is_encoded_in_one_piece(tokenizer: Tokenizer, write_text: WriteText) -> None:
    text = f"{write_text(1)}{ASSISTANT}{write_text(1)}{BOS}{BOS}"
    ids = ChatTemplate(PLAIN, NAMES).encode(tokenizer, [{"role": "user", "content": text}])
    assert ids == [tokenizer.bos_id, tokenizer.special_id(USER), *tokenizer.encode(text)]


def test_a_special_token_may_hold_another(write_text: WriteText) -> None:
    """The longer one is one token; spelled in a message, neither it nor what is in it is special."""
    trained = Tokenizer.train([write_text(50)], 300)
    trained._backend.add_tokens([f"{USER}{ASSISTANT}", "User"])
    tokenizer = Tokenizer(trained._backend)
    special = set(tokenizer.added_tokens.values())
    template = ChatTemplate("{{ messages[0].content }}" + USER + ASSISTANT + USER, {})
    ids = template.encode(tokenizer, [{"role": "user", "content": f"{USER}{ASSISTANT}User{USER}"}])
    expected = [tokenizer.added_tokens[f"{USER}{ASSISTANT}"], tokenizer.special_id(USER)]
    assert [i for i in ids if i in special] == ids[-2:] == expected


def test_text_of_private_characters_survives(tokenizer: Tokenizer) -> None:
    """The quotes are characters that the conversation does not use."""
    text = "\U000f0000\U000f0001" + USER + "\U000f0000\ue000"
    template = ChatTemplate("{{ messages[0].content }}\U000f0002", {})
    ids = template.encode(tokenizer, [{"role": "user", "content": text}])
    assert tokenizer.decode(ids) == text + "\U000f0002" and min(ids) >= len(SPECIAL_TOKENS)


def test_the_template_sees_what_was_written(v3: Tokenizer, v3_template: ChatTemplate) -> None:
    """V3's template drops what stands before `</think>`, an added token, in the turns of the assistant alone."""
    messages = [{"role": role, "content": "<think>so</think>it is"} for role in ("user", "assistant")]
    ids = v3_template.encode(v3, messages)
    text = [v3.encode(text) for text in ("<think>so</think>it is", "it is")]
    assert ids == [v3.bos_id, v3.special_id(USER), *text[0], v3.special_id(ASSISTANT), *text[1], v3.eos_id]


def test_a_field_of_null_is_no_field_but_for_content() -> None:
    source = "{% for m in messages %}{{ m.content is none }} {{ 'tool_calls' in m }}{% endfor %}"
    messages = [{"role": "assistant", "content": None, "tool_calls": None}]
    assert ChatTemplate(source, {}).render(messages) == "True False"


def test_variables_reach_the_template_and_are_text_too(tokenizer: Tokenizer) -> None:
    source = "{% if tools is not none %}{{ tools | tojson }}{% endif %}{{ messages[0].content }}"
    template = ChatTemplate(source, {})
    messages = [{"role": "user", "content": "hi"}]
    assert template.render(messages) == "hi"
    tools = [{"name": f"é<{EOS}", EOS: 1}]
    text = '[{"name": "é<' + EOS + '", "' + EOS + '": 1}]hi'
    assert template.render(messages, tools=tools) == text
    assert template.encode(tokenizer, messages, tools=tools) == tokenizer.encode(text)


def test_whitespace_and_loops_are_jinjas_as_transformers_sets_it_up() -> None:
    stop = "  {% if m.content == 'b' %}\n{% break %}{% endif %}\n"
    template = ChatTemplate("  {% for m in messages %}\n{{ m.content }}\n" + stop + "{% endfor %}\n.", {})
    assert template.render([{"role": "user", "content": text} for text in "abc"]) == "a\nb\n."


def write_settings(folder: Path, **settings: Any) -> None:
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")


def test_a_template_file_goes_before_the_settings(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "hi"}]
    write_settings(
        tmp_path, chat_template="{{ bos_token }}1", bos_token={"content": "<B>"}, eos_token="<E>", pad_token=None
    )
    assert ChatTemplate.load(tmp_path).render(messages) == "<B>1"
    (tmp_path / "chat_template.jinja").write_text("{{ eos_token }}{{ pad_token is defined }}", encoding="utf-8")
    assert ChatTemplate.load(tmp_path).render(messages) == "<E>False"


def test_a_folder_without_a_sound_template_is_an_error(tmp_path: Path) -> None:
    for settings in ({}, {"chat_template": None}, {"chat_template": 3}):
        write_settings(tmp_path, **settings)
        with pytest.raises(UserError, match="has no chat template"):
            ChatTemplate.load(tmp_path)
    write_settings(tmp_path, chat_template="{% if %}")
    with pytest.raises(UserError, match="is not valid Jinja") as error:
        ChatTemplate.load(tmp_path)
    assert str(tmp_path) in str(error.value)
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(UserError, match=r"cannot read the chat template .*chat_template\.jinja"):
        ChatTemplate.load(tmp_path)


@pytest.mark.parametrize(
    ("messages", "complaint"),
    [
        ([], "at least one"),
        ("hi", "at least one"),
        ({"role": "user", "content": "hi"}, "at least one"),
        (["hi"], "message 0 of the chat is 'hi'"),
        ([{"role": "user", "content": "hi"}, {"content": "hi"}], "message 1 of the chat"),
        ([{"role": 1, "content": "hi"}], "a 'role' of text"),
        ([{"role": "user", "content": object()}], "plain JSON"),
        ([{"role": "user"}], "cannot render.*content"),
        ([{"role": "user", "content": None}], "cannot render"),
        ([{"role": "user", "content": ["hi"]}], "cannot render"),
        ([{"role": "assistant", "tool_calls": [{}]}], "cannot render"),
    ],
)
def test_bad_messages(messages: Any, complaint: str, v3: Tokenizer, v3_template: ChatTemplate) -> None:
    with pytest.raises(UserError, match=complaint):
        v3_template.render(messages)
    with pytest.raises(UserError, match=complaint):
        v3_template.encode(v3, messages)


def test_what_a_template_refuses_is_said_in_its_words() -> None:
    template = ChatTemplate("{{ raise_exception('one system message, please') }}", {})
    with pytest.raises(UserError, match="cannot render these messages: one system message, please"):
        template.render([{"role": "user", "content": "hi"}])


@pytest.mark.parametrize("attack", ["''.__class__.__mro__", "messages.append(1)", "raise_exception.__globals__"])
def test_a_template_is_kept_in_its_sandbox(attack: str) -> None:
    with pytest.raises(UserError, match="cannot render"):
        ChatTemplate("{{ " + attack + ".x }}", {}).render([{"role": "user", "content": "hi"}])


def test_without_jinja_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(UserError, match=r"dsv3\[serve\]"):
        ChatTemplate("", {})
