"""Quantise an ONNX network by NNCF: `shrink_nncf.py NETWORK ROWS.npz OUT`, where arrays of the rows are named BATCH.INPUT."""

from __future__ import annotations

import sys
from collections import defaultdict

import nncf
import numpy as np
import onnx


def main() -> None:
    network, given, out = sys.argv[1:]
    batches: dict[int, dict[str, np.ndarray]] = defaultdict(dict)
    with np.load(given) as arrays:
        for key in arrays:
            place, _, name = key.partition(".")
            batches[int(place)][name] = arrays[key]
    quantised = nncf.quantize(onnx.load(network), nncf.Dataset([batches[place] for place in sorted(batches)]))
    onnx.save(quantised, out)


if __name__ == "__main__":
    main()
