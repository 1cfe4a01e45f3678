"""A fake model that writes what a test wants, and a chat template that knows tools and reasoning."""

from __future__ import annotations

import tokenizers
from fixtures_text import EOS_ID

THINKING = (
    "{% if tools %}<|im_start|>system\n<tools>{% for t in tools %}{{ t | tojson }}{% endfor %}</tools>"
    " <tool_call> </think><|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}{{ m.content }}"
    "{% for c in m.tool_calls %}<tool_call>{{ c.function | tojson }}</tool_call>{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is not defined or enable_thinking %}<think>\n{% endif %}{% endif %}"
)


class Says:
    """Writes `text` behind every prompt, then ends its turn."""

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        self._backend = backend
        self._prompt: tuple[int, ...] = ()
        self.text = ""
        self.prompts: list[str] = []

    def __call__(self, tokens: tuple[int, ...]) -> int:
        if not self._prompt or tokens[: len(self._prompt)] != self._prompt or not self._goes_on(tokens):
            self._prompt = tokens
            self.prompts.append(self._backend.decode(list(tokens), skip_special_tokens=False))
        ids = self._backend.encode(self.text, add_special_tokens=False).ids
        done = len(tokens) - len(self._prompt)
        return ids[done] if done < len(ids) else EOS_ID

    def _goes_on(self, tokens: tuple[int, ...]) -> bool:
        ids = self._backend.encode(self.text, add_special_tokens=False).ids
        rest = list(tokens[len(self._prompt) :])
        return bool(rest) and rest == [*ids, EOS_ID, EOS_ID][: len(rest)]
