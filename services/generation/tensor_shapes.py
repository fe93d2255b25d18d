"""Names and shapes of the tensors in a folder, read from the headers of its safetensors files.

SGLang dies of a truncated file or a wrong shape, and silently keeps the present weights of a missing tensor; so a
folder is held against the model that the engine runs before a swap begins.
"""

import json
from pathlib import Path

Shapes = dict[str, tuple[int, ...]]


def expected_shapes(model: Path) -> Shapes:
    """What a swap must bring: the tensors of the checkpoint in `model`; none if it is not a folder here."""
    shapes = safetensors_shapes(model) if model.is_dir() else {}
    config = model / "config.json"
    if config.is_file() and json.loads(config.read_text()).get("tie_word_embeddings"):
        shapes.pop("lm_head.weight", None)  # some checkpoints store the tied head a second time
    return shapes


def safetensors_shapes(folder: Path) -> Shapes:
    """Names and shapes of all tensors in the folder, from the files' headers; raises `ValueError` on a torn file."""
    shapes: Shapes = {}
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with path.open("rb") as file:
                header_bytes = int.from_bytes(file.read(8), "little")
                size_bytes = path.stat().st_size - 8 - header_bytes
                tensors = json.loads(file.read(header_bytes)) if size_bytes >= 0 else {}
            tensors.pop("__metadata__", None)
            if size_bytes != max((tensor["data_offsets"][1] for tensor in tensors.values()), default=0):
                raise ValueError(f"{path.stat().st_size} bytes are not the length its header tells")
            shapes |= {name: tuple(tensor["shape"]) for name, tensor in tensors.items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} is not a whole safetensors file: {error}") from error
    return shapes
