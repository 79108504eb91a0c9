"""A backward pass in two halves: the gradient of the inputs now, those of the weights later.

The stage before waits for the input's gradient; nobody waits for the weights'. Schedules without bubbles put the second
half off until there is nothing better to do. No layer has to know of this: in the autograd graph, whatever leads to an
input lies on the *path*; edges that leave the path lead to parameters. The first half runs the path and remembers what
arrived at the nodes where such edges leave; the second starts there.

Two things do not wait. A node of a Python `autograd.Function` computes all its gradients at once: what it had to
compute anyway is added to its parameters in the first half, since putting it off would mean computing it twice. And
where several nodes of the path use one and the same tensor off it, only their sum can be told from outside.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import GradientEdge, Node


@dataclass
class _Gate:
    """A node on the path with edges to parameters, and the gradients that arrived at it."""

    node: Node
    edges: list[GradientEdge]
    arrived: tuple[Tensor | None, ...] = ()

    def keep(self, wanted: Callable[[GradientEdge], bool]) -> _Gate:
        """The same with some of its edges."""
        return _Gate(self.node, [edge for edge in self.edges if wanted(edge)])

    def finish(self) -> None:
        """Add what left the path here to the parameters."""
        pairs = [(GradientEdge(self.node, i), g) for i, g in enumerate(self.arrived) if g is not None]
        if pairs and self.edges:
            edges, gradients = zip(*pairs, strict=True)
            _into_parameters(self.edges, torch.autograd.grad(edges, self.edges, gradients, allow_unused=True))


def backward_input(
    outputs: Sequence[GradientEdge], gradients: Sequence[Tensor], inputs: Sequence[GradientEdge]
) -> tuple[Sequence[Tensor | None], Callable[[], None]]:
    """The gradients of `inputs`, None where there is none, and a function that adds those of the parameters.

    It may be called once. Until then the graph stays alive.
    """
    gates, on_path = _gates([output.node for output in outputs], [x.node for x in inputs])
    aside = [pair for pair in zip(outputs, gradients, strict=True) if pair[0].node not in on_path]
    ahead = [pair for pair in zip(outputs, gradients, strict=True) if pair[0].node in on_path]
    uses = Counter(edge for gate in gates for edge in gate.edges)
    later = [gate.keep(lambda edge: uses[edge] == 1) for gate in gates if not isinstance(gate.node, BackwardCFunction)]
    at_once = list(uses.keys() - {edge for gate in later for edge in gate.edges})
    found: Sequence[Tensor | None] = [None] * len(inputs)
    if ahead:
        handles = [gate.node.register_prehook(_remember(gate)) for gate in later]
        edges, grads = zip(*ahead, strict=True)
        found = torch.autograd.grad(edges, [*inputs, *at_once], grads, retain_graph=True, allow_unused=True)
        for handle in handles:
            handle.remove()
        _into_parameters(at_once, found[len(inputs) :])

    def finish() -> None:
        for gate in later:
            gate.finish()
        _into_parameters([edge for edge, _ in aside], [gradient for _, gradient in aside])

    return found[: len(inputs)], finish


def _into_parameters(edges: Sequence[GradientEdge], gradients: Sequence[Tensor | None]) -> None:
    pairs = [(edge, gradient) for edge, gradient in zip(edges, gradients, strict=True) if gradient is not None]
    if pairs:
        # The nodes behind a parameter (a transpose, a cast) may serve several edges: they must outlive the first.
        torch.autograd.backward([edge for edge, _ in pairs], [gradient for _, gradient in pairs], retain_graph=True)


def _remember(gate: _Gate) -> Callable[[tuple[Tensor, ...]], None]:
    def hook(gradients: tuple[Tensor, ...]) -> None:
        gate.arrived = gradients

    return hook


def _gates(roots: Sequence[Node], targets: Sequence[Node]) -> tuple[list[_Gate], set[Node]]:
    """The gates on the paths from roots to targets, and all nodes of those paths."""
    known: dict[Node, bool] = dict.fromkeys(targets, True)  # whether a node leads to a target
    gates: list[_Gate] = []
    stack = [(root, False) for root in roots]
    while stack:
        node, children_known = stack.pop()
        following = [(n, i) for n, i in node.next_functions if n is not None]
        if children_known:
            known[node] = any(known[n] for n, _ in following)
            edges = [GradientEdge(n, i) for n, i in following if not known[n]]
            if known[node] and edges:
                gates.append(_Gate(node, edges))
        elif node not in known:
            known[node] = False
            stack += [(node, True), *((n, False) for n, _ in following)]
    return gates, {node for node, leads in known.items() if leads}
