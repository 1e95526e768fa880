"""NNCF's weight compression of one ONNX file; run by quality.py in an interpreter that has NNCF.

quality_nncf.py FLOAT.onnx CALIBRATION.npz OUT.onnx INT4_SYM|INT4_ASYM GROUP
"""

from __future__ import annotations

import sys

import nncf
import numpy as np
import onnx


def main() -> None:
    plain, data, out, mode, group = sys.argv[1:]
    rows: dict[int, dict[str, np.ndarray]] = {}
    with np.load(data) as stored:
        for key in stored.files:
            index, _, name = key.partition("/")
            rows.setdefault(int(index), {})[name] = stored[key]
    compressed = nncf.compress_weights(
        onnx.load(plain),
        mode=nncf.CompressWeightsMode[mode],
        group_size=int(group),
        ratio=1.0,
        # Not all_layers: ONNX Runtime can't run the grouped embeddings either. By default they take 8 bits.
        # ONNX Runtime can't run what NNCF 3.4 makes of a Gemm with a transposed weight: its groups lie on another axis.
        ignored_scope=nncf.IgnoredScope(types=["Gemm"]),
        awq=True,
        scale_estimation=True,
        dataset=nncf.Dataset([rows[index] for index in sorted(rows)]),
        subset_size=len(rows),
    )
    onnx.save(compressed, out)


if __name__ == "__main__":
    main()
