"""`dsv3 chat`: a conversation in the terminal, in the same process as the model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import torch
from rich.console import Console
from rich.text import Text

from dsv3.checkpoint.locate import find_checkpoint
from dsv3.errors import UserError
from dsv3.serve.engine import Engine
from dsv3.serve.engine_config import EngineConfig, Quantization
from dsv3.serve.load import load_model
from dsv3.serve.params import SamplingParams
from dsv3.serve.server.chat_parser import ChatParser, Content, Piece, Reasoning
from dsv3.serve.server.template import ServedTemplate, load_template

_HELP = "/reset forgets the conversation, /exit (or Ctrl-D) ends it, Ctrl-C stops an answer"


class Conversation:
    """Messages so far, and how the next is answered."""

    def __init__(self, engine: Engine, template: ServedTemplate, params: SamplingParams, *, system: str = "") -> None:
        self._engine, self._template, self._params = engine, template, params
        self._beginning = [{"role": "system", "content": system}] if system else []
        self._in_reasoning = template.opens_reasoning()
        self.messages = list(self._beginning)

    def reset(self) -> None:
        """Back to the beginning."""
        self.messages = list(self._beginning)

    def answer(self, text: str) -> Iterator[Piece]:
        """The answer to `text` as it comes. As much of it as came before the iterator was closed is remembered."""
        tokenizer = self._engine.tokenizer
        assert tokenizer is not None, "a template is of no use without a tokenizer"
        asked = [*self.messages, {"role": "user", "content": text}]
        prompt = self._template.encode(tokenizer, asked, add_generation_prompt=True)
        parser = ChatParser(in_reasoning=self._in_reasoning)
        said = ""
        with closing(self._engine.stream(prompt, self._params)) as outputs:
            try:
                for output in outputs:
                    pieces = parser.feed(output.text)
                    if output.finish_reason is not None:
                        pieces += parser.finish()
                    for piece in pieces:
                        said += piece.text if isinstance(piece, Content) else ""
                        yield piece
                    if output.error is not None:
                        raise UserError(f"this answer failed: {output.error}")
            finally:
                if said:  # else the question is taken back, so that the next does not follow upon it
                    self.messages = [*asked, {"role": "assistant", "content": said}]


def talk(conversation: Conversation, console: Console, read: Callable[[], str]) -> None:
    """Answer what `read` gives until it ends (`EOFError`) or says so."""
    console.print(_HELP, style="dim")
    while True:
        try:
            text = read().strip()
        except (EOFError, KeyboardInterrupt):
            console.print()
            return
        if text == "/exit":
            return
        if text == "/reset":
            conversation.reset()
            console.print("forgotten", style="dim")
        elif text.startswith("/"):
            console.print(f"there is no {text.split()[0]}: {_HELP}", style="dim", markup=False)
        elif text:
            _say(conversation, console, text)


def _say(conversation: Conversation, console: Console, text: str) -> None:
    try:
        with closing(conversation.answer(text)) as pieces:  # type: ignore[type-var]
            for piece in pieces:
                if isinstance(piece, (Content, Reasoning)):
                    style = "dim italic" if isinstance(piece, Reasoning) else ""
                    console.print(Text(_printable(piece.text), style), end="", soft_wrap=True)
        console.print()
    except KeyboardInterrupt:
        console.print(" (stopped)", style="dim")
    except UserError as error:
        console.print(f"{error}", style="red", markup=False)


def _printable(text: str) -> str:
    """Without control characters, by which a text could take over the terminal."""
    return "".join(char for char in text if char in "\n\t" or (char.isprintable() or ord(char) > 159))


def chat(
    model: Path,
    params: SamplingParams,
    *,
    system: str,
    chat_template: Path | None,
    device: torch.device,
    dtype: torch.dtype | None,
    quantization: Quantization = "none",
) -> None:
    """Load the model in `model` and talk. Raises `UserError` if it cannot chat."""
    folder = find_checkpoint(model)
    template = load_template(folder, chat_template)
    if template is None:
        raise UserError(
            f"{model} has no chat template: take a model trained on conversations, or give one with --chat-template"
        )
    loaded, tokenizer = load_model(folder, device=device, dtype=dtype, quantization=quantization)
    console = Console(highlight=False)
    engine = Engine(loaded, tokenizer, EngineConfig(cache_tokens=loaded.config.max_position_embeddings))  # one text
    conversation = Conversation(engine, template, params, system=system)
    talk(conversation, console, lambda: console.input("[bold]> [/bold]"))
