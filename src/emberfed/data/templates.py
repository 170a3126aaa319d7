"""How a record becomes a prompt. The response, and end of text after it, follow the prompt directly."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from emberfed.data.config import Template
from emberfed.errors import DataError

_WITH_CONTEXT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
)
_WITHOUT_CONTEXT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
)
_NAMES = {"user": "Instruction", "assistant": "Response", "system": "System"}


def prompt(record: Mapping[str, Any], template: Template, tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the prompt of a record, up to where the response begins.

    Raises: DataError if the chat template is asked for and the tokenizer has none.
    """
    if template == "chat":
        return _chat(record, tokenizer)
    opening = "" if template == "short" else _WITH_CONTEXT if record["context"] else _WITHOUT_CONTEXT
    history = "".join(f"### {_NAMES[turn['role']]}:\n{turn['content']}\n\n" for turn in record["history"])
    context = f"### Input:\n{record['context']}\n\n" if record["context"] else ""
    return f"{opening}{history}### Instruction:\n{record['instruction']}\n\n{context}### Response:\n"


def _chat(record: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> str:
    if tokenizer.chat_template is None:
        raise DataError(
            "data.template is 'chat' but the model's tokenizer has no chat template; use 'alpaca' or 'short'"
        )
    question = f"{record['instruction']}\n\n{record['context']}" if record["context"] else record["instruction"]
    turns: Sequence[Mapping[str, str]] = [*record["history"], {"role": "user", "content": question}]
    try:
        text = tokenizer.apply_chat_template(list(turns), tokenize=False, add_generation_prompt=True)
    except TemplateError as error:
        raise DataError(
            f"the chat template refuses a record ({error}); use data.template 'alpaca' or 'short'"
        ) from None
    assert isinstance(text, str)
    return text
