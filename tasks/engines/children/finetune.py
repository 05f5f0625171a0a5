"""Fine-tuning of the pruned model, loss on the answers alone (paper, section 2.3)."""

from __future__ import annotations

import json
import math
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import torch._inductor.config as inductor
from peft import LoraConfig, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import safe_open
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, AutoTokenizer, get_scheduler

from tasks.algorithms.prompts import training_ids
from tasks.domain.errors import DataError, GateError
from tasks.domain.stage import json_lines
from tasks.engines.children import ranks
from tasks.engines.children.blocks import decoder_blocks
from tasks.engines.children.border import Report, device_of, serve
from tasks.engines.children.packing import Batch, Example, packed, use_packed_attention

IGNORED = -100  # label that bears no loss
MAX_GRADIENT_NORM = 1.0
SEED_STRIDE = 1_000_003
COMPILED_FROM = 1000  # passes; compiling takes a GPU one to two minutes, and then a third off each pass

# On Hopper its backward pass gives NaN for masked sequences of 128 k + 64 tokens (pytorch/pytorch#196678).
torch.backends.cuda.enable_cudnn_sdp(False)
# Else Inductor builds and loads a trial for each vector extension of the CPU, half a minute, for code of the GPU.
inductor.cpp.vec_isa_ok = True


def finetune(request: dict[str, Any], out: Path, report: Report) -> None:
    """request: checkpoint, rows (file), answers ("answer" or "reference"), parts (folder of the states from which a
    training goes on), commit_seconds (from one writing of a state to the next), and the recipe's fields.

    Writes a peft adapter folder (method "full": a checkpoint), loss.jsonl (step, loss, learning rate; step and
    validation_loss once an epoch) and tokens.json (what was trained on). With runtime.finetune_processes above 1 as
    many ranks share each step's rows and come, but for rounding and the draw of dropout, to what one would; each can
    go on from a state that any number of them committed.
    """
    processes = request["runtime"]["finetune_processes"]
    if processes > 1:
        ranks.run_ranks(train, processes, request, out, report)
    else:
        train(request, out, report)


def train(request: dict[str, Any], out: Path, report: Report) -> None:
    """The whole of it, or one rank's share."""
    examples = read_examples(request, AutoTokenizer.from_pretrained(request["checkpoint"]))
    report(0.0, f"{examples.counts['rows']} rows read")
    rates = request["learning_rate"] if isinstance(request["learning_rate"], list) else [request["learning_rate"]]
    best: _Training | None = None
    for rate in rates:
        training = _Training(request, examples, rate, Path(request["parts"]) / f"{request['name']}-{rate}.safetensors")
        training.run(report)
        if best is None or training.best_loss < best.best_loss:
            best = training
    assert best is not None
    if not math.isfinite(best.entries[-1].get("loss", 0.0)):
        raise GateError(
            f"the loss or its gradient is not finite at step {best.step} with "
            f"finetune.learning_rate={best.rate}; lower it"
        )
    best.save(out)
    if ranks.rank() == 0:
        (out / "tokens.json").write_text(json.dumps(examples.counts | best.counts()))


@dataclass
class Examples:
    """Rows as token ids and labels, in the order of the dataset."""

    train: list[Example] = field(default_factory=list)
    validation: list[Example] = field(default_factory=list)
    epochs: float = 1.0
    counts: dict[str, int] = field(
        default_factory=lambda: {"rows": 0, "validation_rows": 0, "too_long": 0, "failed": 0}
    )


def read_examples(request: dict[str, Any], tokenizer: Any) -> Examples:
    """Rows longer than max_length are left out whole, in both arms or in none; nothing is cut off.

    With budget "answer_tokens" an arm's epochs are scaled so that it trains on as many as the SFT arm does.
    """
    found = Examples(epochs=request["epochs"])
    fields = ("answer", "reference")
    lines = [json.loads(line) for line in json_lines(Path(request["rows"]))]
    usable = [row for row in lines if row["outcome"] != "failed"]
    found.counts["failed"] = len(lines) - len(usable)
    prompts = [row["prompt"] for row in usable]
    by_field = [training_ids(tokenizer, prompts, [row[name] for row in usable]) for name in fields]
    rows: list[tuple[str, dict[str, tuple[list[int], int]]]] = []
    for row, *both in zip(usable, *by_field, strict=True):
        if max(len(ids) for ids, _ in both) > request["max_length"]:
            found.counts["too_long"] += 1
        else:
            rows.append((row["id"], dict(zip(fields, both, strict=True))))
    judging = _validation_ids([name for name, _ in rows], request["validation"], request["seed"])
    answer_tokens = dict.fromkeys(fields, 0)
    for name, arms in rows:
        ids, prompt_length = arms[request["answers"]]
        example = {"input_ids": ids, "labels": [IGNORED] * prompt_length + ids[prompt_length:]}
        (found.validation if name in judging else found.train).append(example)
        if name not in judging:
            for arm, (own, start) in arms.items():
                answer_tokens[arm] += len(own) - start
    found.counts["rows"], found.counts["validation_rows"] = len(found.train), len(found.validation)
    if not found.train:
        raise DataError(f"finetune.max_length={request['max_length']}: no row is short enough; raise it")
    if request["budget"] == "answer_tokens":
        found.epochs *= answer_tokens["reference"] / answer_tokens[request["answers"]]
    return found


def _validation_ids(ids: list[str], share: float, seed: int) -> set[str]:
    """A draw of ids that other rows hardly change: each has a place of its own in the order of the draw."""
    drawn = sorted(ids, key=lambda name: random.Random(f"{seed}/{name}").random())
    return set(drawn[: math.ceil(share * len(ids))])


def answer_loss(model: Any, batch: Batch) -> torch.Tensor:
    """Summed cross-entropy of the answer tokens of a packed batch.

    Logits are computed only where a label is: on a small model the vocabulary is most of the work.
    """
    inputs = dict(batch)
    labels = inputs.pop("labels")[0]
    answers = torch.nonzero(labels != IGNORED).squeeze(1)
    logits = model(**inputs, use_cache=False, logits_to_keep=answers - 1).logits[0]
    return torch.nn.functional.cross_entropy(logits.float(), labels[answers], reduction="sum")


def answer_tokens_of(batch: list[Example]) -> int:
    return sum(label != IGNORED for row in batch for label in row["labels"])


class _Training:
    """One run with one learning rate. It can be ended at any step and go on from its file to the same result."""

    def __init__(self, request: dict[str, Any], examples: Examples, rate: float, part: Path) -> None:
        self.request, self.examples, self.rate, self.part = request, examples, rate, part
        self.device = device_of(request["runtime"])
        torch.manual_seed(request["seed"])
        model = _model(request)
        self.model = ranks.sharded(model, self.device) if ranks.count() > 1 else model.to(self.device)
        self.trained = {name: weight for name, weight in self.model.named_parameters() if weight.requires_grad}
        self.optimizer = torch.optim.AdamW(
            self.trained.values(), lr=rate, weight_decay=request["weight_decay"], fused=self.device == "cuda"
        )
        self.per_epoch = math.ceil(len(examples.train) / request["batch"])
        self.steps = math.ceil(examples.epochs * self.per_epoch)
        self.scheduler = get_scheduler(
            request["schedule"], self.optimizer, math.ceil(request["warmup_ratio"] * self.steps), self.steps
        )
        self.step = 0
        self.entries: list[dict[str, float]] = []
        self.best_loss = math.inf
        self.best: dict[str, torch.Tensor] = {}
        if part.exists():
            self._load()
        passes = (self.steps - self.step) * math.ceil(request["batch"] / request["runtime"]["micro_batch"])
        if self.device == "cuda" and ranks.count() == 1 and passes > COMPILED_FROM:
            _, *alike = decoder_blocks(model, model.config.get_text_config().num_hidden_layers)
            for block in alike:  # the first, whose input bears no gradient, would take as long as all others together
                block.compile(dynamic=True)

    def run(self, report: Report) -> None:
        report(self.step / self.steps, f"the model is loaded, step {self.step} of {self.steps}")
        committed = time.monotonic()
        while self.step < self.steps:
            loss = self._optimize(self._batch(self.step))
            self.step += 1
            self.entries.append({"step": self.step, "loss": loss, "learning_rate": self.scheduler.get_last_lr()[0]})
            if not math.isfinite(loss):
                self.best_loss = math.inf
                return
            self.scheduler.step()
            if self.examples.validation and (self.step % self.per_epoch == 0 or self.step == self.steps):
                self._validate()
            due = time.monotonic() - committed > self.request["commit_seconds"] or self.step == self.steps
            if ranks.summed(due, self.device):  # the ranks' clocks differ
                self._commit()
                committed = time.monotonic()
            report(self.step / self.steps, f"step {self.step} of {self.steps}, loss {loss:.3f}")

    def save(self, out: Path) -> None:
        with torch.no_grad():
            for name, weight in self.best.items():
                self.trained[name].copy_(weight)
        state = ranks.whole(self._state()) if ranks.count() > 1 else None
        if ranks.rank() == 0:
            self.model.save_pretrained(out, state_dict=state)
            (out / "loss.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in self.entries))

    def _state(self) -> dict[str, torch.Tensor]:
        """All that a checkpoint may hold, tied weights once."""
        once = {name for name, _ in (*self.model.named_parameters(), *self.model.named_buffers())}
        return {name: tensor for name, tensor in self.model.state_dict().items() if name in once}

    def counts(self) -> dict[str, Any]:
        """Steps, and the tokens that went through the model in them; those of the answers bore the loss."""
        seen = [row for step in range(self.steps) for row in self._batch(step)]
        chosen = {"learning_rate": self.rate, "steps": self.steps}
        if self.best:
            chosen["validation_loss"] = self.best_loss
        return chosen | {
            "tokens": sum(len(row["input_ids"]) for row in seen), "trained_tokens": answer_tokens_of(seen),
        }  # fmt: skip

    def _batch(self, step: int) -> list[Example]:
        """The rows of a step: every epoch is a shuffle of its own, the same for both arms."""
        epoch, place = divmod(step, self.per_epoch)
        order = _shuffled(len(self.examples.train), f"{self.request['seed']}/{epoch}")
        size = self.request["batch"]
        return [self.examples.train[index] for index in order[place * size : (place + 1) * size]]

    def _optimize(self, rows: list[Example]) -> float:
        """One optimizer step; returns the mean cross-entropy over its answer tokens."""
        self.model.train()
        seed = self.request["seed"] * SEED_STRIDE + self.step  # dropout, wherever the run began
        torch.manual_seed(seed * ranks.count() + ranks.rank())
        count, total = answer_tokens_of(rows), torch.zeros((), device=self.device)
        for batch, weight in self._micro_batches(rows):
            with self._autocast():
                loss = answer_loss(self.model, batch) * weight / count
            loss.backward()
            total += loss.detach()
        norm = torch.nn.utils.clip_grad_norm_(self.trained.values(), MAX_GRADIENT_NORM)
        if not torch.isfinite(norm.full_tensor() if isinstance(norm, DTensor) else norm):
            return math.nan  # before it reaches weights, which the next commit would keep
        self.optimizer.step()
        self.optimizer.zero_grad()
        return ranks.summed(float(total), self.device)

    def _validate(self) -> None:
        self.model.eval()
        rows = self.examples.validation
        with torch.no_grad(), self._autocast():  # sharded weights do not bear inference mode
            total = sum(answer_loss(self.model, batch).item() * weight for batch, weight in self._micro_batches(rows))
        loss = ranks.summed(total, self.device) / answer_tokens_of(rows)
        self.entries.append({"step": self.step, "validation_loss": loss})
        if loss < self.best_loss:
            self.best_loss = loss
            self.best = {name: weight.detach().cpu().clone() for name, weight in self.trained.items()}

    def _micro_batches(self, rows: list[Example]) -> Iterator[tuple[Batch, float]]:
        """This rank's part of the rows, every batch with its share of the long ones, for the longest sets the memory.

        As many batches on every rank, those for company of weight 0, not 1.
        """
        least = math.ceil(len(rows) / self.request["runtime"]["micro_batch"])
        count = math.ceil(least / ranks.count()) * ranks.count()
        by_length = sorted(rows, key=lambda row: len(row["input_ids"]))
        for first in range(ranks.rank(), count, ranks.count()):
            batch = by_length[first::count]
            yield packed(batch or rows[:1], self.device), float(bool(batch))

    def _autocast(self) -> Any:
        return torch.autocast(self.device, torch.bfloat16, enabled=self.request["dtype"] == "bfloat16")

    def _commit(self) -> None:
        """All that the next step depends on, in one safetensors file that appears whole."""
        tensors = {f"weight {name}": weight for name, weight in self.trained.items()}
        tensors |= {f"best {name}": weight for name, weight in self.best.items()}
        for name, weight in self.trained.items():
            tensors |= {f"{key} {name}": value for key, value in self.optimizer.state[weight].items()}
        state = {"step": self.step, "entries": self.entries, "best_loss": self.best_loss}
        unfinished = self.part.with_name(f".{self.part.name}")
        tensors = ranks.whole(tensors)
        if ranks.rank() == 0:
            save_file(tensors, unfinished, {"state": json.dumps(state)})
            unfinished.rename(self.part)

    def _load(self) -> None:
        with safe_open(self.part, "pt") as file, torch.no_grad():
            state = json.loads(file.metadata()["state"])
            names = set(file.keys())
            for name, weight in self.trained.items():
                weight.copy_(ranks.part_of(file.get_tensor(f"weight {name}"), weight))
                self.optimizer.state[weight] = {
                    key: ranks.part_of(file.get_tensor(f"{key} {name}"), weight)
                    for key in ("step", "exp_avg", "exp_avg_sq")
                }
                if f"best {name}" in names:
                    self.best[name] = ranks.part_of(file.get_tensor(f"best {name}"), weight).cpu()
        self.step, self.entries, self.best_loss = state["step"], state["entries"], state["best_loss"]
        self.scheduler.last_epoch = self.step - 1
        self.scheduler.step()


@lru_cache(maxsize=1)  # one epoch's: every step of it asks
def _shuffled(count: int, seed: str) -> list[int]:
    order = list(range(count))
    random.Random(seed).shuffle(order)
    return order


def _model(request: dict[str, Any]) -> Any:
    """The pruned model, with an adapter on its frozen weights, or with every weight trained in float32."""
    full = request["method"] == "full"
    dtype = torch.float32 if full else getattr(torch, request["dtype"])
    model = AutoModelForCausalLM.from_pretrained(request["checkpoint"], dtype=dtype)
    if device_of(request["runtime"]) == "cuda" and request["dtype"] == "bfloat16":
        use_packed_attention(model)
    if full:
        return model
    targets = request["targets"]
    lora = LoraConfig(
        r=request["rank"], lora_alpha=request["alpha"], lora_dropout=request["dropout"], task_type="CAUSAL_LM",
        target_modules=targets if isinstance(targets, str) else list(targets),
    )  # fmt: skip
    adapted = get_peft_model(model, lora)
    for layer in adapted.modules():
        if isinstance(layer, BaseTunerLayer):
            layer.cast_input_dtype_enabled = False  # autocast does it, without a float32 copy through the dropout
    return adapted


if __name__ == "__main__":
    serve(finetune)
