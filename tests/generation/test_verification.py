"""Maps an engine's tensors to their parts in a checkpoint, and checks that they have changed like those."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from headrace.generation.tensors.checksum import cuda_checksum
from headrace.generation.tensors.verification import (
    ConfirmedState,
    compare_bytes,
    compare_changes,
    map_to_checkpoint,
    sample_checksums,
)

LAYER = "model.layers.0"
PARTS = {
    "model.embed_tokens.weight": ["model.embed_tokens.weight"],
    "lm_head.weight": ["model.embed_tokens.weight"],
    f"{LAYER}.self_attn.qkv_proj.weight": [f"{LAYER}.self_attn.{part}_proj.weight" for part in "qkv"],
    f"{LAYER}.self_attn.qkv_proj.bias": [f"{LAYER}.self_attn.{part}_proj.bias" for part in "qkv"],
    f"{LAYER}.mlp.gate_up_proj.weight": [f"{LAYER}.mlp.{part}_proj.weight" for part in ("gate", "up")],
    f"{LAYER}.mlp.experts.w13_weight": [
        f"{LAYER}.mlp.experts.{number}.{part}_proj.weight" for number in range(12) for part in ("gate", "up")
    ],
    f"{LAYER}.mlp.experts.w2_weight": [f"{LAYER}.mlp.experts.{number}.down_proj.weight" for number in range(12)],
    f"{LAYER}.moe.experts.w13_weight": [
        f"{LAYER}.moe.experts.{number}.w{part}.weight" for number in range(2) for part in (1, 3)
    ],
    f"{LAYER}.linear_attn.in_proj_ba.weight": [f"{LAYER}.linear_attn.in_proj_{part}.weight" for part in "ba"],
}
STORED = sorted({part for parts in PARTS.values() for part in parts})
GIVEN = dict.fromkeys(STORED, "old")
HELD = [dict.fromkeys(PARTS, f"rank {rank}") for rank in range(2)]


def test_fused_tied_and_stacked_tensors_map_to_their_parts_in_order() -> None:
    assert map_to_checkpoint([*PARTS, "model.rotary.cache"], STORED) == PARTS
    assert map_to_checkpoint(["a.qkv_proj.weight"], ["a.q_proj.weight", "a.k_proj.weight"]) == {}, (
        "not all of it is there"
    )


@pytest.mark.parametrize("name", PARTS)
@pytest.mark.parametrize("changed_ranks", [[0], [1], [0, 1], []])
def test_one_part_that_changed_must_show_on_some_rank(name: str, changed_ranks: list[int]) -> None:
    """If no part has changed, the checksum may change on no rank."""
    part = PARTS[name][-1]
    affected = [other for other, parts in PARTS.items() if part in parts]
    held = [dict(rank) for rank in HELD]
    for rank in changed_ranks:
        held[rank] |= dict.fromkeys(affected, "new")
    before = ConfirmedState(GIVEN, HELD)
    right = compare_changes(GIVEN | {part: "new"}, held, before)
    assert (right.mismatch == "") == bool(changed_ranks) and right.num_compared == len(PARTS)
    still = compare_changes(GIVEN, held, before)
    assert (still.mismatch == "") == (not changed_ranks)
    if changed_ranks:
        assert f"{affected[0]} has changed, but its bytes are the same as before" in still.mismatch


def test_an_engine_that_loaded_only_one_tensor_is_detected() -> None:
    held = [rank | {"lm_head.weight": "new", "model.embed_tokens.weight": "new"} for rank in HELD]
    compared = compare_changes(dict.fromkeys(STORED, "new"), held, ConfirmedState(GIVEN, HELD))
    assert f"{len(PARTS) - 2} of its {len(PARTS)} tensors do not match" in compared.mismatch


def test_tensors_with_unknown_names_are_compared_as_a_whole() -> None:
    """`renamed.*` stands for a model family whose engine uses other names for all tensors."""
    before = ConfirmedState({"a": "old", "b": "old", "c": "old"}, [{"c": "x", "renamed.a": "x", "renamed.b": "x"}])
    given, held = {"a": "new", "b": "old", "c": "old"}, [{"c": "x", "renamed.a": "y", "renamed.b": "x"}]
    compared = compare_changes(given, held, before)
    assert compared == ("", 1, ["renamed.a", "renamed.b"])
    assert "has not changed, but its bytes have" in compare_changes(given, before.checksums, before).mismatch
    assert "has changed, but its bytes are the same as before" in compare_changes(before.digests, held, before).mismatch


def test_tensors_unknown_before_are_not_compared() -> None:
    before = ConfirmedState({"a": "old"}, [{"a": "x", "b": "x"}])
    assert compare_changes({"a": "new", "b": "new"}, [{"a": "y", "b": "x"}], before) == ("", 1, [])


def bytes_of(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


@pytest.fixture
def tensors(tmp_path: Path) -> dict[str, torch.Tensor]:
    """A bfloat16 checkpoint in `tmp_path`, with a vocabulary that SGLang pads and a tensor that it holds in float32."""
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (70, 4), "layer.A_log": (6,)}
    shapes |= {"layer.q_proj.weight": (8, 4), "layer.k_proj.weight": (4, 4), "layer.v_proj.weight": (4, 4)}
    generator = torch.Generator().manual_seed(0)
    made = {name: torch.randn(shape, generator=generator).to(torch.bfloat16) for name, shape in shapes.items()}
    save_file(made, tmp_path / "model.safetensors")
    return made


def held_by_sglang(tensors: dict[str, torch.Tensor]) -> dict[str, bytes]:
    return {
        "model.embed_tokens.weight": bytes_of(
            torch.cat([tensors["model.embed_tokens.weight"], torch.zeros(58, 4).bfloat16()])
        ),
        "layer.qkv_proj.weight": bytes_of(torch.cat([tensors[f"layer.{part}_proj.weight"] for part in "qkv"])),
        "layer.A_log": bytes_of(tensors["layer.A_log"].float()),
    }


def test_bytes_are_compared_with_the_file_if_fused_padded_or_in_float32(
    tmp_path: Path, tensors: dict[str, torch.Tensor]
) -> None:
    held = {name: hashlib.sha256(payload).hexdigest()[:16] for name, payload in held_by_sglang(tensors).items()}
    assert compare_bytes(tmp_path, tensors.keys(), held) == ("", 3)
    for name in held:
        problem, _ = compare_bytes(tmp_path, tensors.keys(), held | {name: "0" * 16})
        assert f"other bytes for 1 of 3 tensors, {name} first" in problem


def test_a_sample_differs_for_each_version_and_is_bounded(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    held = held_by_sglang(tensors)
    names = [*held, "layer.experts.w2_weight"]
    whole = sample_checksums(tmp_path, names, 0, 1 << 20)
    assert whole.keys() == held.keys()
    assert all(cuda_checksum(payload) in whole[name] for name, payload in held.items())
    sizes = {name: len(payload) for name, payload in held.items()}
    samples = [set(sample_checksums(tmp_path, names, version, 140)) for version in range(1, 20)]
    assert set.union(*samples) == {"layer.qkv_proj.weight", "layer.A_log"}, "the embedding does not fit"
    assert all(sum(sizes[name] for name in sample) <= 152 for sample in samples)
    assert np.mean([len(sample) for sample in samples]) > 1
