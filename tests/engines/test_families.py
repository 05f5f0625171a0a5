"""Families of models, each as a pico checkpoint through score, cut, gate, reload and generation; and the gate."""

from __future__ import annotations

import json
import re
import shutil
import sys
import weakref
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from tasks.algorithms.prune_plan import NUMBERED, PER_LAYER, layers_of, pruned_config
from tasks.domain.errors import GateError, ModelUnsupported
from tasks.domain.recipe import Runtime
from tasks.domain.span import Span
from tasks.engines.child import run_child
from tasks.engines.children.score import score
from tasks.engines.children.verify import check_served, verify
from tasks.prune import cut, ranked_spans, refuse_what_cannot_be_cut
from tests.conftest import build_tokenizer, pocket_pairs

LAYERS = 7
REMOVED = 2  # an even number: vLLM gives every second block of GPT-OSS a window
RUNTIME = Runtime(device="cpu", batch=3, kv_cache_gb=1, timeout_minutes=5)
WINDOW = {"sliding_window": 16}  # shorter than the gate's probe and the samples
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
# The settings that make a family what it is; widths and tokens are the same for all.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": WINDOW,
    "qwen2": {},
    "qwen3": {"use_sliding_window": True, "max_window_layers": 3, **WINDOW},
    "gemma2": {"query_pre_attn_scalar": 8, **WINDOW},
    "gemma3_text": {"query_pre_attn_scalar": 8, **WINDOW},
    "phi3": WINDOW,
    "olmo2": {},
    "mixtral": EXPERTS,
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "mlp_only_layers": [1, 5]},
    "gpt_oss": EXPERTS | WINDOW,
    "glm4_moe": {
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "first_k_dense_replace": 3,
    },
    "ernie4_5_moe": {
        "moe_num_experts": 4,
        "moe_k": 2,
        "moe_intermediate_size": 24,
        "moe_layer_start_index": 2,
        "moe_layer_end_index": 5,
    },
    "minicpm3": {
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 8,
        "v_head_dim": 8,
        "num_key_value_heads": 4,
    },
}
LISTS = ("layer_types", "mlp_layer_types", "no_rope_layers", "num_attention_heads_per_layer", "mlp_only_layers")


def quiet(_done: float, _text: str) -> None:
    """Progress that nobody looks at."""


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return build_tokenizer()


@pytest.fixture(scope="module")
def documents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("documents") / "documents.json"
    path.write_text(json.dumps([pair["answer"] for pair in pocket_pairs()[:12]]))
    return path


def config_of(family: str, tokenizer: Any, **changes: Any) -> Any:
    settings = {
        "vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": LAYERS,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
        "bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }  # fmt: skip
    if family != "phi3":  # which derives it
        settings["head_dim"] = 8
    return AutoConfig.for_model(family, **(settings | FAMILIES[family] | changes))


def build(folder: Path, family: str, tokenizer: Any, **changes: Any) -> Path:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config_of(family, tokenizer, **changes))
    for parameter in model.parameters():  # wide enough that every block changes the state visibly
        nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_goes_through_the_whole_method(
    family: str, tied: bool, tokenizer: Any, documents: Path, tmp_path: Path
) -> None:
    original, scores, out = (
        build(tmp_path / "original", family, tokenizer, tie_word_embeddings=tied),
        *folders(tmp_path),
    )
    score({
        "checkpoint": str(original), "documents": str(documents), "samples": 4, "length": 32, "seed": 0,
        "metric": "angular", "token": "last", "dtype": "float32", "runtime": RUNTIME.model_dump(),
        "part": str(tmp_path / "sums"), "commit_seconds": 3600,
    }, scores, quiet)  # fmt: skip
    samples = [json.loads(line) for line in (scores / "tokens.jsonl").read_text().splitlines()]
    assert len(samples) == 4
    means = json.loads((scores / "distances.json").read_text())["mean"]
    expected = naive_distances(original, samples)
    for count in range(1, LAYERS + 1):
        for start in range(LAYERS - count + 1):
            assert means[count - 1][start] == pytest.approx(expected[start][start + count], abs=1e-5)

    raw = json.loads((original / "config.json").read_text())
    span = ranked_spans(scores, REMOVED, layers_of(raw))[0]
    facts = cut(original, out, span)
    verify(gate_request(original, out, span, facts), tmp_path, quiet)

    model, loading = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(loading[fault] for fault in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert sum(tensor.numel() for tensor in load_file(out / "model.safetensors").values()) == facts["parameters"]
    assert len(model.model.layers) == LAYERS - REMOVED
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == tied
    whole = AutoConfig.from_pretrained(original)
    for name in LISTS:
        assert getattr(model.config, name, None) == kept_entries(whole, name, span), name
    prompt = torch.tensor([AutoTokenizer.from_pretrained(out).encode(pocket_pairs()[0]["answer"])[:24]])
    cached, uncached = (
        model.generate(prompt, do_sample=False, max_new_tokens=12, min_new_tokens=12, use_cache=use_cache)
        for use_cache in (True, False)
    )
    assert cached.shape[1] == prompt.shape[1] + 12
    assert cached.tolist() == uncached.tolist()


def folders(parent: Path) -> tuple[Path, Path]:
    scores, out = parent / "scores", parent / "out"
    scores.mkdir()
    out.mkdir()
    return scores, out


def gate_request(original: Path, out: Path, span: Span, facts: dict[str, Any]) -> dict[str, Any]:
    return {"original": str(original), "pruned": str(out), "removed": span.removed, "parameters": facts["parameters"],
            "runtime": RUNTIME.model_dump()}  # fmt: skip


def naive_distances(folder: Path, samples: list[list[int]]) -> list[list[float]]:
    """Mean angular distance of the states that enter blocks l and m, one sample and one pair at a time."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    model.model.norm = nn.Identity()  # or the last of hidden_states would be the normed one
    sums = [[0.0] * (LAYERS + 1) for _ in range(LAYERS + 1)]
    for sample in samples:
        with torch.no_grad():
            states = model(torch.tensor([sample]), output_hidden_states=True).hidden_states
        last = [state[0, -1].double() for state in states]
        assert len(last) == LAYERS + 1
        for first in range(LAYERS + 1):
            for second in range(LAYERS + 1):
                cosine = torch.nn.functional.cosine_similarity(last[first], last[second], dim=0).clamp(-1, 1)
                sums[first][second] += float(torch.arccos(cosine)) / torch.pi / len(samples)
    return sums


# --- configs as they are written --------------------------------------------------------------------------

MORE = (
    "cohere2",
    "dots1",
    "exaone4",
    "laguna",
    "llama4_text",
    "ministral",
    "olmo3",
    "qwen2_moe",
    "smollm3",
    "vaultgemma",
)
# Families whose configs on the hub leave the lists out, which transformers then makes by block number.
BY_NUMBER = ("cohere2", "dots1", "gemma2", "gemma3_text", "gpt_oss", "llama4_text", "olmo3", "qwen3", "smollm3",
             "vaultgemma")  # fmt: skip


@pytest.mark.parametrize(
    ("family", "left_out"), [*((family, ()) for family in (*FAMILIES, *MORE)), *((name, LISTS) for name in BY_NUMBER)]
)
def test_a_config_is_read_back_with_the_kept_entries(family: str, left_out: tuple[str, ...], tmp_path: Path) -> None:
    whole = AutoConfig.for_model(family, num_hidden_layers=8, **FAMILIES.get(family, {}))
    written = {name: value for name, value in json.loads(whole.to_json_string()).items() if name not in left_out}
    span = Span(1, 2, 8)
    (tmp_path / "config.json").write_text(json.dumps(pruned_config(written, span)))
    read = AutoConfig.from_pretrained(tmp_path)
    assert read.num_hidden_layers == 6
    for name in LISTS:
        assert getattr(read, name, None) == kept_entries(whole, name, span), name


@pytest.mark.parametrize("family", MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
def test_every_family_of_transformers_is_cut_by_known_rules_or_refused_by_name(family: str, tmp_path: Path) -> None:
    """As transformers writes its config, and without any one list or all of them, as on the hub."""
    if family in ("musicgen", "musicgen_melody"):  # have no default config
        return
    whole = AutoConfig.for_model(family)
    written = json.loads(whole.to_json_string(use_diff=False)) | {"architectures": ["XForCausalLM"]}
    if message := refusal_to_plan(written):
        assert re.search(r"the model \([\w-]+\) |the model's config has (no )?\w+", message)
        return
    text, body = whole.get_text_config(), written.get("text_config") or written
    lists = [name for name in (*PER_LAYER, *NUMBERED) if isinstance(getattr(text, name, None), list | tuple)]
    cuts = set()
    for left_out in {(), *((name,) for name in lists), tuple(lists)}:
        part = {name: value for name, value in body.items() if name not in left_out}
        for span in (Span(0, 1, text.num_hidden_layers), Span(1, 2, text.num_hidden_layers)):
            try:
                cut_config = pruned_config(part if body is written else {**written, "text_config": part}, span)
            except ModelUnsupported:
                continue
            cuts.add(left_out)
            (tmp_path / "config.json").write_text(json.dumps(cut_config))
            read = AutoConfig.from_pretrained(tmp_path).get_text_config()
            assert read.num_hidden_layers == len(span.kept)
            for name in lists:
                assert _listed(getattr(read, name)) == _listed(kept_entries(text, name, span)), (name, left_out, span)
    assert () in cuts


def refusal_to_plan(config: dict[str, Any]) -> str:
    try:
        layers_of(config)
    except ModelUnsupported as error:
        return str(error)
    return ""


def _listed(entries: Any) -> list[Any]:
    return [*(entries or ())]


def kept_entries(whole: Any, name: str, span: Span) -> list[Any] | None:
    entries = getattr(whole, name, None)
    if entries and name in NUMBERED:
        return [span.kept.index(block) for block in entries if block in span.kept]
    return entries and [entries[block] for block in span.kept]


@pytest.mark.parametrize(
    ("family", "settings", "said"),
    [
        ("gemma3n_text", {}, "num_kv_shared_layers"),
        ("gemma3n_text", {"num_kv_shared_layers": 0}, "hidden_size_per_layer_input"),
        ("qwen3_moe", {"decoder_sparse_step": 2}, "decoder_sparse_step"),
        ("llama4_text", {"interleave_moe_layer_step": 2}, "interleave_moe_layer_step"),
        ("jamba", {}, "state-space"),
        ("bamba", {}, "state-space"),
        ("zamba2", {}, "state-space"),
        ("falcon_h1", {}, "state-space"),
        ("nemotron_h", {}, "state-space"),
        ("granitemoehybrid", {}, "state-space"),
        ("lfm2", {}, "state-space"),
        ("qwen3_next", {}, "state-space"),
        ("qwen3_5_text", {}, "state-space"),
        ("recurrent_gemma", {}, "state-space"),
        ("minimax", {}, "state-space"),
        ("kimi_linear", {}, "state-space"),
        ("t5", {}, "encoder-decoder"),
        ("bart", {}, "encoder-decoder"),
    ],
)
def test_a_family_that_no_cut_can_follow_is_refused(family: str, settings: dict[str, Any], said: str) -> None:
    config = json.loads(AutoConfig.for_model(family, **settings).to_json_string())
    with pytest.raises(ModelUnsupported, match=said):
        layers_of({**config, "architectures": ["XForCausalLM"]})


def test_tensors_that_no_cut_could_number_are_refused_before_the_scoring(untied: Path, tmp_path: Path) -> None:
    """A block behind the last one, as checkpoints with a head for the tokens after the next have."""
    refuse_what_cannot_be_cut(untied)
    shutil.copytree(untied, tmp_path, dirs_exist_ok=True)
    further = {f"model.layers.{LAYERS}.norm.weight": torch.zeros(3)}
    save_file(load_file(untied / "model.safetensors") | further, tmp_path / "model.safetensors")
    with pytest.raises(ModelUnsupported, match=f"model.layers with {LAYERS + 1}"):
        refuse_what_cannot_be_cut(tmp_path)


def test_code_that_comes_with_a_model_is_refused_by_name_and_never_run(untied: Path, tmp_path: Path) -> None:
    """Neither by the plan nor by a child that is given such a folder all the same."""
    shutil.copytree(untied, tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text())
    code = {"AutoConfig": "custom.Config", "AutoModelForCausalLM": "custom.Model"}
    (tmp_path / "config.json").write_text(json.dumps({**config, "model_type": "custom", "auto_map": code}))
    (tmp_path / "custom.py").write_text(f"import pathlib\npathlib.Path({str(tmp_path / 'ran')!r}).touch()\n")
    with pytest.raises(ModelUnsupported, match="auto_map: remote code"):
        refuse_what_cannot_be_cut(tmp_path)
    (tmp_path / "documents.json").write_text(json.dumps(["A calibration text, long enough. " * 8]))
    request = {"checkpoint": str(tmp_path), "documents": str(tmp_path / "documents.json"), "samples": 1, "length": 32,
               "part": str(tmp_path / "sums"), "runtime": RUNTIME.model_dump(), "dtype": "float32"}  # fmt: skip
    with pytest.raises(ValueError, match="custom code"):
        score(request, tmp_path, quiet)
    assert not (tmp_path / "ran").exists()


# --- what the gate finds ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def windowed(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Gemma 2 whose window is longer than the gate's probe: its logits do not tell the kinds of blocks apart."""
    return build(tmp_path_factory.mktemp("windowed"), "gemma2", tokenizer, sliding_window=200)


@pytest.fixture(scope="module")
def untied(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("untied"), "llama", tokenizer, tie_word_embeddings=False)


def pruned(original: Path, out: Path, span: Span) -> dict[str, Any]:
    out.mkdir()
    return gate_request(original, out, span, cut(original, out, span))


def reconfigured(request: dict[str, Any], change: Callable[[dict[str, Any]], None]) -> None:
    path = Path(request["pruned"]) / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


def refusal(request: dict[str, Any]) -> str:
    with pytest.raises(GateError) as caught:
        verify(request, Path(), quiet)
    return str(caught.value)


def test_layer_types_of_the_wrong_blocks_are_refused_though_no_logit_shows_it(windowed: Path, tmp_path: Path) -> None:
    request = pruned(windowed, tmp_path / "out", Span(2, 3, LAYERS))
    verify(request, tmp_path, quiet)
    kept = json.loads((tmp_path / "out" / "config.json").read_text())["layer_types"]
    reconfigured(request, lambda config: config.update(layer_types=["sliding_attention", "full_attention"] * 2))
    message = refusal(request)
    assert "layer_types" in message and str(kept) in message
    reconfigured(request, lambda config: config.pop("layer_types"))
    assert "layer_types" in refusal(request)


def test_a_tie_that_is_lost_is_refused(windowed: Path, tmp_path: Path) -> None:
    request = pruned(windowed, tmp_path / "out", Span(2, 3, LAYERS))
    reconfigured(request, lambda config: config.update(tie_word_embeddings=False))
    assert "1 missing keys: ['lm_head.weight']" in refusal(request)


def test_a_tie_that_is_made_up_is_refused(untied: Path, tmp_path: Path) -> None:
    request = pruned(untied, tmp_path / "out", Span(2, 3, LAYERS))
    verify(request, tmp_path, quiet)
    weights = load_file(tmp_path / "out" / "model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, tmp_path / "out" / "model.safetensors", metadata={"format": "pt"})
    reconfigured(request, lambda config: config.update(tie_word_embeddings=True))
    assert f"parameters, the plan says {request['parameters']}" in refusal(request)


def test_blocks_shifted_by_one_are_refused(untied: Path, tmp_path: Path) -> None:
    request = pruned(untied, tmp_path / "out", Span(2, 3, LAYERS))
    shutil.rmtree(tmp_path / "out")
    pruned(untied, tmp_path / "out", Span(1, 3, LAYERS))
    assert "from the original's with blocks [2, 3, 4] bypassed" in refusal(request)


def test_generation_that_changes_with_the_cache_is_refused(
    untied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Places counted wrongly by generate alone: the logits of a plain call stay right."""
    prepare = transformers.LlamaForCausalLM.prepare_inputs_for_generation

    @wraps(prepare)
    def misplaced(self: Any, *args: Any, **options: Any) -> dict[str, Any]:
        inputs: dict[str, Any] = prepare(self, *args, **options)
        if inputs.get("use_cache") and inputs["input_ids"].shape[1] == 1:
            inputs["position_ids"] = torch.zeros_like(inputs["input_ids"])
        return inputs

    monkeypatch.setattr(transformers.LlamaForCausalLM, "prepare_inputs_for_generation", misplaced)
    message = refusal(pruned(untied, tmp_path / "out", Span(2, 3, LAYERS)))
    assert "greedy generation with the key-value cache gives token" in message and "larger by" in message


def test_the_gate_holds_one_model_at_a_time(untied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    request = pruned(untied, tmp_path / "out", Span(2, 3, LAYERS))
    load = AutoModelForCausalLM.from_pretrained
    loaded: list[Callable[[], Any]] = []
    alive: list[int] = []

    def watched(*args: Any, **options: Any) -> Any:
        alive.append(sum(model() is not None for model in loaded))
        result = load(*args, **options)
        loaded.append(weakref.ref(result[0] if isinstance(result, tuple) else result))
        return result

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", watched)
    verify(request, tmp_path, quiet)
    assert alive == [0, 0]


# --- vLLM -------------------------------------------------------------------------------------------------


def test_the_child_also_loads_the_checkpoint_in_vllm(pico: Path, tmp_path: Path) -> None:
    request = pruned(pico, tmp_path / "out", Span(2, 2, 6))
    seen: list[str] = []
    run_child("verify", request, tmp_path / "none", RUNTIME, lambda _done, text: seen.append(text))
    assert seen[-1] == "served by vLLM"


@pytest.mark.parametrize(
    ("served", "tokens", "error", "said"),
    [
        (["original"], 16, GateError, "serves the unpruned model, but not the pruned .*: ValueError: no such model"),
        ([], 16, ModelUnsupported, "does not serve the unpruned model: ValueError: no such model"),
        (["original", "pruned"], 15, ModelUnsupported, "generates 15 tokens instead of 16"),
    ],
)
def test_a_checkpoint_that_vllm_does_not_serve_is_refused(
    served: list[str], tokens: int, error: type[Exception], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Engine:
        def __init__(self, model: str, **_options: Any) -> None:
            if model not in served:
                raise ValueError("no such model")

        def generate(self, *_args: Any, **_options: Any) -> list[Any]:
            return [SimpleNamespace(outputs=[SimpleNamespace(token_ids=[0] * tokens)])]

    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(LLM=Engine, SamplingParams=SimpleNamespace))
    with pytest.raises(error, match=said):
        check_served({"original": "original", "pruned": "pruned", "runtime": RUNTIME.model_dump()})


# --- what comes along -------------------------------------------------------------------------------------


def test_everything_that_is_no_weight_comes_along_and_the_card_says_what_is_gone(untied: Path, tmp_path: Path) -> None:
    original, out = tmp_path / "original", tmp_path / "out"
    shutil.copytree(untied, original)
    out.mkdir()
    (original / "LICENSE").write_text("Do what you like.\n")
    (original / "NOTICE").write_bytes(b"\xff not text")
    (original / "README.md").write_text("---\nlicense: mit\n---\n\n# A model\n")
    (original / "generation_config.json").write_text('{"temperature": 0.6, "do_sample": true, "eos_token_id": [1, 2]}')
    names = {path.name for path in original.iterdir()}
    assert {"generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"} <= names
    facts = cut(original, out, Span(2, 3, LAYERS))
    assert {path.name for path in out.iterdir()} == names
    for name in names - {"README.md", "config.json", "model.safetensors"}:
        assert (out / name).read_bytes() == (original / name).read_bytes(), name
    card = (out / "README.md").read_text()
    assert card.startswith("---\nlicense: mit\n---\n\n# A model\n")
    assert "removes blocks 2-4 of 0-6" in card and f"4 of 7 blocks and {facts['parameters']:,} parameters" in card
    message = [{"role": "user", "content": "Hello?"}]
    before, after = (AutoTokenizer.from_pretrained(folder) for folder in (original, out))
    assert after.apply_chat_template(message) == before.apply_chat_template(message)


def test_a_model_without_a_card_gets_one(untied: Path, tmp_path: Path) -> None:
    (untied / "README.md").unlink(missing_ok=True)
    pruned(untied, tmp_path / "out", Span(0, 1, LAYERS))
    assert "removes block 0 of 0-6" in (tmp_path / "out" / "README.md").read_text()
