"""Functions recorded on the CPU: what is done again, what is not, and what cannot be."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable

import pytest
import torch
from machine import FIRST, SECOND, GraphRecording, Machine
from torch import Tensor

from autoq.nn.recording import CannotBeRecorded, HostRecording, without_garbage_collection
from autoq.nn.spread import Move

CPU = torch.device("cpu")
TABLE = torch.arange(12.0).reshape(3, 4)


def record(function: Callable[[Tensor], Tensor], given: Tensor) -> HostRecording:
    return HostRecording(lambda _: function(given), CPU, (given,))


def in_place(x: Tensor) -> Tensor:
    sums = torch.zeros(4)
    sums += x
    sums.mul_(x[0]).unsqueeze_(0)
    return sums + 1


def parts(x: Tensor) -> Tensor:
    first, second = x.chunk(2)
    values, places = torch.stack([first, second], dim=0).sort(dim=-1)
    return torch.cat([values.flatten(), places.flatten(), x[torch.tensor([2, 0])]], dim=0)


def writes_to_a_view(x: Tensor) -> Tensor:
    table = TABLE.clone()
    table[1].copy_(x)
    table[:, 0] = x[3]
    return table.sum(0)


def writes_to_what_was_given(x: Tensor) -> Tensor:
    x[1:] += 1
    return x * 2


def of_a_table(x: Tensor) -> Tensor:
    return (TABLE.cos().t() @ TABLE.sin())[:, :4] @ x


@pytest.mark.parametrize("function", [in_place, parts, writes_to_a_view, writes_to_what_was_given, of_a_table])
def test_a_replay_gives_what_the_function_would(function: Callable[[Tensor], Tensor]) -> None:
    given = torch.tensor([1.0, 2.0, 3.0, 4.0])
    recording = record(function, given)
    for values in ([3.0, 1.0, 4.0, 1.5], [-2.0, 7.0, 1.0, 8.0]):
        expected = function(torch.tensor(values))
        given.copy_(torch.tensor(values))
        assert torch.equal(recording.replay(), expected)


def test_results_are_not_filled_again() -> None:
    given = torch.tensor([1.0, 2.0])
    recording = record(lambda x: x * 2, given)
    first = recording.replay()
    given.fill_(5.0)
    assert torch.equal(recording.replay(), torch.tensor([10.0, 10.0]))
    assert torch.equal(first, torch.tensor([2.0, 4.0]))


def test_what_never_changes_is_done_once() -> None:
    given = torch.ones(4)
    recording = record(of_a_table, given)
    assert [str(step.function) for step in recording._steps] == ["aten.mv.default"]


def test_random_numbers_are_drawn_again() -> None:
    recording = record(lambda x: torch.rand(8), torch.ones(1))
    assert not torch.equal(recording.replay(), recording.replay())


@pytest.mark.parametrize("function", [lambda x: x * x.item(), lambda x: x[x.bool()], lambda x: x if x else -x])
def test_what_looks_at_values_cannot_be_recorded(function: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises(CannotBeRecorded):
        record(function, torch.ones(1))


@pytest.mark.parametrize(
    "function",
    [
        lambda x: torch.from_numpy((x + 1).numpy()) * 2,
        lambda x: x * (x + 1).tolist()[0],
        lambda x: torch.from_dlpack(x + 1) * 2,
    ],
)
def test_what_goes_past_the_operators_cannot_be_recorded(function: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises(CannotBeRecorded, match="of a tensor"):
        record(function, torch.ones(1))


def test_a_result_that_never_changes_cannot_be_recorded() -> None:
    with pytest.raises(CannotBeRecorded, match="never changes"):
        record(lambda _: TABLE * 2, torch.ones(1))


# ---- several devices -------------------------------------------------------------------------------------------------


def there_and_back(x: Tensor, move: Move) -> Tensor:
    twice = x * 2
    there, again = move([twice, x], SECOND)
    (same,) = move([there + 1], SECOND)  # nothing that would need another graph but the copy
    assert move([], SECOND) == []
    (back,) = move([same * again], FIRST)
    return back - twice


def test_a_graph_for_each_stretch_on_a_device() -> None:
    with Machine():
        given = torch.tensor([1.0, 2.0]).to(FIRST)
        recording = GraphRecording(lambda move: there_and_back(given, move), FIRST, (given,))
        assert [graph.device for graph, _ in recording._stretches] == [FIRST, SECOND, SECOND, FIRST]
        results = []
        for values in ([3.0, -1.0], [5.0, 0.5]):
            given.copy_(torch.tensor(values))
            x = torch.tensor(values)
            results.append((recording.replay(), (2 * x + 1) * x - 2 * x))
        assert all(torch.equal(found.cpu(), expected) for found, expected in results)


@pytest.mark.parametrize("function", [lambda x, _: x.to(SECOND), lambda x, _: x + torch.ones(2, device=SECOND).sum()])
def test_devices_change_only_by_a_move(function: Callable[[Tensor, Move], Tensor]) -> None:
    with Machine():
        given = torch.tensor([1.0, 2.0]).to(FIRST)
        with pytest.raises(CannotBeRecorded, match="gpu:1"):
            GraphRecording(lambda move: function(given, move), FIRST, (given,))


def test_no_garbage_is_collected_meanwhile() -> None:
    for before in (True, False):
        (gc.enable if before else gc.disable)()
        try:
            with contextlib.suppress(ZeroDivisionError), without_garbage_collection():
                assert not gc.isenabled()
                raise ZeroDivisionError
            assert gc.isenabled() == before
        finally:
            gc.enable()
