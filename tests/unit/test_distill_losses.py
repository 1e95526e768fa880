"""Every loss of distillation against a slow computation of its formula, in float64 and loops."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, BertConfig, GPT2Config, LlamaConfig

from edgeport.compress.distill import logits as module
from edgeport.compress.distill.features import attention_map, feature_loss, last_by_size
from edgeport.compress.distill.hidden import hidden_loss, layer_pairs, projections
from edgeport.compress.distill.logits import IGNORED, by_rows, divergence, logit_loss, next_tokens
from edgeport.compress.distill.objective import Tap
from edgeport.compress.distill.relations import relation, relation_loss, vector_layers, vectors
from edgeport.compress.prune.families import sizes_of
from edgeport.errors import BadInputError


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def softmax(row: list[float]) -> list[float]:
    top = max(row)
    powers = [math.exp(value - top) for value in row]
    return [power / sum(powers) for power in powers]


def kl(p: list[float], q: list[float]) -> float:
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


def slow_divergence(student: torch.Tensor, teacher: torch.Tensor, kind: str, beta: float, heat: float) -> list[float]:
    found = []
    for own, other in zip(student.tolist(), teacher.tolist(), strict=True):
        q, p = softmax([value / heat for value in own]), softmax([value / heat for value in other])
        m = [beta * a + (1 - beta) * b for a, b in zip(p, q, strict=True)]
        value = {
            "forward_kl": kl(p, q),
            "reverse_kl": kl(q, p),
            "jsd": beta * kl(p, m) + (1 - beta) * kl(q, m),
        }[kind]
        found.append(value * heat**2)
    return found


def test_a_divergence_by_hand() -> None:
    # p = (3/4, 1/4), q = (1/2, 1/2).
    teacher, student = torch.tensor([[math.log(3.0), 0.0]]), torch.zeros(1, 2)
    forward = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    reverse = 0.5 * math.log(2 / 3) + 0.5 * math.log(2)
    middle = 0.5 * (0.75 * math.log(0.75 / 0.625) + 0.25 * math.log(0.25 / 0.375)) + 0.5 * (
        0.5 * math.log(0.5 / 0.625) + 0.5 * math.log(0.5 / 0.375)
    )
    for kind, value in (("forward_kl", forward), ("reverse_kl", reverse), ("jsd", middle)):
        assert float(divergence(student, teacher, kind)) == pytest.approx(value, rel=1e-5)


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jsd"])
@pytest.mark.parametrize(("beta", "heat"), [(0.5, 1.0), (0.1, 2.0), (0.9, 0.7)])
def test_divergences_are_the_formulas(kind: str, beta: float, heat: float) -> None:
    student, teacher = draw(4, 7) * 2, draw(4, 7, seed=1) * 2
    found = divergence(student, teacher, kind, beta=beta, temperature=heat).tolist()
    assert found == pytest.approx(slow_divergence(student, teacher, kind, beta, heat), rel=1e-4)
    assert divergence(teacher, teacher, kind, beta=beta, temperature=heat).abs().max() < 1e-5


def test_the_jsd_between_its_ends() -> None:
    # GKD, section 3: divided by beta (1 - beta) it goes to forward KL at 0 and to reverse KL at 1.
    student, teacher = draw(3, 5).double(), draw(3, 5, seed=1).double()
    for beta, kind in ((1e-3, "forward_kl"), (1 - 1e-3, "reverse_kl")):
        found = divergence(student, teacher, "jsd", beta=beta) / (beta * (1 - beta))
        assert torch.allclose(found, divergence(student, teacher, kind), rtol=0.02)


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jsd"])
def test_rows_at_a_time_give_the_same_loss_and_gradient(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher, targets = draw(11, 6, seed=1), torch.tensor([0, 5, IGNORED, 2, 2, 1, 3, IGNORED, 4, 0, 1])
    options = {"kind": kind, "beta": 0.3, "temperature": 1.5, "labels": 0.25}
    results = []
    for values in (1, 18, 1 << 20):
        monkeypatch.setattr(module, "VALUES", values)
        student = draw(11, 6).requires_grad_()
        loss = logit_loss(student, teacher, targets, **options)
        (loss * 3).backward()
        results.append((loss.item(), student.grad))
        with torch.no_grad():
            assert logit_loss(student, teacher, targets, **options).item() == pytest.approx(loss.item(), rel=1e-5)
    # The whole at once, by autograd.
    whole = draw(11, 6).requires_grad_()
    apart = divergence(whole, teacher, kind, beta=0.3, temperature=1.5).mean()
    known = targets != IGNORED
    told = -whole.log_softmax(-1)[known, targets[known]].mean()
    total = 0.75 * apart + 0.25 * told
    (total * 3).backward()
    for loss, gradient in results:
        assert loss == pytest.approx(total.item(), rel=1e-5)
        assert torch.allclose(gradient, whole.grad, atol=1e-6)


def test_the_sum_over_rows_is_differentiable_in_half_precision() -> None:
    logits = draw(5, 4).bfloat16().requires_grad_()
    by_rows(logits, lambda rows, _part: rows.float().square().sum()).backward()
    assert torch.equal(logits.grad, (2 * logits.detach().float()).bfloat16())


def test_next_tokens_skip_what_is_padding() -> None:
    ids = torch.tensor([[5, 6, 7, 8], [9, 4, 0, 0]])
    counted = torch.tensor([[True, True, True, True], [True, True, False, False]])
    assert next_tokens(ids, counted).tolist() == [[6, 7, 8, IGNORED], [4, IGNORED, IGNORED, IGNORED]]


def test_layer_maps() -> None:
    # TinyBERT's 4 of 12: every third; 3 of 6: every second. The last always learns from the last.
    assert layer_pairs(4, 12, "uniform") == [(0, 2), (1, 5), (2, 8), (3, 11)]
    assert layer_pairs(3, 6, "uniform") == [(0, 1), (1, 3), (2, 5)]
    assert layer_pairs(4, 6, "uniform") == [(0, 1), (1, 2), (2, 4), (3, 5)]
    assert layer_pairs(6, 6, "uniform") == [(i, i) for i in range(6)]
    assert layer_pairs(3, 6, "last") == [(2, 5)]
    for student, teacher in itertools.product(range(1, 9), range(1, 13)):
        pairs = layer_pairs(student, teacher, "uniform")
        assert pairs[-1] == (student - 1, teacher - 1)
        assert all(0 <= two < teacher for _, two in pairs) or student > teacher


def test_hidden_states_count_where_there_is_text() -> None:
    student, teacher = draw(2, 3, 4), draw(2, 3, 4, seed=1)
    mask = torch.tensor([[True, True, False], [True, False, False]])
    states, wanted = {"a": student, "b": 2 * student}, {"x": teacher, "y": 3 * teacher}
    found = hidden_loss(states, wanted, [("a", "x"), ("b", "y")], projections([(4, 4), (4, 4)], 0), mask)
    terms = []
    for scale, size in ((1, 1), (2, 3)):
        above = below = 0.0
        for row, place in ((0, 0), (0, 1), (1, 0)):
            for own, other in zip(student[row, place].tolist(), teacher[row, place].tolist(), strict=True):
                above += (scale * own - size * other) ** 2
                below += (size * other) ** 2
        terms.append(above / below)
    assert float(found) == pytest.approx(sum(terms) / 2, rel=1e-5)


def test_a_narrower_student_learns_a_matrix() -> None:
    matrices = projections([(4, 6)], 0)
    student, teacher = draw(1, 5, 4).requires_grad_(), draw(1, 5, 6, seed=1)
    loss = hidden_loss({"a": student}, {"x": teacher}, [("a", "x")], matrices, None)
    wanted = (student @ matrices[0].weight.T - teacher).square().sum() / teacher.square().sum()
    assert float(loss.detach()) == pytest.approx(float(wanted.detach()), rel=1e-5)
    loss.backward()
    assert matrices[0].weight.grad.norm() > 0
    assert torch.equal(projections([(4, 6)], 0)[0].weight, matrices[0].weight)
    with pytest.raises(BadInputError, match="states at a"):
        hidden_loss({"a": student}, {"x": teacher[:, :4]}, [("a", "x")], matrices, None)


@pytest.mark.parametrize("pairs", [("qk", "vv"), ("qq", "kk", "vv")])
@pytest.mark.parametrize("padded", [False, True])
def test_relations_are_minilms(pairs: tuple[str, ...], padded: bool) -> None:
    heads, length = 2, 3
    student = {part: draw(1, length, 4, seed=seed) for seed, part in enumerate("qkv")}
    teacher = {part: draw(1, length, 8, seed=seed + 5) for seed, part in enumerate("qkv")}
    mask = torch.tensor([[True, True, not padded]])
    seen = 2 if padded else 3
    total = 0.0
    for first, second in pairs:
        for head in range(heads):
            for row in range(seen):
                relations = []
                for given, width in ((student, 2), (teacher, 4)):
                    cut = slice(head * width, (head + 1) * width)
                    a, b = given[first][0, :, cut].tolist(), given[second][0, :, cut].tolist()
                    scores = [
                        sum(x * y for x, y in zip(a[row], b[column], strict=True)) / math.sqrt(width)
                        for column in range(seen)
                    ]
                    relations.append(softmax(scores))
                total += kl(relations[1], relations[0]) / (len(pairs) * heads * seen)
    assert float(relation_loss(student, teacher, pairs, heads, mask)) == pytest.approx(total, rel=1e-4)
    assert float(relation_loss(teacher, teacher, pairs, heads, mask)) == pytest.approx(0, abs=1e-6)


def test_padding_has_no_gradient_in_relations() -> None:
    student = {part: draw(1, 4, 4, seed=seed).requires_grad_() for seed, part in enumerate("qkv")}
    teacher = {part: draw(1, 4, 4, seed=seed + 5) for seed, part in enumerate("qkv")}
    relation_loss(student, teacher, ("qq", "vv"), 2, torch.tensor([[True, True, True, False]])).backward()
    assert torch.equal(student["q"].grad[0, 3], torch.zeros(4))
    assert student["q"].grad[0, :3].abs().min() > 0


def test_features_of_equal_width_and_attention_maps_of_others() -> None:
    one, two, wide = draw(2, 3, 4, 4), draw(2, 3, 4, 4, seed=1), draw(2, 5, 4, 4, seed=2)
    same = float(feature_loss({"a": one}, {"b": two}, [("a", "b")]))
    assert same == pytest.approx(float((one - two).square().sum() / two.square().sum()), rel=1e-5)
    other = float(feature_loss({"a": one}, {"b": wide}, [("a", "b")]))
    total = 0.0
    for picture in range(2):
        maps = []
        for features in (one, wide):
            flat = [
                sum(float(features[picture, c, y, x]) ** 2 for c in range(features.shape[1]))
                for y in range(4)
                for x in range(4)
            ]
            norm = math.sqrt(sum(value**2 for value in flat))
            maps.append([value / norm for value in flat])
        total += sum((a - b) ** 2 for a, b in zip(*maps, strict=True)) / 2
    assert other == pytest.approx(total, rel=1e-4)
    assert attention_map(wide).norm(dim=1).tolist() == pytest.approx([1, 1])


def test_the_last_convolution_of_each_size() -> None:
    net = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3, stride=2, padding=1),
        torch.nn.Conv2d(4, 4, 3, padding=1),
        torch.nn.Conv2d(4, 6, 3, stride=2, padding=1),
        torch.nn.AdaptiveAvgPool2d(1),
        torch.nn.Conv2d(6, 5, 1),
    )
    assert last_by_size(net, {"input": torch.zeros(1, 3, 8, 8)}) == {(4, 4): "1", (2, 2): "2"}


def test_relations_of_queries_and_keys_are_the_models_attention() -> None:
    """BERT's last layer as transformers computes it, with padding; and what a GPT-2 and a grouped Llama split into."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    bert = AutoModel.from_config(
        BertConfig(**sizes, num_attention_heads=4, initializer_range=0.3), attn_implementation="eager"
    ).eval()
    ids, mask = torch.randint(0, 32, (2, 7)), torch.ones(2, 7, dtype=torch.long)
    mask[1, 5:] = 0
    layers = vector_layers(bert, 1)
    _, seen = Tap(bert, (), list(layers.values()))({"input_ids": ids, "attention_mask": mask})
    found = vectors(seen, layers, sizes_of(bert))
    with torch.no_grad():
        wanted = bert(input_ids=ids, attention_mask=mask, output_attentions=True).attentions[-1]
    assert torch.allclose(relation(found["q"], found["k"], 4, mask.bool()).exp(), wanted, atol=1e-5)

    llama = AutoModelForCausalLM.from_config(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)).eval()
    layers = vector_layers(llama, 1)
    _, seen = Tap(llama, (), list(layers.values()))({"input_ids": ids})
    found = vectors(seen, layers, sizes_of(llama))
    keys = seen["model.layers.1.self_attn.k_proj"]
    assert torch.equal(found["q"], seen["model.layers.1.self_attn.q_proj"])
    # Heads 0 and 1 share the first pair, 2 and 3 the second.
    assert torch.equal(found["k"], torch.cat([keys[..., :4], keys[..., :4], keys[..., 4:], keys[..., 4:]], -1))

    gpt2 = AutoModel.from_config(GPT2Config(n_embd=16, n_head=4, n_layer=2, vocab_size=32, n_positions=16)).eval()
    layers = vector_layers(gpt2, 1)
    _, seen = Tap(gpt2, (), list(layers.values()))({"input_ids": ids})
    found = vectors(seen, layers, sizes_of(gpt2))
    (joined,) = seen.values()
    for place, part in enumerate("qkv"):
        assert torch.equal(found[part], joined[..., 16 * place : 16 * place + 16])
