"""NNCF on one ONNX file; run by quality.py in an interpreter that has NNCF.

peer_nncf.py FLOAT.onnx CALIBRATION.npz OUT.onnx INT4_SYM|INT4_ASYM GROUP   4-bit weights, AWQ and scale estimation
peer_nncf.py FLOAT.onnx CALIBRATION.npz OUT.onnx PTQ|PTQ_BIAS transformer|other   static int8, also of activations
"""

from __future__ import annotations

import sys

import nncf
import onnx
from peer_inputs import read


def main() -> None:
    plain, data, out, mode, detail = sys.argv[1:]
    # NNCF looks the shapes of a transposed (tied) weight up.
    model, rows = onnx.shape_inference.infer_shapes(onnx.load(plain)), read(data)
    if mode.startswith("PTQ"):
        compressed = nncf.quantize(
            model,
            nncf.Dataset(rows),
            subset_size=len(rows),
            preset=nncf.QuantizationPreset.MIXED,
            model_type=nncf.ModelType.TRANSFORMER if detail == "transformer" else None,
            fast_bias_correction=mode != "PTQ_BIAS",
        )
    else:
        compressed = nncf.compress_weights(
            model,
            mode=nncf.CompressWeightsMode[mode],
            group_size=int(detail),
            ratio=1.0,
            # Not all_layers: ONNX Runtime can't run the grouped embeddings either. By default they take 8 bits.
            # ONNX Runtime can't run what NNCF 3.4 makes of a Gemm with a transposed weight: its groups lie on
            # another axis.
            ignored_scope=nncf.IgnoredScope(types=["Gemm"], validate=False),
            awq=True,
            scale_estimation=True,
            dataset=nncf.Dataset(rows),
            subset_size=len(rows),
        )
    onnx.save(compressed, out)


if __name__ == "__main__":
    main()
