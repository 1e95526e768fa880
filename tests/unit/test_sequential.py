"""Calibration block by block: what each layer is shown, against forwards of the whole model."""

import copy

import pytest
import torch
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, BertConfig, LlamaConfig, T5Config, ViTConfig

from edgeport.compress.assign import Assignment
from edgeport.compress.chain import call, find_chains
from edgeport.compress.journal import Journal, Note
from edgeport.compress.quantize.grid import Grid
from edgeport.compress.quantize.rtn import quantize_rtn
from edgeport.compress.sequential import quantize_in_sequence
from edgeport.compress.statistics import Moments, input_vectors, observed
from edgeport.errors import BadInputError
from edgeport.formats import WeightFormat
from edgeport.quantized import dequantize, digest

LLAMA = LlamaConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    tie_word_embeddings=True,
)


def llama() -> nn.Module:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(LLAMA).eval()


def tokens(count: int, length: int = 9) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [{"input_ids": torch.randint(0, 64, (1, length), generator=generator)} for _ in range(count)]


def assignments(
    module: nn.Module, names: list[str], tied: dict[str, tuple[str, ...]] | None = None
) -> list[Assignment]:
    parameters = dict(module.named_parameters(remove_duplicate=False))
    layers = dict(module.named_modules(remove_duplicate=False))
    kinds = {nn.Embedding: "embedding", nn.Linear: "linear", nn.Conv2d: "conv"}
    return [
        Assignment(
            name=name,
            kinds=tuple(kinds[type(layers[n.removesuffix(".weight")])] for n in (tied or {}).get(name, (name,))),
            shape=tuple(parameters[name].shape),
            format=WeightFormat.parse("int4"),
            activation="float",
            scale_dtype="float32",
            tied=(tied or {}).get(name, ()),
            reason="",
        )
        for name in names
    ]


def rtn(_item: Assignment, weight: torch.Tensor, _moments: Moments | None):
    return quantize_rtn(weight, Grid(4)), Note("rtn", None)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (LLAMA, [("layers.0", 3)]),
        (
            BertConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4),
            [("encoder.layer.0", 2)],
        ),
        (
            ViTConfig(
                image_size=32,
                patch_size=16,
                hidden_size=32,
                intermediate_size=48,
                num_hidden_layers=2,
                num_attention_heads=4,
            ),
            [("layers.0", 2)],
        ),
        (
            T5Config(vocab_size=64, d_model=32, d_ff=48, d_kv=8, num_layers=2, num_heads=4),
            [("encoder.block.0", 2), ("decoder.block.0", 2)],
        ),
    ],
    ids=["llama", "bert", "vit", "t5"],
)
def test_chains_of_real_architectures(config, expected):
    torch.manual_seed(0)
    module = AutoModel.from_config(config).eval()
    inputs = {
        "ViTConfig": {"pixel_values": torch.randn(1, 3, 32, 32)},
        "T5Config": {**tokens(1)[0], "decoder_input_ids": torch.tensor([[1, 2, 3]])},
    }.get(type(config).__name__, tokens(1)[0])
    chains = find_chains(module, inputs)
    assert [(chain[0].removeprefix("vit."), len(chain)) for chain in chains] == expected


class Crossed(nn.Module):
    """A list whose entries all read the same input: no chain."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return sum(head(x) for head in self.heads)


def test_parallel_entries_are_no_chain():
    torch.manual_seed(0)
    assert find_chains(Crossed(), {"x": torch.randn(1, 8)}) == []


def test_each_layer_sees_what_the_quantized_prefix_makes():
    module, inputs = llama(), tokens(5)
    names = [name for name, p in module.named_parameters() if p.dim() == 2 and "embed" not in name]
    shown: dict[str, Moments] = {}

    def method(item: Assignment, weight: torch.Tensor, moments: Moments | None):
        assert moments is not None
        shown[item.name] = copy.deepcopy(moments)
        return rtn(item, weight, moments)

    done = quantize_in_sequence(module, assignments(module, names), inputs, method)
    assert list(done) == names
    # The same by brute force: a whole forward with all earlier blocks quantized, for every block.
    replay = copy.deepcopy(module)
    parameters = dict(replay.named_parameters())
    for block in range(3):
        inside = [name for name in names if name.startswith(f"model.layers.{block}.")]
        layers = {name: replay.get_submodule(name.removesuffix(".weight")) for name in inside}
        with torch.no_grad(), observed(layers) as moments:
            for sample in inputs:
                call(replay, sample)
        for name in inside:
            assert shown[name].count == moments[name].count == 45
            assert torch.allclose(shown[name].second, moments[name].second, rtol=1e-4, atol=1e-5)
            assert torch.allclose(shown[name].mean_abs, moments[name].mean_abs, rtol=1e-4, atol=1e-5)
            with torch.no_grad():
                parameters[name].copy_(dequantize(done[name][0]))


def test_tied_head_is_observed_and_quantized_before_the_blocks():
    module, inputs = llama(), tokens(3)
    table = "model.embed_tokens.weight"
    tied = {table: (table, "lm_head.weight")}
    order: list[tuple[str, bool]] = []

    def method(item: Assignment, weight: torch.Tensor, moments: Moments | None):
        order.append((item.name, moments is not None))
        return rtn(item, weight, moments)

    before = {name: value.clone() for name, value in module.state_dict().items()}
    names = [table, "model.layers.2.mlp.down_proj.weight"]
    quantize_in_sequence(module, assignments(module, names, tied), inputs, method)
    assert order == [(table, True), (names[1], True)]
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items()), "the model was changed"


def test_model_without_blocks_takes_one_forward():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Flatten(), nn.Linear(4 * 36, 5))

    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = module

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.net(x)

    named = Named()
    seen = []

    def method(item: Assignment, weight: torch.Tensor, moments: Moments | None):
        assert moments is not None
        seen.append(moments.second.shape[0])
        return rtn(item, weight, moments)

    quantize_in_sequence(
        named, assignments(named, ["net.0.weight", "net.2.weight"]), [{"x": torch.randn(1, 3, 6, 6)}] * 2, method
    )
    assert seen == [27, 144]


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(4, 6, 3, padding=1, stride=2, bias=False),
        nn.Conv2d(4, 6, (3, 1), padding="same", bias=False),
        nn.Conv2d(4, 6, 3, padding=2, dilation=2, padding_mode="reflect", bias=False),
        nn.Conv1d(4, 6, 5, padding=2, stride=2, bias=False),
        nn.Conv2d(4, 6, 1, bias=False),
        nn.Linear(4, 6, bias=False),
    ],
    ids=str,
)
def test_vectors_times_the_weight_are_the_layers_output(layer):
    generator = torch.Generator().manual_seed(0)
    shape = {nn.Conv2d: (2, 4, 9, 8), nn.Conv1d: (2, 4, 11), nn.Linear: (2, 3, 4)}[type(layer)]
    value = torch.randn(shape, generator=generator)
    vectors = input_vectors(layer, value)
    with torch.no_grad():
        product = vectors @ layer.weight.flatten(1).T
        output = layer(value)
    if not isinstance(layer, nn.Linear):
        output = output.flatten(2).transpose(1, 2)
    assert torch.allclose(product, output.reshape(product.shape), atol=1e-5)


def test_depthwise_layers_have_no_common_vectors():
    assert input_vectors(nn.Conv2d(4, 4, 3, groups=4), torch.randn(1, 4, 8, 8)) is None


def test_activations_that_are_not_finite_are_refused_by_name():
    module = llama()
    with torch.no_grad():
        module.model.layers[0].mlp.up_proj.weight.fill_(3e38)
    names = ["model.layers.1.self_attn.q_proj.weight", "model.layers.0.mlp.down_proj.weight"]
    with pytest.raises(BadInputError, match="not finite") as error:
        quantize_in_sequence(module, assignments(module, names), tokens(1), rtn)
    assert error.value.where == "input of layer model.layers.0.mlp.down_proj.weight"


class Killed(Exception):
    """Stands for the end of a process."""


@pytest.mark.parametrize("stop_at", [0, 3, 9, 21])
def test_a_run_that_was_cut_short_goes_on_where_it_was(tmp_path, stop_at):
    module, inputs = llama(), tokens(4)
    table = "model.embed_tokens.weight"
    names = [table, *[name for name, p in module.named_parameters() if p.dim() == 2 and "embed" not in name]]
    rows = assignments(module, names, {table: (table, "lm_head.weight")})

    def method(item: Assignment, weight: torch.Tensor, moments: Moments | None):
        importance = None if moments is None else moments.second.diagonal()
        return quantize_rtn(weight, Grid(3, 16), importance=importance), Note(item.name, float(weight.sum()))

    whole = quantize_in_sequence(module, rows, inputs, method)
    asked: list[str] = []

    def cut(item: Assignment, weight: torch.Tensor, moments: Moments | None):
        if len(asked) == stop_at:
            raise Killed
        asked.append(item.name)
        return method(item, weight, moments)

    with pytest.raises(Killed):
        quantize_in_sequence(module, rows, inputs, cut, journal=Journal(tmp_path / "j"))
    again: list[str] = []

    def counted(item: Assignment, weight: torch.Tensor, moments: Moments | None):
        again.append(item.name)
        return method(item, weight, moments)

    resumed = quantize_in_sequence(module, rows, inputs, counted, journal=Journal(tmp_path / "j"))
    assert list(resumed) == list(whole)
    for name, (tensor, note) in whole.items():
        assert digest(resumed[name][0]) == digest(tensor), name
        assert resumed[name][1] == note
    # Seven weights a block: what a finished block holds is not made again.
    finished = 0 if stop_at < 8 else 1 + 7 * ((stop_at - 1) // 7)
    assert again == names[finished:]
    assert len(list((tmp_path / "j").glob("hidden-*"))) == 1
    Journal(tmp_path / "j").close()
    assert not (tmp_path / "j").exists()
