"""What pruning does to a checkpoint, as a pure function of its config and its tensor names.

Paper, section 2.1: drop the blocks l* .. l*+n-1 and connect the rest. On disk that means: leave the removed
blocks' tensors out, renumber those behind them, and cut whatever the config says block by block alike. The tables
hold the settings that transformers' configuration files and model code read by block number; a setting that looks
like one of them and is not in a table is refused.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

from tasks.domain.errors import ModelUnsupported
from tasks.domain.span import Span

BLOCK = re.compile(r"^(?P<stem>(?:.*\.)?(?:layers|h|blocks))\.(?P<index>\d+)\.(?P<rest>.+)$")

# Where they are lists, one entry a block: cut.
PER_LAYER = (
    "layer_types", "mlp_layer_types", "no_rope_layers", "layer_rope_theta", "sliding_windows", "indexer_types",
    "num_attention_heads", "num_key_value_heads", "num_attention_heads_per_layer", "num_key_value_heads_per_layer",
    "intermediate_size", "activation_sparsity_pattern", "swiglu_limits", "swiglu_limits_shared",
    "num_experts", "layers_num_experts", "moe_topk",
)  # fmt: skip
# Lists of block numbers: renumbered.
NUMBERED = ("mlp_only_layers", "moe_layers")
# "The blocks numbered below k": k becomes the number of kept blocks below it.
THRESHOLDS = ("max_window_layers", "first_k_dense_replace", "num_dense_layers", "moe_layer_start_index")
# "Every k-th block": no k says it after a cut. 0 and 1 mean every block alike; a list (named here) overrides the rule.
PERIODS = {
    "sliding_window_pattern": "layer_types",
    "_sliding_window_pattern": "layer_types",
    "layer_switch": "layer_types",
    "order_of_interleaved_layers": "layer_types",
    "global_attn_every_n_layers": "layer_types",
    "full_attention_interval": "layer_types",
    "no_rope_layer_interval": "no_rope_layers",
    "index_topk_freq": "indexer_types",
    "moe_layer_freq": "mlp_layer_types",
    "moe_layer_interval": None,
    "decoder_sparse_step": None,
    "interleave_moe_layer_step": None,  # transformers reads moe_layers instead, vLLM does not
    "attn_layer_period": None,
    "expert_layer_period": None,
}
# Families that make a list by such a rule where the config leaves it out, as on the hub (list, setting, default k).
EVERY_KTH = {
    "gemma2": ("layer_types", "sliding_window_pattern", 2),
    "vaultgemma": ("layer_types", "sliding_window_pattern", 2),
    "gpt_oss": ("layer_types", "sliding_window_pattern", 2),
    "cohere2": ("layer_types", "sliding_window_pattern", 4),
    "olmo3": ("layer_types", "sliding_window_pattern", 4),
    "gemma3_text": ("layer_types", "sliding_window_pattern", 6),
    "smollm3": ("no_rope_layers", "no_rope_layer_interval", 4),
    "llama4_text": ("no_rope_layers", "no_rope_layer_interval", 4),
}
USUAL_AND_KTH = {"layer_types": ("sliding_attention", "full_attention"), "no_rope_layers": (1, 0)}
# Families that make a list by a rule of another kind where the config leaves it out.
MADE_BY_NUMBER = {
    "layer_types": ("cwm", "deepseek_v4", "granite_swa", "granitemoe_swa", "mimo_v2_flash"),
    "mlp_layer_types": ("axk2", "deepseek_v4", "glm4_moe_lite", "hy_v3", "hy_v4", "laguna", "mimo_v2_flash"),
    "indexer_types": ("hy_v4",),
}
# Families whose layer_types vLLM does not read: there the rule must still hold after the cut.
SERVED_BY_RULE = ("gpt_oss",)
# Names of settings that go by block number; those in no table are refused.
BY_NUMBER = re.compile(
    r"(_interval|_period|_pattern|_frequency|(?<!_base)_freq|_every_\w+|_layers|_layer_id[xs]|_layers?_ind(ex|ices|exes)"
    r"|_replace|_per_stack)$|^layers?_(?!norm)|_layers?_(step|offset|switch|start|end)"
)
NOT_PER_LAYER = re.compile(r"(token_ids?|_tokens|architectures|keys_to_ignore_at_inference|image_grid_pinpoints)$")

REFUSED = {
    "quantization_config": "quantized weights; give an unquantized checkpoint",
    "compression_config": "quantized weights; give an unquantized checkpoint",
    "auto_map": "remote code; give a checkpoint of a class that transformers has",
    "num_kv_shared_layers": "blocks that read the keys and values of other blocks; this layout is not supported",
    "use_cla": "blocks that read the keys and values of other blocks; this layout is not supported",
    "hidden_size_per_layer_input": "embeddings of all blocks in one tensor; this layout is not supported",
    "per_layer_config": "settings of single blocks by number; this layout is not supported",
    "cross_attention_layers": "blocks that read images, by number; this layout is not supported",
}
# Model types of which the config does not say what makes a block differ from the others.
UNLIKE = {
    "diffllama": "attention weighs by block number",
    "gpt_neox_japanese": "the last block has a bias that the others lack",
    "modernbert-decoder": "the first block lacks a norm that the others have",
}
# Model types whose blocks keep a state-space, linear-attention, recurrent or convolution state (beginnings).
STATEFUL = (
    "bamba", "falcon_h1", "falcon_mamba", "granitemoehybrid", "jamba", "kimi_linear", "lfm2", "mamba", "nemotron_h",
    "olmo_hybrid", "plamo2", "qwen3_5", "qwen3_next", "recurrent_gemma", "rwkv", "xlstm", "zamba", "zaya",
)  # fmt: skip
KNOWN = {"num_hidden_layers", "moe_layer_end_index", *PER_LAYER, *NUMBERED, *THRESHOLDS, *PERIODS, *REFUSED}
STATEFUL_KINDS = {"linear_attention", "mamba", "mamba2", "conv", "recurrent", "hybrid", "hybrid_sliding"}


def renamed(names: Iterable[str], span: Span) -> dict[str, str]:
    """Map each kept tensor name to its new name; removed blocks are left out.

    Raises ModelUnsupported unless exactly one stack of blocks with numbers 0 .. layers-1 is found.
    """
    names = list(names)
    stacks: dict[str, set[int]] = {}
    for name in names:
        if match := BLOCK.match(name):
            stacks.setdefault(match["stem"], set()).add(int(match["index"]))
    stems = [stem for stem, found in stacks.items() if found == set(range(span.layers))]
    if len(stems) != 1:
        seen = ", ".join(f"{stem} with {len(found)}" for stem, found in stacks.items()) or "none"
        raise ModelUnsupported(f"the checkpoint has no single stack of {span.layers} numbered blocks (stacks: {seen})")
    new_index = {old: new for new, old in enumerate(span.kept)}
    mapping = {}
    for name in names:
        match = BLOCK.match(name)
        if match is None or match["stem"] != stems[0]:
            mapping[name] = name
        elif int(match["index"]) in new_index:
            mapping[name] = f"{match['stem']}.{new_index[int(match['index'])]}.{match['rest']}"
    return mapping


def pruned_config(config: Mapping[str, Any], span: Span) -> dict[str, Any]:
    """The config of the pruned model: the number of blocks, and everything that it says block by block, cut alike.

    Raises ModelUnsupported, with the field's name, for what cannot be cut exactly.
    """
    config = _spelled_out(config, span.layers)
    _refuse_fields(config)
    cut = {name: _cut(name, value, span) for name, value in config.items()}
    if config.get("model_type") in SERVED_BY_RULE:
        ruled = _spelled_out({"model_type": config["model_type"]}, span.layers - span.count)
        if cut["layer_types"] != ruled["layer_types"]:
            raise ModelUnsupported(
                f"{config['model_type']} without {span.count} blocks has layer_types that do not take turns, and vLLM "
                "goes by block number; set prune.blocks to an even number"
            )
    return cut


def _refuse_fields(config: Mapping[str, Any]) -> None:
    for name, reason in REFUSED.items():
        if config.get(name):
            raise ModelUnsupported(f"the model's config has {name}: {reason}")
    for name, spelled_in in PERIODS.items():
        if config.get(name) not in (None, 0, 1) and not (spelled_in and config.get(spelled_in)):
            raise ModelUnsupported(
                f"the model's config has {name}={config[name]}, a rule by block number that a cut would shift; "
                "this layout is not supported"
            )
    for name, families in MADE_BY_NUMBER.items():
        if config.get("model_type") in families and not config.get(name):
            raise ModelUnsupported(
                f"the model's config has no {name}, which transformers then makes by block number; load the model with "
                "transformers and save it again, which writes them out"
            )
    for name, value in config.items():
        by_number = BY_NUMBER.search(name) and name not in KNOWN and "num_hidden_layers" in config
        if by_number and value and (value > 1 if isinstance(value, int) else isinstance(value, str | list | dict)):
            raise ModelUnsupported(
                f"the model's config has {name}={value}, which seems to go by block number and is not known; this "
                "layout is not supported"
            )


def _cut(name: str, value: Any, span: Span) -> Any:
    if name == "num_hidden_layers":
        return span.layers - span.count
    if name == "text_config" and isinstance(value, Mapping):
        return pruned_config(value, span)
    if name in THRESHOLDS and isinstance(value, int):
        return sum(block < value for block in span.kept)
    if name == "moe_layer_end_index" and isinstance(value, int) and value != -1:  # the last one, which -1 says too
        return sum(block <= value for block in span.kept) - 1
    if name == "scale_depth" and value:  # model code divides it by the root of the number of blocks
        return value * math.sqrt(len(span.kept) / span.layers)
    if not isinstance(value, list) or not value:
        return value
    if name in NUMBERED:
        return [new for new, old in enumerate(span.kept) if old in value]
    if name in PER_LAYER:
        if len(value) != span.layers:
            raise ModelUnsupported(f"the model's config has {len(value)} {name} for {span.layers} blocks; correct it")
        return [value[block] for block in span.kept]
    if len(value) == span.layers and not NOT_PER_LAYER.search(name):
        raise ModelUnsupported(
            f"the model's config has {name}, a list as long as the model has blocks, of a name that is not known; "
            "this layout is not supported"
        )
    return value


def _spelled_out(config: Mapping[str, Any], layers: int) -> Mapping[str, Any]:
    """The config with the list that its family would make by block number."""
    if config.get("model_type") not in EVERY_KTH:
        return config
    name, setting, default = EVERY_KTH[config["model_type"]]
    if config.get(name):
        return config
    usual, kth = USUAL_AND_KTH[name]
    period = config.get(setting) or default
    return {**config, name: [usual if (block + 1) % period else kth for block in range(layers)]}


def layers_of(config: Mapping[str, Any]) -> int:
    """The number of decoder blocks.

    Raises ModelUnsupported when the config is no decoder-only language model's, when blocks keep a state, and for
    every field that no cut could follow: what can be refused is refused before anything runs.
    """
    if config.get("is_encoder_decoder"):
        raise ModelUnsupported(
            f"the model ({config.get('model_type')}) is an encoder-decoder; give a decoder-only causal LM"
        )
    architectures = config.get("architectures") or []
    if not any("ForCausalLM" in name or "ForConditionalGeneration" in name for name in architectures):
        raise ModelUnsupported(
            f"the model's architectures={architectures} hold no causal language model; give a ...ForCausalLM checkpoint"
        )
    text = config.get("text_config") or {}
    for part in (config, text):
        kinds = {kind for name in ("layer_types", "layers_block_type", "block_types") for kind in part.get(name) or ()}
        if reason := UNLIKE.get(str(part.get("model_type"))):
            raise ModelUnsupported(f"the model ({part['model_type']}) is not supported: {reason}")
        if str(part.get("model_type")).startswith(STATEFUL) or kinds & STATEFUL_KINDS:
            raise ModelUnsupported(
                f"the model ({part.get('model_type')}) has state-space, linear-attention, recurrent or convolution "
                "blocks, which do not stand in for attention blocks; give a model of attention blocks only"
            )
    layers = config.get("num_hidden_layers") or text.get("num_hidden_layers")
    if not isinstance(layers, int):
        raise ModelUnsupported("the model's config has no num_hidden_layers; this layout is not supported")
    for part in (config, text):
        _refuse_fields(_spelled_out(part, layers))
    return layers
