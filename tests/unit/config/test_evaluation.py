"""The `evaluation` block: what it refuses, and how it says so."""

from __future__ import annotations

from datetime import date
from typing import Any

import pytest

from rose_ray.config import JobConfig, parse_config
from rose_ray.errors import ConfigError


def parsed(**evaluation: Any) -> JobConfig:
    held_out = {"name": "help", "pairs": [{"files": ["test.jsonl"]}]}
    return parse_config(
        {
            "workspace": "w",
            "model": {"base": "b"},
            "pool": {"inputs": [{"files": ["p.jsonl"]}]},
            "targets": [{"name": "a", "pairs": [{"files": ["v.jsonl"]}]}],
            "evaluation": {"held_out": [held_out], **evaluation},
        }
    )


def test_defaults_are_the_protocol() -> None:
    found = parsed().evaluation
    assert found is not None
    assert found.budgets == [0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0] and found.seeds == [0, 1, 2]
    assert found.references == ["zero_shot", "random", "full"] and found.training.epochs == 4


def test_whole_numbers_stand_for_shares() -> None:
    found = parsed(budgets=[0.5, 1]).evaluation
    assert found is not None and found.budgets == [0.5, 1.0]


ENDPOINT = {"name": "j", "kind": "endpoint", "url": "http://h/v1", "model": "m"}


@pytest.mark.parametrize(
    ("block", "message"),
    [
        ({"arms": ["b"]}, r"evaluation.arms: \['b'\] are not among the targets \['a'\]"),
        ({"budgets": [0.1, 0.1]}, "repeats a value"),
        ({"budgets": [1.5]}, "less than or equal to 1"),
        ({"budgets": []}, "nothing to train on"),
        ({"seeds": []}, "at least 1 item"),
        ({"controls": ["select_then_dpo"], "budgets": [0.1]}, "control_budget: 0.05 is not among budgets"),
        ({"judges": [ENDPOINT], "opponent": "random", "references": ["full"]}, "so never trained"),
        ({"judges": [{"name": "j", "kind": "endpoint", "url": "http://h"}]}, "kind endpoint needs model"),
        ({"judges": [{"name": "j", "kind": "rouge_l", "model": "m"}]}, "kind rouge_l has no use for model"),
        ({"judges": [{**ENDPOINT, "tie_margin": 0.1}]}, "has no use for tie_margin"),
        ({"judges": [{**ENDPOINT, "api_key_env": "sk-123"}]}, "api_key_env"),
        (
            {"judges": [{**ENDPOINT, "url": "http://user:key@h/v1"}]},
            "credentials in the URI at evaluation.judges.0.url",
        ),
        *(
            (
                {"judges": [{**ENDPOINT, "url": url}]},
                rf"evaluation\.judges\.0\.url(.|\n)*{fault}(.|\n)*host\.example/v1",
            )
            for url, fault in [
                ("host/v1", "does not begin with http://HOST"),
                ("http:///v1", "does not begin with http://HOST"),
                ("ftp://host/v1", "does not begin with http://HOST"),
                ("http://a b/v1", "white space"),
                ("http://h/v1\n", "white space"),
                ("http://hôst/v1", "beyond ASCII"),
                ("", "it is empty"),
                ("http://h:port/v1", "it is no URL: Port"),
                ("http://[::1/v1", "it is no URL: Invalid IPv6"),
                ("http://h/v1?api-version=1", "cannot be added behind"),
            ]
        ),
        ({"judges": [{**ENDPOINT, "extra_body": {"messages": []}}]}, "other parameters than messages: a judge sets"),
        ({"judges": [{**ENDPOINT, "extra_body": {"seed": date(2024, 1, 1)}}]}, "what JSON can hold: .* type date"),
        (
            {"judges": [{"name": "j", "kind": "rouge_l", "extra_body": {"seed": 1}}]},
            "kind rouge_l has no use for extra_body",
        ),
        ({"judges": [ENDPOINT, ENDPOINT]}, r"names must differ, found \['j'\]"),
        ({"judge": []}, "did you mean 'judges'"),
    ],
)
def test_refusals(block: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parsed(**block)
