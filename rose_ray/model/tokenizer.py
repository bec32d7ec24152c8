"""Tokenizer and chat template of the base model. Nothing here imports torch or PEFT: readers start many processes."""

from __future__ import annotations

import hashlib
import json
import os
from typing import Any

from rose_ray.config.model import ModelConfig
from rose_ray.data.chat import TULU_TEMPLATE, ChatTemplate
from rose_ray.data.tokenize import Tokeniser
from rose_ray.errors import ModelError

_TEMPLATE_NAMES = ("tokenizer", "tulu")


def resolve_base(model: ModelConfig) -> str:
    """Return the local folder of the base model, downloading it from the hub where the name is not a folder.

    Raises:
        ModelError: There is no such folder or repository.
    """
    try:
        return model_folder(model.base)
    except ModelError as error:
        raise ModelError(f"model.base: {error}") from error


def model_folder(name: str) -> str:
    """Return the local folder of any model, as `resolve_base`. Its caller says which key has the name.

    Raises:
        ModelError: There is no such folder or repository.
    """
    if os.path.isdir(name):
        return os.path.abspath(name)
    from huggingface_hub import snapshot_download

    try:
        path: str = snapshot_download(
            name, allow_patterns=["*.py", "*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]
        )
    except Exception as error:  # the hub client raises many unrelated types
        raise ModelError(f"{name!r} is no folder here, and the hub gave: {type(error).__name__}: {error}") from error
    return path


def with_absolute_paths(model: ModelConfig) -> ModelConfig:
    """Return the configuration with its local paths made absolute: workers run in folders of their own."""
    absolute = {
        name: os.path.abspath(value)
        for name, value in (("base", model.base), ("template", model.template))
        if value not in _TEMPLATE_NAMES and os.path.exists(value)
    }
    return model.model_copy(update=absolute)


def load_tokenizer(model: ModelConfig) -> Any:
    """Return the base model's tokenizer, with a padding token (the end token where it has none of its own).

    Raises:
        ModelError: It cannot be loaded.
    """
    from transformers import AutoTokenizer  # half a second, which most processes need not pay

    folder = resolve_base(model)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=model.trust_remote_code)
    except (OSError, ValueError) as error:
        raise ModelError(f"{model.base}: cannot load its tokenizer: {error}") from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token  # padding is masked out everywhere, so its value never matters
    return tokenizer


def chat_template(model: ModelConfig, tokenizer: Any) -> ChatTemplate:
    """Return the chat template that ``model.template`` names.

    Raises:
        ModelError: The tokenizer has none, or no end token for ``tulu``, or the file cannot be read.
    """
    if model.template == "tokenizer":
        source = tokenizer.chat_template
        if not isinstance(source, str):
            raise ModelError(
                f"model.template: tokenizer, but the tokenizer of {model.base!r} has no chat template. "
                "Set it to tulu, or to a Jinja file."
            )
    elif model.template == "tulu":
        if tokenizer.eos_token is None:
            raise ModelError(
                f"model.template: tulu ends answers with the end token, and the tokenizer of {model.base!r} has none "
                "(eos_token). Give it one, or set model.template to tokenizer or a Jinja file."
            )
        source = TULU_TEMPLATE
    else:
        try:
            with open(model.template, encoding="utf-8") as file:
                source = file.read()
        except OSError as error:
            raise ModelError(
                f"model.template: {model.template!r} is neither tokenizer nor tulu nor a readable file: "
                f"{error.strerror}."
            ) from error
    bos = tokenizer.bos_token or ""
    if model.template == "tulu" and tokenizer(" ")["input_ids"][:1] != [tokenizer.bos_token_id]:
        bos = ""  # LESS's code adds what the tokenizer adds by itself, and nothing else
    return ChatTemplate(
        source=source,
        bos_token=bos,
        eos_token=tokenizer.eos_token or "",
        end_tokens=_special_tokens(tokenizer),
        loss_on_turn_tail=model.loss_on_turn_tail,
    )


def _special_tokens(tokenizer: Any) -> tuple[str, ...]:
    # Templates also end turns with special tokens that have no name (bos, eos, ...) in the tokenizer's configuration.
    added = (token.content for token in tokenizer.added_tokens_decoder.values() if token.special)
    return tuple(dict.fromkeys([*tokenizer.all_special_tokens, *added]))


def load_tokeniser(model: ModelConfig) -> Tokeniser:
    """Return the tokeniser of the pool and of chat-encoded pairs."""
    tokenizer = load_tokenizer(model)
    return Tokeniser(tokenizer, chat_template(model, tokenizer), model.max_tokens)


def describe_text(model: ModelConfig) -> str:
    """Return `text_digest` of the base model."""
    return text_digest(load_tokeniser(model))


def text_digest(tokeniser: Tokeniser) -> str:
    """Return the digest, 16 hex digits, of how text becomes tokens: tokenizer, chat template, what carries loss."""
    template = tokeniser.template
    parts = [
        tokeniser.tokenizer.backend_tokenizer.to_str(),
        template.source,
        template.bos_token,
        template.eos_token,
        list(template.end_tokens),
        template.loss_on_turn_tail,
    ]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]
