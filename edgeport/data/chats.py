"""Prompts as a model's chat template writes them."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeport.errors import BadInputError, first_line

if TYPE_CHECKING:
    from edgeport.model.types import Model


def rendered_prompts(model: Model, prompts: Sequence[str]) -> list[str]:
    """Each prompt as the only message of a conversation, up to where the answer begins; special tokens are written out.

    Raises:
        BadInputError: the model has no chat template, or it refuses a prompt.
    """
    from jinja2 import TemplateError
    from transformers import AutoTokenizer

    if "tokenizer_config.json" not in model.assets:
        raise _no_template(model)
    with tempfile.TemporaryDirectory() as folder:
        for name, path in model.assets.items():
            shutil.copyfile(path, Path(folder) / name)
        try:
            tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        except Exception as error:  # the libraries raise nothing more specific for a damaged file
            raise BadInputError(f"The tokenizer can't be read: {first_line(error)}.", where=model.name) from error
    if not getattr(tokenizer, "chat_template", None):
        raise _no_template(model)
    try:
        return [
            str(
                tokenizer.apply_chat_template(
                    [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
                )
            )
            for prompt in prompts
        ]
    except TemplateError as error:
        raise BadInputError(f"The chat template refuses a prompt: {first_line(error)}.", where=model.name) from error


def _no_template(model: Model) -> BadInputError:
    return BadInputError(
        f"{model.name} has no chat template.",
        where="chat of [compress.data]",
        next_step="Leave chat out: prompts are then given as they are.",
    )
