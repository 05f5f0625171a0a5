"""The gate before a pruned checkpoint is published: it must be what the plan says, and nothing else."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tasks.algorithms.prune_plan import NUMBERED, PER_LAYER, pruned_config
from tasks.domain.errors import GateError, ModelUnsupported
from tasks.domain.span import Span
from tasks.engines.children.blocks import bypassed, decoder_blocks
from tasks.engines.children.border import Report, device_of, serve, vllm_options

TOLERANCE = 1e-4  # largest allowed difference of float32 logits
PROBE_TOKENS = 48
GENERATED_TOKENS = 16
SERVED_CONTEXT = 128  # tokens; vLLM must only show that it serves the model


def gate(request: dict[str, Any], out: Path, report: Report) -> None:
    """`verify`, and `check_served` where vLLM is installed and finds the device that it is built for."""
    verify(request, out, report)
    if find_spec("vllm") and (torch.version.cuda is None or torch.cuda.is_available()):
        report(0.8, "loading in vLLM")
        torch.cuda.empty_cache()  # does nothing before a GPU was used
        check_served(request)
        report(1.0, "served by vLLM")


def verify(request: dict[str, Any], _out: Path, report: Report) -> None:
    """request: original and pruned checkpoints, removed blocks, parameters expected after the cut.

    Checks, each with the measured figure in its GateError: strict reload, parameter count, per-layer settings after
    the reload, no NaN, logits with the key-value cache and greedy tokens with it equal to those without, logits
    equal to the original's with the same blocks bypassed. One of the two models is in memory at a time, in float32.
    """
    device = device_of(request["runtime"])
    probe, own = _check_alone(request, device)
    report(0.4, "reloads and generates")
    difference, allowed = float((own - _bypassed_logits(request, probe, device)).abs().max()), _allowed(own)
    if not difference <= allowed:  # also when it is no number
        raise GateError(
            f"logits of the pruned model differ by {difference:.2e} from the original's with blocks "
            f"{request['removed']} bypassed (allowed: {allowed:.0e})"
        )
    report(0.7, "logits equal")


def check_served(request: dict[str, Any]) -> None:
    """vLLM loads the pruned checkpoint and generates, in the type that it picks.

    Costs about 25 s on two CPU cores, nearly all of it vLLM's start, and the memory of one model and its cache.
    Raises GateError with what vLLM said when it does not, ModelUnsupported when it does not serve the original either.
    """
    if not (fault := _fault_in_vllm(request["pruned"], request)):
        return
    if original := _fault_in_vllm(request["original"], request):
        raise ModelUnsupported(f"vLLM, which generates and evaluates, does not serve the unpruned model: {original}")
    raise GateError(f"vLLM serves the unpruned model, but not the pruned checkpoint: {fault}")


def _fault_in_vllm(checkpoint: str, request: dict[str, Any]) -> str | None:
    """What keeps vLLM from generating some tokens with a checkpoint."""
    from vllm import LLM, SamplingParams

    options = vllm_options(
        {**request, "checkpoint": checkpoint, "dtype": "auto", "max_length": SERVED_CONTEXT, "seed": 0}
    )
    sampling = SamplingParams(temperature=0, max_tokens=GENERATED_TOKENS, ignore_eos=True)
    try:
        llm = LLM(model=checkpoint, **(options | {"enforce_eager": True}))
        (output,) = llm.generate([{"prompt_token_ids": list(range(PROBE_TOKENS))}], sampling, use_tqdm=False)
    except Exception as error:  # whatever it is, the checkpoint cannot be used
        return f"{type(error).__name__}: {error}"
    generated = len(output.outputs[0].token_ids)
    return None if generated == GENERATED_TOKENS else f"it generates {generated} tokens instead of {GENERATED_TOKENS}"


def _check_alone(request: dict[str, Any], device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """All that needs the pruned model only; a probe of random tokens and the model's logits of it."""
    model, loading = AutoModelForCausalLM.from_pretrained(
        request["pruned"], dtype=torch.float32, output_loading_info=True
    )
    model = model.to(device).eval()
    for fault in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if loading[fault]:
            raise GateError(
                f"the pruned checkpoint reloads with {len(loading[fault])} {fault.replace('_', ' ')}: "
                f"{sorted(loading[fault])[:5]}"
            )
    # Buffers that are stored count (routers' correction biases), tied tensors count once.
    parameters = sum({tensor.data_ptr(): tensor.numel() for tensor in model.state_dict().values()}.values())
    if parameters != request["parameters"]:
        raise GateError(f"the pruned model has {parameters} parameters, the plan says {request['parameters']}")
    _check_settings(request, model.config.get_text_config().to_dict())

    generator = torch.Generator().manual_seed(0)
    vocabulary = model.get_input_embeddings().num_embeddings
    probe = torch.randint(0, vocabulary, (1, PROBE_TOKENS), generator=generator).to(device)
    with torch.inference_mode():
        own = model(input_ids=probe, use_cache=False).logits
        if not torch.isfinite(own).all():
            raise GateError(f"the pruned model gives {int((~torch.isfinite(own)).sum())} logits that are not finite")
        difference = _cache_difference(model, probe, own)
    if not difference <= (allowed := _allowed(own)):  # also when it is no number
        raise GateError(
            f"logits with the key-value cache differ by {difference:.2e} from those without (allowed: {allowed:.0e})"
        )
    _check_generation(model, probe)
    return probe, own.cpu()


def _allowed(logits: torch.Tensor) -> float:
    """Rounding grows with what is rounded: TOLERANCE of the largest logit, which real models have at 20 or 30."""
    return TOLERANCE * max(1.0, float(logits.abs().max()))


def _check_settings(request: dict[str, Any], found: dict[str, Any]) -> None:
    """What transformers makes of the pruned config against the plan on what it makes of the original's.

    Wider than the logits, which see no sliding window that is longer than the probe.
    """
    fields = ("num_hidden_layers", *PER_LAYER, *NUMBERED)
    original = AutoConfig.from_pretrained(request["original"]).get_text_config().to_dict()
    removed = request["removed"]
    span = Span(removed[0], len(removed), original["num_hidden_layers"])
    expected = pruned_config({name: original[name] for name in fields if name in original}, span)
    for name, value in expected.items():
        if found.get(name) != value:
            raise GateError(f"the pruned checkpoint reloads with {name}={found.get(name)}, the plan says {value}")


def _cache_difference(model: Any, probe: torch.Tensor, uncached: torch.Tensor) -> float:
    """Largest difference of the logits when half of the probe is read at once and the rest token by token."""
    half = probe.shape[1] // 2
    step = model(input_ids=probe[:, :half], use_cache=True)
    worst = float((step.logits - uncached[:, :half]).abs().max())
    for place in range(half, probe.shape[1]):
        step = model(input_ids=probe[:, place : place + 1], past_key_values=step.past_key_values, use_cache=True)
        worst = max(worst, float((step.logits[:, -1] - uncached[:, place]).abs().max()))
    return worst


def _check_generation(model: Any, probe: torch.Tensor) -> None:
    """Greedy tokens with the cache are those without; the first that is not may only be a tie of logits."""
    cached, uncached = (
        model.generate(
            probe, attention_mask=torch.ones_like(probe), do_sample=False, use_cache=use_cache, output_logits=True,
            max_new_tokens=GENERATED_TOKENS, min_new_tokens=GENERATED_TOKENS, return_dict_in_generate=True,
        )
        for use_cache in (True, False)
    )  # fmt: skip
    different = (cached.sequences != uncached.sequences)[0, PROBE_TOKENS:].nonzero()
    if len(different):
        place = int(different[0])
        logits = uncached.logits[place][0]
        ours, theirs = (int(run.sequences[0, PROBE_TOKENS + place]) for run in (cached, uncached))
        if (gap := float(logits[theirs] - logits[ours])) > (allowed := _allowed(logits)):
            raise GateError(
                f"greedy generation with the key-value cache gives token {ours} at place {place}, without it "
                f"{theirs}, whose logit is larger by {gap:.2e} (allowed: {allowed:.0e})"
            )


def _bypassed_logits(request: dict[str, Any], probe: torch.Tensor, device: str) -> torch.Tensor:
    original = AutoModelForCausalLM.from_pretrained(request["original"], dtype=torch.float32).to(device).eval()
    blocks = decoder_blocks(original, original.config.get_text_config().num_hidden_layers)
    with torch.inference_mode(), bypassed(blocks, request["removed"]):
        logits: torch.Tensor = original(input_ids=probe, use_cache=False).logits
    return logits.cpu()


if __name__ == "__main__":
    serve(gate)
