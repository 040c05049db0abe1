"""An ONNX graph without what only its makers need: in a small network, names and inferred shapes outweigh the weights."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from onnx import AttributeProto, GraphProto, ModelProto

_LETTERS = "abcdefghijklmnopqrstuvwxyz"


def make_lean(model: ModelProto) -> None:
    """Remove inferred shapes, documentation, metadata of nodes and node names, and shorten all other names, in place.

    Names of the graph's inputs and outputs and the model's own metadata stay. Node names matter to tools that edit the graph, so
    this comes last.
    """
    kept = {value.name for value in (*model.graph.input, *model.graph.output)}
    short = {"": "", **{name: name for name in kept}}
    unused = (name for name in _short_names() if name not in kept)

    def shorten(name: str) -> str:
        if name not in short:
            short[name] = next(unused)
        return short[name]

    for graph in list(_graphs(model.graph)):
        del graph.value_info[:], graph.quantization_annotation[:]
        for named in (*graph.initializer, *graph.input, *graph.output):
            named.name = shorten(named.name)
        for node in graph.node:
            node.name = ""
            node.input[:] = [shorten(name) for name in node.input]
            node.output[:] = [shorten(name) for name in node.output]
        for part in (graph, *graph.initializer, *graph.input, *graph.output, *graph.node):
            part.doc_string = ""
            del part.metadata_props[:]
    model.doc_string = ""


def _short_names() -> Iterator[str]:
    """a, b, ..., z, aa, ab, ..."""
    previous = [""]
    while True:
        previous = [stem + letter for stem in previous for letter in _LETTERS]
        yield from previous


def _graphs(graph: GraphProto) -> Iterator[GraphProto]:
    """A graph and all graphs inside its nodes (branches, loop bodies): a name is unique across them."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            for inner in _inner(attribute):
                yield from _graphs(inner)


def _inner(attribute: AttributeProto) -> list[GraphProto]:
    return [*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs]
