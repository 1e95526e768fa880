"""`load_model`: whatever a user may write where a MODEL is asked for becomes a Model."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

from edgeport.errors import BadInputError
from edgeport.model.compressed import compressed_folder, load_compressed
from edgeport.model.types import Model
from edgeport.model.zoo import PREFIX, load_zoo
from edgeport.packages import Progress

HUB_PREFIX = "hub:"
FACTORY = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*")
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
ALLOWED = (
    "zoo:NAME",
    "a Hugging Face folder, or one that `edgeport compress` wrote",
    "a .gguf file",
    "package.module:factory",
    "a hub id (organisation/name or hub:name)",
)


def load_model(
    reference: str,
    *,
    name: str | None = None,
    example_inputs: Path | None = None,
    task: str | None = None,
    allow_pickle: bool = False,
    progress: Progress | None = None,
) -> Model:
    """Load a checkpoint, in float32 and eval mode.

    Args:
        reference: `zoo:NAME`, a Hugging Face folder, a folder that `edgeport compress` wrote, a `.gguf` file,
            `package.module:factory`, or a hub id (`organisation/name`, or `hub:` and an id). The hub is only asked
            for an id that is no local path.
        name: the model's short name; None takes one from the reference.
        example_inputs: a .safetensors or .npz file of named example inputs, for factories.
        task: optimum's task name; None infers it.
        allow_pickle: read checkpoints that are pickles.
        progress: called with one line of text when something long begins.

    Raises:
        BadInputError: the reference names nothing, or what it names can't be loaded.
    """
    if example_inputs is not None and (not FACTORY.fullmatch(reference) or reference.startswith((PREFIX, HUB_PREFIX))):
        raise BadInputError(
            "Example inputs are only taken with package.module:factory.", where="--example-inputs", allowed=ALLOWED[3]
        )
    model = _load(reference, example_inputs, task, allow_pickle, progress)
    return model if name is None else replace(model, name=checked_name(name))


def _load(
    reference: str, example_inputs: Path | None, task: str | None, allow_pickle: bool, progress: Progress | None
) -> Model:
    if reference.startswith(PREFIX):
        return load_zoo(reference, task=task, progress=progress)
    path = Path(reference)
    if (compressed := compressed_folder(reference)) is not None:
        return load_compressed(compressed, task=task)
    if path.is_dir():
        from edgeport.model.huggingface import load_folder

        folder = path.resolve()
        return load_folder(
            folder, name=short_name(folder.name), reference=folder.name, task=task, allow_pickle=allow_pickle
        )
    if path.suffix == ".gguf" and not reference.startswith(HUB_PREFIX):
        from edgeport.model.gguf import load_gguf

        return load_gguf(path, name=short_name(path.stem), reference=path.name, task=task, progress=progress)
    if path.is_file():
        raise BadInputError("The file is no model that edgeport can read.", where=path, allowed=ALLOWED)
    if reference.startswith(HUB_PREFIX) or (HUB_ID.fullmatch(reference) and not path.parent.is_dir()):
        return _load_hub(reference.removeprefix(HUB_PREFIX), task, allow_pickle, progress)
    if FACTORY.fullmatch(reference):
        from edgeport.model.factory import load_factory

        return load_factory(reference, example_inputs=example_inputs, task=task)
    raise BadInputError(f"There is no model {reference!r}.", where="MODEL", allowed=ALLOWED)


def _load_hub(repository: str, task: str | None, allow_pickle: bool, progress: Progress | None) -> Model:
    from edgeport.model.hub import download
    from edgeport.model.huggingface import load_folder

    folder = download(repository, allow_pickle=allow_pickle, progress=progress)
    return load_folder(
        folder,
        name=short_name(repository.rpartition("/")[2]),
        reference=repository,
        kind="hub",
        task=task,
        allow_pickle=allow_pickle,
        note=f"hub revision {folder.name}",
    )


def short_name(text: str) -> str:
    """A name for files out of any text: lower case letters, digits, dots and dashes."""
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-.") or "model"


def checked_name(name: str) -> str:
    """The name as it is, when it can name a file.

    Raises:
        BadInputError: it can't.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", name):
        raise BadInputError(f"{name!r} can't name a file.", where="--name", allowed="letters, digits, '.', '_' and '-'")
    return name
