"""Which GPUs a child process gets: the least used of this machine, whichever of the user's runs uses the others."""

from __future__ import annotations

import fcntl
import itertools
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import lru_cache
from pathlib import Path
from typing import TextIO
from urllib.parse import quote

# A use is a file <gpu>.<number> that its user has locked; the kernel frees those of a killed process at once.
USES = Path(tempfile.gettempdir(), f"sdd-gpus-{os.getuid()}")


@lru_cache(maxsize=1)
def visible_gpus() -> tuple[str, ...]:
    """What CUDA_VISIBLE_DEVICES lists, else the driver's numbers of all GPUs; without torch, which takes seconds."""
    if (listed := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return tuple(filter(None, listed.split(",")))
    if not shutil.which("nvidia-smi"):
        return ()
    command = ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"]
    return tuple(subprocess.run(command, capture_output=True, text=True, check=False).stdout.split())


@contextmanager
def least_used(gpus: tuple[str, ...], count: int) -> Iterator[tuple[str, ...]]:
    """While open, use `count` of these GPUs."""
    USES.mkdir(mode=0o700, parents=True, exist_ok=True)
    with ExitStack() as used:
        with (USES / "choosing").open("w") as turn:
            fcntl.flock(turn, fcntl.LOCK_EX)
            chosen = tuple(sorted(gpus, key=_uses)[:count])
            for gpu in chosen:
                used.enter_context(next(filter(None, (locked(_file(gpu, number)) for number in itertools.count()))))
        yield chosen


def _uses(gpu: str) -> int:
    """How many processes use it, looking at the files that there are."""
    found = 0
    for number in itertools.takewhile(lambda number: _file(gpu, number).exists(), itertools.count()):
        if file := locked(_file(gpu, number)):
            file.close()
        else:
            found += 1
    return found


def _file(gpu: str, number: int) -> Path:
    return USES / f"{quote(gpu, safe='')}.{number}"


def locked(path: Path) -> TextIO | None:
    """The file, locked until it is closed; None while somebody else has it."""
    file = path.open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return None
    return file
