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

    def encode(self, text: str, **options: Any) -> list[int]: ...


def prompt_ids(tokenizer: ChatTokenizer, messages: Sequence[Message]) -> list[int]:
    """Token ids of the conversation up to where the assistant's answer begins.

    The template's text already holds the special tokens, so nothing is added to it (no second BOS).
    """
    if tokenizer.chat_template is None:
        text = "\n\n".join(message["content"] for message in messages) + "\n\n"
        return tokenizer.encode(text)
    return tokenizer.encode(prompt_text(tokenizer, messages), add_special_tokens=False)


def prompt_text(tokenizer: ChatTokenizer, messages: Sequence[Message]) -> str:
    """What the chat template makes of the conversation, special tokens included."""
    return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))


def training_ids(tokenizer: ChatTokenizer, messages: Sequence[Message], answer: str) -> tuple[list[int], int]:
    """Token ids of prompt, answer and end-of-turn, and the length of the prompt, which bears no loss."""
    prompt = prompt_ids(tokenizer, messages)
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    return prompt + tokenizer.encode(answer, add_special_tokens=False) + end, len(prompt)


def request(instruction: str, context: str = "") -> list[Message]:
    """The user's turn of a dataset row."""
    return [{"role": "user", "content": f"{instruction}\n\n{context}" if context else instruction}]
