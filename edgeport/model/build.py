"""Put a Model together around a loaded module: task, inputs, outputs, example, preprocessing, labels."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeport.errors import BadInputError
from edgeport.model.fold import fold_norms, linearize, remove_parametrizations
from edgeport.model.inputs import huggingface_inputs, make_example, output_specs, vocabulary_size
from edgeport.model.preprocessing import read_preprocessing
from edgeport.model.types import Model, Source, SourceKind

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def infer_task(module: PreTrainedModel) -> str:
    """optimum's name for what the model's head does.

    Raises:
        BadInputError: optimum does not know it.
    """
    from optimum.exporters.tasks import TasksManager

    try:
        task = str(TasksManager.infer_task_from_model(module))
    except ValueError as error:
        raise BadInputError(
            f"The task of {type(module).__name__} can't be inferred.",
            where="--task",
            allowed=sorted(TasksManager.get_all_tasks()),
        ) from error
    # optimum lists BART under fill-mask first, though its class is the one for sequence to sequence.
    if task == "fill-mask" and module.config.is_encoder_decoder:
        return "text2text-generation"
    return task


def class_names(config: Any, task: str) -> tuple[str, ...]:
    """A classifier's labels in order, or none where the config has only the defaults LABEL_0, LABEL_1, ..."""
    names = getattr(config, "id2label", None)
    if not task.endswith("classification") or not names:
        return ()
    ordered = tuple(str(names[key]) for key in sorted(names, key=int))
    return () if all(name == f"LABEL_{index}" for index, name in enumerate(ordered)) else ordered


def build_huggingface(
    module: PreTrainedModel,
    *,
    name: str,
    reference: str,
    kind: SourceKind,
    task: str | None,
    files: Mapping[str, str],
    assets: Mapping[str, Path],
    licence: str | None,
    note: str | None,
) -> Model:
    """A Model around a transformers module, which becomes the Model's own (it is changed in place).

    Raises:
        BadInputError: edgeport does not know the model's inputs or task.
    """
    module.eval().requires_grad_(False)
    module.config.use_cache = False
    module.config.return_dict = True
    modality, inputs = huggingface_inputs(module)
    vocabulary = vocabulary_size(module)
    example = make_example(inputs, vocabulary=vocabulary)
    remove_parametrizations(module)
    linearize(module)
    fold_norms(module, example)
    chosen = task or infer_task(module)
    preprocessor = assets.get("preprocessor_config.json")
    image = read_preprocessing(preprocessor, inputs[0]) if modality == "image" and preprocessor else None
    return Model(
        name=name,
        module=module,
        source=Source(kind=kind, reference=reference, files=dict(files), licence=licence, note=note),
        task=chosen,
        modality=modality,
        inputs=inputs,
        outputs=output_specs(module, inputs, vocabulary=vocabulary),
        example=example,
        huggingface=True,
        assets=dict(assets),
        image=image,
        labels=class_names(module.config, chosen),
    )
