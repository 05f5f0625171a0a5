"""LoRA fine-tuning of the pruned model, loss on the answers alone (paper, section 2.3)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch.utils.data import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainerCallback, TrainingArguments, set_seed

from tasks.algorithms.prompts import training_ids
from tasks.domain.errors import DataError
from tasks.engines.children.border import Report, device_of, serve

IGNORED = -100  # label that bears no loss


def finetune(request: dict[str, Any], out: Path, report: Report) -> None:
    """request: checkpoint, rows (file), answers ("answer" or "reference"), and the recipe's fields.

    Writes a peft adapter folder, loss.jsonl (step, loss, learning rate) and tokens.json (what was trained on).
    """
    set_seed(request["seed"])
    tokenizer = AutoTokenizer.from_pretrained(request["checkpoint"])
    examples, counts = _examples(request, tokenizer)
    model = AutoModelForCausalLM.from_pretrained(request["checkpoint"], dtype=getattr(torch, request["dtype"]))
    targets = request["targets"]
    lora = LoraConfig(
        r=request["rank"], lora_alpha=request["alpha"], lora_dropout=request["dropout"], task_type="CAUSAL_LM",
        target_modules=targets if isinstance(targets, str) else list(targets),
    )  # fmt: skip
    model = get_peft_model(model, lora)
    losses = _Losses(report)
    trainer = AnswerTrainer(
        model=model, args=_arguments(request, out), train_dataset=examples, data_collator=packed, callbacks=[losses]
    )
    trainer.train()
    model.save_pretrained(out)
    with (out / "loss.jsonl").open("w") as file:
        file.writelines(json.dumps(entry) + "\n" for entry in losses.entries)
    (out / "tokens.json").write_text(json.dumps(counts | {"steps": trainer.state.global_step}))


class _Examples(Dataset[dict[str, list[int]]]):
    def __init__(self, examples: list[dict[str, list[int]]]) -> None:
        self.examples = examples

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        return self.examples[index]


def _examples(request: dict[str, Any], tokenizer: Any) -> tuple[_Examples, dict[str, int]]:
    """Rows as token ids and labels. Rows longer than max_length are left out whole, in both arms or in none."""
    examples: list[dict[str, list[int]]] = []
    counts = {"rows": 0, "too_long": 0, "failed": 0, "tokens": 0, "trained_tokens": 0}
    for line in Path(request["rows"]).read_text().splitlines():
        row = json.loads(line)
        if row["outcome"] == "failed":
            counts["failed"] += 1
            continue
        arms = {field: training_ids(tokenizer, row["prompt"], row[field]) for field in ("answer", "reference")}
        if max(len(ids) for ids, _ in arms.values()) > request["max_length"]:
            counts["too_long"] += 1
            continue
        ids, prompt_length = arms[request["answers"]]
        examples.append({"input_ids": ids, "labels": [IGNORED] * prompt_length + ids[prompt_length:]})
        counts["rows"] += 1
        counts["tokens"] += len(ids)
        counts["trained_tokens"] += len(ids) - prompt_length
    if not examples:
        raise DataError(f"finetune.max_length={request['max_length']}: no row is short enough; raise it")
    return _Examples(examples), counts


def packed(batch: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    """One sequence of all rows without padding, (1, tokens) each; positions start again with every row.

    Attention stays within a row: without a mask, the model derives the borders from the positions.
    """
    return {
        "input_ids": torch.tensor([[token for row in batch for token in row["input_ids"]]]),
        "position_ids": torch.tensor([[place for row in batch for place in range(len(row["input_ids"]))]]),
        "labels": torch.tensor([[label for row in batch for label in row["labels"]]]),
    }


class AnswerTrainer(Trainer):
    """Computes logits only where a label is: on a small model the vocabulary is most of the work."""

    def compute_loss(
        self, model: Any, inputs: dict[str, torch.Tensor], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Mean cross-entropy over the answer tokens of the whole optimizer step."""
        loss = answer_loss(model, inputs) / (num_items_in_batch or (inputs["labels"] != IGNORED).sum())
        return (loss, None) if return_outputs else loss


def answer_loss(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Summed cross-entropy of the answer tokens of a packed batch."""
    labels = inputs["labels"][0]
    answers = torch.nonzero(labels != IGNORED).squeeze(1)
    logits = model(
        input_ids=inputs["input_ids"], position_ids=inputs["position_ids"], use_cache=False, logits_to_keep=answers - 1
    ).logits[0]
    return torch.nn.functional.cross_entropy(logits.float(), labels[answers], reduction="sum")


def _arguments(request: dict[str, Any], out: Path) -> TrainingArguments:
    micro = min(request["runtime"]["micro_batch"], request["batch"])
    if request["batch"] % micro:
        micro = next(size for size in range(micro, 0, -1) if request["batch"] % size == 0)
    return TrainingArguments(
        output_dir=str(out / ".trainer"), save_strategy="no", report_to=[], disable_tqdm=True, logging_steps=1,
        num_train_epochs=request["epochs"], per_device_train_batch_size=micro,
        gradient_accumulation_steps=request["batch"] // micro, learning_rate=request["learning_rate"],
        lr_scheduler_type=request["schedule"], warmup_steps=request["warmup_ratio"],
        weight_decay=request["weight_decay"], seed=request["seed"], data_seed=request["seed"],
        use_cpu=device_of(request["runtime"]) == "cpu", bf16=False, remove_unused_columns=False,
        dataloader_pin_memory=False,
    )  # fmt: skip


class _Losses(TrainerCallback):
    """Keeps the loss of every step and tells the parent."""

    def __init__(self, report: Report) -> None:
        self.report = report
        self.entries: list[dict[str, float]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        if logs and "loss" in logs:
            loss = float(logs["loss"])
            self.entries.append(
                {"step": state.global_step, "loss": loss, "learning_rate": float(logs["learning_rate"])}
            )
            self.report(
                state.global_step / state.max_steps, f"step {state.global_step} of {state.max_steps}, loss {loss:.3f}"
            )


if __name__ == "__main__":
    serve(finetune)
