"""Texts in and out of a decoder: its tokenizer, its chat template, and the cache kept from turn to turn."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeport.errors import BadInputError, first_line
from edgeport.model.tokenizer import end_tokens
from edgeport.runtime.generate import Generation, Sampling, generate

if TYPE_CHECKING:
    import numpy as np

    from edgeport.runtime.decoder import Tokens

Message = dict[str, str]
"""{"role": "user", "content": "..."}."""


@dataclass(frozen=True)
class Texts:
    """The tokenizer of a bundle's assets.

    Attributes:
        stop: tokens that end an answer.
    """

    tokenizer: Any
    stop: frozenset[int]

    @property
    def chats(self) -> bool:
        """There is a chat template."""
        return bool(getattr(self.tokenizer, "chat_template", None))

    def ids(self, text: str) -> np.ndarray:
        """A text's tokens as the tokenizer makes them, special ones included; int64 (S,)."""
        import numpy as np

        return np.array(self.tokenizer(text)["input_ids"], np.int64)

    def rendered(self, messages: Sequence[Message]) -> str:
        """A conversation as the chat template writes it, up to where the answer begins.

        Raises:
            BadInputError: there is no template, or it refuses the conversation.
        """
        if not self.chats:
            raise BadInputError(
                "The model has no chat template: it continues texts.",
                where="tokenizer_config.json",
                next_step="`edgeport run BUNDLE TEXT --raw` continues one.",
            )
        from jinja2 import TemplateError

        try:
            text = self.tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
        except TemplateError as error:
            raise BadInputError(f"The chat template refuses the conversation: {first_line(error)}") from error
        return str(text)

    def chat_ids(self, messages: Sequence[Message]) -> np.ndarray:
        """The tokens of a rendered conversation; the template itself writes the special ones. int64 (S,)."""
        import numpy as np

        return np.array(self.tokenizer(self.rendered(messages), add_special_tokens=False)["input_ids"], np.int64)

    def stream(self, ids: Iterator[int]) -> Iterator[str]:
        """New tokens as pieces of text, each as soon as its bytes are whole."""
        from tokenizers.decoders import DecodeStream

        decoder, backend = DecodeStream(skip_special_tokens=True), self.tokenizer.backend_tokenizer
        for token in ids:
            piece = decoder.step(backend, token)
            if piece:
                yield piece


def open_texts(assets: Path) -> Texts:
    """Read the tokenizer files of a folder.

    Raises:
        BadInputError: there is no tokenizer.json, or it can't be read.
    """
    if not (assets / "tokenizer.json").is_file():
        raise BadInputError(
            "There is no tokenizer, so texts can't be read.",
            where=assets,
            next_step="Export from a checkpoint that has a tokenizer.",
        )
    from transformers import AutoTokenizer, PreTrainedTokenizerFast
    from transformers.utils import logging

    logging.set_verbosity_error()
    known = (assets / "tokenizer_config.json").is_file()
    try:
        if known:
            tokenizer = AutoTokenizer.from_pretrained(assets, local_files_only=True, trust_remote_code=False)
        else:
            tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(assets / "tokenizer.json"))
    except Exception as error:  # the libraries raise nothing more specific for a damaged file
        raise BadInputError(f"The tokenizer can't be read: {first_line(error)}.", where=assets) from error
    return Texts(tokenizer, frozenset(stop_tokens(assets, tokenizer)))


def stop_tokens(assets: Path, tokenizer: Any) -> set[int]:
    """The end tokens that generation_config.json and the tokenizer name."""
    found = set(end_tokens(assets / "generation_config.json"))
    if tokenizer.eos_token_id is not None:
        found.add(int(tokenizer.eos_token_id))
    return found


class Conversation:
    """A chat with a decoder. What the cache holds of earlier turns is not read again."""

    def __init__(self, tokens: Tokens, texts: Texts, sampling: Sampling) -> None:
        self.tokens, self.texts, self.sampling = tokens, texts, sampling
        self.messages: list[Message] = []
        self._held: list[int] = []

    def answer(self, ids: np.ndarray, most: int, show: Callable[[str], None]) -> Generation:
        """Go on from a whole text, and call `show` with each piece of the answer.

        Raises:
            BadInputError: the text does not fit the cache.
        """
        wanted = [int(token) for token in ids]
        if len(wanted) > self.tokens.context:
            raise BadInputError(
                f"The prompt has {len(wanted)} tokens; the model's cache holds {self.tokens.context}.",
                where="prompt",
                allowed=f"at most {self.tokens.context} tokens, the answer included",
                next_step="Shorten it, or export with a larger --context.",
            )
        shared = 0
        # One token at least is fed: the scores come from it.
        while shared < min(len(self._held), len(wanted) - 1) and self._held[shared] == wanted[shared]:
            shared += 1
        self.tokens.rewind(shared)
        self._held = wanted[:shared]
        record, new = generate(self.tokens, ids[shared:], most=most, stop=self.texts.stop, sampling=self.sampling)
        try:
            for piece in self.texts.stream(new):
                show(piece)
        finally:
            # Also when interrupted: the cache holds what was fed, which may lack the last token.
            self._held = (wanted + record.ids)[: self.tokens.length]
        return record

    def say(self, text: str, most: int, show: Callable[[str], None]) -> Generation:
        """One turn: the user says something, the model answers; both stay part of the conversation."""
        self.messages.append({"role": "user", "content": text})
        pieces: list[str] = []

        def keep(piece: str) -> None:
            pieces.append(piece)
            show(piece)

        try:
            return self.answer(self.texts.chat_ids(self.messages), most, keep)
        except BadInputError:
            self.messages.pop()
            raise
        finally:
            if pieces:
                self.messages.append({"role": "assistant", "content": "".join(pieces)})
