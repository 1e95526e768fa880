"""Learning on texts that the student writes: what they are, what counts of them, and MiniLLM's gradient, exactly."""

from __future__ import annotations

import itertools

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from edgeport.compress.distill.minillm import policy_loss, what_follows
from edgeport.compress.distill.sampling import continue_texts, prompt_length, written_batch

SIZES = {"vocab_size": 16, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}


def llama(seed: int) -> torch.nn.Module:
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(LlamaConfig(**SIZES, initializer_range=0.5)).eval()


def texts(module: torch.nn.Module, ids: torch.Tensor, prompt: int, heat: float) -> torch.Tensor:
    """Probabilities of the tokens behind the prompt, (B, T), from one forward without a cache."""
    with torch.no_grad():
        chances = (module(input_ids=ids).logits[:, prompt - 1 : -1] / heat).softmax(-1)
    return chances.gather(2, ids[:, prompt:, None])[..., 0]


@pytest.mark.parametrize("share", [0.0, 0.3])
def test_texts_are_drawn_from_the_mixture(share: float) -> None:
    """The frequency of each two-token text against its probability; 4000 draws, five standard errors."""
    student, teacher = llama(0), llama(1)
    prompts = torch.tensor([[3, 7, 1]]).expand(4000, 3)
    drawn = continue_texts(
        student, prompts, 2, torch.Generator().manual_seed(0), temperature=1.3, teacher=teacher, share=share
    )
    assert drawn.shape == (4000, 5)
    assert torch.equal(drawn[:, :3], prompts)
    every = torch.tensor([[3, 7, 1, a, b] for a, b in itertools.product(range(16), range(16))])
    # Mixed token by token.
    mixed = (share * texts(teacher, every, 3, 1.3) + (1 - share) * texts(student, every, 3, 1.3)).prod(1)
    counts = torch.bincount(drawn[:, 3] * 16 + drawn[:, 4], minlength=256) / 4000
    error = (mixed * (1 - mixed) / 4000).sqrt() + 1e-4
    assert float(mixed.sum()) == pytest.approx(1, abs=1e-4)
    assert ((counts - mixed).abs() < 5 * error).all()


def test_what_counts_of_a_written_text() -> None:
    ids = torch.tensor([[5, 6, 1, 2, 9, 3], [5, 9, 1, 2, 3, 4]])
    made = written_batch({"input_ids": ids, "attention_mask": ids, "position_ids": ids}, ids, 2, 9)
    # Up to the token that ends the text; one in the prompt ends nothing.
    assert made["answer_mask"].tolist() == [[0, 0, 1, 1, 1, 0], [0, 0, 1, 1, 1, 1]]
    assert made["attention_mask"].tolist() == [[1] * 6] * 2
    assert made["position_ids"].tolist() == [list(range(6))] * 2
    assert written_batch({"input_ids": ids}, ids, 2, None)["answer_mask"].tolist() == [[0, 0, 1, 1, 1, 1]] * 2


def test_where_a_prompt_ends() -> None:
    plain = {"input_ids": torch.zeros(1, 20)}
    assert prompt_length(plain, 16) == 10
    assert prompt_length(plain, 4) == 4
    answered = {"input_ids": torch.zeros(1, 6), "answer_mask": torch.tensor([[0, 0, 0, 1, 1, 0]])}
    assert prompt_length(answered, 2) == 3


def test_rewards_of_what_follows() -> None:
    rewards = torch.tensor([[1.0, 2.0, 4.0, 8.0], [1.0, 2.0, 4.0, 8.0]])
    counted = torch.tensor([[True, True, True, True], [True, True, True, False]])
    assert what_follows(rewards, counted, mean=False).tolist() == [[14, 12, 8, 0], [6, 4, 0, 0]]
    assert what_follows(rewards, counted)[0].tolist() == pytest.approx([14 / 3, 6, 8, 0])
    assert what_follows(rewards, counted)[1, :3].tolist() == pytest.approx([3, 4, 0])


@pytest.mark.parametrize("heat", [1.0, 1.7])
def test_the_policy_gradient_is_that_of_the_reverse_kl(heat: float) -> None:
    """All 27 texts of three tokens out of three, weighted by their probability: no sampling error."""
    generator = torch.Generator().manual_seed(0)
    # Tables of logits after nothing, one token, two tokens.
    shapes = [(1, 3), (3, 3), (9, 3)]
    student = [torch.randn(*shape, generator=generator).double().requires_grad_() for shape in shapes]
    teacher = [torch.randn(*shape, generator=generator).double() for shape in shapes]
    every = torch.tensor(list(itertools.product(range(3), repeat=3)))

    def logits(tables: list[torch.Tensor]) -> torch.Tensor:
        rows = (torch.zeros(27, dtype=torch.long), every[:, 0], every[:, 0] * 3 + every[:, 1])
        return torch.stack([table[row] for table, row in zip(tables, rows, strict=True)], 1)

    def logs(tables: list[torch.Tensor]) -> torch.Tensor:
        return (logits(tables) / heat).log_softmax(-1).gather(2, every[..., None])[..., 0].sum(1)

    own, other = logs(student), logs(teacher)
    exact = torch.autograd.grad((own.exp() * (own - other)).sum(), student)
    chance = own.exp().detach()
    counted = torch.ones(1, 3, dtype=torch.bool)
    found = [torch.zeros_like(table) for table in student]
    for index in range(27):
        one, two, ids = logits(student)[index, None], logits(teacher)[index, None], every[index, None]
        loss = 3 * policy_loss(one, two, ids, counted, share=0.0, temperature=heat, mean=False)
        for total, gradient in zip(found, torch.autograd.grad(loss, student), strict=True):
            total += chance[index] * gradient
    for total, gradient in zip(found, exact, strict=True):
        assert torch.allclose(total, gradient, atol=1e-6)


def test_weights_correct_for_the_teachers_share() -> None:
    """With one token the weights make the expectation over the mixture that over the student: exact again."""
    student = torch.tensor([[[0.2, -1.0, 0.7]]], requires_grad=True)
    teacher = torch.tensor([[[1.0, 0.1, -0.4]]])
    q, p = student.softmax(-1)[0, 0], teacher.softmax(-1)[0, 0]
    exact = torch.autograd.grad((q * (q / p).log()).sum(), student)[0]
    mixed = (0.25 * p + 0.75 * q).detach()
    total = torch.zeros_like(student)
    for token in range(3):
        ids, counted = torch.tensor([[token]]), torch.ones(1, 1, dtype=torch.bool)
        loss = policy_loss(student, teacher, ids, counted, share=0.25)
        total += mixed[token] * torch.autograd.grad(loss, student)[0]
    assert torch.allclose(total, exact, atol=1e-6)
