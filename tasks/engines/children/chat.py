"""The harness's questions asked as a conversation, with the token ids that generation and training have."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jinja2 import TemplateError

from tasks.algorithms.prompts import Message, prompt_text


class ChatPrompts:
    """Goes before one of the harness's backends among the bases of a class.

    The harness itself adds a start token to a template's text that does not begin with one, and takes white space
    that ends a prompt for the answer's; neither is what the model was trained on.
    """

    tokenizer: Any

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.add_bos_token = False  # so it encodes without special tokens, whatever the tokenizer would add

    def apply_chat_template(self, chat_history: Sequence[Message], add_generation_prompt: bool = True) -> str:
        assert add_generation_prompt, "no task of the leaderboard begins the answer itself"
        try:
            return prompt_text(self.tokenizer, chat_history)
        except TemplateError:  # some templates refuse a system message; the harness leaves it out then
            return prompt_text(self.tokenizer, [turn for turn in chat_history if turn["role"] != "system"])

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        prompt, answer = (self.tokenizer.encode(text, add_special_tokens=False) for text in (context, continuation))
        return prompt, answer
