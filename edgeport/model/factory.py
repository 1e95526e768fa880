"""Load any torch module that a Python function makes: `package.module:factory`, with example inputs."""

from __future__ import annotations

import hashlib
import importlib
import inspect
import sys
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from edgeport.errors import BadInputError
from edgeport.model.fold import fold_norms, remove_parametrizations
from edgeport.model.inputs import MAX_BATCH, named_outputs
from edgeport.model.types import Axis, Model, Source, TensorSpec
from edgeport.storage import hash_file

EXAMPLES = (
    "the factory returns (module, example_inputs), the module has an attribute example_inputs, "
    "or --example-inputs names a .safetensors or .npz file"
)


def load_factory(reference: str, *, example_inputs: Path | None = None, task: str | None = None) -> Model:
    """Call a factory that the user names, and look at the module it makes.

    Example inputs are a tensor, a tuple of tensors in `forward`'s order, or a dict of tensors by `forward`'s
    names. The first dimension becomes the batch axis when the module is seen to take another size there.

    Args:
        reference: `package.module:factory`; the current folder is searched too. The factory takes no arguments
            and returns a torch.nn.Module, or (module, example_inputs).
        task: optimum's task name; None says "other".

    Raises:
        BadInputError: the module can't be imported, the factory fails, or its result can't be used.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # a factory that leaves weights at random still makes the same model each time
        made = _call(_resolve(reference), reference)
    given: Any = None
    if isinstance(made, tuple) and len(made) == 2:
        made, given = made
    if not isinstance(made, torch.nn.Module):
        raise BadInputError(
            f"The factory returned {type(made).__name__}.",
            where=reference,
            allowed="a torch.nn.Module, maybe with inputs",
        )
    module = made.eval().requires_grad_(False).to(torch.float32)
    files = {"weights": hash_weights(module), **_source_hash(module)}
    if example_inputs is not None:
        given = read_example(example_inputs)
        files[example_inputs.name] = hash_file(example_inputs)
    elif given is None:
        given = getattr(module, "example_inputs", None)
    if given is None:
        raise BadInputError("The module comes without example inputs.", where=reference, allowed=EXAMPLES)
    example = _named(module, given, reference)
    remove_parametrizations(module)
    _run(module, example, reference)
    fold_norms(module, example)
    inputs, outputs = _specs(module, example, task, reference)
    shape = example[inputs[0].name].shape
    return Model(
        name=reference.rpartition(":")[2].rpartition(".")[2].lower(),
        module=module,
        source=Source("factory", reference, files, note="made by the user's own code"),
        task=task or "other",
        modality="image" if len(shape) == 4 and shape[1] in (1, 3) else "other",
        inputs=inputs,
        outputs=outputs,
        example=example,
        huggingface=False,
    )


def _resolve(reference: str) -> Any:
    """The object that `package.module:name` names; the current folder comes first, as with `python -m`."""
    module_name, _, attribute = reference.partition(":")
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        found: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise BadInputError(
            f"The Python module {error.name!r} can't be found.",
            where=reference,
            next_step="Install it, or run edgeport in the folder that holds it.",
        ) from error
    except Exception as error:  # the user's code may raise anything
        raise BadInputError(f"Importing the module failed: {type(error).__name__}: {error}", where=reference) from error
    finally:
        sys.path.remove(here)
    for part in attribute.split("."):
        if not hasattr(found, part):
            names = sorted(name for name in vars(found) if not name.startswith("_") and callable(getattr(found, name)))
            raise BadInputError(f"{module_name} has no {attribute!r}.", where=reference, allowed=names or None)
        found = getattr(found, part)
    return found


def _call(factory: Any, reference: str) -> Any:
    if isinstance(factory, torch.nn.Module):
        return factory
    if not callable(factory):
        raise BadInputError("It can't be called.", where=reference, allowed="a function or class without arguments")
    try:
        return factory()
    except Exception as error:  # the user's code may raise anything
        raise BadInputError(
            f"The factory failed: {type(error).__name__}: {error}",
            where=reference,
            allowed="a function or class without required arguments",
        ) from error


def hash_weights(module: torch.nn.Module) -> str:
    """sha256 over every tensor of the module's state: name, dtype, shape and bytes, in the state's order."""
    digest = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _source_hash(module: torch.nn.Module) -> dict[str, str]:
    """sha256 of the file that defines the module's class, where there is one."""
    try:
        path = inspect.getsourcefile(type(module))
    except TypeError:  # a class made in a shell
        path = None
    return {} if path is None else {Path(path).name: hash_file(Path(path))}


def read_example(path: Path) -> dict[str, torch.Tensor]:
    """Named example inputs from a .safetensors or .npz file.

    Raises:
        BadInputError: the file is missing, damaged, empty, or of another kind.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not path.is_file():
        raise BadInputError("The file of example inputs is missing.", where=path)
    try:
        if path.suffix == ".safetensors":
            tensors = load_file(path)
        elif path.suffix == ".npz":
            import numpy as np

            with np.load(path, allow_pickle=False) as arrays:
                tensors = {name: torch.from_numpy(arrays[name]) for name in arrays.files}
        else:
            raise BadInputError(
                f"Example inputs can't be read from a {path.suffix or 'nameless'} file.",
                where=path,
                allowed=".safetensors or .npz",
            )
    except (SafetensorError, ValueError, OSError, TypeError, zipfile.BadZipFile) as error:
        raise BadInputError(f"The file of example inputs is damaged: {error}", where=path) from error
    if not tensors:
        raise BadInputError("The file of example inputs is empty.", where=path)
    return tensors


def _named(module: torch.nn.Module, given: Any, reference: str) -> dict[str, torch.Tensor]:
    """Example inputs by the names that `forward` gives them, in its order."""
    parameters = inspect.signature(module.forward).parameters.values()
    names = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    if isinstance(given, torch.Tensor):
        given = (given,)
    if isinstance(given, Mapping):
        unknown = [str(name) for name in given if name not in names]
        if unknown:
            raise BadInputError(f"The module takes no input {unknown[0]!r}.", where=reference, allowed=names)
        named = {name: given[name] for name in names if name in given}
    elif isinstance(given, Sequence) and 0 < len(given) <= len(names):
        named = dict(zip(names, given, strict=False))
    else:
        raise BadInputError(
            f"The example inputs don't fit forward({', '.join(names)}).",
            where=reference,
            allowed="a tensor, a tuple of tensors, or a dict of tensors",
        )
    wrong = [name for name, value in named.items() if not isinstance(value, torch.Tensor)]
    if wrong:
        raise BadInputError(f"The example input {wrong[0]!r} is no tensor.", where=reference)
    return {
        name: value.detach().to(torch.float32) if value.is_floating_point() else value.detach()
        for name, value in named.items()
    }


def _run(module: torch.nn.Module, example: Mapping[str, torch.Tensor], reference: str) -> dict[str, torch.Tensor]:
    try:
        with torch.inference_mode():
            result = module(**example)
    except Exception as error:  # the user's code may raise anything
        raise BadInputError(
            f"The module fails on its example inputs: {type(error).__name__}: {str(error).splitlines()[0]}",
            where=reference,
        ) from error
    return named_outputs(result)


def _specs(
    module: torch.nn.Module, example: dict[str, torch.Tensor], task: str | None, reference: str
) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
    """Inputs and outputs; the batch axis is free only when a second size of it works and shows in every output."""
    base = _run(module, example, reference)
    if task is not None and task.endswith("classification") and list(base) == ["output"]:
        base = {"logits": base["output"]}
    sizes = {int(value.shape[0]) if value.dim() else 0 for value in example.values()}
    batch: Axis | None = None
    if len(sizes) == 1 and 0 not in sizes:
        size = sizes.pop()
        axis = Axis("batch", 1, max(MAX_BATCH, size), size)
        doubled = {name: torch.cat([value, value]) for name, value in example.items()}
        try:
            with torch.inference_mode():
                twice = list(named_outputs(module(**doubled)).values())
        except Exception:  # noqa: BLE001 - a module that can't take it has a fixed batch, whatever it raises
            twice = []
        ones = list(base.values())
        follows = [
            one.dim() > 0 and two.shape == (2 * one.shape[0], *one.shape[1:])
            for one, two in zip(ones, twice, strict=False)
        ]
        batch = axis if len(twice) == len(ones) and all(follows) else None

    def spec(name: str, tensor: torch.Tensor) -> TensorSpec:
        shape: tuple[int | Axis, ...] = tuple(int(size) for size in tensor.shape)
        if batch is not None:
            # An output's first dimension may be a multiple of the batch (a model that flattens positions).
            first = (
                batch if shape[0] == batch.example else replace(batch, name=f"{name}_0", example=int(tensor.shape[0]))
            )
            shape = (first, *shape[1:])
        return TensorSpec(name, str(tensor.dtype).removeprefix("torch."), shape)

    return (
        tuple(spec(name, value) for name, value in example.items()),
        tuple(spec(name, value) for name, value in base.items()),
    )
