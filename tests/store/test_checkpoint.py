"""Safetensors headers and the renamed copy, against the safetensors library and real models."""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tasks.domain.errors import ModelUnsupported
from tasks.store import checkpoint
from tasks.store.checkpoint import (
    INDEX,
    PAGE,
    Tensor,
    count_parameters,
    is_tied,
    model_tensors,
    tensors_of,
    write_renamed,
)
from tests.conftest import ROOT, build_pico

MIB = 2**20
# VmHWM and not ru_maxrss: the latter starts at the size of the process that started this one.
PEAK_OF_A_CUT = """
import sys
from pathlib import Path
from tasks.domain.span import Span
from tasks.prune import cut
def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
before = peak()
cut(Path(sys.argv[1]), Path(sys.argv[2]), Span(1, 7, 8))
print(before, peak())
"""


@pytest.fixture(scope="module")
def loose(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pico model whose output head is a tensor of its own."""
    return build_pico(tmp_path_factory.mktemp("loose"), tie_word_embeddings=False)


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two files of tensors of many types and shapes."""
    folder = tmp_path_factory.mktemp("mixed")
    generator = torch.Generator().manual_seed(0)
    first = {
        "half": torch.randn(3, 5, generator=generator).to(torch.bfloat16),
        "bytes": torch.arange(7, dtype=torch.uint8),
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 4),
        "naïve.name": torch.randn(2, 2, 2, generator=generator, dtype=torch.float64),
    }
    save_file(first, folder / "model-00001-of-00002.safetensors", metadata={"format": "pt"})
    save_file({"bool": torch.tensor([True, False])}, folder / "model-00002-of-00002.safetensors")
    return folder


def config_of(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "config.json").read_text()))


def loaded(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def raw(tensor: Tensor) -> bytes:
    return tensor.file.read_bytes()[tensor.start : tensor.start + tensor.size]


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


@pytest.mark.parametrize("name", ["pico", "mixed"])
def test_tensors_of_reads_what_safetensors_reads(name: str, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(name)
    found, expected = tensors_of(folder), loaded(folder)
    assert found.keys() == expected.keys()
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as stream:
            for tensor_name in stream.keys():  # noqa: SIM118
                part = stream.get_slice(tensor_name)
                tensor = found[tensor_name]
                assert tensor.file == file
                assert (tensor.shape, tensor.dtype) == (tuple(part.get_shape()), part.get_dtype())
                assert tensor.parameters == expected[tensor_name].numel()
                assert raw(tensor) == bits(expected[tensor_name])


def test_a_folder_without_safetensors_is_refused(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(ModelUnsupported, match="save_pretrained"):
        tensors_of(tmp_path)


@pytest.mark.parametrize("name", ["pico", "mixed"])
def test_a_renamed_copy_is_equal_bit_for_bit(name: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    folder = request.getfixturevalue(name)
    tensors = tensors_of(folder)
    write_renamed(tensors, {old: f"new.{old}" for old in reversed(tensors)}, tmp_path)
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) == len(list(folder.glob("*.safetensors")))
    before, after = loaded(folder), loaded(tmp_path)
    assert after.keys() == {f"new.{old}" for old in before}
    for old, tensor in before.items():
        copy = after[f"new.{old}"]
        assert (copy.dtype, copy.shape, bits(copy)) == (tensor.dtype, tensor.shape, bits(tensor))
    for file in files:
        with safe_open(file, framework="pt") as stream:
            assert stream.metadata() == {"format": "pt"}, "transformers refuses a file that does not say so"


def test_a_nan_keeps_its_payload(tmp_path: Path) -> None:
    pattern = torch.tensor([0x7FC0, 0x7FC1, 0xFFFF - 0x10000, 0x7F80], dtype=torch.int32).to(torch.int16)
    save_file({"w": pattern.view(torch.bfloat16)}, tmp_path / "model.safetensors")
    out = tmp_path / "out"
    out.mkdir()
    write_renamed(tensors_of(tmp_path), {"w": "v"}, out)
    assert loaded(out)["v"].view(torch.int16).tolist() == pattern.tolist()


def test_tensors_left_out_are_not_written(pico: Path, tmp_path: Path) -> None:
    tensors = tensors_of(pico)
    kept = {name: name for name in tensors if ".layers.3." not in name}
    write_renamed(tensors, kept, tmp_path)
    assert loaded(tmp_path).keys() == kept.keys() < tensors.keys()
    size = sum(tensors[name].size for name in kept)
    assert 0 < (tmp_path / "model.safetensors").stat().st_size - size < 200 * len(kept) + PAGE


def test_tensors_keep_their_place_within_a_page(tmp_path: Path) -> None:
    """A copy that shifts them by some bytes is half as fast again."""
    source = tmp_path / "source"
    source.mkdir()
    for number in range(2):
        weights = {f"{number}.{name}": torch.rand(32, 32) for name in ("a", "b", "c", "d")}
        save_file(weights, source / f"{number}.safetensors", metadata={"format": "pt", "note": "x" * 100 * number})
    tensors = tensors_of(source)
    names = {old: f"renamed.{old}" for old in tensors if not old.endswith("b")}
    (out := tmp_path / "out").mkdir()
    write_renamed(tensors, names, out)
    places = {old: tensors[old].start % PAGE for old in names}
    assert len(set(places.values())) == 2, "the sources must differ"
    assert {old: tensors_of(out)[new].start % PAGE for old, new in names.items()} == places
    assert all(torch.equal(loaded(out)[new], loaded(source)[old]) for old, new in names.items())


def test_large_checkpoints_are_written_in_shards(pico: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = tensors_of(pico)
    limit = 2 * max(tensor.size for tensor in tensors.values())
    monkeypatch.setattr(checkpoint, "SHARD_BYTES", limit)
    shutil.copytree(pico, tmp_path, ignore=shutil.ignore_patterns("*.safetensors"), dirs_exist_ok=True)
    write_renamed(tensors, {name: name for name in tensors}, tmp_path)

    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) > 2
    assert [file.name for file in files] == [
        f"model-{number:05d}-of-{len(files):05d}.safetensors" for number in range(1, len(files) + 1)
    ]
    index = json.loads((tmp_path / INDEX).read_text())
    held = {name: file.name for file in files for name in load_file(file)}
    assert index["weight_map"] == held and held.keys() == tensors.keys()
    assert index["metadata"]["total_size"] == sum(tensor.size for tensor in tensors.values())
    for file in files:
        assert sum(bits(tensor).__len__() for tensor in load_file(file).values()) <= limit

    one = AutoModelForCausalLM.from_pretrained(pico).state_dict()
    many, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert all(torch.equal(tensor, one[name]) for name, tensor in many.state_dict().items())


def test_a_tensor_larger_than_a_shard_is_alone_in_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_file({"a": torch.ones(2), "b": torch.ones(100), "c": torch.ones(2)}, tmp_path / "model.safetensors")
    monkeypatch.setattr(checkpoint, "SHARD_BYTES", 64)
    out = tmp_path / "out"
    out.mkdir()
    write_renamed(tensors_of(tmp_path), {"a": "a", "b": "b", "c": "c"}, out)
    assert [sorted(load_file(file)) for file in sorted(out.glob("*.safetensors"))] == [["a"], ["b"], ["c"]]


def test_tensors_larger_than_a_copy_step_are_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "COPY_BYTES", 1000)
    tensor = torch.randn(777, 3)
    save_file({"w": tensor}, tmp_path / "model.safetensors")
    out = tmp_path / "out"
    out.mkdir()
    write_renamed(tensors_of(tmp_path), {"w": "w"}, out)
    assert torch.equal(loaded(out)["w"], tensor)


def test_a_source_that_is_cut_off_is_an_error(pico: Path, tmp_path: Path) -> None:
    content = (pico / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(content[:-10])
    tensors = tensors_of(tmp_path)
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(OSError, match="ends before the tensor does"):
        write_renamed(tensors, {name: name for name in tensors}, out)


def test_a_stored_copy_of_a_tied_head_is_not_written_again(pico: Path, tmp_path: Path) -> None:
    tensors = tensors_of(pico)
    assert "lm_head.weight" not in tensors
    stored = {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"]}
    shutil.copytree(pico, tmp_path, ignore=shutil.ignore_patterns("*.safetensors"), dirs_exist_ok=True)
    wanted = model_tensors(stored, config_of(pico))
    write_renamed(wanted, {name: name for name in wanted}, tmp_path)
    assert loaded(tmp_path).keys() == tensors.keys()
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert model.get_output_embeddings().weight.data_ptr() == model.get_input_embeddings().weight.data_ptr()


def test_rotary_tables_of_old_checkpoints_are_left_out(pico: Path) -> None:
    """They are no parameters, and every loader computes its own."""
    tensors = tensors_of(pico)
    table = Tensor(pico, 0, 64, "F32", (16,))
    stored = {**tensors, "model.layers.0.self_attn.rotary_emb.inv_freq": table}
    assert model_tensors(stored, config_of(pico)) == tensors


def test_an_untied_head_stays(loose: Path) -> None:
    tensors = tensors_of(loose)
    assert "lm_head.weight" in model_tensors(tensors, config_of(loose))
    assert model_tensors(tensors, config_of(loose)) == tensors


@pytest.mark.parametrize(
    ("config", "tied"),
    [
        ({"tie_word_embeddings": True}, True),
        ({"tie_word_embeddings": False}, False),
        ({}, False),
        ({"text_config": {"tie_word_embeddings": True}}, True),
        ({"text_config": {}}, False),
        ({"text_config": None}, False),
        ({"tie_word_embeddings": False, "text_config": {"tie_word_embeddings": True}}, False),
    ],
)
def test_is_tied(config: dict[str, Any], tied: bool) -> None:
    assert is_tied(config) is tied


@pytest.mark.parametrize("name", ["pico", "loose"])
def test_count_parameters_equals_the_model(name: str, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(name)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert count_parameters(folder, config_of(folder)) == model.num_parameters()


def test_a_stored_copy_of_a_tied_head_is_not_counted(pico: Path, tmp_path: Path) -> None:
    weights = load_file(pico / "model.safetensors")
    save_file(
        {**weights, "lm_head.weight": weights["model.embed_tokens.weight"].clone()}, tmp_path / "model.safetensors"
    )
    assert count_parameters(tmp_path, config_of(pico)) == count_parameters(pico, config_of(pico))


def test_the_memory_of_a_cut_does_not_grow_with_the_checkpoint(tmp_path: Path) -> None:
    """3.5 GiB in two files of holes: the real way through the code, and no block of the disk taken by the source."""
    original, out = tmp_path / "original", tmp_path / "out"
    original.mkdir()
    out.mkdir()
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_hidden_layers": 8}
    (original / "config.json").write_text(json.dumps(config))
    blocks = {f"model.layers.{block}.mlp.up_proj.weight": 384 * MIB for block in range(8)}
    write_holes(original / "model-00001-of-00002.safetensors", {"model.embed_tokens.weight": 512 * MIB})
    write_holes(original / "model-00002-of-00002.safetensors", blocks)
    assert sum(file.stat().st_size for file in original.glob("*.safetensors")) > 3.4 * 1024 * MIB

    command = [sys.executable, "-c", PEAK_OF_A_CUT, str(original), str(out)]
    done = subprocess.run(command, cwd=ROOT, env=dict(os.environ), capture_output=True, text=True, check=True)
    before, after = (int(kib) / 1024 for kib in done.stdout.split())
    assert sum(file.stat().st_size for file in out.glob("*.safetensors")) > (512 + 384) * MIB
    shutil.rmtree(out)
    assert after < 1024 + 512, f"the cut took {after:.0f} MiB, the largest tensor has 512"
    assert after - before < 64, f"the cut took {after - before:.0f} MiB on top of the imports' {before:.0f}"


def write_holes(file: Path, sizes: dict[str, int]) -> None:
    """A safetensors file of zeros that are not on the disk."""
    header: dict[str, Any] = {}
    offset = 0
    for name, size in sizes.items():
        header[name] = {"dtype": "BF16", "shape": [size // 2], "data_offsets": [offset, offset + size]}
        offset += size
    encoded = json.dumps(header).encode()
    with file.open("wb") as stream:
        stream.write(struct.pack("<Q", len(encoded)) + encoded)
        stream.truncate(8 + len(encoded) + offset)
