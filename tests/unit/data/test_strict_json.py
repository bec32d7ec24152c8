"""What a lenient JSON reader would change or drop is refused, and exact text is kept."""

import pytest

from rose_ray.data.strict_json import canonical_text, iter_array, parse_json, parse_object, without_key
from rose_ray.errors import RowError


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"a": NaN}', "not_json"),
        ('{"a": -Infinity}', "not_json"),
        ('{"a": 1e999}', "not_json"),
        ('{"a": ' + "1" * 5000 + "}", "not_json"),
        ('{"a": 1} {"b": 2}', "not_json"),
        ('{"a": "x\ty"}', "not_json"),
        ("{'a': 1}", "not_json"),
        ("", "not_json"),
        ("[" * 100_000, "not_json"),
        ('{"a": 1, "a": 2}', "duplicate_key"),
        ('{"a": [{"b": 1, "b": 1}]}', "duplicate_key"),
        ('{"a": "\\ud800"}', "invalid_unicode"),
        ('{"\\udfff": 1}', "invalid_unicode"),
        ("[1]", "not_object"),
        ('"text"', "not_object"),
        ("null", "not_object"),
    ],
)
def test_refused_with_a_reason(text, reason):
    with pytest.raises(RowError) as caught:
        parse_object(text)
    assert caught.value.reason == reason
    str(caught.value).encode()


def test_surrogate_pairs_and_escaped_backslashes_are_fine():
    assert parse_json('"\\ud83d\\ude00"') == "\N{GRINNING FACE}"
    assert parse_json('"\\\\ud800"') == "\\ud800"


def test_types_stay():
    value = parse_object(' {"id": "000123", "n": 12345678901234567890123, "t": true, "z": null, "f": 1.0} ')
    assert value == {"id": "000123", "n": 12345678901234567890123, "t": True, "z": None, "f": 1.0}
    assert type(value["n"]) is int and type(value["f"]) is float


def test_array_elements_keep_their_text_and_bad_ones_do_not_stop_the_rest():
    text = ' [ {"a":  1.50}, {"b": NaN, "c": [1, 2]},\n{"d": 1, "d": 2} , 7, {"e": "\\ud800"}, {}]\n'
    texts, values = zip(*iter_array(text), strict=True)
    assert texts == (
        '{"a":  1.50}',
        '{"b": NaN, "c": [1, 2]}',
        '{"d": 1, "d": 2}',
        "7",
        '{"e": "\\ud800"}',
        "{}",
    )
    reasons = [value.reason if isinstance(value, RowError) else value for value in values]
    assert reasons == [{"a": 1.5}, "not_json", "duplicate_key", 7, "invalid_unicode", {}]


def test_empty_array():
    assert list(iter_array(" [ ] ")) == []


@pytest.mark.parametrize("text", ['[{"a": 1}', '[{"a": 1},]', '[{"a": 1} {"b": 2}]', "[1] x", "[", '[{"a": }]'])
def test_broken_array(text):
    with pytest.raises(RowError, match="not_json"):
        list(iter_array(text))


def test_no_array():
    with pytest.raises(RowError, match="an object"):
        list(iter_array('{"a": 1}'))
    with pytest.raises(RowError, match="jsonl"):
        list(iter_array('{"a": 1}\n{"a": 2}\n'))


def test_canonical_text():
    assert canonical_text({"b": [1, "é"], "a": None}) == '{"a":null,"b":[1,"é"]}'


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ('{"k": 1}', "{}"),
        ('{ "k" : {"k": "}"} , "a": 1.10}', '{ "a": 1.10}'),
        ('{"a": "\\u00e9", "k": [1, 2], "b": 1e3}', '{"a": "\\u00e9", "b": 1e3}'),
        ('{"a": 1, "\\u006b": null}\n', '{"a": 1}\n'),
        (' {"a": {"k": 1}, "kk": "k"} ', ' {"a": {"k": 1}, "kk": "k"} '),
        ("{ }", "{ }"),
    ],
)
def test_a_key_is_taken_out_and_all_else_stays(text, left):
    assert without_key(text, "k") == left
    assert parse_object(without_key(text, "k")) == {k: v for k, v in parse_object(text).items() if k != "k"}
