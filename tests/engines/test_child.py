"""The process border and the real programs behind it, on a pico model."""

from __future__ import annotations

import json
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np
import pytest
import torch
from peft import LoraModel, PeftModel
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from tasks.domain.errors import ConfigError, DataError, EngineError, GateError, ModelUnsupported, PipelineError
from tasks.domain.recipe import Finetune, Runtime
from tasks.domain.span import Span
from tasks.engines.child import _environment, _gpus_for, run_child
from tasks.engines.children.border import vllm_options
from tasks.engines.children.finetune import IGNORED, _Training, answer_loss, answer_tokens_of, finetune, read_examples
from tasks.engines.children.merge import merge
from tasks.engines.children.packing import packed
from tasks.engines.children.verify import verify
from tasks.engines.gpus import least_used, visible_gpus
from tasks.prune import cut
from tests.conftest import build_pico, descendants, pocket_pairs, write_jsonl

RUNTIME = Runtime(device="cpu", timeout_minutes=5)
SPAN = Span(2, 2, 6)
END_OF_TIMES = 3600
PATIENCE = 30  # seconds until a process that was told to end counts as one that stays


def quiet(_done: float, _text: str) -> None:
    """Progress that nobody looks at."""


def children_running(name: str) -> list[int]:
    """Our own children that run this program."""

    def command(pid: int) -> str:
        try:
            return Path(f"/proc/{pid}/cmdline").read_text()
        except OSError:
            return ""

    return [pid for pid in descendants(os.getpid()) if f"tasks.engines.children.{name}" in command(pid)]


def ends(pid: int) -> bool:
    """Whether a process that was told to end is gone, or goes while we wait for the kernel to say so."""
    try:
        handle = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        return bool(select.select([handle], [], [], PATIENCE)[0])
    finally:
        os.close(handle)


@pytest.fixture
def at_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """Make every Python child first run some code, which stands for a fault; returns a folder it may write to."""

    def plant(code: str) -> Path:
        site, notes = tmp_path / "site", tmp_path / "notes"
        site.mkdir()
        notes.mkdir()
        prelude = "import json, os, pathlib, signal, subprocess, time\n"
        (site / "sitecustomize.py").write_text(f"{prelude}notes = pathlib.Path({str(notes)!r})\n{code}\n")
        monkeypatch.setenv("PYTHONPATH", str(site))
        return notes

    return plant


# --- the border -------------------------------------------------------------------------------------------


def test_credentials_do_not_reach_a_child(at_start: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    secrets = ("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "FSSPEC_S3", "PREFECT_API_KEY", "PREFECT_API_URL",
               "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")  # fmt: skip
    for name in secrets:
        monkeypatch.setenv(name, "topsecret")
    monkeypatch.setenv("HTTPS_PROXY", "http://proxy")
    notes = at_start("(notes / 'environment.json').write_text(json.dumps(dict(os.environ)))\nos._exit(3)")
    with pytest.raises(EngineError, match="score: the child process ended with status 3"):
        run_child("score", {}, notes / "out", RUNTIME, quiet)
    seen = json.loads((notes / "environment.json").read_text())
    assert not [name for name in seen if name.startswith(("AWS_", "PREFECT_"))]
    assert "topsecret" not in seen.values()
    assert seen["HTTPS_PROXY"] == "http://proxy"
    assert seen.keys() >= _environment(RUNTIME).keys() - {"_"}


@pytest.fixture
def machine_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """Set the GPUs that this process may use, and that no other process does."""
    monkeypatch.setattr("tasks.engines.gpus.USES", tmp_path / "uses")

    def show(gpus: str) -> None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", gpus)
        visible_gpus.cache_clear()

    yield show
    visible_gpus.cache_clear()


def test_children_side_by_side_have_a_gpu_each(
    at_start: Callable[[str], Path], machine_with: Callable[[str], None]
) -> None:
    """The children tell their GPU and wait for each other, so that all live at once."""
    machine_with("4,7")
    notes = at_start(
        "(notes / str(os.getpid())).write_text(os.environ['CUDA_VISIBLE_DEVICES'])\n"
        "while len(list(notes.iterdir())) < 4: time.sleep(0.01)\nos._exit(3)"
    )
    scratch = notes.parent
    with ThreadPoolExecutor(4) as pool:
        ended = [pool.submit(run_child, "score", {}, scratch, RUNTIME.model_copy(update={"device": "auto"}), quiet)
                 for _ in range(4)]  # fmt: skip
    assert all(isinstance(future.exception(), EngineError) for future in ended)
    assert sorted(path.read_text() for path in notes.iterdir()) == ["4", "4", "7", "7"]


def test_generation_on_a_gpu_has_vllm_in_a_process_of_its_own(
    at_start: Callable[[str], Path], machine_with: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("VLLM_ENABLE_V1_MULTIPROCESSING", raising=False)
    machine_with("4")
    notes = at_start(
        "import sys\n(notes / sys.orig_argv[2]).write_text(os.environ['VLLM_ENABLE_V1_MULTIPROCESSING'])\nos._exit(3)"
    )
    for name, device in (("distil", "cpu"), ("evaluate", "auto"), ("distil", "auto")):
        with pytest.raises(EngineError):
            run_child(name, {}, notes.parent, RUNTIME.model_copy(update={"device": device}), quiet)
        note = notes / f"tasks.engines.children.{name}"
        assert (note.read_text() == "1") == (name == "distil" and device == "auto")


def test_a_shared_fine_tuning_has_a_gpu_for_each_process(
    at_start: Callable[[str], Path], machine_with: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside another child, whichever starts first: of three GPUs it has two, the other child the third.

    It alone has an allocator whose segments grow.
    """
    machine_with("4,7,9")
    monkeypatch.delenv("PYTORCH_ALLOC_CONF", raising=False)
    notes = at_start(
        "import sys\ngiven = os.environ['CUDA_VISIBLE_DEVICES'], os.environ.get('PYTORCH_ALLOC_CONF', '')\n"
        "(notes / sys.orig_argv[2]).write_text(' '.join(given))\n"
        "while len(list(notes.iterdir())) < 2: time.sleep(0.01)\nos._exit(3)"
    )
    runtime = RUNTIME.model_copy(update={"device": "auto", "finetune_processes": 2})
    with ThreadPoolExecutor(2) as pool:
        ended = [pool.submit(run_child, name, {}, notes.parent, runtime, quiet) for name in ("score", "finetune")]
    assert all(isinstance(future.exception(), EngineError) for future in ended)
    notes_of = {name: (notes / f"tasks.engines.children.{name}").read_text() for name in ("score", "finetune")}
    (score, allocator), (finetune, trainings_allocator) = (note.split(" ") for note in notes_of.values())
    assert sorted([score, *finetune.split(",")]) == ["4", "7", "9"]
    assert (allocator, trainings_allocator) == ("", "expandable_segments:True")


@pytest.mark.parametrize(
    ("gpus", "device", "given"),
    [("4,7", "cuda", ("4", "7")), ("4,7", "cpu", ()), ("", "auto", ()), ("4", "auto", None), ("", "cuda", None)],
)
def test_more_processes_than_gpus_are_refused_unless_they_run_on_cpu(
    machine_with: Callable[[str], None],
    gpus: str,
    device: Literal["auto", "cpu", "cuda"],
    given: tuple[str, ...] | None,
) -> None:
    machine_with(gpus)
    runtime = Runtime(device=device, finetune_processes=2)
    if given is None:
        with pytest.raises(ConfigError, match=r"runtime\.finetune_processes=2: .* here are [01]; lower it"):
            _gpus_for("finetune", runtime)
    else:
        with _gpus_for("finetune", runtime) as chosen:
            assert chosen == given
    with _gpus_for("score", runtime) as chosen:
        assert len(chosen) <= 1


def test_runs_in_processes_of_their_own_take_the_gpus_that_others_leave(tmp_path: Path) -> None:
    """One run holds a GPU and is killed with -9."""
    hold = (
        "import sys, pathlib, tasks.engines.gpus as g; g.USES = pathlib.Path(sys.argv[1])\n"
        "with g.least_used(('4', 'GPU-a/7'), 1) as held: print(*held, flush=True); sys.stdin.readline()"
    )
    uses = tmp_path / "uses"
    first, second = (
        subprocess.Popen([sys.executable, "-c", hold, str(uses)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        for _ in range(2)
    )
    try:
        told = [process.stdout.readline().decode().strip() for process in (first, second) if process.stdout]
        assert sorted(told) == ["4", "GPU-a/7"]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("tasks.engines.gpus.USES", uses)
            with least_used(("4", "GPU-a/7"), 2) as both:
                assert sorted(both) == sorted(told), "a GPU that is used is shared where there is no other"
            second.kill()
            second.wait()
            with least_used(("4", "GPU-a/7"), 1) as free:
                assert free == (told[1],)
    finally:
        for process in (first, second):
            process.kill()
            process.communicate()


def test_the_environment_of_a_child_follows_the_runtime(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "id")
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.setenv("PYTHONPATH", "/mine")
    found = _environment(Runtime(kv_cache_gb=3))
    assert "AWS_ACCESS_KEY_ID" not in found
    assert found["VLLM_CPU_KVCACHE_SPACE"] == "3"
    assert found["OMP_NUM_THREADS"] == "7"
    assert found["PYTHONPATH"].split(os.pathsep)[1:] == ["/mine"]
    assert os.environ["AWS_ACCESS_KEY_ID"] == "id", "the parent keeps its own"


def test_engines_side_by_side_share_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    threads = [_environment(Runtime(engines=engines))["OMP_NUM_THREADS"] for engines in (1, 2, 8)]
    assert threads == ["6", "3", "1"]


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"timeout_minutes": 0.05, "timeouts": {"distil": 60}}, r"runtime\.timeout_minutes=0\.05"),
        ({"timeouts": {"score": 0.05}}, r"runtime\.timeouts\.score=0\.05"),
    ],
)
def test_a_child_that_takes_too_long_is_ended(
    at_start: Callable[[str], Path], tmp_path: Path, settings: dict[str, Any], named: str
) -> None:
    notes = at_start(f"(notes / 'pid').write_text(str(os.getpid()))\ntime.sleep({END_OF_TIMES})")
    runtime = RUNTIME.model_copy(update=settings)
    with pytest.raises(EngineError, match=f"took longer than {named};") as caught:
        run_child("score", {}, tmp_path / "out", runtime, quiet)
    assert caught.value.retryable
    assert ends(int((notes / "pid").read_text()))


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV, signal.SIGTERM], ids=lambda number: number.name)
def test_a_child_ended_by_a_signal_names_it(
    at_start: Callable[[str], Path], tmp_path: Path, number: signal.Signals
) -> None:
    at_start(f"print('last words', flush=True)\nos.kill(os.getpid(), {int(number)})")
    with pytest.raises(EngineError, match=f"score: the child process was ended by {number.name}") as caught:
        run_child("score", {}, tmp_path / "out", RUNTIME, quiet)
    assert caught.value.retryable
    assert "last words" in str(caught.value), "the end of its log belongs to the error"


def test_a_grandchild_does_not_outlive_the_child(at_start: Callable[[str], Path], tmp_path: Path) -> None:
    notes = at_start(
        f"worker = subprocess.Popen(['sleep', '{END_OF_TIMES}'])\n"
        "(notes / 'pid').write_text(str(worker.pid))\n"
        "os._exit(5)"
    )
    with pytest.raises(EngineError, match="status 5"):
        run_child("score", {}, tmp_path / "out", RUNTIME, quiet)
    assert ends(int((notes / "pid").read_text()))


def test_a_grandchild_that_ignores_sigterm_does_not_outlive_the_child(
    at_start: Callable[[str], Path], tmp_path: Path
) -> None:
    notes = at_start(
        "program = 'import signal, time; signal.signal(15, signal.SIG_IGN); print(flush=True); '\n"
        f"program += 'time.sleep({END_OF_TIMES})'\n"
        "worker = subprocess.Popen(['python3', '-I', '-S', '-c', program], stdout=subprocess.PIPE)\n"
        "worker.stdout.readline()\n"
        "(notes / 'pid').write_text(str(worker.pid))\n"
        "os._exit(5)"
    )
    with pytest.raises(EngineError, match="status 5"):
        run_child("score", {}, tmp_path / "out", RUNTIME, quiet)
    assert ends(int((notes / "pid").read_text()))


def test_a_worker_that_holds_the_pipe_does_not_hide_that_the_child_died(
    at_start: Callable[[str], Path], tmp_path: Path
) -> None:
    """A forked worker inherits the progress pipe; the parent must not wait for it to close until the deadline."""
    notes = at_start(
        "worker = os.fork()\n"
        f"if worker == 0:\n    time.sleep({END_OF_TIMES})\n"
        "(notes / 'pid').write_text(str(worker))\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    runtime = RUNTIME.model_copy(update={"timeout_minutes": 0.2})
    with pytest.raises(EngineError, match="was ended by SIGKILL"):
        run_child("score", {}, tmp_path / "out", runtime, quiet)
    assert ends(int((notes / "pid").read_text()))


def test_a_crash_inside_a_child_shows_the_end_of_its_log(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="score: the child process ended with status 1") as caught:
        run_child("score", {"checkpoint": str(tmp_path / "nowhere")}, tmp_path / "out", RUNTIME, quiet)
    assert "nowhere" in str(caught.value) and "Error" in str(caught.value)
    assert caught.value.retryable
    assert not children_running("score")


def test_a_child_killed_at_work_is_named_and_its_group_is_gone(pico: Path, tmp_path: Path) -> None:
    killed: list[int] = []

    def kill(_done: float, _text: str) -> None:
        if not killed:
            (pid,) = children_running("score")
            assert os.getpgid(pid) == pid != os.getpgid(0), "a group of its own"
            killed.append(pid)
            os.kill(pid, signal.SIGKILL)

    request = score_request(pico, tmp_path, documents=["A calibration text, long enough. " * 8] * 2000)
    with pytest.raises(EngineError, match="ended by SIGKILL"):
        run_child("score", request, tmp_path / "out", RUNTIME.model_copy(update={"batch": 1}), kill)
    with pytest.raises(ProcessLookupError):
        os.killpg(killed[0], 0)


def test_an_error_in_the_parent_ends_the_child(pico: Path, tmp_path: Path) -> None:
    seen: list[int] = []

    def interrupted(_done: float, _text: str) -> None:
        seen.extend(children_running("score"))
        raise KeyboardInterrupt

    request = score_request(pico, tmp_path, documents=["A calibration text, long enough. " * 8] * 2000)
    with pytest.raises(KeyboardInterrupt):
        run_child("score", request, tmp_path / "out", RUNTIME.model_copy(update={"batch": 1}), interrupted)
    assert len(seen) == 1 and ends(seen[0])
    assert not children_running("score")


def test_a_child_that_is_started_during_a_stop_is_ended(
    at_start: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_start(f"time.sleep({END_OF_TIMES})")
    stopping = threading.Event()
    monkeypatch.setattr("tasks.engines.child._stopping", stopping)

    @contextmanager
    def stopped_meanwhile(*_arguments: Any) -> Iterator[tuple[str, ...]]:
        stopping.set()
        yield ()

    def waiting(*_arguments: Any) -> int:
        raise AssertionError("waits for a child that is to end")

    monkeypatch.setattr("tasks.engines.child._gpus_for", stopped_meanwhile)
    monkeypatch.setattr("tasks.engines.child._Follower.until_end_of", waiting)
    with pytest.raises(EngineError, match="score: the run is being stopped"):
        run_child("score", {}, tmp_path / "out", RUNTIME, quiet)
    assert not children_running("score")


def test_the_own_error_of_a_child_comes_through(pico: Path, tmp_path: Path) -> None:
    request = score_request(pico, tmp_path, documents=["short"])
    with pytest.raises(DataError, match=r"score\.calibration: no document has 16 tokens") as caught:
        run_child("score", request, tmp_path / "out", RUNTIME, quiet)
    assert caught.value.exit_status == 2 and not caught.value.retryable


# --- score ------------------------------------------------------------------------------------------------


def score_request(checkpoint: Path, folder: Path, documents: list[str], **fields: Any) -> dict[str, Any]:
    path = folder / "documents.json"
    path.write_text(json.dumps(documents))
    return {"checkpoint": str(checkpoint), "documents": str(path), "samples": len(documents), "length": 48,
            "metric": "angular", "token": "last", "dtype": "float32", "seed": 0, "part": str(folder / "sums"),
            "commit_seconds": END_OF_TIMES, **fields}  # fmt: skip


def states_by_hand(model: Any, ids: list[int]) -> list[torch.Tensor]:
    """The state of the last token before each block and after the last one, one block at a time, without padding."""
    inner, length = model.model, len(ids)
    hidden = inner.embed_tokens(torch.tensor([ids]))
    positions = torch.arange(length)[None]
    mask = torch.full((length, length), torch.finfo(torch.float32).min).triu(1)[None, None]
    states = [hidden]
    for block in inner.layers:
        hidden = block(
            hidden, attention_mask=mask, position_ids=positions, position_embeddings=inner.rotary_emb(hidden, positions)
        )
        states.append(hidden)
    return [state[0, -1] for state in states]


@pytest.fixture(scope="module")
def scored(pico: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """The same documents of different lengths, scored one by one and four at a time."""
    folder = tmp_path_factory.mktemp("score")
    documents = ["tiny", *(pair["answer"] for pair in pocket_pairs()[:30])]
    request = score_request(pico, folder, documents, samples=9)
    outs = {}
    for batch in (1, 4):
        outs[batch] = folder / f"batch-{batch}"
        run_child("score", request, outs[batch], RUNTIME.model_copy(update={"batch": batch}), quiet)
    return outs


@torch.inference_mode()
def test_distances_equal_a_forward_pass_by_hand(pico: Path, scored: dict[int, Path]) -> None:
    model = AutoModelForCausalLM.from_pretrained(pico, dtype=torch.float32, attn_implementation="eager").eval()
    samples = [json.loads(line) for line in (scored[4] / "tokens.jsonl").read_text().splitlines()]
    assert len({len(sample) for sample in samples}) > 2, "lengths must differ, or padding is not tried"
    states = [states_by_hand(model, sample) for sample in samples]
    found = json.loads((scored[4] / "distances.json").read_text())
    assert (found["metric"], found["token"], found["samples"]) == ("angular", "last", 9)
    for count in range(1, 7):
        for start in range(6):
            mean, std = (found[kind][count - 1][start] for kind in ("mean", "std"))
            if start + count > 6:
                assert mean is None and std is None
                continue
            each = []
            for state in states:
                one, other = state[start].double(), state[start + count].double()
                cosine = float(one @ other) / (float(one @ one) * float(other @ other)) ** 0.5
                each.append(np.arccos(min(1.0, cosine)) / np.pi)
            assert mean == pytest.approx(np.mean(each), abs=1e-5)
            assert std == pytest.approx(np.std(each, ddof=1), abs=1e-5)


def test_the_batch_does_not_change_the_distances(scored: dict[int, Path]) -> None:
    one, four = (json.loads((scored[batch] / "distances.json").read_text()) for batch in (1, 4))
    for kind in ("mean", "std"):
        first, second = (np.array(found[kind], dtype=float) for found in (one, four))
        assert np.array_equal(np.isnan(first), np.isnan(second))
        assert np.nanmax(np.abs(first - second)) < 1e-6
    assert (scored[1] / "tokens.jsonl").read_text() == (scored[4] / "tokens.jsonl").read_text()


def test_tokens_are_what_was_fed(pico: Path, scored: dict[int, Path]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(pico)
    encoded = [tokenizer.encode(pair["answer"])[:48] for pair in pocket_pairs()[:30]]
    expected = [ids for ids in encoded if len(ids) >= 16][:9]
    assert [json.loads(line) for line in (scored[1] / "tokens.jsonl").read_text().splitlines()] == expected


def test_the_ranking_orders_the_means(scored: dict[int, Path]) -> None:
    mean = json.loads((scored[4] / "distances.json").read_text())["mean"]
    starts = json.loads((scored[4] / "ranking.json").read_text())["starts_by_count"]
    for count, row in enumerate(mean, 1):
        assert sorted(starts[count - 1]) == list(range(6 - count + 1))
        values = [row[start] for start in starts[count - 1]]
        assert values == sorted(values)


# --- verify -----------------------------------------------------------------------------------------------


@pytest.fixture
def pruned(pico: Path, tmp_path: Path) -> dict[str, Any]:
    """The request of a right cut."""
    out = tmp_path / "pruned"
    out.mkdir()
    facts = cut(pico, out, SPAN)
    return {"original": str(pico), "pruned": str(out), "removed": SPAN.removed, "parameters": facts["parameters"],
            "runtime": RUNTIME.model_dump()}  # fmt: skip


def rewritten(folder: str, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    weights = load_file(Path(folder) / "model.safetensors")
    change(weights)
    save_file(weights, Path(folder) / "model.safetensors", metadata={"format": "pt"})


def refused(request: dict[str, Any]) -> str:
    with pytest.raises(GateError) as caught:
        verify(request, Path(), quiet)
    assert not caught.value.retryable
    return str(caught.value)


def test_a_right_cut_passes(pruned: dict[str, Any]) -> None:
    seen: list[float] = []
    verify(pruned, Path(), lambda done, _text: seen.append(done))
    assert seen == sorted(seen) and len(seen) >= 2


@pytest.mark.parametrize("span", [Span(0, 1, 4), Span(3, 1, 4), Span(0, 3, 4)], ids=str)
def test_a_right_cut_of_an_untied_model_passes_at_either_end(tmp_path: Path, span: Span) -> None:
    original, out = build_pico(tmp_path / "loose", tie_word_embeddings=False, num_hidden_layers=4), tmp_path / "out"
    out.mkdir()
    facts = cut(original, out, span)
    verify({"original": str(original), "pruned": str(out), "removed": span.removed, "parameters": facts["parameters"],
            "runtime": RUNTIME.model_dump()}, Path(), quiet)  # fmt: skip
    assert AutoModelForCausalLM.from_pretrained(out).num_parameters() == facts["parameters"]
    with pytest.raises(GateError, match="bypassed"):
        verify({"original": str(original), "pruned": str(out), "removed": [(block + 1) % 4 for block in span.removed],
                "parameters": facts["parameters"], "runtime": RUNTIME.model_dump()}, Path(), quiet)  # fmt: skip


def test_a_wrong_number_of_parameters_is_refused_across_the_border(pruned: dict[str, Any], tmp_path: Path) -> None:
    count = pruned["parameters"]
    request = {**pruned, "parameters": count + 1}
    with pytest.raises(GateError, match=f"has {count} parameters, the plan says {count + 1}"):
        run_child("verify", request, tmp_path / "out", RUNTIME, quiet)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_no_number_is_refused(pruned: dict[str, Any], value: float) -> None:
    def change(weights: dict[str, torch.Tensor]) -> None:
        weights["model.layers.1.mlp.down_proj.weight"][3, 4] = value

    rewritten(pruned["pruned"], change)
    assert "not finite" in refused(pruned)


def test_swapped_blocks_are_refused(pruned: dict[str, Any]) -> None:
    def change(weights: dict[str, torch.Tensor]) -> None:
        for name in [name for name in weights if ".layers.1." in name]:
            other = name.replace(".layers.1.", ".layers.2.")
            weights[name], weights[other] = weights[other], weights[name]

    rewritten(pruned["pruned"], change)
    message = refused(pruned)
    assert "logits of the pruned model differ" in message and "blocks [2, 3] bypassed" in message


def test_the_wrong_blocks_are_refused(pruned: dict[str, Any]) -> None:
    assert "blocks [1, 2] bypassed" in refused({**pruned, "removed": [1, 2]})


def test_a_slightly_changed_weight_is_refused(pruned: dict[str, Any]) -> None:
    def change(weights: dict[str, torch.Tensor]) -> None:
        weights["model.layers.3.self_attn.v_proj.weight"] *= 1.05

    rewritten(pruned["pruned"], change)
    assert "logits of the pruned model differ" in refused(pruned)


def test_a_missing_tensor_is_refused(pruned: dict[str, Any]) -> None:
    rewritten(pruned["pruned"], lambda weights: weights.__delitem__("model.layers.0.mlp.up_proj.weight"))
    message = refused(pruned)
    assert "missing keys" in message and "model.layers.0.mlp.up_proj.weight" in message


def test_a_block_too_many_is_refused(pruned: dict[str, Any]) -> None:
    def change(weights: dict[str, torch.Tensor]) -> None:
        for name in [name for name in weights if ".layers.3." in name]:
            weights[name.replace(".layers.3.", ".layers.4.")] = weights[name].clone()

    rewritten(pruned["pruned"], change)
    message = refused(pruned)
    assert "unexpected keys" in message and "layers.4." in message


def test_a_cache_that_changes_generation_is_refused(pruned: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """As after a cut in memory that leaves two blocks with one cache slot."""
    build = LlamaForCausalLM.__init__

    def with_stale_number(self: Any, config: Any, *args: Any, **options: Any) -> None:
        build(self, config, *args, **options)
        if config.num_hidden_layers == 4:
            self.model.layers[3].self_attn.layer_idx = 2

    monkeypatch.setattr(LlamaForCausalLM, "__init__", with_stale_number)
    assert "cache" in refused(pruned)


def test_a_config_with_the_old_number_of_blocks_is_refused(pruned: dict[str, Any]) -> None:
    path = Path(pruned["pruned"]) / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "num_hidden_layers": 6}))
    assert "missing keys" in refused(pruned)


def test_a_model_without_that_many_blocks_is_unsupported(pruned: dict[str, Any]) -> None:
    from tasks.engines.children.blocks import decoder_blocks

    model = AutoModelForCausalLM.from_pretrained(pruned["pruned"])
    assert len(decoder_blocks(model, 4)) == 4
    with pytest.raises(ModelUnsupported, match="0 lists of 6 blocks instead of one"):
        decoder_blocks(model, 6)


# --- fine-tuning ------------------------------------------------------------------------------------------


def training_row(number: int, answer: str, reference: str, **fields: Any) -> dict[str, Any]:
    return {"id": f"r-{number}", "prompt": [{"role": "user", "content": f"Question {number}?"}], "answer": answer,
            "reference": reference, "outcome": "accepted", **fields}  # fmt: skip


def finetune_request(checkpoint: Path, rows: Path, answers: str = "answer", **fields: Any) -> dict[str, Any]:
    recipe = Finetune(rank=4, alpha=8, learning_rate=5e-3, epochs=8, batch=4, max_length=64).model_dump()
    return {"checkpoint": str(checkpoint), "rows": str(rows), "answers": answers, "runtime": RUNTIME.model_dump(),
            "parts": tempfile.mkdtemp(prefix="sdd-parts-"), "name": "state", "commit_seconds": END_OF_TIMES,
            **recipe, **fields}  # fmt: skip


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five rows to train on, one that failed, and two that are too long in one of the arms."""
    short = [training_row(i, f"The rewritten answer is {i}.", f"It is {i}.") for i in range(5)]
    odd = [
        training_row(5, "x", "y", outcome="failed"),
        training_row(6, "word " * 60, "short"),
        training_row(7, "short", "word " * 60),
    ]
    return write_jsonl(tmp_path_factory.mktemp("rows") / "rows.jsonl", short + odd)


@pytest.fixture(scope="module")
def trained(pico: Path, rows: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two runs of the same request, each in a process of its own, with micro-batches of two."""
    outs = [tmp_path_factory.mktemp("adapters") / name for name in ("first", "second")]
    for out in outs:
        run_child("finetune", finetune_request(pico, rows), out, RUNTIME.model_copy(update={"micro_batch": 2}), quiet)
    return outs


@pytest.mark.parametrize("answers", ["answer", "reference"])
def test_only_the_answer_and_its_end_bear_loss(pico: Path, rows: Path, answers: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(pico)
    found = read_examples(finetune_request(pico, rows, answers), tokenizer)
    examples = found.train
    trained_rows = [json.loads(line) for line in rows.read_text().splitlines()][:5]
    assert len(examples) == 5
    total = masked = 0
    for example, row in zip(examples, trained_rows, strict=True):
        by_hand = f"<|start|>user\n{row['prompt'][0]['content']}<|end|>\n<|start|>assistant\n"
        prompt = tokenizer.encode(by_hand, add_special_tokens=False)
        answer = [*tokenizer.encode(row[answers], add_special_tokens=False), tokenizer.eos_token_id]
        assert example["input_ids"] == prompt + answer
        for position, (token, label) in enumerate(zip(example["input_ids"], example["labels"], strict=True)):
            assert label == (token if position >= len(prompt) else IGNORED)
        total, masked = total + len(prompt + answer), masked + len(prompt)
    assert found.counts == {"rows": 5, "validation_rows": 0, "too_long": 2, "failed": 1}
    assert answer_tokens_of(examples) == total - masked


def test_a_row_of_exactly_the_longest_length_stays(pico: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(pico)
    path = write_jsonl(tmp_path / "rows.jsonl", [training_row(1, "an answer", "an answer")])
    length = len(read_examples(finetune_request(pico, path, max_length=500), tokenizer).train[0]["input_ids"])
    assert len(read_examples(finetune_request(pico, path, max_length=length), tokenizer).train) == 1
    with pytest.raises(DataError, match=rf"finetune\.max_length={length - 1}: no row is short enough"):
        read_examples(finetune_request(pico, path, max_length=length - 1), tokenizer)


def test_both_arms_train_on_the_same_rows_in_the_same_order(pico: Path, rows: Path) -> None:
    """They differ in the answers and in nothing else: step by step the same prompts, in every epoch another order."""
    tokenizer, steps = AutoTokenizer.from_pretrained(pico), []
    for answers in ("answer", "reference"):
        request = finetune_request(pico, rows, answers, epochs=3.0)
        training = _Training(request, read_examples(request, tokenizer), 1e-3, Path(request["parts"], "state"))
        batches = [training._batch(step) for step in range(training.steps)]
        steps.append([[_prompt(row) for row in batch] for batch in batches])
    assert steps[0] == steps[1]
    epochs = [[prompt for step in steps[0][first : first + 2] for prompt in step] for first in (0, 2, 4)]
    assert [len(set(epoch)) for epoch in epochs] == [5, 5, 5]
    assert len(set(map(tuple, epochs))) > 1


def _prompt(row: dict[str, list[int]]) -> tuple[int, ...]:
    pairs = zip(row["input_ids"], row["labels"], strict=True)
    return tuple(token for token, label in pairs if label == IGNORED)


def test_a_share_of_the_gpu_below_the_weights_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The card is a stand-in of 10 GB, the weights a sparse file of 3."""
    card = SimpleNamespace(get_device_total_memory=lambda: 10**10)
    monkeypatch.setattr("vllm.platforms.current_platform", card, raising=False)
    (weights := tmp_path / "model.safetensors").touch()
    os.truncate(weights, 3 * 10**9)
    request = {"checkpoint": str(tmp_path), "dtype": "bfloat16", "max_length": 64, "seed": 0}

    def options(share: float) -> dict[str, Any]:
        return vllm_options(request | {"runtime": {"device": "cuda", "gpu_memory": share, "engines": 2}})

    assert options(0.5)["kv_cache_memory_bytes"] == 10**9
    with pytest.raises(ConfigError, match=r"runtime\.gpu_memory=0\.20.*10 GB.*3\.0 GB of weights; raise it"):
        options(0.2)


def test_rows_are_packed_with_positions_of_their_own() -> None:
    batch = packed([{"input_ids": [5, 6, 7], "labels": [IGNORED, 6, 7]}, {"input_ids": [8, 9], "labels": [IGNORED, 9]}])
    assert batch.pop("max_length_q") == 3
    assert {name: tensor.tolist() for name, tensor in batch.items()} == {
        "input_ids": [[5, 6, 7, 8, 9]], "position_ids": [[0, 1, 2, 0, 1]], "labels": [[IGNORED, 6, 7, IGNORED, 9]],
        "cu_seq_lens_q": [0, 3, 5],
    }  # fmt: skip


def test_the_loss_of_packed_rows_is_that_of_each_row_alone(pico: Path, rows: Path) -> None:
    """Loss and gradient of whole rows through all logits, one row at a time: no row may see another."""
    model = AutoModelForCausalLM.from_pretrained(pico).train()
    examples = read_examples(finetune_request(pico, rows), AutoTokenizer.from_pretrained(pico)).train
    weight = model.model.layers[0].self_attn.q_proj.weight

    loss = answer_loss(model, packed(examples))
    loss.backward()
    gradient = weight.grad.clone()
    model.zero_grad()

    total = torch.zeros(())
    for example in examples:
        logits = model(input_ids=torch.tensor([example["input_ids"]])).logits[0]
        for position, label in enumerate(example["labels"]):
            if label != IGNORED:
                total = total - logits[position - 1].log_softmax(0)[label]
    total.backward()
    assert float(loss) == pytest.approx(float(total), rel=1e-5)
    assert torch.allclose(gradient, weight.grad, rtol=1e-3, atol=1e-3 * float(weight.grad.abs().max()))


def test_the_micro_batch_does_not_change_the_training(pico: Path, rows: Path, tmp_path: Path) -> None:
    entries = {}
    for micro in (1, 2, 3, 4):
        request = finetune_request(pico, rows, dropout=0.0, epochs=2.0)
        request["runtime"] = {**request["runtime"], "micro_batch": micro}
        finetune(request, tmp_path / str(micro), quiet)
        lines = (tmp_path / str(micro) / "loss.jsonl").read_text().splitlines()
        entries[micro] = [json.loads(line) for line in lines]
    for micro in (2, 3, 4):
        assert [entry["step"] for entry in entries[micro]] == [1, 2, 3, 4]
        for entry, expected in zip(entries[micro], entries[1], strict=True):
            assert entry["loss"] == pytest.approx(expected["loss"], rel=1e-3)
            assert entry["learning_rate"] == pytest.approx(expected["learning_rate"])


def test_training_lowers_the_loss(trained: list[Path]) -> None:
    entries = [json.loads(line) for line in (trained[0] / "loss.jsonl").read_text().splitlines()]
    counts = json.loads((trained[0] / "tokens.json").read_text())
    assert counts["rows"] == 5 and counts["too_long"] == 2 and counts["failed"] == 1
    assert [entry["step"] for entry in entries] == list(range(1, counts["steps"] + 1))
    assert counts["steps"] == 16, "five rows in steps of four, eight times"
    losses = [entry["loss"] for entry in entries]
    assert losses[0] == pytest.approx(np.log(500), rel=0.2), "a random model knows nothing"
    assert np.mean(losses[-4:]) < np.mean(losses[:4]) - 0.3
    assert max(entry["learning_rate"] for entry in entries) == pytest.approx(5e-3, rel=0.1)


def test_equal_seeds_give_equal_adapters_bit_for_bit(trained: list[Path]) -> None:
    first, second = ((out / "adapter_model.safetensors").read_bytes() for out in trained)
    assert first == second
    assert (trained[0] / "loss.jsonl").read_text() == (trained[1] / "loss.jsonl").read_text()
    weights = load_file(trained[0] / "adapter_model.safetensors")
    assert any(float(weight.abs().max()) > 0 for name, weight in weights.items() if "lora_B" in name)
    adapted = {name.split(".")[-3] for name in weights}
    assert adapted == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def test_another_seed_or_arm_gives_another_adapter(trained: list[Path], pico: Path, rows: Path, tmp_path: Path) -> None:
    weights = {"first": load_file(trained[0] / "adapter_model.safetensors")}
    for name, request in {
        "seed": finetune_request(pico, rows, seed=1, epochs=1.0),
        "arm": finetune_request(pico, rows, "reference", epochs=1.0),
        "same": finetune_request(pico, rows, epochs=1.0),
    }.items():
        finetune(request, tmp_path / name, quiet)
        weights[name] = load_file(tmp_path / name / "adapter_model.safetensors")
    for one, other in (("seed", "same"), ("arm", "same"), ("seed", "arm")):
        assert any(not torch.equal(weight, weights[other][name]) for name, weight in weights[one].items())


# --- merge ------------------------------------------------------------------------------------------------


@torch.inference_mode()
def logits(model: Any) -> torch.Tensor:
    found = model.eval()(input_ids=torch.arange(40)[None] * 7 % 400).logits
    assert isinstance(found, torch.Tensor)
    return found


def test_the_merged_checkpoint_computes_what_the_adapter_does(trained: list[Path], pico: Path, tmp_path: Path) -> None:
    out = tmp_path / "merged"
    run_child("merge", {"checkpoint": str(pico), "adapter": str(trained[0])}, out, RUNTIME, quiet)
    base = AutoModelForCausalLM.from_pretrained(pico)
    plain = logits(base)
    adapted = logits(PeftModel.from_pretrained(base, trained[0]))
    model = AutoModelForCausalLM.from_pretrained(out)
    merged = logits(model)
    assert float((adapted - plain).abs().max()) > 0.1, "the adapter must change something"
    assert float((merged - adapted).abs().max()) < 1e-4 * float(adapted.abs().max())
    assert model.get_output_embeddings().weight.data_ptr() == model.get_input_embeddings().weight.data_ptr()
    assert "lm_head.weight" not in load_file(out / "model.safetensors")
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is True
    assert AutoTokenizer.from_pretrained(out).chat_template == AutoTokenizer.from_pretrained(pico).chat_template
    assert not list(out.glob("adapter*"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_merge_keeps_type_and_head_of_the_pruned_model(tmp_path: Path, rows: Path, dtype: torch.dtype) -> None:
    base = build_pico(tmp_path / "loose", tie_word_embeddings=False)
    AutoModelForCausalLM.from_pretrained(base, dtype=dtype).save_pretrained(base)
    for name in ("span.json", "candidates.json"):
        (base / name).write_text("{}")
    finetune(finetune_request(base, rows, epochs=2.0), tmp_path / "adapter", quiet)
    out = tmp_path / "merged"
    out.mkdir()
    merge({"checkpoint": str(base), "adapter": str(tmp_path / "adapter")}, out, quiet)
    before, after = load_file(base / "model.safetensors"), load_file(out / "model.safetensors")
    assert {n: (w.dtype, w.shape) for n, w in after.items()} == {n: (w.dtype, w.shape) for n, w in before.items()}
    assert torch.equal(before["lm_head.weight"], after["lm_head.weight"])
    assert not torch.equal(before["model.layers.0.mlp.up_proj.weight"], after["model.layers.0.mlp.up_proj.weight"])
    assert not {"span.json", "candidates.json"} & {path.name for path in out.iterdir()}, "they describe the cut"


def test_an_adapter_of_another_shape_is_an_error(trained: list[Path], pico: Path, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    shutil.copytree(trained[0], adapter)
    config = adapter / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "r": 8}))
    with pytest.raises(PipelineError, match="size mismatch"):
        run_child("merge", {"checkpoint": str(pico), "adapter": str(adapter)}, tmp_path / "out", RUNTIME, quiet)


def test_an_adapter_of_a_deeper_model_is_an_error(trained: list[Path], pruned: dict[str, Any], tmp_path: Path) -> None:
    """Its tensors for blocks that are gone would be dropped in silence."""
    (tmp_path / "out").mkdir()
    with pytest.raises((PipelineError, RuntimeError, ValueError)):
        merge({"checkpoint": pruned["pruned"], "adapter": str(trained[0])}, tmp_path / "out", quiet)


@pytest.mark.parametrize("scale", [0.0, 0.99, 2.0])
def test_an_adapter_merged_at_another_scale_is_refused(
    scale: float, trained: list[Path], pico: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the rounding to bfloat16 would hide it."""
    shutil.copytree(pico, base := tmp_path / "base")
    AutoModelForCausalLM.from_pretrained(pico, dtype=torch.bfloat16).save_pretrained(base)
    merge_and_unload = LoraModel.merge_and_unload

    def scaled(self: Any) -> Any:
        for layer in self.modules():
            if isinstance(layer, LoraLayer):
                layer.scale_layer(scale)
        return merge_and_unload(self)

    monkeypatch.setattr(LoraModel, "merge_and_unload", scaled)
    (tmp_path / "out").mkdir()
    with pytest.raises(GateError, match=r"merged logits in float32 differ from the adapter's by"):
        merge({"checkpoint": str(base), "adapter": str(trained[0])}, tmp_path / "out", quiet)


def test_a_merge_that_computes_something_else_is_refused(
    trained: list[Path], pico: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = LlamaForCausalLM.save_pretrained

    def spoiled(self: Any, *args: Any, **options: Any) -> Any:
        with torch.no_grad():
            self.model.layers[2].mlp.down_proj.weight.zero_()
        return save(self, *args, **options)

    monkeypatch.setattr(LlamaForCausalLM, "save_pretrained", spoiled)
    (tmp_path / "out").mkdir()
    with pytest.raises(GateError, match=r"merged logits differ from the adapter's by"):
        merge({"checkpoint": str(pico), "adapter": str(trained[0])}, tmp_path / "out", quiet)
