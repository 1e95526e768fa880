"""Tokenizer parity: the ids that the original tokenizer makes, against those of the implementations on devices.

`tokenizer_vectors` are what must come out; a bundle carries them (golden/tokenizer.json), so that an app can replay
them. Here they are replayed through the very libraries that device runtimes link, on the bundle's own files.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from edgeport.errors import EdgeportError
from edgeport.validate.evidence import TokenizerParity

MOST_SHOWN = 5
DEVICE = {"onnxruntime": "onnxruntime-extensions", "executorch": "pytorch-tokenizers"}
"""The package with the implementation that each runtime's generation library links; the gate demands that it agrees."""

Encode = Callable[[str], list[int]]


def tokenizer_vectors(
    assets: Path, strings: Sequence[str], conversations: Sequence[Sequence[Mapping[str, str]]]
) -> dict[str, Any]:
    """What a tokenizer makes of texts: `strings` [{text, ids}], and `chats` [{messages, text, ids}] with a template.

    Ids come without the special tokens that a tokenizer puts around a text: device runtimes leave those to the caller.

    Raises:
        BadInputError: there is no tokenizer, or it can't be read.
    """
    from edgeport.runtime.conversation import open_texts

    texts = open_texts(assets)

    def ids(text: str) -> list[int]:
        return [int(token) for token in texts.tokenizer(text, add_special_tokens=False)["input_ids"]]

    chats = []
    for messages in conversations if texts.chats else ():
        rendered = texts.rendered([dict(message) for message in messages])
        chats.append({"messages": [dict(message) for message in messages], "text": rendered, "ids": ids(rendered)})
    return {"strings": [{"text": text, "ids": ids(text)} for text in strings], "chats": chats}


def replay(vectors: Mapping[str, Any], assets: Path, runtime: str) -> tuple[TokenizerParity, ...]:
    """Run the vectors through every implementation that is installed here.

    Args:
        runtime: of the artifact: the implementation that belongs to it is marked as the device's.
    """
    return tuple(_replay(package, vectors, assets, device=DEVICE.get(runtime) == package) for package in READERS)


def _replay(package: str, vectors: Mapping[str, Any], assets: Path, *, device: bool) -> TokenizerParity:
    try:
        found = version(package)
        encode, render = READERS[package](assets)
    except ImportError:
        return TokenizerParity(implementation=package, device=device, absent="the package is not installed")
    except (RuntimeError, ValueError, OSError, EdgeportError) as error:
        return TokenizerParity(
            implementation=package,
            device=device,
            version=found,
            failed=f"it can't read the files: {' '.join(str(error).split())}",
        )
    different = []
    cases = [(row["text"], row["ids"]) for row in (*vectors["strings"], *vectors["chats"])]
    for text, ids in cases:
        got = encode(text)
        if got != ids:
            different.append(f"{_short(text)}: {got[:8]} instead of {ids[:8]}")
    rendered = 0
    for chat in vectors["chats"] if render is not None else ():
        assert render is not None
        got_text = render(chat["messages"])
        rendered += 1
        if got_text != chat["text"]:
            different.append(f"chat template: {_short(got_text)} instead of {_short(chat['text'])}")
    return TokenizerParity(
        implementation=package,
        device=device,
        version=found,
        texts=len(cases),
        templates=rendered,
        different=len(different),
        examples=tuple(different[:MOST_SHOWN]),
    )


def _short(text: str) -> str:
    shown = repr(text)
    return shown if len(shown) <= 60 else shown[:57] + "...'"


Render = Callable[[Sequence[Mapping[str, str]]], str]


def _extensions(assets: Path) -> tuple[Encode, Render | None]:
    before = dict(os.environ)
    from onnxruntime_extensions.pp_api import Tokenizer  # type: ignore[import-untyped]

    # Its import asks for protobuf's pure Python form, which writes maps in another order: processes started later
    # would write other bytes.
    os.environ.clear()
    os.environ.update(before)
    tokenizer = Tokenizer(str(assets))
    tokenizer.update_options({"add_special_tokens": "false"})

    def encode(text: str) -> list[int]:
        return [int(token) for token in tokenizer.tokenize(text)]

    def render(messages: Sequence[Mapping[str, str]]) -> str:
        text = json.dumps(list(messages), ensure_ascii=False)
        return str(tokenizer.apply_chat_template(text, add_generation_prompt=True, tokenize=False))

    return encode, render


def _pytorch_tokenizers(assets: Path) -> tuple[Encode, Render | None]:
    from pytorch_tokenizers import CppHFTokenizer  # type: ignore[import-untyped]

    tokenizer = CppHFTokenizer()
    tokenizer.load(str(assets / "tokenizer.json"))
    return lambda text: [int(token) for token in tokenizer.encode(text, 0, 0)], None


def _tokenizers(assets: Path) -> tuple[Encode, Render | None]:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(assets / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return lambda text: list(tokenizer.encode(text, add_special_tokens=False).ids), None


READERS: dict[str, Callable[[Path], tuple[Encode, Render | None]]] = {
    "tokenizers": _tokenizers,
    "onnxruntime-extensions": _extensions,
    "pytorch-tokenizers": _pytorch_tokenizers,
}
