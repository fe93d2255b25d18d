"""A machine with NVIDIA GPUs, as far as files and `nvidia-smi` tell of them."""

import os
from pathlib import Path

GIB = 1 << 30


class FakeGpus:
    """`count` GPUs with `gib` of memory each, all of it free; their UUIDs are GPU-0000…, GPU-1111… and so on."""

    def __init__(self, folder: Path, count: int, gib: int = 80) -> None:
        self.files = folder / "dev"
        self.files.mkdir()
        for index in range(count):
            (self.files / f"nvidia{index}").touch()
        (self.files / "nvidiactl").touch()
        self.query = folder / "bin" / "nvidia-smi"
        self.query.parent.mkdir()
        self.tell(*[(gib * 1024, gib * 1024)] * count)

    def tell(self, *memory: tuple[int, int]) -> None:
        """MiB in all and free, by GPU."""
        rows = [f"GPU-{str(index) * 4}, {total}, {free}" for index, (total, free) in enumerate(memory)]
        script = ["#!/bin/sh", 'echo "$@" >> "$(dirname "$0")/asked"', "cat <<'END'", *rows, "END", ""]
        self.query.write_text("\n".join(script))
        self.query.chmod(0o755)

    @property
    def path(self) -> str:
        """PATH with this machine's nvidia-smi."""
        return os.pathsep.join([str(self.query.parent), os.environ["PATH"]])

    @property
    def settings(self) -> str:
        """What makes a `headrace` of tests/support/fake_services.py see them, with all installed that they need."""
        return (
            "import pathlib; from headrace.common.hardware import device; "
            "from headrace.launcher.placement import devices; "
            f"device.DEVICE_FILES = pathlib.Path({str(self.files)!r}); devices.missing_for_cuda = lambda is_engine: ''"
        )
