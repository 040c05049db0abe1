"""The artefact that ships: an ONNX file that takes raw inputs, its labels and checksums; written, verified, run and timed without torch."""
