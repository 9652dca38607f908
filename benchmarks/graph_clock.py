"""Times of a call without the host: several calls over rotating inputs, captured as one CUDA graph.

`Clock` times calls that the host launches, so of a short call it measures the host. Here k calls,
each on inputs of its own, are captured in one graph and replayed: device milliseconds of a call.
The inputs are more than the L2 cache holds, so each call reads memory. Beside it the host's
milliseconds: those of launching one call, not waited for.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from benchmarks.clock import first_line

REPLAYS = 10
MOST_INPUTS = 16


def inputs_needed(bytes_of_one: int, cache_bytes: int) -> int:
    """Sets of inputs that together are twice the cache, at least two and at most MOST_INPUTS."""
    wanted = -(-2 * cache_bytes // max(1, bytes_of_one))
    return max(2, min(MOST_INPUTS, wanted))


class GraphClock:
    """Times captured calls on one device; on a CPU, which has no graphs, the host's part alone."""

    def __init__(self, device: str) -> None:
        self.gpu = device.startswith("cuda")
        self.failed: str | None = None  # why nothing is captured any more
        self.cache_bytes = 0
        if self.gpu:
            properties = torch.cuda.get_device_properties(device)
            self.cache_bytes = getattr(properties, "L2_cache_size", 64 << 20)

    def measure(self, calls: Sequence[Callable[[], Any]]) -> dict[str, Any]:
        """{"host_ms", "device_ms"} of one of the calls, or {"not_captured": reason}.

        The calls do the same work on different inputs. Nothing is captured after a failure: the
        stream may be left in the middle of one.
        """
        if self.failed is not None:
            return {"not_captured": self.failed}
        for call in calls:
            call()  # compiles, and makes what stays
        self._wait()
        started = time.perf_counter()
        for call in calls:
            call()
        host_ms = 1e3 * (time.perf_counter() - started) / len(calls)
        self._wait()
        if not self.gpu:
            return {"host_ms": host_ms}
        try:
            return {"host_ms": host_ms, "device_ms": self._replayed(calls)}
        except Exception as error:  # whatever the driver, the allocator or the call may raise
            self.failed = first_line(error)
            torch.cuda.synchronize()
            return {"not_captured": self.failed}

    def _wait(self) -> None:
        if self.gpu:
            torch.cuda.synchronize()

    def _replayed(self, calls: Sequence[Callable[[], Any]]) -> float:
        """Milliseconds of a call in replays of a graph of all of them: the median replay's."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for call in calls:
                call()
        graph.replay()
        events = []
        for _ in range(REPLAYS):
            start = torch.cuda.Event(enable_timing=True)
            end = torch.cuda.Event(enable_timing=True)
            start.record()
            graph.replay()
            end.record()
            events.append((start, end))
        torch.cuda.synchronize()
        times = [start.elapsed_time(end) for start, end in events]
        return statistics.median(times) / len(calls)
