"""Walks through autograd's graphs, from what was computed back to what it was computed from."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor
from torch.autograd.graph import Node


def graph_nodes(ends: Iterable) -> list[Node]:
    """Every node of the autograd graphs that end in these tensors or nodes."""
    nodes: dict[Node, bool] = {}
    todo: list[Node | None] = [x.grad_fn if isinstance(x, Tensor) else x for x in ends]
    while todo:
        node = todo.pop()
        if node is not None and node not in nodes:
            nodes[node] = True
            todo += [parent for parent, _ in node.next_functions]
    return list(nodes)


def uses(output: Tensor, outside: dict[str, Tensor]) -> str | None:
    """The name of a parameter in `outside` that `output` was computed from, if there is one."""
    for node in graph_nodes([output]):
        variable = getattr(node, "variable", None)
        for name, p in outside.items():
            if variable is p:
                return name
    return None


def leaves_reached(total: Tensor, leaves: list[Tensor]) -> set[int]:
    """The positions of the leaves that a backward pass from `total` reaches without passing a stop.

    A stop is what stop_gradients.py puts in the place of `detach`. No gradient of a plain loop passes one.
    """
    position = {id(leaf): i for i, leaf in enumerate(leaves)}
    reached: set[int] = set()
    seen, todo = set(), [total.grad_fn]
    while todo:
        node = todo.pop()
        if node is None or node in seen or node.name() == "_StopBackward":
            continue
        seen.add(node)
        variable = getattr(node, "variable", None)
        if variable is not None and id(variable) in position:
            reached.add(position[id(variable)])
        todo += [parent for parent, _ in node.next_functions]
    return reached
