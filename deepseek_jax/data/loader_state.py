"""A loader's position: {"data": what it depends on, "streams": {number of a stream: where it is}}, all of it JSON.

A process knows where its own streams are. `gather` makes the position of all streams from what the processes know; that
is the one to save, and `select` takes from it what a process needs, however many of them there are then.
"""

import json
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from deepseek_jax.errors import DataError

LoaderState = dict[str, Any]


def merge(positions: Sequence[LoaderState]) -> LoaderState:
    """One position of all streams from those of several processes.

    Raises DataError if they read different data, or if two that read the same stream are at different places in it.
    """
    data, streams = positions[0]["data"], {}
    for position in positions:
        _refuse_other_data(
            position["data"],
            data,
            "two processes read different data: {}. Give all of them the same settings and files",
        )
        for stream, place in position["streams"].items():
            if streams.setdefault(stream, place) != place:
                raise DataError(
                    f"stream {stream} is at different places in two processes: take the position after the same batch "
                    "on all"
                )
    return {"data": data, "streams": {stream: streams[stream] for stream in sorted(streams, key=int)}}


def gather(position: Any) -> Any:
    """`merge` over the processes of this run, the same on every one; each has to call it after the same batch.

    With one process the position is what it was, whichever loader it came from.
    """
    if jax.process_count() == 1:
        return position
    raw = np.frombuffer(json.dumps(position).encode(), np.uint8)
    lengths = multihost_utils.process_allgather(np.int32(len(raw)))
    everything = multihost_utils.process_allgather(np.pad(raw, (0, max(lengths) - len(raw))))
    return merge([json.loads(row[:length].tobytes()) for row, length in zip(everything, lengths, strict=True)])


def select(position: LoaderState, data: dict[str, Any], streams: Iterable[int]) -> list[Any]:
    """Where each of `streams` is, for Grain. Raises DataError if the position belongs to other data or lacks one of
    them."""
    _refuse_other_data(
        position["data"],
        data,
        "the saved data position belongs to other data: {}. Restore the setting or start a new run",
    )
    missing = [stream for stream in streams if str(stream) not in position["streams"]]
    if missing:
        raise DataError(
            f"the saved data position has the streams {', '.join(position['streams'])} and not "
            f"{', '.join(map(str, missing))}: "
            "it is one process's part; save what data.loader_state.gather makes of the parts"
        )
    return [_restore_tuples(position["streams"][str(stream)]) for stream in streams]


def _refuse_other_data(found: dict[str, Any], wanted: dict[str, Any], problem: str) -> None:
    changed = [
        f"{name} was {found.get(name)!r} and is {wanted[name]!r}" for name in wanted if found.get(name) != wanted[name]
    ]
    if changed:
        raise DataError(problem.format("; ".join(changed)))


def _restore_tuples(state: Any) -> Any:
    """JSON turns tuples into lists, but Grain's packer recognizes its 'nothing left over' slices only as tuples."""
    if isinstance(state, dict):
        return {
            k: {n: tuple(s) for n, s in v.items()} if k == "remainder_slices" else _restore_tuples(v)
            for k, v in state.items()
        }
    return [_restore_tuples(item) for item in state] if isinstance(state, list) else state
