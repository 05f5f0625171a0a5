"""What pruning does to a checkpoint, as a pure function of its config and its tensor names.

Paper, section 2.1: drop the blocks l* .. l*+n-1 and connect the rest. On disk that means: leave the removed
blocks' tensors out, renumber those behind them, and cut every per-layer list of the config alike.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from tasks.domain.errors import ModelUnsupported
from tasks.domain.span import Span

BLOCK = re.compile(r"^(?P<stem>(?:.*\.)?(?:layers|h|blocks))\.(?P<index>\d+)\.(?P<rest>.+)$")

# Settings that give a rule for blocks by their number: cutting blocks out changes which block the rule means.
PATTERNED = {
    "sliding_window_pattern": "layer_types",
    "full_attention_interval": "layer_types",
    "decoder_sparse_step": None,
    "mlp_only_layers": None,
    "moe_layers": None,
    "cross_attention_layers": None,
    "interleave_moe_layer_step": None,
    "expert_layer_period": None,
    "first_k_dense_replace": None,
    "num_kv_shared_layers": None,
    "attn_layer_period": None,
    "max_window_layers": "layer_types",
}
UNSUPPORTED = ("quantization_config", "auto_map")


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
    """The config of the pruned model: the number of blocks and every list with an entry a block, cut alike.

    Raises ModelUnsupported, with the field's name, for what cannot be cut safely.
    """
    for name in UNSUPPORTED:
        if config.get(name):
            raise ModelUnsupported(f"the model's config has {name}; give an unquantized checkpoint without remote code")
    cut: dict[str, Any] = {}
    for name, value in config.items():
        if name == "num_hidden_layers":
            cut[name] = span.layers - span.count
        elif name == "text_config" and isinstance(value, Mapping):
            cut[name] = pruned_config(value, span)
        elif isinstance(value, list) and len(value) == span.layers and not _is_token_list(name):
            cut[name] = [value[block] for block in span.kept]
        else:
            cut[name] = value
    for name, replacement in PATTERNED.items():
        if config.get(name) and not (replacement and config.get(replacement)):
            if name == "decoder_sparse_step" and config[name] == 1:
                continue
            if name == "max_window_layers" and not config.get("use_sliding_window", True):
                cut[name] = min(config[name], span.layers - span.count)
                continue
            raise ModelUnsupported(
                f"the model's config has {name}={config[name]}, a rule by block number that a cut would shift; "
                "this layout is not supported"
            )
    return cut


def _is_token_list(name: str) -> bool:
    return name.endswith("token_id") or name == "architectures"


def layers_of(config: Mapping[str, Any]) -> int:
    """The number of decoder blocks; raises ModelUnsupported when the config is no decoder-only language model's."""
    if config.get("is_encoder_decoder"):
        raise ModelUnsupported(
            f"the model ({config.get('model_type')}) is an encoder-decoder; give a decoder-only causal LM"
        )
    architectures = config.get("architectures") or []
    if not any("ForCausalLM" in name or "ForConditionalGeneration" in name for name in architectures):
        raise ModelUnsupported(
            f"the model's architectures={architectures} hold no causal language model; give a ...ForCausalLM checkpoint"
        )
    layers = config.get("num_hidden_layers") or (config.get("text_config") or {}).get("num_hidden_layers")
    if not isinstance(layers, int):
        raise ModelUnsupported("the model's config has no num_hidden_layers; this layout is not supported")
    return layers
