"""Operations and bytes of one inference against sums by hand, and the roof over them."""

import numpy as np
import pytest
import torch

from edgeport.model.types import AttentionLayer, Decoder, Model, Source, TensorSpec
from edgeport.validate.evidence import Interval, Latency, Work
from edgeport.validate.work import attention_flops, count_work, machine_limits, roofline


def make_model(module, inputs, example, decoder=None):
    return Model(
        name="tiny",
        module=module.eval(),
        source=Source("factory", "test:tiny", {}),
        task="other",
        modality="other",
        inputs=inputs,
        outputs=(TensorSpec("y", "float32", (1,)),),
        example=example,
        huggingface=False,
        decoder=decoder,
    )


class Attention(torch.nn.Module):
    """Ids through an embedding, one head of attention, and a projection."""

    def __init__(self):
        super().__init__()
        self.table = torch.nn.Embedding(100, 16)
        self.out = torch.nn.Linear(16, 8)

    def forward(self, ids):
        x = self.table(ids)[:, None]
        return self.out(torch.nn.functional.scaled_dot_product_attention(x, x, x)[:, 0])


def test_attention_and_an_embedding_by_hand():
    model = make_model(Attention(), (TensorSpec("ids", "int64", (1, 10)),), {})
    ids = np.array([[3, 3, 3, 5, 5, 7, 8, 9, 9, 9]])
    work = count_work(model, {"ids": ids}, file_bytes=10_000, stored={"table.weight": 1600})
    # Scores and their sum over values are two products of 10 x 16 x 10; the projection is one of 10 x 16 x 8.
    assert work.flops == 2 * (2 * 10 * 16 * 10 + 10 * 16 * 8)
    # 5 of 100 rows are looked up.
    assert work.weight_bytes == 10_000 - 1600 * 95 // 100
    # Embedding: 10 int64 in, 10 x 16 floats out; projection: these in, 10 x 8 out.
    assert work.activation_bytes == 10 * 8 + 4 * (160 + 160 + 80)
    assert (work.cache_bytes, work.input_shapes) == (0, {"ids": (1, 10)})
    assert work.moved_bytes == work.weight_bytes + work.activation_bytes


def test_a_convolution_by_hand():
    module = torch.nn.Conv2d(3, 8, 3, stride=2, groups=1)
    model = make_model(module, (TensorSpec("input", "float32", (1, 3, 9, 9)),), {})
    work = count_work(model, {"input": np.ones((1, 3, 9, 9), np.float32)}, file_bytes=900, stored={})
    assert work.flops == 2 * (8 * 4 * 4) * (3 * 3 * 3)
    assert work.activation_bytes == 4 * (3 * 81 + 8 * 16)
    assert work.weight_bytes == 900
    assert not module._forward_hooks, "the module is left as it was"


def test_a_decoder_is_counted_at_one_more_token():
    class Head(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.table = torch.nn.Embedding(50, 16)
            self.head = torch.nn.Linear(16, 50, bias=False)

        def forward(self, input_ids, use_cache, logits_to_keep):
            assert (use_cache, logits_to_keep, input_ids.shape) == (False, 1, (1, 1))
            return self.head(self.table(input_ids))

    layers = (AttentionLayer(4, 2, 8, 1.0), AttentionLayer(4, 2, 8, 1.0, window=5))
    decoder = Decoder(layers, context=64, vocabulary=50)
    model = make_model(Head(), (TensorSpec("input_ids", "int64", (1, 20)),), {}, decoder)
    work = count_work(model, {"input_ids": np.zeros((1, 20), np.int64)}, file_bytes=5000, stored={})
    # 19 tokens before it, of which the second layer sees 4; two products of 4 heads x 8.
    assert attention_flops(decoder, 19) == 2 * 2 * 4 * 8 * (19 + 4)
    assert work.flops == 2 * 16 * 50 + attention_flops(decoder, 19)
    # Keys and values of 2 heads x 8 in 2 layers, float32, 20 tokens.
    assert work.cache_bytes == 2 * 2 * 2 * 8 * 4 * 20


def latency(p50_ms, shapes):
    one = Interval(mean=1.0, low=1.0, high=1.0, n=1)
    return Latency(
        threads=1,
        queries=1,
        warmup=0,
        p50_ms=p50_ms,
        p90_ms=p50_ms,
        cpu_ms=p50_ms,
        baseline_p50_ms=None,
        baseline_p90_ms=None,
        ratio=one,
        valid=True,
        note="",
        input_shapes=shapes,
    )


@pytest.mark.parametrize(
    ("weight_bytes", "bound", "attainable"), [(10_000_000, "memory", 20.0), (1_000_000, "arithmetic", 50.0)]
)
def test_the_roof_is_the_lower_of_two_limits(weight_bytes, bound, attainable):
    """20 million operations in 2 ms under 50 Gflop/s and 10 GB/s."""
    shapes = {"x": (1, 2)}
    work = Work(
        input_shapes=shapes,
        flops=20_000_000,
        weight_bytes=weight_bytes,
        activation_bytes=0,
        peak_gflops=50.0,
        bandwidth_gb_s=10.0,
    )
    found = roofline(work, latency(2.0, shapes))
    assert (found.bound, found.attainable_gflops) == (bound, pytest.approx(attainable))
    assert found.achieved_gflops == pytest.approx(10.0)
    assert found.mfu == pytest.approx(0.2)
    assert roofline(work, latency(2.0, {"x": (1, 3)})) is None
    assert roofline(work.model_copy(update={"peak_gflops": None}), latency(2.0, shapes)) is None


def test_the_machines_limits_leave_torch_as_it_was():
    before = torch.get_num_threads()
    peak, bandwidth = machine_limits(1)
    assert peak > 0
    assert bandwidth > 0
    assert torch.get_num_threads() == before
