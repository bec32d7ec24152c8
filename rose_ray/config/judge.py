"""Who compares two answers: an entry of `evaluation.judges`."""

from __future__ import annotations

import json
import re
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import Field, field_validator, model_validator

from rose_ray.config.strict import Name, Strict

JudgeKind = Literal["endpoint", "local_model", "reward_model", "rouge_l", "cross_entropy"]

_NEEDS: dict[str, set[str]] = {"endpoint": {"url", "model"}, "local_model": {"model"}, "reward_model": {"model"}}
_ENDPOINT_ONLY = {
    "url",
    "api_key_env",
    "timeout_seconds",
    "retries",
    "backoff_seconds",
    "token_budget",
    "max_reply_tokens",
    "extra_body",
    "parallel",
    "max_unusable",
}

_URL_CHARACTERS = re.compile(r"[!-~]+")
"""Of ASCII what can be seen; anything else has to be written as %XX, a host as xn--."""


class JudgeConfig(Strict):
    """One judge. Each comparison is judged in both orders."""

    name: Name = Field(description="Name in tables and paths.")
    kind: JudgeKind = Field(
        description="An OpenAI-compatible endpoint; a causal language model or a sequence-classification reward model "
        "in a folder; ROUGE-L against the chosen answer; cross-entropy of the chosen answer, lower wins."
    )
    url: str | None = Field(None, description="Of the endpoint, http or https, up to /v1; /chat/completions is added.")
    model: str | None = Field(None, description="The endpoint's name of the model, or a folder or hub name.")
    api_key_env: Annotated[str, Field(pattern=r"^[A-Z_][A-Z0-9_]*$", max_length=64)] | None = Field(
        None, description="Environment variable that holds the endpoint's key; never the key itself."
    )
    timeout_seconds: float = Field(60.0, gt=0, description="Of one request, until its reply is there whole.")
    retries: int = Field(3, ge=0, description="Further tries of a request that failed, or whose reply is no verdict.")
    backoff_seconds: float = Field(1.0, ge=0, description="Wait before the first further try; doubles each time.")
    token_budget: int | None = Field(
        None, ge=1, description="Stop before this many tokens, prompts and replies, are spent in the workspace."
    )
    max_reply_tokens: int = Field(256, ge=1, description="Longest reply.")
    extra_body: dict[str, Any] = Field(
        {},
        description="Parameters of the request, beside or instead of temperature: 0 and max_tokens; null removes one.",
    )
    parallel: int = Field(4, ge=1, description="Requests at a time.")
    max_unusable: float = Field(
        0.1, ge=0, le=1, description="Largest share of comparisons without a verdict before the evaluation stops."
    )
    tie_margin: float = Field(0.0, ge=0, description="Scores closer than this are a tie; not for endpoints.")

    @field_validator("url")
    @classmethod
    def _url_of_an_endpoint(cls, url: str | None) -> str | None:
        if url is not None and (fault := _url_fault(url)):
            raise ValueError(f"{fault}; expected for instance https://host.example/v1")
        return url

    @field_validator("extra_body")
    @classmethod
    def _parameters_of_a_request(cls, body: dict[str, Any]) -> dict[str, Any]:
        fixed = sorted({"model", "messages", "stream"} & set(body))
        if fixed:
            raise ValueError(f"expected other parameters than {', '.join(fixed)}: a judge sets these itself")
        try:
            json.dumps(body, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise ValueError(f"expected what JSON can hold: {error}") from error
        return body

    @model_validator(mode="after")
    def _fields_fit_kind(self) -> JudgeConfig:
        missing = sorted(name for name in _NEEDS.get(self.kind, set()) if getattr(self, name) is None)
        if missing:
            raise ValueError(f"judge {self.name}: kind {self.kind} needs {' and '.join(missing)}")
        fields = type(self).model_fields
        idle = set() if self.kind == "endpoint" else set(_ENDPOINT_ONLY)
        idle |= {"model"} if self.kind in ("rouge_l", "cross_entropy") else set()
        idle |= {"tie_margin"} if self.kind == "endpoint" else set()
        idle = {name for name in idle if getattr(self, name) != fields[name].default}
        if idle:
            raise ValueError(f"judge {self.name}: kind {self.kind} has no use for {', '.join(sorted(idle))}")
        return self


def _url_fault(url: str) -> str:
    """What is wrong, without the URL: it may hold a key."""
    if not _URL_CHARACTERS.fullmatch(url):
        return "it is empty, or holds white space or a character beyond ASCII"
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError as error:
        return f"it is no URL: {error}"
    if parts.scheme not in ("http", "https") or not host:
        return "it does not begin with http://HOST or https://HOST"
    if parts.query or parts.fragment:
        return "/chat/completions cannot be added behind ? or #"
    return ""
