"""Graph code that is made when it is first run: the same results, made no more often than needed."""

import pytest
import torch
from torch import fx, nn

from edgeport.export.executorch.faster import code_made_when_run


class Sums(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(x) + 1


def add_to_last(graph: fx.GraphModule, value: float) -> None:
    """One more addition before the output."""
    output = next(node for node in graph.graph.nodes if node.op == "output")
    with graph.graph.inserting_before(output):
        added = graph.graph.call_function(torch.add, (output.args[0], value))
    output.args = (added,)
    graph.recompile()


def test_changes_take_effect_at_the_next_run():
    x = torch.tensor([-1.0, 2.0])
    with code_made_when_run():
        graph = fx.symbolic_trace(Sums())
        assert torch.equal(graph(x), torch.tensor([1.0, 3.0]))
        add_to_last(graph, 10)
        add_to_last(graph, 100)
        assert torch.equal(graph(x), torch.tensor([111.0, 113.0]))
        assert torch.equal(graph.forward(x), torch.tensor([111.0, 113.0]))


def test_a_graph_changed_inside_runs_rightly_outside():
    with code_made_when_run():
        graph = fx.symbolic_trace(Sums())
        add_to_last(graph, 5)
    assert torch.equal(graph(torch.tensor([1.0])), torch.tensor([7.0]))
    add_to_last(graph, 5)
    assert torch.equal(graph(torch.tensor([1.0])), torch.tensor([12.0]))


def test_graphs_inside_graphs():
    with code_made_when_run():
        inner = fx.symbolic_trace(Sums())
        graph = fx.Graph()
        graph.output(graph.call_module("inner", (graph.placeholder("x"),)))
        outer = fx.GraphModule({"inner": inner}, graph)
        add_to_last(inner, 1)
        assert torch.equal(outer(torch.tensor([1.0])), torch.tensor([3.0]))


def test_no_code_is_made_for_a_graph_that_does_not_run():
    made = []
    python_code = fx.Graph.python_code

    def counted(self, *arguments, **named):
        made.append(self)
        return python_code(self, *arguments, **named)

    with pytest.MonkeyPatch.context() as patch, code_made_when_run():
        patch.setattr(fx.Graph, "python_code", counted)
        graph = fx.symbolic_trace(Sums())
        for _ in range(5):
            add_to_last(graph, 1)
        assert not made
        graph(torch.tensor([1.0]))
        graph(torch.tensor([1.0]))
        assert len(made) == 1


def test_torchs_own_way_is_back_afterwards():
    before = fx.GraphModule.recompile
    with pytest.raises(RuntimeError, match="stop"):
        stop_inside(before)
    assert fx.GraphModule.recompile is before


def stop_inside(before: object) -> None:
    with code_made_when_run():
        assert fx.GraphModule.recompile is not before
        raise RuntimeError("stop")
