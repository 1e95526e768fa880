"""The step of a recipe that trains a smaller model towards a larger one, and where its data comes from."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator, model_validator

from edgeport.schema import Strict
from edgeport.sourcing import DataSource


class Asked(Strict):
    """A teacher that is only asked: a command, or an endpoint of the OpenAI kind (edgeport.data.answers)."""

    command: str | None = Field(default=None, description="takes a prompt on stdin and answers on stdout")
    endpoint: str | None = Field(
        default=None, pattern="^https?://", description="an address that /chat/completions is put behind"
    )
    model: str | None = Field(default=None, description="of the endpoint")
    key_variable: str | None = Field(default=None, description="environment variable that holds the endpoint's key")
    system: str | None = Field(default=None, description="said before every prompt")
    max_tokens: int = Field(default=256, ge=1, description="of an endpoint's answer")
    temperature: float = Field(default=0.0, ge=0, description="of an endpoint")
    timeout_seconds: float = Field(default=120.0, gt=0, description="for one answer")
    record: str = Field(description="file that every answer is appended to, and taken from in later runs")

    @model_validator(mode="after")
    def _one_teacher(self) -> Asked:
        if (self.command is None) == (self.endpoint is None):
            raise ValueError("give either command or endpoint")
        if (self.endpoint is None) != (self.model is None):
            raise ValueError("an endpoint needs a model, and a command has none")
        return self


class DistillData(DataSource):
    """What a distillation learns from. Without any of it: the data card of the model's modality.

    One source: a data card's calibration slice, files of texts, pictures, texts that the teacher writes, or prompts
    with the answers of a teacher that is only asked.
    """

    generate: int | None = Field(
        default=None, ge=2, description="texts that the teacher, a causal language model, writes itself"
    )
    prompts: tuple[str, ...] = Field(
        default=(), description="files of prompts, as `texts`; the answers of `teacher` are learned"
    )
    teacher: Asked | None = Field(default=None, description="who answers the prompts")
    chat: bool = Field(default=False, description="the student reads prompts in its chat template, instead of bare")
    samples: int = Field(default=1000, ge=2, description="most inputs that are used")

    @property
    def named(self) -> tuple[str, ...]:
        """The sources that are given, by their options."""
        given = {"generate": self.generate is not None, "prompts": bool(self.prompts)}
        return (*super().named, *(name for name, there in given.items() if there))

    @model_validator(mode="after")
    def _fits_the_source(self) -> DistillData:
        if bool(self.prompts) != (self.teacher is not None):
            raise ValueError("prompts and [compress.data.teacher] belong together")
        if self.chat and not self.prompts:
            raise ValueError("chat is about prompts")
        if self.sequence is not None and not self.texts and not self.prompts:
            raise ValueError("sequence is about texts and prompts")
        return self


class Distill(Strict):
    """`method = "distill"`: train the model towards a teacher, by default itself before anything was cut ("heal")."""

    method: Literal["distill"]
    teacher: str | None = Field(
        default=None, description="any MODEL that edgeport loads; None is the model as it was before the recipe's cuts"
    )
    outputs: float = Field(
        default=1.0, ge=0, description="weight of the outputs: a divergence of logits, else the relative squared error"
    )
    divergence: Literal["forward_kl", "reverse_kl", "jsd"] = Field(
        default="forward_kl", description="between the teacher's and the student's distributions"
    )
    beta: float = Field(
        default=0.5, gt=0, lt=1, description="of jsd: towards 0 like forward, towards 1 like reverse KL"
    )
    temperature: float = Field(default=1.0, gt=0, le=100, description="that logits are divided by")
    labels: float = Field(
        default=0.0, ge=0, le=1, description="share of cross-entropy with the next tokens in the loss of logits"
    )
    hidden: float = Field(default=0.0, ge=0, description="weight of the hidden states of blocks (TinyBERT)")
    relations: float = Field(default=0.0, ge=0, description="weight of the relations inside attention (MiniLM)")
    relation_pairs: tuple[Literal["qk", "qq", "kk", "vv"], ...] = Field(
        default=("qq", "kk", "vv"), description='MiniLM v2; ("qk", "vv") is the first MiniLM'
    )
    relation_heads: int | None = Field(
        default=None, ge=1, description="that queries, keys and values are cut into; None takes the student's heads"
    )
    layers: Literal["uniform", "last"] = Field(
        default="uniform",
        description="whose blocks teach: of N for M every N/M-th, or only the last (of relations always the last)",
    )
    features: float = Field(default=0.0, ge=0, description="weight of a conv net's feature maps, one a resolution")
    on_policy: float = Field(
        default=0.0, ge=0, le=1, description="share of the batches that the student writes itself (GKD's lambda)"
    )
    policy_gradient: bool = Field(
        default=False, description="the reverse KL of whole texts that student and teacher write (MiniLLM)"
    )
    teacher_mix: float = Field(
        default=0.2, ge=0, lt=1, description="of policy_gradient: the teacher's part in what texts are drawn from"
    )
    prompt_tokens: int = Field(default=16, ge=1, description="given of each input where the student writes the rest")
    new_tokens: int = Field(default=48, ge=1, description="that the student writes")
    steps: int = Field(default=500, ge=1, le=10_000_000, description="updates of the weights")
    batch: int = Field(default=4, ge=1, le=4096, description="inputs that run together")
    accumulate: int = Field(default=1, ge=1, le=4096, description="batches whose gradients make one update")
    learning_rate: float = Field(default=2e-4, gt=0, le=1)
    weight_decay: float = Field(default=0.01, ge=0, le=1)
    warm_up: float = Field(default=0.05, ge=0, lt=1, description="share of the steps in which the rate rises")
    checks: int = Field(default=10, ge=1, description="times in all that the held-out loss is measured")
    patience: int | None = Field(
        default=3, ge=1, description="checks in a row without a better loss after which training stops; None never"
    )
    held_out: int = Field(default=32, ge=1, description="inputs that only judge, at most a fifth of all")
    freeze: tuple[str, ...] = Field(default=(), description="glob patterns of parameters that stay as they are")
    precision: Literal["auto", "float32", "mixed"] = Field(
        default="auto", description='of the forward; "auto" is bfloat16 autocast on a GPU, float32 on a CPU'
    )
    seed: int = 0
    data: DistillData = DistillData()

    @field_validator("relation_pairs")
    @classmethod
    def _some_pairs(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if not value:
            raise ValueError("name at least one pair")
        return value

    @model_validator(mode="after")
    def _learns_something(self) -> Distill:
        if self.outputs == self.hidden == self.relations == self.features == 0:
            raise ValueError("nothing is learned: give outputs, hidden, relations or features a weight")
        writes = self.on_policy > 0 or self.policy_gradient
        needs = {
            "divergence": (self.outputs, "outputs"),
            "labels": (self.outputs, "outputs"),
            "beta": (self.divergence == "jsd", 'divergence = "jsd"'),
            "relation_pairs": (self.relations, "relations"),
            "relation_heads": (self.relations, "relations"),
            "teacher_mix": (self.policy_gradient, "policy_gradient"),
            "prompt_tokens": (writes, "on_policy or policy_gradient"),
            "new_tokens": (writes, "on_policy or policy_gradient"),
        }
        for name, (given, what) in needs.items():
            # Recipes that were stored in full name the defaults, too.
            if not given and getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"{name} changes nothing without {what}")
        if self.data.prompts and self.labels == 0:
            raise ValueError("a teacher's answers are learned as labels: give labels a share, 1 for them alone")
        if self.policy_gradient and (self.divergence != "reverse_kl" or self.on_policy or self.outputs == 0):
            raise ValueError(
                "policy_gradient lowers the reverse KL on texts of its own: set divergence to reverse_kl, outputs "
                "above 0, and leave on_policy out"
            )
        return self
