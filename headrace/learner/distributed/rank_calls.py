"""What rank 0 tells the other ranks to do: one call after another, msgpack of typed structs, never pickle.

`training/leader.py` says them and obeys them, `ranks.py` carries them. Each is taken part in by every rank, in the
order told.
"""

import msgspec


class Build(msgspec.Struct, frozen=True, tag=True):
    """Loads the model and shards it."""

    config: bytes
    """JSON."""


class Load(msgspec.Struct, frozen=True, tag=True):
    """Takes its part of a checkpoint's tensors."""

    folder: str
    files: list[str]


class Train(msgspec.Struct, frozen=True, tag=True):
    """Takes the step after `step` completed ones, on its share of the batch."""

    config: bytes
    """As it counts in this step."""
    groups: list[bytes]
    """On the wire's format."""
    step: int
    version_steps: dict[int, int]


class Gather(msgspec.Struct, frozen=True, tag=True):
    """Hands its part of a weight to the others."""

    name: str


class Copy(msgspec.Struct, frozen=True, tag=True):
    """Copies its part of a checkpoint's tensors into host memory."""


class Write(msgspec.Struct, frozen=True, tag=True):
    """Begins to write what it has copied, in a thread of its own."""

    folder: str


class Written(msgspec.Struct, frozen=True, tag=True):
    """Says whether that is done, and what became of it."""


class End(msgspec.Struct, frozen=True, tag=True):
    """Ends with rank 0's exit code."""

    code: int


Call = Build | Load | Train | Gather | Copy | Write | Written | End
_decoder: msgspec.msgpack.Decoder[Call] = msgspec.msgpack.Decoder(Call)


def encode_call(call: Call) -> bytes:
    return msgspec.msgpack.encode(call)


def decode_call(content: bytes) -> Call:
    return _decoder.decode(content)
