"""Interleaving, and what is made of the seconds; no test looks at a clock."""

import torch

from unimatrix.bench.clock import (
    Workload,
    compare_rounds,
    summarize,
    time_interleaved,
    time_once,
)


def test_models_take_turns_and_drop_out_when_their_rounds_are_over() -> None:
    calls, rounds = [], []
    workloads = {
        name: Workload(lambda name=name: name, lambda given: calls.append(given)) for name in "abc"
    }
    seconds = time_interleaved(
        workloads,
        {"a": 3, "b": 1, "c": 3},
        device="cpu",
        on_round=lambda: rounds.append(len(calls)),
    )
    assert calls == list("abc") + list("abc") + list("ca") + list("ac")
    assert rounds == [0, 3, 6, 8]
    assert {name: len(found) for name, found in seconds.items()} == {"a": 3, "b": 1, "c": 3}
    assert time_interleaved({}, {}, device="cpu") == {}


def test_preparing_is_not_timed() -> None:
    order = []
    workload = Workload(lambda: order.append("prepare"), lambda _: order.append("run"))
    assert time_once(workload, "cpu") >= 0
    assert order == ["prepare", "run"]


def test_medians_and_ratios() -> None:
    spread = summarize([3.0, 1.0, 2.0, 10.0])
    assert spread == (2.5, 1.0, 10.0, 4)
    # The ratio is that of each round, over the rounds that both have.
    assert compare_rounds([2.0, 30.0, 5.0], [1.0, 10.0]) == 2.5


def test_one_without_room_leaves_the_others() -> None:
    def run(_: None) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    workloads = {
        "large": Workload(lambda: None, run),
        "small": Workload(lambda: None, lambda _: None),
    }
    seconds = time_interleaved(workloads, {"large": 5, "small": 2}, device="cpu")
    assert seconds["large"] == []
    assert len(seconds["small"]) == 2
