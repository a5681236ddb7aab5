"""Chat templates of the kinds that there are: with a default system message, without, and with none at all."""

from __future__ import annotations

from helpers import make_tokenizer
from transformers import PreTrainedTokenizerFast

END = "</s>{{ '\n' }}"
TURNS = "{% for m in messages %}<s>{{ m.role }}\n{{ m.content }}" + END + "{% endfor %}"
ANSWER = "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
# System messages as turns (Qwen 3); a default one (SmolLM2); within the user's turn (Gemma 3), also behind a mark;
# refused (Gemma 2).
WITHIN = (
    "{% if messages[0].role == 'system' %}{% set first = 'MARK' + messages[0].content + '\n\n' %}"
    "{% set messages = messages[1:] %}{% else %}{% set first = '' %}{% endif %}"
    "{% for m in messages %}<s>{{ m.role }}\n{{ first if loop.first else '' }}{{ m.content }}" + END + "{% endfor %}"
    "" + ANSWER
)
TEMPLATES = {
    "turns": TURNS + ANSWER,
    "default": "{% if messages[0].role != 'system' %}<s>system\nbe good" + END + "{% endif %}" + TURNS + ANSWER,
    "within": WITHIN.replace("MARK", ""),
    "marked": WITHIN.replace("MARK", "# "),
    "refused": "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "" + TURNS + ANSWER,
}
# Headers end in a space, one token with the first word (Vicuna), also where system messages follow them (Llama 2).
SPACED = {
    "spaced": "{% for m in messages %}<s>{{ m.role }}: {{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant:{% endif %}",
    "behind": "{% if messages[0].role == 'system' %}{% set first = '## ' + messages[0].content + ' ##\n\n' %}"
    "{% set messages = messages[1:] %}{% else %}{% set first = '' %}{% endif %}"
    "{% for m in messages %}{% if m.role == 'user' %}<s># {{ first if loop.first else '' }}{{ m.content }} #:"
    "{% else %} {{ m.content }} </s>{% endif %}{% endfor %}",
}


def chatty(name: str) -> PreTrainedTokenizerFast:
    """The tests' tokenizer with one of the templates."""
    tokenizer = make_tokenizer()
    tokenizer.chat_template = {**TEMPLATES, **SPACED}[name]
    return tokenizer


def conversation(question: str, answer: str, system: str | None = None) -> dict[str, list[dict[str, str]]]:
    """A row of messages."""
    before = [] if system is None else [{"role": "system", "content": system}]
    return {
        "prompt": [*before, {"role": "user", "content": question}],
        "completion": [{"role": "assistant", "content": answer}],
    }
