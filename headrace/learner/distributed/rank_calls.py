"""The calls that rank 0 sends to the other ranks: msgpack of typed structs, never pickle.

`training/leader.py` sends and executes them, `ranks.py` transports them. Every rank, rank 0 included, executes each
call, in the order sent.
"""

import msgspec


class BuildPolicy(msgspec.Struct, frozen=True, tag=True):
    """Loads the model and shards it."""

    config: bytes
    """The run's configuration, as JSON."""


class LoadState(msgspec.Struct, frozen=True, tag=True):
    """Loads the rank's part of a checkpoint's tensors."""

    folder: str
    files: list[str]


class TrainStep(msgspec.Struct, frozen=True, tag=True):
    """Takes the step after `step` completed ones, on the rank's share of the batch."""

    config: bytes
    """The configuration of this step, as JSON."""
    groups: list[bytes]
    """The batch, in the wire format."""
    step: int
    version_steps: dict[int, int]


class GatherWeight(msgspec.Struct, frozen=True, tag=True):
    """Sends the rank's part of a weight to the other ranks."""

    name: str


class CopyState(msgspec.Struct, frozen=True, tag=True):
    """Copies the rank's part of a checkpoint's tensors into host memory."""


class WriteState(msgspec.Struct, frozen=True, tag=True):
    """Starts to write the copied tensors, in a background thread."""

    folder: str


class PollWrite(msgspec.Struct, frozen=True, tag=True):
    """Reports whether the write is finished, and its result."""


class Exit(msgspec.Struct, frozen=True, tag=True):
    """Ends the process with rank 0's exit code."""

    code: int


Call = BuildPolicy | LoadState | TrainStep | GatherWeight | CopyState | WriteState | PollWrite | Exit
_decoder: msgspec.msgpack.Decoder[Call] = msgspec.msgpack.Decoder(Call)


def encode_call(call: Call) -> bytes:
    return msgspec.msgpack.encode(call)


def decode_call(content: bytes) -> Call:
    return _decoder.decode(content)
