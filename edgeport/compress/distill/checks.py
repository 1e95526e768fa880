"""What is refused before a distillation begins."""

from __future__ import annotations

import fnmatch

from edgeport.data.generated import check_generates
from edgeport.distilling import Distill
from edgeport.errors import BadInputError
from edgeport.model.inputs import vocabulary_size
from edgeport.model.types import Model
from edgeport.storage import read_json


def check_teacher(student: Model, teacher: Model, step: Distill) -> None:
    """Refuse a teacher whose outputs say something else than the student's.

    Raises:
        BadInputError: other inputs, outputs or vocabularies.
    """
    name = teacher.source.reference
    for what in ("inputs", "outputs") if step.outputs else ("inputs",):
        own, other = ([spec.name for spec in getattr(one, what)] for one in (student, teacher))
        if own != other:
            raise BadInputError(
                f"The teacher {name} has the {what} {', '.join(other)}; the student has {', '.join(own)}.",
                where="teacher of distill",
                allowed=f"models with the same {what}",
            )
    _check_vocabulary(student, teacher)
    for own_spec, other_spec in zip(student.outputs, teacher.outputs, strict=True) if step.outputs else ():
        if own_spec.fixed_shape() != other_spec.fixed_shape():
            raise BadInputError(
                f"The teacher {name} gives {own_spec.name} of {other_spec.fixed_shape()}, the student of "
                f"{own_spec.fixed_shape()}.",
                where="teacher of distill",
                allowed="models whose outputs have equal shapes",
                next_step="With outputs = 0 only what is inside is compared: hidden, relations, features.",
            )


def _check_vocabulary(student: Model, teacher: Model) -> None:
    sizes = [vocabulary_size(one.module) for one in (student, teacher)]
    words = "A model of another vocabulary can teach by its answers alone: [compress.data] with prompts."
    if sizes[0] != sizes[1]:
        raise BadInputError(
            f"The vocabularies differ: the teacher {teacher.source.reference} has {sizes[1]} tokens, the student "
            f"{sizes[0]}.",
            where="teacher of distill",
            allowed="teachers with the student's vocabulary",
            next_step=words,
        )
    files = [one.assets.get("tokenizer.json") for one in (student, teacher)]
    if files[0] is None or files[1] is None:
        return
    tables = [read_json(path)["model"].get("vocab") for path in files if path is not None]
    if tables[0] != tables[1]:
        raise BadInputError(
            f"The vocabularies differ: the teacher {teacher.source.reference} has as many tokens as the student, but "
            "other ones.",
            where="teacher of distill",
            allowed="teachers with the student's vocabulary",
            next_step=words,
        )


def check_step(student: Model, step: Distill) -> None:
    """Refuse what can be known to fail before any data is there.

    Raises:
        BadInputError: patterns that match nothing, or texts where the model writes none.
    """
    if step.on_policy or step.policy_gradient or step.data.generate is not None:
        check_generates(student, where="on_policy, policy_gradient or generate of distill")
    names = [name for name, _ in student.module.named_parameters(remove_duplicate=False)]
    for pattern in step.freeze:
        if not fnmatch.filter(names, pattern):
            raise BadInputError(
                f"The pattern {pattern!r} matches no parameter.",
                where="freeze of distill",
                allowed=f"patterns of names such as {', '.join(names[:3])}",
            )
