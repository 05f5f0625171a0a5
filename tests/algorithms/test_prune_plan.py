"""The plan of a cut, on tensor names and configs written by hand."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.algorithms.prune_plan import layers_of, pruned_config, renamed
from tasks.domain.errors import ModelUnsupported
from tasks.domain.span import Span

MIDDLE = Span(1, 2, 4)

LLAMA = {
    "model.embed_tokens.weight": "model.embed_tokens.weight",
    "model.layers.0.self_attn.q_proj.weight": "model.layers.0.self_attn.q_proj.weight",
    "model.layers.0.mlp.up_proj.weight": "model.layers.0.mlp.up_proj.weight",
    "model.layers.1.self_attn.q_proj.weight": None,
    "model.layers.1.mlp.up_proj.weight": None,
    "model.layers.2.self_attn.q_proj.weight": None,
    "model.layers.2.mlp.up_proj.weight": None,
    "model.layers.3.self_attn.q_proj.weight": "model.layers.1.self_attn.q_proj.weight",
    "model.layers.3.mlp.up_proj.weight": "model.layers.1.mlp.up_proj.weight",
    "model.norm.weight": "model.norm.weight",
    "lm_head.weight": "lm_head.weight",
}
GPT2 = {
    "transformer.wte.weight": "transformer.wte.weight",
    "transformer.h.0.attn.c_attn.weight": "transformer.h.0.attn.c_attn.weight",
    "transformer.h.1.attn.c_attn.weight": None,
    "transformer.h.2.attn.c_attn.weight": None,
    "transformer.h.3.attn.c_attn.weight": "transformer.h.1.attn.c_attn.weight",
    "transformer.ln_f.weight": "transformer.ln_f.weight",
}
BARE = {
    "h.0.ln_1.bias": "h.0.ln_1.bias",
    "h.1.ln_1.bias": None,
    "h.2.ln_1.bias": None,
    "h.3.ln_1.bias": "h.1.ln_1.bias",
}
NESTED = {
    "model.vision_tower.layers.0.weight": "model.vision_tower.layers.0.weight",
    "model.vision_tower.layers.1.weight": "model.vision_tower.layers.1.weight",
    "model.language_model.layers.0.mlp.weight": "model.language_model.layers.0.mlp.weight",
    "model.language_model.layers.1.mlp.weight": None,
    "model.language_model.layers.2.mlp.weight": None,
    "model.language_model.layers.3.mlp.weight": "model.language_model.layers.1.mlp.weight",
}
EXPERTS = {
    "model.layers.0.mlp.experts.3.up.weight": "model.layers.0.mlp.experts.3.up.weight",
    "model.layers.1.mlp.experts.3.up.weight": None,
    "model.layers.2.mlp.experts.0.up.weight": None,
    "model.layers.3.mlp.experts.2.up.weight": "model.layers.1.mlp.experts.2.up.weight",
    "model.layers.3.mlp.experts.11.up.weight": "model.layers.1.mlp.experts.11.up.weight",
}


@pytest.mark.parametrize(
    "expected", [LLAMA, GPT2, BARE, NESTED, EXPERTS], ids=["llama", "gpt2", "bare", "nested", "moe"]
)
def test_names_of_a_middle_cut(expected: dict[str, str | None]) -> None:
    assert renamed(expected, MIDDLE) == {old: new for old, new in expected.items() if new is not None}


@pytest.mark.parametrize(
    ("start", "kept"), [(0, {2: 0, 3: 1}), (2, {0: 0, 1: 1})], ids=["the first blocks", "the last blocks"]
)
def test_names_of_a_cut_at_either_end(start: int, kept: dict[int, int]) -> None:
    names = [f"model.layers.{block}.w" for block in range(4)]
    expected = {f"model.layers.{old}.w": f"model.layers.{new}.w" for old, new in kept.items()}
    assert renamed(names, Span(start, 2, 4)) == expected


@given(st.data())
def test_every_kept_block_moves_up_by_the_blocks_removed_before_it(data: st.DataObject) -> None:
    layers = data.draw(st.integers(2, 30))
    count = data.draw(st.integers(1, layers - 1))
    start = data.draw(st.integers(0, layers - count))
    names = [f"model.layers.{block}.{part}" for block in data.draw(st.permutations(range(layers))) for part in "ab"]
    found = renamed(names, Span(start, count, layers))
    assert sorted(found.values()) == sorted(
        f"model.layers.{block}.{p}" for block in range(layers - count) for p in "ab"
    )
    for old, new in found.items():
        before, after = int(old.split(".")[2]), int(new.split(".")[2])
        assert before - after == (count if before >= start + count else 0)
        assert old[-1] == new[-1]
    assert not {int(old.split(".")[2]) for old in found} & set(range(start, start + count))


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (
            [f"model.{side}.layers.{i}.w" for side in ("encoder", "decoder") for i in range(4)],
            "model.decoder.layers with 4",
        ),
        ([f"model.layers.{i}.w" for i in (0, 1, 3)], "model.layers with 3"),
        ([f"model.layers.{i}.w" for i in (0, 1, 3, 4)], "model.layers with 4"),
        ([f"model.layers.{i}.w" for i in range(1, 5)], "model.layers with 4"),
        ([f"model.layers.{i}.w" for i in range(5)], "model.layers with 5"),
        (["model.embed_tokens.weight"], "none"),
        ([], "none"),
    ],
    ids=["two stacks", "one missing", "a hole", "from one", "one too many", "no blocks", "nothing"],
)
def test_anything_but_one_whole_stack_is_refused(names: list[str], said: str) -> None:
    with pytest.raises(ModelUnsupported, match="no single stack of 4 numbered blocks") as caught:
        renamed(names, MIDDLE)
    assert said in str(caught.value)


def test_only_the_number_of_blocks_changes_in_a_plain_config() -> None:
    config = {"model_type": "llama", "hidden_size": 64, "num_hidden_layers": 4, "rope_theta": 1e4, "head_dim": None}
    before = copy.deepcopy(config)
    assert pruned_config(config, MIDDLE) == {**before, "num_hidden_layers": 2}
    assert config == before, "the original config must stay as it is"


@pytest.mark.parametrize(
    ("name", "value", "cut"),
    [
        ("layer_types", ["full", "sliding", "sliding", "chunked"], ["full", "chunked"]),
        ("mlp_layer_types", ["dense", "sparse", "sparse", "sparse"], ["dense", "sparse"]),
        ("no_rope_layers", [1, 1, 1, 0], [1, 0]),
        ("num_key_value_heads_per_layer", [8, 4, 2, 1], [8, 1]),
        ("intermediate_size", [10, 20, 30, 40], [10, 40]),
        ("activation_sparsity_pattern", [0.95, 0.95, 0.0, 0.0], [0.95, 0.0]),
        ("mlp_only_layers", [0, 3], [0, 1]),  # numbers of blocks, not an entry a block
        ("mlp_only_layers", [1, 2], []),
        ("mlp_only_layers", [], []),
        ("moe_layers", [0, 1, 2, 3], [0, 1]),
        ("max_window_layers", 4, 2),
        ("max_window_layers", 3, 1),
        ("max_window_layers", 28, 2),
        ("first_k_dense_replace", 0, 0),
        ("first_k_dense_replace", 1, 1),
        ("num_dense_layers", 2, 1),
        ("moe_layer_end_index", -1, -1),
        ("moe_layer_end_index", 3, 1),
        ("moe_layer_end_index", 2, 0),
        ("moe_layer_end_index", 0, 0),
        ("scale_depth", 2.0, 2**0.5),
    ],
)
def test_what_the_config_says_block_by_block_is_cut_alike(name: str, value: Any, cut: Any) -> None:
    assert pruned_config({"num_hidden_layers": 4, name: value}, MIDDLE) == {"num_hidden_layers": 2, name: cut}


@given(st.data())
def test_cut_settings_say_of_each_kept_block_what_they_said(data: st.DataObject) -> None:
    layers = data.draw(st.integers(2, 12))
    count = data.draw(st.integers(1, layers - 1))
    span = Span(data.draw(st.integers(0, layers - count)), count, layers)
    kinds = data.draw(st.lists(st.sampled_from("fs"), min_size=layers, max_size=layers))
    dense = data.draw(st.sets(st.integers(0, layers - 1)))
    first = data.draw(st.integers(0, layers + 2))
    found = pruned_config({"layer_types": kinds, "mlp_only_layers": sorted(dense), "num_dense_layers": first}, span)
    for new, old in enumerate(span.kept):
        assert found["layer_types"][new] == kinds[old]
        assert (new in found["mlp_only_layers"]) == (old in dense)
        assert (new < found["num_dense_layers"]) == (old < first)
    assert len(found["layer_types"]) == len(span.kept)


@pytest.mark.parametrize("length", [1, 3, 5])
@pytest.mark.parametrize("name", ["layer_types", "no_rope_layers", "intermediate_size"])
def test_a_list_of_another_length_than_the_model_is_refused_by_name(name: str, length: int) -> None:
    with pytest.raises(ModelUnsupported, match=f"{length} {name} for 4 blocks"):
        pruned_config({"num_hidden_layers": 4, name: [1] * length}, MIDDLE)


@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
def test_a_list_of_the_models_length_under_an_unknown_name_is_refused_by_name(nested: bool) -> None:
    config = {"num_hidden_layers": 4, "attn_type_list": [0, 0, 0, 1]}
    with pytest.raises(ModelUnsupported, match="attn_type_list"):
        pruned_config({"text_config": config} if nested else config, MIDDLE)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("eos_token_id", [1, 2, 3, 4]),
        ("pad_token_id", [1, 2, 3, 4]),
        ("bad_token_ids", [1, 2, 3, 4]),
        ("suppress_tokens", [1, 2, 3, 4]),
        ("architectures", ["AForCausalLM", "B", "C", "D"]),
        ("list_of_another_length", ["full"] * 3),
        ("rope_scaling", {"short_factor": [1.0, 2.0, 3.0, 4.0]}),
        ("vision_config", {"num_hidden_layers": 4, "layer_types": ["full"] * 4}),
        ("layer_types", None),
        ("no_rope_layers", []),
        ("intermediate_size", 64),
    ],
)
def test_what_is_no_list_of_blocks_stays(name: str, value: Any) -> None:
    assert pruned_config({"num_hidden_layers": 4, name: value}, MIDDLE)[name] == value


SLIDING, FULL = "sliding_attention", "full_attention"


@pytest.mark.parametrize(
    ("config", "name", "cut"),
    [
        ({"model_type": "gemma2"}, "layer_types", [FULL, SLIDING, FULL, SLIDING, FULL, SLIDING]),
        ({"model_type": "gemma3_text"}, "layer_types", [SLIDING] * 4 + [FULL, SLIDING]),
        ({"model_type": "gemma3_text", "sliding_window_pattern": 3}, "layer_types",
         [SLIDING, FULL, SLIDING, SLIDING, FULL, SLIDING]),
        ({"model_type": "cohere2"}, "layer_types", [SLIDING, SLIDING, FULL] + [SLIDING] * 3),
        ({"model_type": "olmo3", "layer_types": None}, "layer_types", [SLIDING, SLIDING, FULL] + [SLIDING] * 3),
        ({"model_type": "smollm3", "no_rope_layer_interval": 2}, "no_rope_layers", [0, 1, 0, 1, 0, 1]),
        ({"model_type": "llama4_text", "no_rope_layers": []}, "no_rope_layers", [1, 1, 0, 1, 1, 1]),
        ({"model_type": "llama"}, "layer_types", None),
    ],
    ids=repr,
)  # fmt: skip
def test_a_list_that_the_family_makes_by_number_is_made_before_the_cut(
    config: dict[str, Any], name: str, cut: list[Any] | None
) -> None:
    assert pruned_config({"num_hidden_layers": 7, **config}, Span(0, 1, 7)).get(name) == cut


@pytest.mark.parametrize("spelled", [False, True])
def test_gpt_oss_must_take_turns_after_the_cut(spelled: bool) -> None:
    config = {"model_type": "gpt_oss"} | ({"layer_types": [SLIDING, FULL] * 3} if spelled else {})
    for span in (Span(1, 2, 6), Span(0, 4, 6), Span(5, 1, 6)):
        left = 6 - span.count
        assert pruned_config(config, span)["layer_types"] == ([SLIDING, FULL] * 3)[:left]
    for span in (Span(0, 1, 6), Span(2, 3, 6)):
        with pytest.raises(ModelUnsupported, match=r"layer_types .* prune\.blocks"):
            pruned_config(config, span)


def test_a_nested_text_config_is_cut_in_place() -> None:
    text = {"num_hidden_layers": 4, "layer_types": ["a", "b", "c", "d"], "eos_token_id": [1, 2, 3, 4]}
    found = pruned_config(
        {"model_type": "gemma3", "text_config": text, "vision_config": {"num_hidden_layers": 9}}, MIDDLE
    )
    assert found == {
        "model_type": "gemma3",
        "text_config": {"num_hidden_layers": 2, "layer_types": ["a", "d"], "eos_token_id": [1, 2, 3, 4]},
        "vision_config": {"num_hidden_layers": 9},
    }


REFUSED = [
    ("quantization_config", {"bits": 4}),
    ("compression_config", {"format": "float-quantized"}),
    ("auto_map", {"AutoModelForCausalLM": "modeling.Model"}),
    ("num_kv_shared_layers", 2),
    ("use_cla", True),
    ("hidden_size_per_layer_input", 256),
    ("per_layer_config", {"0": {"num_attention_heads": 2}}),
    ("cross_attention_layers", [1]),
    ("attn_layer_period", 2),
    ("decoder_sparse_step", 2),
    ("interleave_moe_layer_step", 2),
    ("moe_layer_freq", [0, 1, 1, 1]),
    ("sliding_window_pattern", 2),
    ("sliding_window_pattern", "LLLG"),
    ("no_rope_layer_interval", 4),
    ("full_attention_interval", 2),
    ("layer_switch", 4),
    # in no table
    ("dense_attention_every_n_layers", 2),
    ("layer_group_size", 4),
    ("global_layer_pattern", "LLG"),
    ("shared_kv_layers", [1, 3]),
    ("memory_layer_ids", {"1": 2}),
    ("num_layers", 4),
    ("first_k_linear_replace", 2),
]


@pytest.mark.parametrize(("name", "value"), REFUSED)
@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
def test_rules_by_block_number_and_foreign_weights_are_refused_by_name(name: str, value: Any, nested: bool) -> None:
    config = {"num_hidden_layers": 4, name: value}
    whole = {"text_config": config} if nested else config
    with pytest.raises(ModelUnsupported, match=name):
        pruned_config(whole, MIDDLE)
    with pytest.raises(ModelUnsupported, match=name):
        layers_of({"architectures": ["XForCausalLM"], **whole})


@pytest.mark.parametrize(
    "fields",
    [
        {"quantization_config": None}, {"auto_map": {}}, {"num_kv_shared_layers": 0}, {"use_cla": False},
        {"hidden_size_per_layer_input": None}, {"decoder_sparse_step": 1}, {"interleave_moe_layer_step": 1},
        {"moe_layer_freq": 1}, {"sliding_window_pattern": None}, {"sliding_window_pattern": 0},
        {"sliding_window_pattern": 2, "layer_types": ["s", "f", "s", "f"]},
        {"sliding_window_pattern": "LLLG", "layer_types": ["s", "s", "s", "f"]},
        {"no_rope_layer_interval": 4, "no_rope_layers": [1, 1, 1, 0]},
        {"model_type": "gemma3_text", "sliding_window_pattern": 6},
        {"model_type": "smollm3", "no_rope_layer_interval": 4},
        {"model_type": "cohere2", "layer_switch": 4, "order_of_interleaved_layers": "local_attn_first"},
        {"layer_group_size": 1, "global_layer_pattern": "", "shared_kv_layers": [], "layer_scale": True},
        {"layer_norm_eps": 1e-5, "layer_norm_groups": 8, "rope_local_base_freq": 10000, "num_nextn_predict_layers": 1},
        {"vision_config": {"num_hidden_layers": 4, "layer_group_size": 2}},
    ],
    ids=repr,
)  # fmt: skip
def test_rules_that_are_off_or_spelled_out_a_block_are_no_obstacle(fields: dict[str, Any]) -> None:
    config = {"architectures": ["XForCausalLM"], "num_hidden_layers": 4, **fields}
    assert layers_of(config) == 4
    assert pruned_config(config, MIDDLE)["num_hidden_layers"] == 2


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("mimo_v2_flash", "layer_types"),
        ("cwm", "layer_types"),
        ("hy_v3", "mlp_layer_types"),
        ("hy_v4", "indexer_types"),
    ],
)
def test_a_list_that_the_family_makes_by_another_rule_must_be_written_out(family: str, name: str) -> None:
    config = {"architectures": ["XForCausalLM"], "model_type": family, "num_hidden_layers": 4}
    spelled = {field: ["a", "b", "c", "d"] for field in ("layer_types", "mlp_layer_types", "indexer_types")}
    assert pruned_config({**config, **spelled}, MIDDLE)[name] == ["a", "d"]
    for left_out in ({**config, **spelled, name: None}, {k: v for k, v in (config | spelled).items() if k != name}):
        for read in (layers_of, lambda config: pruned_config(config, MIDDLE)):
            with pytest.raises(ModelUnsupported, match=f"config has no {name}, .* save it again"):
                read(left_out)


@pytest.mark.parametrize("family", ["diffllama", "gpt_neox_japanese", "modernbert-decoder"])
def test_blocks_unlike_each_other_in_what_no_setting_says_are_refused(family: str) -> None:
    with pytest.raises(ModelUnsupported, match=rf"\({family}\) is not supported: "):
        layers_of({"architectures": ["XForCausalLM"], "model_type": family, "num_hidden_layers": 4})


@pytest.mark.parametrize(
    ("config", "layers"),
    [
        ({"architectures": ["LlamaForCausalLM"], "num_hidden_layers": 32}, 32),
        ({"architectures": ["Gemma3ForConditionalGeneration"], "text_config": {"num_hidden_layers": 26}}, 26),
    ],
)
def test_layers_of_a_decoder(config: dict[str, Any], layers: int) -> None:
    assert layers_of(config) == layers


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"model_type": "t5", "is_encoder_decoder": True, "num_hidden_layers": 4,
          "architectures": ["T5ForConditionalGeneration"]}, r"\(t5\) is an encoder-decoder"),
        ({"architectures": ["BertForMaskedLM"], "num_hidden_layers": 4}, "BertForMaskedLM"),
        ({"architectures": ["LlamaForSequenceClassification"], "num_hidden_layers": 4}, "SequenceClassification"),
        ({"num_hidden_layers": 4}, "architectures"),
        ({"architectures": None, "num_hidden_layers": 4}, "architectures"),
        ({"architectures": ["GPT2LMHeadForCausalLM"], "n_layer": 4}, "num_hidden_layers"),
    ],
)  # fmt: skip
def test_what_is_no_decoder_only_language_model_is_refused(config: dict[str, Any], said: str) -> None:
    with pytest.raises(ModelUnsupported, match=said) as caught:
        layers_of(config)
    assert caught.value.exit_status == 2


@pytest.mark.parametrize(
    "fields",
    [
        *({"model_type": name} for name in (
            "mamba", "mamba2", "falcon_mamba", "jamba", "bamba", "zamba2", "falcon_h1", "nemotron_h", "lfm2_moe",
            "granitemoehybrid", "qwen3_next", "qwen3_5_moe", "recurrent_gemma", "rwkv", "kimi_linear",
        )),
        {"model_type": "minimax", "layer_types": ["full_attention", "linear_attention"] * 2},
        {"model_type": "new", "layer_types": ["full_attention", "conv"] * 2},
        {"model_type": "new", "layers_block_type": ["mamba", "attention"] * 2},
        {"model_type": "new", "block_types": ["recurrent", "attention"]},
    ],
    ids=repr,
)  # fmt: skip
@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
def test_blocks_that_keep_a_state_are_refused_by_the_models_name(fields: dict[str, Any], nested: bool) -> None:
    config = {"num_hidden_layers": 4, **fields}
    with pytest.raises(ModelUnsupported, match=rf"\({fields['model_type']}\) has state-space"):
        layers_of({"architectures": ["XForCausalLM"], **({"text_config": config} if nested else config)})


@pytest.mark.parametrize("model_type", ["llama", "minimax_m2", "qwen3", "qwen3_moe", "gemma3_text", "gpt_oss"])
def test_blocks_of_attention_are_no_obstacle(model_type: str) -> None:
    config = {"architectures": ["XForCausalLM"], "model_type": model_type, "num_hidden_layers": 4}
    assert layers_of({**config, "layer_types": [SLIDING, FULL] * 2}) == 4
