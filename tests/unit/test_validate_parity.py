"""Parity against hand-computed values and against torch."""

import numpy as np
import pytest
import torch

from edgeport.errors import MeasurementError
from edgeport.validate.outputs import sentence_embedding, valid_positions
from edgeport.validate.parity import compare

RNG = np.random.default_rng


def one(reference, measured, *, task="feature-extraction", inputs=None, output="y"):
    found = compare(
        [{output: np.asarray(r, np.float32)} for r in reference],
        [{output: np.asarray(m, np.float32)} for m in measured],
        task=task,
        inputs=inputs,
    )
    return {p.output: p for p in found}[output]


def test_numbers_computed_by_hand():
    parity = one([[3.0, 4.0], [0.0, 2.0]], [[4.0, 3.0], [0.0, 2.5]])
    assert parity.max_abs == 1.0
    assert parity.relative_l2 == pytest.approx(np.sqrt((1 + 1 + 0.25) / (25 + 4)), rel=1e-12)
    assert parity.cosine is not None
    assert parity.cosine.mean == pytest.approx((24 / 25 + 1) / 2, rel=1e-12)
    assert parity.cosine_worst == pytest.approx(24 / 25, rel=1e-12)
    assert parity.cosine.n == 2
    assert parity.top1_agreement is None
    assert parity.kl is None
    assert parity.positions is None


def test_equal_outputs_are_equal():
    values = RNG(0).normal(size=(5, 7, 3)).astype(np.float32)
    parity = one(values, values)
    assert (parity.max_abs, parity.relative_l2) == (0.0, 0.0)
    assert parity.cosine_worst == pytest.approx(1.0, abs=1e-15)
    assert parity.finite
    assert parity.varies


def test_classifier_scores_against_torch():
    random = RNG(1)
    reference = random.normal(size=(40, 1, 11)).astype(np.float32) * 3
    measured = (reference + random.normal(size=reference.shape)).astype(np.float32)
    parity = one(reference, measured, task="image-classification", output="logits")
    r, m = torch.tensor(reference[:, 0]).double(), torch.tensor(measured[:, 0]).double()
    expected = torch.nn.functional.kl_div(
        m.log_softmax(-1), r.log_softmax(-1), log_target=True, reduction="batchmean"
    ).item()
    assert parity.kl is not None
    assert parity.top1_agreement is not None
    assert parity.kl.mean == pytest.approx(expected, rel=1e-10)
    assert parity.top1_agreement.mean == (r.argmax(-1) == m.argmax(-1)).double().mean().item()
    assert 0.3 < parity.top1_agreement.mean < 0.95
    assert parity.kl.low < parity.kl.mean < parity.kl.high
    assert parity.positions == 40


def test_language_model_leaves_padding_out():
    """Positions under a zero mask hold anything at all, even NaN, in either model."""
    random = RNG(2)
    reference = random.normal(size=(2, 1, 6, 13)).astype(np.float32)
    measured = reference + random.normal(size=reference.shape).astype(np.float32) * 0.5
    masks = np.array([[[1, 1, 1, 1, 0, 0]], [[0, 0, 0, 1, 1, 1]]])
    expected = []
    for r, m, mask in zip(reference, measured, masks, strict=True):
        rows = [
            torch.nn.functional.kl_div(
                torch.tensor(m[0, t]).double().log_softmax(-1),
                torch.tensor(r[0, t]).double().log_softmax(-1),
                log_target=True,
                reduction="sum",
            ).item()
            for t in range(6)
            if mask[0, t]
        ]
        expected += rows
    for index, mask in enumerate(masks):
        reference[index][:, mask[0] == 0] = 1e9
        measured[index][:, mask[0] == 0] = np.nan
    parity = one(
        reference,
        measured,
        task="text-generation",
        output="logits",
        inputs=[{"attention_mask": mask, "input_ids": mask} for mask in masks],
    )
    assert parity.positions == 7
    assert parity.finite
    assert parity.kl is not None
    assert parity.kl.mean == pytest.approx(np.mean(expected), rel=1e-9)
    assert parity.max_abs is not None
    assert parity.max_abs < 5


def test_decoder_outputs_follow_the_decoder_mask():
    inputs = {
        "attention_mask": np.array([[1, 1, 0]]),
        "decoder_input_ids": np.zeros((1, 3), np.int64),
        "decoder_attention_mask": np.array([[1, 0, 0]]),
    }
    decoder = valid_positions("logits", (1, 3, 9), inputs)
    encoder = valid_positions("encoder_last_hidden_state", (1, 3, 9), inputs)
    assert decoder is not None
    assert decoder.tolist() == [[True, False, False]]
    assert encoder is not None
    assert encoder.tolist() == [[True, True, False]]
    del inputs["decoder_attention_mask"]
    assert valid_positions("logits", (1, 3, 9), inputs) is None
    assert valid_positions("logits", (1, 2), {"attention_mask": np.ones((1, 3))}) is None


def test_sentence_embedding_is_derived_and_judged():
    random = RNG(3)
    hidden = random.normal(size=(3, 1, 4, 8)).astype(np.float32)
    mask = np.array([[1, 1, 1, 0]])
    expected = torch.nn.functional.normalize(torch.tensor(hidden[0][:, :3]).mean(1), dim=-1).numpy()
    poisoned = hidden[0].copy()
    poisoned[:, 3] = np.nan
    np.testing.assert_allclose(sentence_embedding(poisoned, mask), expected, atol=1e-6)

    reference = [{"last_hidden_state": h, "pooler_output": h[:, 0]} for h in hidden]
    measured = [{"last_hidden_state": h * 2, "pooler_output": h[:, 0]} for h in hidden]
    found = {
        p.output: p
        for p in compare(reference, measured, task="feature-extraction", inputs=[{"attention_mask": mask}] * 3)
    }
    assert found["sentence_embedding"].max_abs == pytest.approx(0, abs=1e-6)
    assert found["last_hidden_state"].relative_l2 == pytest.approx(1.0, rel=1e-9)
    assert found["pooler_output"].relative_l2 == 0
    other = compare(reference, measured, task="text-classification", inputs=[{"attention_mask": mask}] * 3)
    assert {p.output for p in other} == {"last_hidden_state", "pooler_output"}


def test_answer_spans_score_the_positions_of_the_text():
    """In question answering the classes are the tokens; a spurious peak on padding is not a class."""
    reference = np.array([[1.0, 5.0, 2.0, 9.0]], np.float32)
    measured = np.array([[1.0, 4.0, 2.0, 99.0]], np.float32)
    inputs = [{"attention_mask": np.array([[1, 1, 1, 0]])}]
    parity = one([reference], [measured], task="question-answering", output="start_logits", inputs=inputs)
    r, m = torch.tensor([1.0, 5.0, 2.0]).double(), torch.tensor([1.0, 4.0, 2.0]).double()
    expected = torch.nn.functional.kl_div(m.log_softmax(-1), r.log_softmax(-1), log_target=True, reduction="sum")
    assert parity.positions == 1
    assert parity.top1_agreement is not None
    assert parity.top1_agreement.mean == 1.0
    assert parity.kl is not None
    assert parity.kl.mean == pytest.approx(expected.item(), rel=1e-9)


def test_segmentation_classes_are_on_axis_one():
    reference = RNG(4).normal(size=(1, 5, 3, 2)).astype(np.float32)
    parity = one([reference], [reference], task="semantic-segmentation", output="logits")
    assert parity.positions == 6


def test_a_classifier_may_name_its_only_output_anything():
    values = RNG(5).normal(size=(3, 1, 4)).astype(np.float32)
    assert one(values, values, task="image-classification", output="probabilities").positions == 3
    assert one(values, values, task="feature-extraction", output="logits").positions is None
    assert one(values[..., :1], values[..., :1], task="text-classification", output="logits").positions is None


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_not_finite_leaves_no_number(bad):
    reference = RNG(6).normal(size=(4, 1, 9)).astype(np.float32)
    measured = reference.copy()
    measured[2, 0, 5] = bad
    parity = one(reference, measured, task="text-generation", output="logits")
    assert not parity.finite
    assert parity.positions == 4
    numbers = (parity.max_abs, parity.relative_l2, parity.cosine, parity.cosine_worst, parity.kl, parity.top1_agreement)
    assert numbers == (None,) * 6


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_reference_that_is_not_finite_is_refused(bad):
    with pytest.raises(MeasurementError, match="original model's own output"):
        one([[1.0, bad]], [[1.0, 2.0]])


def test_a_constant_reference_is_refused():
    with pytest.raises(MeasurementError, match="is 0 everywhere"):
        one([[0.0, 0.0], [0.0, 0.0]], [[0.0, 0.0], [0.0, 0.0]])


def test_stuck_outputs_are_seen():
    """A cosine of positive vectors is high even for a constant: the flag does not depend on it."""
    reference = 10 + RNG(7).normal(size=(5, 20)).astype(np.float32)
    constant = one(reference, np.full_like(reference, 10))
    assert constant.cosine is not None
    assert constant.cosine.mean > 0.99
    assert not constant.varies
    repeated = one(reference, np.repeat(reference[:1], 5, axis=0))
    assert not repeated.varies
    assert one(reference, reference + 1).varies
    # An original that gives the same for every sample asks nothing else of the artifact.
    assert one(np.repeat(reference[:1], 5, axis=0), np.repeat(reference[:1], 5, axis=0)).varies


def test_single_numbers_are_compared_as_one_vector():
    reference, measured = np.array([[0.1], [0.9], [0.5]]), np.array([[0.9], [0.1], [0.5]])
    parity = one(reference, measured)
    r, m = reference.astype(np.float32).astype(float), measured.astype(np.float32).astype(float)
    expected = float((r * m).sum() / np.sqrt((r**2).sum() * (m**2).sum()))
    assert parity.cosine is not None
    assert parity.cosine.mean == pytest.approx(expected, rel=1e-12)
    assert parity.cosine_worst == parity.cosine.mean


def test_zero_vectors_do_not_pass():
    parity = one([[1.0, 2.0], [3.0, 1.0]], [[0.0, 0.0], [0.0, 0.0]])
    assert parity.cosine is not None
    assert parity.cosine.mean == 0.0
    assert not parity.varies


def test_shapes_names_and_counts_must_fit():
    with pytest.raises(MeasurementError, match="shape"):
        one([[1.0, 2.0]], [[1.0, 2.0, 3.0]])
    with pytest.raises(MeasurementError, match="lacks an output"):
        compare([{"a": np.arange(3.0)}], [{"b": np.arange(3.0)}], task="other")
    with pytest.raises(MeasurementError, match="fewer"):
        one([[1.0, 2.0]], [[1.0, 2.0], [1.0, 2.0]])
    with pytest.raises(MeasurementError, match="no sample"):
        one([[1.0, 2.0], [1.0, 2.0]], [[1.0, 2.0]])
    with pytest.raises(MeasurementError, match="no sample"):
        compare([], [], task="other")
