"""What a distillation lowers: the weighted sum of the terms that its step asks for, on one batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch

from edgeport.compress.chain import call, find_chains, hidden_states
from edgeport.compress.distill.batch import Sample, inputs_of, real_positions, told_positions
from edgeport.compress.distill.distance import distance
from edgeport.compress.distill.features import feature_loss, feature_pairs
from edgeport.compress.distill.hidden import hidden_loss, layer_pairs, projections
from edgeport.compress.distill.logits import logit_loss, next_tokens
from edgeport.compress.distill.minillm import policy_loss
from edgeport.compress.distill.relations import check_heads, relation_loss, vector_layers, vectors
from edgeport.compress.distill.sampling import continue_texts, prompt_length, written_batch
from edgeport.compress.prune.families import FAMILIES, Sizes, sizes_of
from edgeport.data.corpus import end_of_text
from edgeport.distilling import Distill
from edgeport.errors import BadInputError
from edgeport.model.inputs import select_outputs
from edgeport.model.types import Model

Seen = dict[str, torch.Tensor]


class Tap:
    """Runs a module and keeps what some of its layers gave."""

    def __init__(self, module: torch.nn.Module, outputs: Sequence[str], layers: Sequence[str]) -> None:
        self.module, self.outputs, self.layers = module, tuple(outputs), tuple(dict.fromkeys(layers))

    def __call__(self, inputs: Sample) -> tuple[Seen, Seen]:
        """Outputs by name, and what the layers gave by theirs."""
        seen: Seen = {}

        def note(name: str) -> Any:
            def hook(_layer: torch.nn.Module, _arguments: Any, output: Any) -> None:
                seen[name] = hidden_states(output)

            return hook

        with ExitStack() as stack:
            for name in self.layers:
                stack.callback(self.module.get_submodule(name).register_forward_hook(note(name)).remove)
            found = select_outputs(call(self.module, inputs), self.outputs)
        return found, seen


@dataclass(frozen=True)
class Relations:
    """Which layers' queries, keys and values are compared, of the student and of the teacher."""

    layers: tuple[dict[str, str], dict[str, str]]
    sizes: tuple[Sizes, Sizes]
    heads: int


def _blocks(model: Model) -> list[str]:
    """Names of the blocks that run one after the other; a single one is only known of a family."""
    if str(getattr(getattr(model.module, "config", None), "model_type", "")) in FAMILIES:
        sizes = sizes_of(model.module)
        return [sizes.block(index) for index in range(sizes.layers)]
    chains = find_chains(model.module, model.example)
    return chains[-1] if chains else []


def _states(student: Model, teacher: Model, step: Distill) -> list[tuple[str, str]]:
    """Pairs of blocks whose hidden states are compared.

    Raises:
        BadInputError: one of the models is no chain of blocks.
    """
    own, other = _blocks(student), _blocks(teacher)
    if not own or not other:
        raise BadInputError(
            "Hidden states are those of blocks that run one after the other, and the model has none.",
            where="hidden of distill",
            next_step="Leave hidden out; conv nets take features.",
        )
    return [(own[one], other[two]) for one, two in layer_pairs(len(own), len(other), step.layers)]


def _relations(student: Model, teacher: Model, step: Distill) -> Relations:
    own, other = (sizes_of(one.module) for one in (student, teacher))
    heads = step.relation_heads or own.heads
    check_heads((own, other), heads)
    layers = vector_layers(student.module, own.layers - 1), vector_layers(teacher.module, other.layers - 1)
    return Relations(layers, (own, other), heads)


class Objective:
    """The loss of one batch, of a student that is trained in place.

    Attributes:
        matrices: what is trained beside the student and then forgotten.
        end: the token that ends a text.
        causal: each position's logits are of the next token.
    """

    def __init__(self, student: Model, teacher: Model, step: Distill) -> None:
        self.step, self.end = step, end_of_text(student)
        self.causal = student.task.startswith("text-generation")
        self.relations = _relations(student, teacher, step) if step.relations else None
        self.states = _states(student, teacher, step) if step.hidden else []
        self.features = feature_pairs(student.module, teacher.module, student.example) if step.features else []
        pairs = [*self.states, *self.features]
        if self.relations is not None:
            pairs += list(zip(self.relations.layers[0].values(), self.relations.layers[1].values(), strict=True))
        names = tuple(spec.name for spec in student.outputs) if step.outputs else ()
        self.student = Tap(student.module, names, [own for own, _ in pairs])
        self.teacher = Tap(teacher.module, names, [other for _, other in pairs])
        self.matrices = projections(self._widths(student, teacher), step.seed)

    def _widths(self, student: Model, teacher: Model) -> list[tuple[int, int]]:
        if not self.states:
            return []
        with torch.no_grad():
            own, other = self.student(student.example)[1], self.teacher(teacher.example)[1]
        return [(own[one].shape[-1], other[two].shape[-1]) for one, two in self.states]

    def __call__(self, batch: Sample) -> torch.Tensor:
        """The loss on given inputs, a scalar."""
        return self._compare(batch, labels=self.step.labels)

    def on_policy(self, batch: Sample, generator: torch.Generator) -> torch.Tensor:
        """The loss on what the student writes behind the beginnings of given texts (GKD, Agarwal et al. 2024,
        https://arxiv.org/abs/2306.13649, algorithm 1). Its own tokens are no labels to learn."""
        return self._compare(self.write(batch, generator, share=0.0), labels=0.0)

    def policy_gradient(self, batch: Sample, generator: torch.Generator) -> torch.Tensor:
        """MiniLLM's loss on texts that both write, and the other terms on the given ones (labels: its L_PT)."""
        step = self.step
        written = self.write(batch, generator, share=step.teacher_mix)
        inputs = inputs_of(written)
        with torch.no_grad():
            wanted = self.teacher(inputs)[0]["logits"]
        found = self.student(inputs)[0]["logits"]
        loss = (
            step.outputs
            * (1 - step.labels)
            * policy_loss(
                found[:, :-1],
                wanted[:, :-1],
                written["input_ids"][:, 1:],
                written["answer_mask"][:, 1:].bool(),
                share=step.teacher_mix,
                temperature=step.temperature,
            )
        )
        others = step.labels or self.states or self.relations or self.features
        return loss + self._compare(batch, labels=step.labels, apart=False) if others else loss

    def write(self, batch: Sample, generator: torch.Generator, *, share: float) -> dict[str, torch.Tensor]:
        """A batch with the beginnings of the given texts, and what student and teacher write behind them."""
        step = self.step
        prompt = prompt_length(batch, step.prompt_tokens)
        ids = continue_texts(
            self.student.module,
            batch["input_ids"][:, :prompt],
            step.new_tokens,
            generator,
            temperature=step.temperature,
            teacher=self.teacher.module,
            share=share,
        )
        return written_batch(batch, ids, prompt, self.end)

    def _compare(self, batch: Sample, *, labels: float, apart: bool = True) -> torch.Tensor:
        """The weighted terms on a batch; without `apart` the outputs are held against the labels alone."""
        step, mask, inputs = self.step, real_positions(batch), inputs_of(batch)
        taught = (apart and labels < 1) or self.states or self.relations or self.features
        wanted: Seen = {}
        shown: Seen = {}
        if taught:
            with torch.no_grad():
                wanted, shown = self.teacher(inputs)
        found, seen = self.student(inputs)
        total = torch.zeros(())
        if step.outputs:
            total = total + step.outputs * self._outputs(batch, found, wanted if apart else {}, labels)
        if self.states:
            total = total + step.hidden * hidden_loss(seen, shown, self.states, self.matrices, mask)
        if self.relations is not None:
            own, other = (
                vectors(values, layers, sizes)
                for values, layers, sizes in zip(
                    (seen, shown), self.relations.layers, self.relations.sizes, strict=True
                )
            )
            apart_by = relation_loss(own, other, step.relation_pairs, self.relations.heads, mask)
            total = total + step.relations * apart_by
        if self.features:
            total = total + step.features * feature_loss(seen, shown, self.features)
        return total

    def _outputs(self, batch: Sample, found: Seen, wanted: Seen, labels: float) -> torch.Tensor:
        """Divergence of logits and cross-entropy, and the relative error of every other output."""
        others = {name: value for name, value in wanted.items() if name != "logits"}
        apart = distance(found, others, batch) if others else torch.zeros(())
        if "logits" not in found:
            return apart
        step, student, teacher = self.step, found["logits"], wanted.get("logits")
        counted = told_positions(batch) if student.ndim > 2 else None
        targets = self._targets(batch) if labels else None
        if counted is not None and counted.shape == student.shape[:2]:
            student = student[counted]
            teacher = None if teacher is None else teacher[counted]
            targets = None if targets is None else targets[counted]
        classes = student.shape[-1]
        return apart + logit_loss(
            student.reshape(-1, classes),
            None if teacher is None else teacher.reshape(-1, classes),
            None if targets is None else targets.reshape(-1),
            kind=step.divergence,
            beta=step.beta,
            temperature=step.temperature,
            labels=labels,
        )

    def _targets(self, batch: Sample) -> torch.Tensor:
        """The class that each row of the logits should name.

        Raises:
            BadInputError: nothing says so.
        """
        if "labels" in batch:
            return batch["labels"]
        if not self.causal:
            raise BadInputError(
                "The data has no true classes to learn.",
                where="labels of distill",
                allowed="causal language models, and data with labels",
                next_step="Leave labels at 0.",
            )
        mask = batch.get("attention_mask")
        ids = batch["input_ids"]
        return next_tokens(ids, torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool())


def to_device(sample: Mapping[str, torch.Tensor], device: torch.device) -> dict[str, torch.Tensor]:
    """A sample where the models are."""
    return {name: value.to(device) for name, value in sample.items()}
