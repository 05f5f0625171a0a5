"""Training that is interrupted, judged on held-out rows, matched in tokens, or of all weights."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, Gemma2Config, GptOssConfig, MistralConfig

import tasks.engines.children.finetune as child
from tasks.domain.errors import EngineError, GateError
from tasks.domain.recipe import Runtime
from tasks.engines.child import run_child
from tasks.engines.children import packing
from tasks.engines.children.finetune import IGNORED, finetune, read_examples
from tasks.engines.children.merge import merge
from tasks.engines.children.packing import packed
from tests.conftest import descendants, write_jsonl
from tests.engines.test_child import RUNTIME, children_running, ends, finetune_request, quiet, training_row
from tests.store.conftest import contents


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rewrites of about three times the length of their references."""
    made = [training_row(i, f"The rewritten answer to this one is, I think, {i}.", f"It is {i}.") for i in range(20)]
    return write_jsonl(tmp_path_factory.mktemp("rows") / "rows.jsonl", made)


def losses(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "loss.jsonl").read_text().splitlines()]


def outcome(folder: Path) -> tuple[list[dict[str, float]], dict[str, torch.Tensor], dict[str, Any]]:
    return (
        losses(folder),
        load_file(folder / "adapter_model.safetensors"),
        json.loads((folder / "tokens.json").read_text()),
    )


def test_a_killed_training_goes_on_to_the_same_bytes(pico: Path, rows: Path, tmp_path: Path) -> None:
    """With dropout, momentum, a schedule, several epochs and a best epoch, every one of which must be resumed."""
    settings: dict[str, Any] = {
        "epochs": 3.0, "dropout": 0.1, "validation": 0.2, "warmup_ratio": 0.2, "commit_seconds": -1,  # after every step
    }  # fmt: skip
    run_child("finetune", finetune_request(pico, rows, **settings), tmp_path / "whole", RUNTIME, quiet)
    request, texts = finetune_request(pico, rows, **settings), list[str]()

    def kill_at_seven(_done: float, text: str) -> None:
        if text.startswith("step 7 "):
            (pid,) = children_running("finetune")
            os.kill(pid, signal.SIGKILL)

    with pytest.raises(EngineError, match="ended by SIGKILL"):
        run_child("finetune", request, tmp_path / "killed", RUNTIME, kill_at_seven)
    assert not (tmp_path / "killed" / "adapter_model.safetensors").exists()
    run_child("finetune", request, tmp_path / "resumed", RUNTIME, lambda _done, text: texts.append(text))
    steps = [int(text.split()[1]) for text in texts if text.startswith("step ")]
    assert steps[0] >= 8, "what was committed is not repeated"
    assert [text.split(",")[0] for text in texts[:2]] == ["16 rows read", "the model is loaded"]
    assert texts[1].startswith(f"the model is loaded, step {steps[0] - 1} of ")
    assert any("validation_loss" in entry for entry in outcome(tmp_path / "whole")[0])
    assert contents(tmp_path / "resumed") == contents(tmp_path / "whole")


def test_the_epoch_with_the_lowest_validation_loss_is_kept(pico: Path, rows: Path, tmp_path: Path) -> None:
    """A learning rate that ruins the model: the adapter that is saved must be an early one."""
    request = finetune_request(pico, rows, epochs=6.0, validation=0.3, learning_rate=1.0, schedule="constant")
    finetune(request, tmp_path / "a", quiet)
    entries, _, counts = outcome(tmp_path / "a")
    losses = [entry["validation_loss"] for entry in entries if "validation_loss" in entry]
    assert losses[-1] > min(losses) == counts["validation_loss"]
    examples = read_examples(request, AutoTokenizer.from_pretrained(pico))
    assert counts["validation_rows"] == len(examples.validation) == 6
    assert counts["rows"] + counts["validation_rows"] == 20
    from peft import PeftModel

    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(pico), tmp_path / "a").eval()
    with torch.inference_mode():
        total = sum(float(child.answer_loss(model, packed([row]))) for row in examples.validation)
    assert total / child.answer_tokens_of(examples.validation) == pytest.approx(min(losses), rel=1e-3)


def test_a_training_that_diverges_is_refused(pico: Path, rows: Path, tmp_path: Path) -> None:
    with pytest.raises(GateError, match=r"not finite at step \d+ with finetune\.learning_rate=1e\+30"):
        finetune(finetune_request(pico, rows, learning_rate=1e30), tmp_path / "a", quiet)
    finetune(finetune_request(pico, rows, learning_rate=[1e30, 1e-3], validation=0.3), tmp_path / "b", quiet)
    assert outcome(tmp_path / "b")[2]["learning_rate"] == 1e-3


def test_a_gradient_that_is_no_number_reaches_no_weight(
    pico: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the third step the loss is as always and its gradient is not: what was committed before stays sound."""
    request, calls, loss = finetune_request(pico, rows, commit_seconds=-1), [], child.answer_loss

    def poisoned(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        calls.append(len(batch["input_ids"]))
        zero = sum(weight.sum() for weight in model.parameters() if weight.requires_grad) * 0.0
        return loss(model, batch) + (zero.sqrt() if len(calls) == 3 else zero)

    monkeypatch.setattr(child, "answer_loss", poisoned)
    request["runtime"]["micro_batch"] = request["batch"]
    with pytest.raises(GateError, match=r"loss or its gradient is not finite at step 3 with finetune\.learning_rate"):
        finetune(request, tmp_path, quiet)
    (part,) = Path(request["parts"]).iterdir()
    state = load_file(part)
    assert {float(tensor) for name, tensor in state.items() if name.startswith("step ")} == {2.0}
    assert all(torch.isfinite(tensor).all() for tensor in state.values())


def test_of_several_learning_rates_the_one_with_the_lower_validation_loss_is_taken(
    pico: Path, rows: Path, tmp_path: Path
) -> None:
    request = finetune_request(pico, rows, epochs=2.0, validation=0.3, learning_rate=[1e-7, 5e-3])
    finetune(request, tmp_path / "a", quiet)
    assert outcome(tmp_path / "a")[2]["learning_rate"] == 5e-3
    again = finetune_request(pico, rows, epochs=2.0, validation=0.3, learning_rate=[5e-3, 1e-7])
    finetune(again, tmp_path / "b", quiet)
    assert all(torch.equal(w, outcome(tmp_path / "b")[1][name]) for name, w in outcome(tmp_path / "a")[1].items())


def test_budgets_match_steps_or_answer_tokens(pico: Path, rows: Path, tmp_path: Path) -> None:
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for budget in ("steps", "answer_tokens"):
        for arm in ("answer", "reference"):
            out = tmp_path / f"{budget}-{arm}"
            finetune(finetune_request(pico, rows, arm, epochs=4.0, budget=budget), out, quiet)
            found[budget, arm] = outcome(out)[2]
    assert found["steps", "answer"]["steps"] == found["steps", "reference"]["steps"]
    assert found["steps", "answer"]["trained_tokens"] > 2 * found["steps", "reference"]["trained_tokens"]
    assert found["answer_tokens", "reference"] == found["steps", "reference"], "the SFT arm is the measure"
    a_step = found["steps", "answer"]["trained_tokens"] / found["steps", "answer"]["steps"]
    difference = found["answer_tokens", "answer"]["trained_tokens"] - found["steps", "reference"]["trained_tokens"]
    assert abs(difference) < 1.1 * a_step


def test_full_fine_tuning_trains_every_weight_and_merges_to_a_checkpoint(
    pico: Path, rows: Path, tmp_path: Path
) -> None:
    finetune(finetune_request(pico, rows, method="full", epochs=1.0, learning_rate=1e-3), tmp_path / "full", quiet)
    before, after = load_file(pico / "model.safetensors"), load_file(tmp_path / "full" / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(not torch.equal(weight, after[name]) for name, weight in before.items())
    (tmp_path / "merged").mkdir()
    merge({"checkpoint": str(pico), "adapter": str(tmp_path / "full")}, tmp_path / "merged", quiet)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert torch.equal(merged.model.layers[0].mlp.up_proj.weight, after["model.layers.0.mlp.up_proj.weight"])
    assert (tmp_path / "merged" / "tokenizer.json").exists()


# --- shared by processes -------------------------------------------------------------------------------------


SHARED = Runtime(  # on GPUs and over nccl where there are two
    device="cuda" if torch.cuda.device_count() > 1 else "cpu", finetune_processes=2, micro_batch=2, timeout_minutes=5
)
ALONE = SHARED.model_copy(update={"finetune_processes": 1})


def request_on(runtime: Runtime, pico: Path, rows: Path, out: Path, **settings: Any) -> dict[str, Any]:
    """Steps of five rows and a last one of a single row: no multiple of the processes and micro-batches."""
    (out / "parts").mkdir(parents=True, exist_ok=True)
    recipe = {"epochs": 2.0, "batch": 5, "dropout": 0.0, "validation": 0.2, "learning_rate": 1e-3, **settings}
    return finetune_request(pico, rows, **recipe, runtime=runtime.model_dump(), parts=str(out / "parts"))


def check_equal_but_for_rounding(one: Path, other: Path) -> None:
    """Losses, weights, and the state after the last step, whose momenta show the size of the gradients."""
    for entry, expected in zip(*(losses(folder) for folder in (other, one)), strict=True):
        assert entry == pytest.approx(expected, abs=1e-5)
    files = [file.relative_to(one) for file in one.rglob("*.safetensors")]
    assert len(files) == 2
    for file in files:
        found, weights = load_file(other / file), load_file(one / file)
        assert found.keys() == weights.keys()
        for name, weight in weights.items():
            assert torch.allclose(found[name], weight, rtol=1e-4, atol=1e-5), name
    counts, expected_counts = (json.loads((folder / "tokens.json").read_text()) for folder in (other, one))
    assert counts == pytest.approx(expected_counts, abs=1e-5)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_two_processes_train_what_one_does(pico: Path, rows: Path, tmp_path: Path, method: str) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    texts: list[str] = []
    finetune(request_on(ALONE, pico, rows, one, method=method), one, quiet)
    finetune(request_on(SHARED, pico, rows, two, method=method), two, lambda _done, text: texts.append(text))
    steps = [f"step {step} of 8" for step in range(1, 9)]
    assert [text.split(",")[0] for text in texts] == ["16 rows read", "the model is loaded", *steps]
    check_equal_but_for_rounding(one, two)
    assert {path.name for path in one.iterdir()} == {path.name for path in two.iterdir()}
    name = "config.json" if method == "full" else "adapter_config.json"
    config, other = (json.loads((folder / name).read_text()) for folder in (one, two))
    if method == "lora":  # made of a set
        assert sorted(config.pop("target_modules")) == sorted(other.pop("target_modules"))
    assert config == other


class Stopped(Exception):
    """What a kill is to the training."""


def test_a_training_goes_on_under_another_number_of_processes(pico: Path, rows: Path, tmp_path: Path) -> None:
    """Begun by one process, carried on by two, ended by one."""
    whole, out = tmp_path / "whole", tmp_path / "out"
    settings: dict[str, Any] = {"epochs": 4.0, "commit_seconds": -1}  # after every step
    finetune(request_on(ALONE, pico, rows, whole, **settings), whole, quiet)
    seen: list[int] = []

    def stop_at(last: int) -> Callable[[float, str], None]:
        def stop(_done: float, text: str) -> None:
            if text.startswith("step "):
                seen.append(int(text.split()[1]))
                if seen[-1] == last:
                    raise Stopped

        return stop

    for runtime, last in ((ALONE, 5), (SHARED, 7)):
        with pytest.raises(Stopped):
            finetune(request_on(runtime, pico, rows, out, **settings), out, stop_at(last))
    assert seen == [1, 2, 3, 4, 5, 6, 7], "what was committed is not repeated"
    finetune(request_on(ALONE, pico, rows, out, **settings), out, stop_at(0))
    assert seen == sorted(set(seen))
    check_equal_but_for_rounding(whole, out)


@pytest.mark.parametrize(
    ("settings", "kind", "text"),
    [
        ({"learning_rate": 1e30}, GateError, r"not finite at step \d+ with finetune\.learning_rate=1e\+30"),
        ({"checkpoint": "/nowhere"}, EngineError, r"status 1; end of its log:(.|\n)+rank [01]: (.|\n)*/nowhere"),
    ],
)
def test_the_error_of_a_rank_comes_through(
    pico: Path, rows: Path, tmp_path: Path, settings: dict[str, Any], kind: type[Exception], text: str
) -> None:
    request = {**request_on(SHARED, pico, rows, tmp_path), **settings}
    with pytest.raises(kind, match=text):
        run_child("finetune", request, tmp_path, SHARED, quiet)


def test_a_rank_that_dies_ends_all(pico: Path, rows: Path, tmp_path: Path) -> None:
    killed: list[int] = []

    def kill(_done: float, _text: str) -> None:
        if not killed:
            ranks = [
                pid for pid in descendants(os.getpid()) if "spawn_main" in Path(f"/proc/{pid}/cmdline").read_text()
            ]
            assert len(ranks) == 2
            killed.extend(ranks)
            os.kill(max(ranks), signal.SIGKILL)

    request = request_on(SHARED, pico, rows, tmp_path, epochs=1000.0)
    with pytest.raises(EngineError, match="finetune: the child process ended with status 1") as caught:
        run_child("finetune", request, tmp_path, SHARED, kill)
    assert caught.value.retryable and "signal SIGKILL" in str(caught.value)
    assert all(ends(pid) for pid in killed)


def attention_of_each_row(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, starts: torch.Tensor, *_: Any, scale: float,
    window_size: tuple[int, int],
) -> torch.Tensor:  # fmt: skip
    """Stands in for varlen_attn, which has no kernel for CPUs."""
    made = []
    for start, end in pairwise(starts.tolist()):
        back = torch.arange(end - start)[:, None] - torch.arange(end - start)
        seen = (back >= 0) & ((back <= window_size[0]) | (window_size[0] < 0))
        row = (states[start:end].transpose(0, 1) for states in (q, k, v))
        made.append(torch.nn.functional.scaled_dot_product_attention(*row, attn_mask=seen, scale=scale).transpose(0, 1))
    return torch.cat(made)


@pytest.mark.parametrize("window", [None, 4])
def test_packed_attention_is_that_of_the_model_itself(window: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loss and gradients, with fewer keys than queries; on a GPU with the kernel that trainings use."""
    torch.manual_seed(0)
    device, tolerance = ("cuda", 0.05) if torch.cuda.is_available() else ("cpu", 1e-4)
    if device == "cpu":
        monkeypatch.setattr(packing, "varlen_attn", attention_of_each_row)
    shape = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = MistralConfig(vocab_size=99, num_key_value_heads=2, sliding_window=window, **shape)
    model = AutoModelForCausalLM.from_config(config).to(device)
    rows = [{"input_ids": (ids := torch.randint(99, (size,)).tolist()), "labels": ids} for size in (9, 1, 17, 5)]
    for row in rows:
        row["labels"] = [IGNORED, *row["labels"][1:]]
    found = []
    for own in (True, False):
        if not own:
            packing.use_packed_attention(model)
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            loss = child.answer_loss(model, packed(rows, device))
        model.zero_grad()
        loss.backward()
        found.append((loss.item(), [weight.grad.clone() for weight in model.parameters()]))
    assert model.config._attn_implementation == packing.PACKED
    assert found[1][0] == pytest.approx(found[0][0], rel=tolerance)
    for gradient, expected in zip(found[1][1], found[0][1], strict=True):
        assert torch.allclose(gradient, expected, rtol=tolerance, atol=tolerance * float(expected.abs().max()))


def test_attention_with_a_cap_or_sinks_stays_as_it_is() -> None:
    for config in (Gemma2Config(**(few := {"num_hidden_layers": 1, "hidden_size": 64, "vocab_size": 99})),
                   GptOssConfig(num_local_experts=2, intermediate_size=64, **few)):  # fmt: skip
        model = AutoModelForCausalLM.from_config(config)
        before = model.config._attn_implementation
        packing.use_packed_attention(model)
        assert model.config._attn_implementation == before
