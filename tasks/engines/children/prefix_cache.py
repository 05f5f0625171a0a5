"""The harness's vLLM backend, reading the prefix cache in multiple-choice tasks too.

The choices of an item share its context, and the items of a subject their few-shot examples; yet vLLM computes
every prompt whole once log-probabilities of the prompt are asked for, since it has none for cached tokens. The
harness only looks at the continuation's, so the context may come from the cache.
"""

from __future__ import annotations

from typing import Any

from lm_eval.models.vllm_causallms import VLLM
from vllm import SamplingParams

Tokens = tuple[int, ...]


class PrefixCachedVLLM(VLLM):
    """Same numbers as VLLM; where the cache reached into a continuation, the request runs again without it."""

    _continuations: dict[Tokens, int]

    def __init__(self, **options: Any) -> None:
        self._encoded: dict[str, list[int]] = {}
        super().__init__(**options)

    def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> Any:
        """Texts become tokens at once, by all cores, and a context that choices share only once.

        The harness has one text after the other encoded, which takes longer than a small model's scoring on a GPU.
        """
        pairs = [request.args for request in requests]
        texts = {text for context, continuation in pairs for text in (context + continuation, context.rstrip())}
        ordered = sorted(texts - {""})
        self._encoded = dict(zip(ordered, super().tok_encode(ordered), strict=True))
        try:
            return super().loglikelihood(requests, disable_tqdm)
        finally:
            self._encoded = {}

    def tok_encode(self, string: Any, *arguments: Any, **options: Any) -> Any:
        if isinstance(string, str) and not arguments and not options and string in self._encoded:
            return self._encoded[string]
        return super().tok_encode(string, *arguments, **options)

    def _loglikelihood_tokens(self, requests: Any, disable_tqdm: bool = False) -> Any:
        self._continuations = {}
        for _, context, continuation in requests:
            prompt = tuple((context + continuation)[-(self.max_length - 1) :])
            self._continuations[prompt] = max(len(continuation), self._continuations.get(prompt, 0))
        return super()._loglikelihood_tokens(requests, disable_tqdm)

    def _model_generate(self, requests: Any, generate: bool = False, sampling_params: Any = None) -> Any:
        if generate:
            return super()._model_generate(requests, generate, sampling_params)
        outputs = self._after_their_contexts(requests)
        for prompt, output in zip(requests, outputs, strict=True):  # some versions give no entries for cached tokens
            absent = len(prompt) - len(output.prompt_logprobs)
            output.prompt_logprobs = [None] * absent + list(output.prompt_logprobs)
        unscored = [
            index
            for index, (prompt, output) in enumerate(zip(requests, outputs, strict=True))
            if output.num_cached_tokens >= len(prompt) - self._continuations[tuple(prompt)]
        ]
        if unscored:
            again = [_scoring(skip_cache=True)] * len(unscored)
            scored = super()._model_generate([requests[index] for index in unscored], True, again)
            for index, output in zip(unscored, scored, strict=True):
                outputs[index] = output
        return outputs

    def _after_their_contexts(self, requests: list[list[int]]) -> list[Any]:
        """The prompts' outputs. A context that choices share goes before them, and asks for no log-probabilities."""
        sharing: dict[Tokens, list[int]] = {}
        for index, prompt in enumerate(requests):
            context = tuple(prompt[: -self._continuations[tuple(prompt)]])
            sharing.setdefault(context, []).append(index)
        prompts: list[list[int]] = []
        sampling: list[SamplingParams] = []
        places: dict[int, int] = {}
        scoring, reading = _scoring(skip_cache=False), SamplingParams(temperature=0, max_tokens=1, detokenize=False)
        for context, indices in sharing.items():
            if len(indices) > 1 and len(context) > 1:
                prompts.append(list(context[:-1]))
                sampling.append(reading)
            for index in indices:
                places[index] = len(prompts)
                prompts.append(requests[index])
                sampling.append(scoring)
        outputs = super()._model_generate(prompts, True, sampling)
        return [outputs[places[index]] for index in range(len(requests))]


def _scoring(*, skip_cache: bool) -> SamplingParams:
    return SamplingParams(
        temperature=0, prompt_logprobs=1, max_tokens=1, detokenize=False, skip_reading_prefix_cache=skip_cache
    )
