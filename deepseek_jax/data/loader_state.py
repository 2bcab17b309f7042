"""Loader state: {"data": what it depends on, "streams": {number of a stream: its state in Grain}}, all of it JSON.

Each process has the state of its own streams. `gather` puts the states of all processes together, to be saved; `select`
takes from it what a process needs, for any number of processes.
"""

import json
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from deepseek_jax.errors import DataError

LoaderState = dict[str, Any]


def merge(states: Sequence[LoaderState]) -> LoaderState:
    """The state of all streams, from those of several processes.

    Raises DataError if they read different data, or if two that read the same stream disagree about it.
    """
    data, streams = states[0]["data"], {}
    for state in states:
        _refuse_other_data(
            state["data"], data, "two processes read different data: {}. Give all of them the same settings and files"
        )
        for stream, own in state["streams"].items():
            if streams.setdefault(stream, own) != own:
                raise DataError(
                    f"stream {stream} is at different places in two processes: save the state after the same batch "
                    "on all"
                )
    return {"data": data, "streams": {stream: streams[stream] for stream in sorted(streams, key=int)}}


def gather(state: Any) -> Any:
    """`merge` over the processes of this run, with the same result on each; all must call it after the same batch.

    With one process the state stays what it was, whichever loader it came from.
    """
    if jax.process_count() == 1:
        return state
    raw = np.frombuffer(json.dumps(state).encode(), np.uint8)
    lengths = multihost_utils.process_allgather(np.int32(len(raw)))
    everything = multihost_utils.process_allgather(np.pad(raw, (0, max(lengths) - len(raw))))
    return merge([json.loads(row[:length].tobytes()) for row, length in zip(everything, lengths, strict=True)])


def select(state: LoaderState, data: dict[str, Any], streams: Iterable[int]) -> list[Any]:
    """The saved states of `streams`, for Grain. Raises DataError if the state is of other data or lacks a stream."""
    _refuse_other_data(
        state["data"], data, "the saved loader state belongs to other data: {}. Restore the setting or start a new run"
    )
    missing = [stream for stream in streams if str(stream) not in state["streams"]]
    if missing:
        raise DataError(
            f"the saved loader state has the streams {', '.join(state['streams'])} and not "
            f"{', '.join(map(str, missing))}: it is one process's; save what data.loader_state.gather makes of all"
        )
    return [_restore_tuples(state["streams"][str(stream)]) for stream in streams]


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
