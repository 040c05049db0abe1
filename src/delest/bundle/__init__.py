"""The artefact that ships: an ONNX file that takes raw inputs, its labels and checksums; written, verified, run and timed without torch."""

from __future__ import annotations

from delest.bundle.model import Model, load

__all__ = ["Model", "load"]
