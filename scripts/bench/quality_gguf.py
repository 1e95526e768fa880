"""llama.cpp's formats for the quality bench: a float GGUF file, llama.cpp's own quantizer, its tensors in PyTorch.

The quantizer is called in the shared library of npm's `@node-llama-cpp/linux-x64`, which peer_env.py fetches. What is
compared are the dequantised weights, in the float model's own arithmetic; llama.cpp's kernels also round activations.
"""

from __future__ import annotations

import copy
import ctypes
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from quality_bench import LANGUAGE, Bench, Made
from quality_peers import Peer

from edgeport.model.types import Model
from edgeport.model.zoo import fetch_zoo
from edgeport.runtime.torch import TorchSession

FORMATS = {"Q8_0": 7, "Q6_K": 18, "Q5_K_M": 17, "Q4_K_M": 15, "Q4_K_S": 14, "Q4_0": 2, "Q3_K_M": 12}
"""llama.cpp's file types by name, with their numbers in `enum llama_ftype`."""


class _Parameters(ctypes.Structure):
    """The first fields of `llama_model_quantize_params`; the rest keeps its defaults."""

    _fields_ = (
        ("threads", ctypes.c_int32),
        ("ftype", ctypes.c_int),
        ("output_type", ctypes.c_int),
        ("embedding_type", ctypes.c_int),
        ("rest", ctypes.c_byte * 240),
    )


def quantize(library: Path, plain: Path, out: Path, kind: str) -> None:
    """llama.cpp's `llama_model_quantize`.

    Raises:
        RuntimeError: it failed; it says why on stderr.
    """
    ctypes.CDLL(str(library.parent / "libggml-base.so"), ctypes.RTLD_GLOBAL)
    llama = ctypes.CDLL(str(library))
    llama.llama_backend_init()
    llama.llama_model_quantize_default_params.restype = _Parameters
    parameters = llama.llama_model_quantize_default_params()
    parameters.threads, parameters.ftype = 1, FORMATS[kind]
    if llama.llama_model_quantize(str(plain).encode(), str(out).encode(), ctypes.byref(parameters)):
        raise RuntimeError(f"llama.cpp could not make {kind}")


def swap_halves(weight: np.ndarray, heads: int, *, back: bool = False) -> np.ndarray:
    """Rows of q and k from the order of Hugging Face (halves) to llama.cpp's (pairs), or back."""
    split = (weight.shape[0] // heads // 2, 2) if back else (2, weight.shape[0] // heads // 2)
    return weight.reshape(heads, *split, -1).swapaxes(1, 2).reshape(weight.shape)


def names(model: Model) -> dict[str, tuple[str, int]]:
    """Each parameter's name in the file, and its heads where its rows change places."""
    config: Any = model.module.config
    table = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    found = {}
    for name, _ in model.module.named_parameters():
        layer = re.search(r"\.([qk]_proj)\.", name)
        found[name] = (str(table.get_name(name, (".weight",))), int(heads[layer[1]]) if layer else 0)
    return found


def write_float(model: Model, out: Path) -> None:
    """The model as a float32 GGUF file, with the tokenizer of the zoo's file, from which the bench's model was made."""
    config: Any = model.module.config
    reader, writer = gguf.GGUFReader(fetch_zoo("smollm2")), gguf.GGUFWriter(out, "llama")
    for field in reader.fields.values():
        if field.name.startswith("tokenizer."):
            writer.add_key_value(field.name, field.contents(), field.types[0], field.types[-1])
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_rope_freq_base(float(config.rope_parameters["rope_theta"]))
    writer.add_vocab_size(config.vocab_size)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    for name, (stored, heads) in names(model).items():
        weight = model.module.get_parameter(name).detach().float().numpy()
        writer.add_tensor(stored, swap_halves(weight, heads) if heads else weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def read_back(model: Model, path: Path) -> tuple[Model, int, float]:
    """The model with a file's weights, the bytes of its tensors, and the bits of a quantized weight on average."""
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    module = copy.deepcopy(model.module)
    with torch.no_grad():
        for name, (stored, heads) in names(model).items():
            tensor = tensors[stored]
            weight = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
            parameter = module.get_parameter(name)
            weight = weight.reshape(tuple(parameter.shape))
            parameter.copy_(torch.from_numpy(np.array(swap_halves(weight, heads, back=True) if heads else weight)))
    coded = [tensor for tensor in tensors.values() if tensor.tensor_type != gguf.GGMLQuantizationType.F32]
    bits = 8 * sum(int(tensor.n_bytes) for tensor in coded) / sum(int(tensor.n_elements) for tensor in coded)
    return replace(model, module=module), sum(int(tensor.n_bytes) for tensor in tensors.values()), bits


def row(library: Path, kind: str) -> Callable[[Bench, Path], Made]:
    def make(bench: Bench, folder: Path) -> Made:
        plain = bench.shared / "model.gguf"
        if not plain.is_file():
            write_float(bench.model, plain)
        path = folder / "model.gguf"
        quantize(library, plain, path, kind)
        model, size, bits = read_back(bench.model, path)
        return Made(bench.ask(TorchSession(model).run), size, bits, "PyTorch, dequantised")

    return make


def gguf_peers(folder: Path, bench: Bench) -> Iterator[Peer]:
    """Rows for a Llama, where llama.cpp's library is."""
    libraries = sorted(folder.glob("**/libllama*.so"))
    libraries = [path for path in libraries if "common" not in path.name]
    if bench.model.task != LANGUAGE or not libraries:
        return
    for kind in FORMATS:
        yield Peer("llama.cpp 0.5.0 (gguf)", kind, f"{kind}, no importance matrix", row(libraries[0], kind))
