"""The one renderer of prompts: the same token ids in generation, in the training mask and in evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

Message = dict[str, str]


class ChatTokenizer(Protocol):
    """What is used of a transformers tokenizer."""

    chat_template: Any
    eos_token_id: int | None

    def apply_chat_template(self, conversation: Sequence[Message], **options: Any) -> Any: ...

    def __call__(self, text: list[str], **options: Any) -> Any: ...


def prompt_ids(tokenizer: ChatTokenizer, messages: Sequence[Message]) -> list[int]:
    """Token ids of the conversation up to where the assistant's answer begins."""
    return prompts_ids(tokenizer, [messages])[0]


def prompts_ids(tokenizer: ChatTokenizer, conversations: Sequence[Sequence[Message]]) -> list[list[int]]:
    """The same of many conversations, with all cores.

    A template's text already holds the special tokens, so nothing is added to it (no second BOS).
    """
    if tokenizer.chat_template is not None:
        texts = [prompt_text(tokenizer, messages) for messages in conversations]
    else:
        texts = ["".join(f"{message['content']}\n\n" for message in messages) for messages in conversations]
    return _encoded(tokenizer, texts, special=tokenizer.chat_template is None)


def prompt_text(tokenizer: ChatTokenizer, messages: Sequence[Message]) -> str:
    """What the chat template makes of the conversation, special tokens included."""
    return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))


def training_ids(
    tokenizer: ChatTokenizer, conversations: Sequence[Sequence[Message]], answers: Sequence[str]
) -> list[tuple[list[int], int]]:
    """Of each row the ids of prompt, answer and end-of-turn, and the length of the prompt, which bears no loss."""
    prompts = prompts_ids(tokenizer, conversations)
    ends = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    bodies = _encoded(tokenizer, answers, special=False)
    return [(prompt + body + ends, len(prompt)) for prompt, body in zip(prompts, bodies, strict=True)]


def _encoded(tokenizer: ChatTokenizer, texts: Sequence[str], *, special: bool) -> list[list[int]]:
    if not texts:
        return []  # of which a tokenizer makes floats
    return list(tokenizer(list(texts), add_special_tokens=special, return_attention_mask=False)["input_ids"])


def request(instruction: str, context: str = "") -> list[Message]:
    """The user's turn of a dataset row."""
    return [{"role": "user", "content": f"{instruction}\n\n{context}" if context else instruction}]
