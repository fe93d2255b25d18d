"""Checks before a swap: the engine suits the swap mode, and the folder has every tensor that the engine runs."""

from pathlib import Path
from typing import Literal

import msgspec

from headrace.generation.engine.http_calls import EngineError
from headrace.generation.tensors.shapes import Shapes, safetensors_shapes

SwapMode = Literal["retract", "in_place"]


class ServerInfo(msgspec.Struct):
    """The fields of SGLang's `/server_info` that are read here."""

    device: str
    tp_size: int
    disable_overlap_schedule: bool
    disable_radix_cache: bool


def check_server(url: str, server: ServerInfo, mode: SwapMode) -> None:
    """Raises `EngineError` if swaps in `mode` would give wrong results in an engine that was started like this."""
    is_suitable = server.disable_overlap_schedule and server.disable_radix_cache and server.tp_size == 1
    if mode == "in_place" and not is_suitable:
        raise EngineError(
            "swap_mode in_place needs an engine started with --disable-overlap-schedule, --disable-radix-cache and "
            f"--tp-size 1; {url} has overlap schedule {_on(not server.disable_overlap_schedule)}, "
            f"radix cache {_on(not server.disable_radix_cache)}, tp_size {server.tp_size}"
        )


def check_folder(folder: Path, expected: Shapes) -> None:
    """Raises `EngineError` unless the safetensors files in the folder are whole and have the `expected` tensors."""
    try:
        shapes = safetensors_shapes(folder)
    except ValueError as error:
        raise EngineError(str(error)) from error
    for name, shape in expected.items():
        if shapes.get(name) != shape:
            found = f"shape {shapes[name]}" if name in shapes else "no such tensor"
            raise EngineError(f"{folder}: {found} for {name}, the engine runs shape {shape}")


def _on(is_on: bool) -> str:
    return "on" if is_on else "off"
