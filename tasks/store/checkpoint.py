"""Rewriting a safetensors checkpoint tensor by tensor, in the kernel: no tensor passes through Python's memory.

The format (safetensors README): eight bytes of little-endian header length, a JSON header with dtype,
shape and byte range of each tensor, then the bytes.
"""

from __future__ import annotations

import fcntl
import json
import os
import struct
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tasks.domain.errors import ModelUnsupported

SINGLE = "model.safetensors"
INDEX = f"{SINGLE}.index.json"
SHARD_BYTES = 5 * 10**9
COPY_BYTES = 2**20  # at once; sendfile's own pipe holds 64 KB and takes a third longer
ALIGNMENT = 8
PAGE = 4096


@dataclass(frozen=True)
class Tensor:
    """Where a tensor lies: bytes start .. start+size of `file`."""

    file: Path
    start: int
    size: int
    dtype: str
    shape: tuple[int, ...]

    @property
    def parameters(self) -> int:
        count = 1
        for extent in self.shape:
            count *= extent
        return count


def tensors_of(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint folder by name, read from the headers alone.

    Raises ModelUnsupported when the folder has no safetensors file, or not all that its index names.
    """
    found: dict[str, Tensor] = {}
    for file in weight_files(folder):
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            header = json.loads(stream.read(length))
        for name, entry in header.items():
            if name != "__metadata__":
                begin, end = entry["data_offsets"]
                found[name] = Tensor(file, 8 + length + begin, end - begin, entry["dtype"], tuple(entry["shape"]))
    return found


def weight_files(folder: Path) -> list[Path]:
    """Those that transformers would load: model.safetensors, else what the index names, else all there are.

    Some models have the same weights once more beside them, in one file and under other names. An index from elsewhere
    may name whatever it wants: what does not lie in the folder itself is not there.
    """
    found = {path.name: path for path in folder.glob("*.safetensors")}
    if not found:
        raise ModelUnsupported(f"{folder} has no .safetensors file; save the model with save_pretrained first")
    wanted = {*found}
    if SINGLE in found:
        wanted = {SINGLE}
    elif (folder / INDEX).exists():
        wanted = {*json.loads((folder / INDEX).read_text())["weight_map"].values()}
    if missing := sorted(wanted - found.keys()):
        raise ModelUnsupported(f"{folder} has no {missing[0]}, which its {INDEX} names; fetch the model again")
    return [found[name] for name in sorted(wanted)]


def write_renamed(tensors: Mapping[str, Tensor], names: Mapping[str, str], out: Path) -> None:
    """Write the tensors in `names` (old name -> new name) as shards of at most 5 GB, with an index when several.

    Each shard comes out of one file, so that it can be aligned with it.
    """
    shards: list[dict[str, Tensor]] = [{}]
    used, source = 0, None
    for old, new in names.items():
        tensor = tensors[old]
        if shards[-1] and (used + tensor.size > SHARD_BYTES or tensor.file != source):
            shards.append({})
            used = 0
        shards[-1][new] = tensor
        used, source = used + tensor.size, tensor.file
    if len(shards) == 1:
        _write_shard(out / SINGLE, shards[0])
        return
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        _write_shard(out / file, shard)
        weight_map |= dict.fromkeys(shard, file)
    total = sum(tensor.size for shard in shards for tensor in shard.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (out / INDEX).write_text(json.dumps(index, indent=2))


def _write_shard(path: Path, shard: Mapping[str, Tensor]) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, tensor in shard.items():
        header[name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": [offset, offset + tensor.size]}
        offset += tensor.size
    encoded = json.dumps(header, separators=(",", ":")).encode()
    first = next(iter(shard.values()))
    # The kernel moves whole pages, 1.6 times as fast, where tensors begin at the same place of a page as before.
    encoded += b" " * ((first.start - first.start % ALIGNMENT - 8 - len(encoded)) % PAGE)
    reading, writing = os.pipe()
    try:
        with suppress(PermissionError):  # users have a limit; the default size does too
            fcntl.fcntl(writing, fcntl.F_SETPIPE_SZ, COPY_BYTES)
        with path.open("wb") as target, first.file.open("rb") as source:
            target.write(struct.pack("<Q", len(encoded)) + encoded)
            target.flush()
            for start, end in _adjacent(shard.values()):
                while start < end:
                    moved = os.splice(source.fileno(), writing, min(end - start, COPY_BYTES), offset_src=start)
                    if not moved:
                        raise OSError(f"{first.file} ends before the tensor does")
                    start += moved
                    while moved:
                        moved -= os.splice(reading, target.fileno(), moved)
    finally:
        os.close(reading)
        os.close(writing)


def _adjacent(tensors: Iterable[Tensor]) -> list[tuple[int, int]]:
    """Byte ranges of one file, those of tensors that follow each other joined."""
    ranges: list[tuple[int, int]] = []
    for tensor in tensors:
        start = ranges.pop()[0] if ranges and ranges[-1][1] == tensor.start else tensor.start
        ranges.append((start, tensor.start + tensor.size))
    return ranges


def model_tensors(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors that a model is made of: no stored copy of a tied output head, no rotary table of an old Llama."""
    dead = ("rotary_emb.inv_freq", *(["lm_head.weight"] if is_tied(config) else []))
    return {name: tensor for name, tensor in tensors.items() if not name.endswith(dead)}


def is_tied(config: Mapping[str, Any]) -> bool:
    """Whether input and output embeddings are one tensor (an absent setting means untied in saved configs)."""
    return bool(config.get("tie_word_embeddings", (config.get("text_config") or {}).get("tie_word_embeddings", False)))


def count_parameters(folder: Path, config: Mapping[str, Any]) -> int:
    return sum(tensor.parameters for tensor in model_tensors(tensors_of(folder), config).values())
