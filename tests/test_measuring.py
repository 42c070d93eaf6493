"""How the benchmarks measure: `benchmarks/measuring.py`."""

from __future__ import annotations

import torch
from measuring import PeakMemory, interleaved, one_round, ratios, seconds_of, spread


def test_all_are_timed_in_every_round_and_who_is_first_changes():
    calls = []
    steps = {name: lambda name=name: calls.append(name) for name in "abc"}
    times = interleaved(steps, rounds=3, count=2)
    assert calls == list("aabbcc" + "bbccaa" + "ccaabb")
    assert list(times) == list("abc") and all(len(values) == 3 and min(values) >= 0 for values in times.values())
    assert one_round({}, 0) == {}


def test_seconds_are_a_mean_over_the_steps(monkeypatch):
    clock = iter([10.0, 16.0])
    monkeypatch.setattr("measuring.time.perf_counter", lambda: next(clock))
    assert seconds_of(lambda: None, count=3) == 2.0


def test_ratios_are_taken_round_by_round():
    assert ratios([2.0, 9.0], [1.0, 3.0]) == [2.0, 3.0]
    assert spread([1.0, 4.0, 2.0]) == "2.000 (1.000..4.000)"


def test_peak_memory_is_what_is_held_at_once():
    kept = torch.zeros(1024)  # held before, and released after: neither counts
    with PeakMemory() as peak:
        for _ in range(3):
            first, second = torch.zeros(2**18), torch.zeros(2**17)
            del first, second
    del kept
    assert peak.num_bytes == 2**20 + 2**19
    assert sorted(set(peak.changes)) == [-(2**20), -(2**19), 2**19, 2**20]


def test_a_peak_is_never_below_nothing():
    large = torch.zeros(2**18)
    with PeakMemory() as peak:
        del large
    assert peak.num_bytes == 0
