"""Token ids of prompts: one start token, the same prompt everywhere, the answer and its end behind it."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import AutoTokenizer

from tasks.algorithms.prompts import Message, prompt_ids, request, training_ids
from tests.conftest import build_tokenizer

TALK: list[Message] = [
    {"role": "user", "content": "What is 2 plus 2?"},
    {"role": "assistant", "content": "It is 4."},
    {"role": "user", "content": "And 3 plus 3?"},
]
ANSWER = " It is 6,\nas you see."
WITH_START = "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}" \
    "{% if add_generation_prompt %}[assistant] {% endif %}"  # fmt: skip


def tokenizer_that_adds_its_start_token(template: str | None) -> Any:
    """As Llama's: `encode` puts the start token in front by itself."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = build_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|start|> $A", special_tokens=[("<|start|>", tokenizer.bos_token_id)]
    )
    tokenizer.chat_template = template
    assert tokenizer.encode("x")[0] == tokenizer.bos_token_id
    return tokenizer


@pytest.fixture(scope="module")
def starting() -> Any:
    return tokenizer_that_adds_its_start_token(WITH_START)


@pytest.fixture(scope="module")
def plain() -> Any:
    return tokenizer_that_adds_its_start_token(None)


def test_the_template_start_token_is_the_only_one(starting: Any) -> None:
    ids = prompt_ids(starting, TALK)
    assert ids.count(starting.bos_token_id) == 1 and ids[0] == starting.bos_token_id
    text = "[user] What is 2 plus 2?\n[assistant] It is 4.\n[user] And 3 plus 3?\n[assistant] "
    assert starting.decode(ids[1:]) == text


def test_prompt_ids_equal_the_library_rendering(starting: Any) -> None:
    own = starting.apply_chat_template(TALK, add_generation_prompt=True, tokenize=True, return_dict=True)
    assert prompt_ids(starting, TALK) == list(own["input_ids"])


def test_a_template_without_start_token_gets_none() -> None:
    tokenizer = tokenizer_that_adds_its_start_token("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    assert tokenizer.bos_token_id not in prompt_ids(tokenizer, TALK)


def test_without_a_template_the_tokenizer_adds_its_own_start_token(plain: Any) -> None:
    ids = prompt_ids(plain, TALK)
    assert ids.count(plain.bos_token_id) == 1 and ids[0] == plain.bos_token_id
    assert plain.decode(ids[1:]) == "What is 2 plus 2?\n\nIt is 4.\n\nAnd 3 plus 3?\n\n"


@pytest.mark.parametrize("kind", ["starting", "plain"])
def test_training_continues_the_generation_prompt(kind: str, request: pytest.FixtureRequest) -> None:
    tokenizer = request.getfixturevalue(kind)
    prompt = prompt_ids(tokenizer, TALK)
    ids, length = training_ids(tokenizer, [TALK], [ANSWER])[0]
    assert length == len(prompt) and ids[:length] == prompt
    answer = tokenizer.encode(ANSWER, add_special_tokens=False)
    assert ids[length:] == [*answer, tokenizer.eos_token_id]
    assert tokenizer.decode(ids[length:-1]) == ANSWER
    assert ids.count(tokenizer.bos_token_id) == 1
    assert ids.count(tokenizer.eos_token_id) == 1


def test_no_end_token_where_the_tokenizer_has_none(starting: Any) -> None:
    tokenizer = tokenizer_that_adds_its_start_token(WITH_START)
    tokenizer.eos_token = None
    ids, length = training_ids(tokenizer, [TALK], [ANSWER])[0]
    assert ids[length:] == tokenizer.encode(ANSWER, add_special_tokens=False)


def test_an_empty_answer_trains_the_end_alone(starting: Any) -> None:
    ids, length = training_ids(starting, [TALK], [""])[0]
    assert ids[length:] == [starting.eos_token_id]


def test_the_pico_checkpoint_renders_as_written_by_hand(pico: Any) -> None:
    tokenizer = AutoTokenizer.from_pretrained(pico)
    by_hand = (
        "<|start|>user\nWhat is 2 plus 2?<|end|>\n<|start|>assistant\nIt is 4.<|end|>\n"
        "<|start|>user\nAnd 3 plus 3?<|end|>\n<|start|>assistant\n"
    )
    ids, length = training_ids(tokenizer, [TALK], ["6"])[0]
    assert ids[:length] == tokenizer.encode(by_hand, add_special_tokens=False)
    whole = tokenizer.apply_chat_template([*TALK, {"role": "assistant", "content": "6"}], tokenize=False)
    assert ids == tokenizer.encode(whole.rstrip("\n"), add_special_tokens=False), "training text is the full rendering"


def test_a_request_puts_its_context_below() -> None:
    assert request("Sum up.", "A text.") == [{"role": "user", "content": "Sum up.\n\nA text."}]
    assert request("Sum up.") == request("Sum up.", "") == [{"role": "user", "content": "Sum up."}]
