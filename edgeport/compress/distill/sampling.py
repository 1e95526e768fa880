"""Texts that a student goes on writing, as inputs to learn on."""

from __future__ import annotations

import torch

from edgeport.compress.distill.batch import Sample
from edgeport.model.inputs import select_outputs


@torch.no_grad()
def continue_texts(
    student: torch.nn.Module,
    prompts: torch.Tensor,
    count: int,
    generator: torch.Generator,
    *,
    temperature: float = 1.0,
    teacher: torch.nn.Module | None = None,
    share: float = 0.0,
) -> torch.Tensor:
    """Token ids (B, P + count) that continue prompts (B, P), drawn from softmax(logits / temperature).

    Args:
        teacher, share: the teacher's part in the distribution that is drawn from: share p + (1 - share) q.
    """
    writers = [(student, 1 - share)]
    if teacher is not None and share > 0:
        writers.append((teacher, share))
    caches: list[object] = [None] * len(writers)
    ids = read = prompts
    for _ in range(count):
        chances = torch.zeros(())
        for place, (module, weight) in enumerate(writers):
            output = module(input_ids=read, past_key_values=caches[place], use_cache=True)
            caches[place] = output.past_key_values
            logits = select_outputs(output, ("logits",))["logits"][:, -1].float().cpu()
            chances = chances + weight * (logits / temperature).softmax(-1)
        # Drawn on the CPU: one generator, whatever the device.
        read = torch.multinomial(chances, 1, generator=generator).to(ids.device)
        ids = torch.cat([ids, read], 1)
    return ids


def prompt_length(sample: Sample, most: int) -> int:
    """Tokens of a sample's beginning that are given: up to its answer, where it has one; else half of it at most."""
    answer = sample.get("answer_mask")
    if answer is not None and bool(answer.any()):
        return max(1, int(answer[0].nonzero()[0]))
    return max(1, min(most, sample["input_ids"].shape[1] // 2))


def written_batch(batch: Sample, ids: torch.Tensor, prompt: int, end: int | None) -> dict[str, torch.Tensor]:
    """A batch of written texts in place of a given one: what follows the prompt counts, up to the end-of-text token.

    Args:
        ids: (B, S).
    """
    answer = torch.zeros_like(ids)
    answer[:, prompt:] = 1
    if end is not None:
        ended = (ids[:, prompt:] == end).cumsum(1)
        # The token that ends a text is still one that was written.
        answer[:, prompt:] -= ((ended - (ids[:, prompt:] == end).long()) > 0).long()
    made = {"input_ids": ids, "answer_mask": answer}
    if "attention_mask" in batch:
        made["attention_mask"] = torch.ones_like(ids)
    if "position_ids" in batch:
        made["position_ids"] = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    return made
