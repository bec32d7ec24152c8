"""Reading pair files: subtasks, shots, and pairs that are refused."""

import json

import pytest

from rose_ray.data.preferences import PreferencePair, check_pairs, read_pairs
from rose_ray.errors import ConfigError, DataError, PairError
from rose_ray.filesystem import locate


def _row(number, **changes):
    return {"id": f"p{number}", "prompt": f"q{number}", "chosen": "good", "rejected": "bad", **changes}


def _file(tmp_path, rows, name="pairs.jsonl"):
    content = rows if isinstance(rows, str) else "\n".join(json.dumps(row) for row in rows)
    (tmp_path / name).write_text(content)
    return locate(str(tmp_path / name))


def _authors(num_prompts, **changes):
    entry = {
        "responses": [" a", " b"],
        "pairs": [[0, 1]],
        "sft_target": " a",
        "rejected_target": " b",
        **changes,
    }
    return json.dumps({f"\n\nHuman: q{i}\n\nAssistant:": entry for i in range(num_prompts)})


def _subtasks(pairs):
    return [(pair.pair_id, pair.subtask) for pair in pairs]


def test_one_subtask_named_by_the_target_or_as_told(tmp_path):
    files = [_file(tmp_path, [_row(1), _row(2)])]
    assert _subtasks(read_pairs(files, target="hh")) == [("p1", "hh"), ("p2", "hh")]
    assert _subtasks(read_pairs(files, target="hh", subtask="helpful"))[0] == ("p1", "helpful")


def test_subtasks_by_file(tmp_path):
    files = [_file(tmp_path, [_row(1)], "a.jsonl"), _file(tmp_path, [_row(2)], "b.jsonl")]
    pairs = read_pairs(files, target="t", subtasks_by_file={"a": "helpful", files[1].name: "harmless"})
    assert _subtasks(pairs) == [("p1", "helpful"), ("p2", "harmless")]
    with pytest.raises(ConfigError, match=r"no subtask for '.*b\.jsonl'"):
        read_pairs(files, target="t", subtasks_by_file={"a": "helpful"})


@pytest.mark.parametrize(("name", "content"), [("a.jsonl", ""), ("a.json", "{}"), ("a.json", "[]")])
def test_a_file_without_pairs_beside_a_full_one(tmp_path, name, content):
    files = [_file(tmp_path, [_row(1)]), _file(tmp_path, content, name)]
    with pytest.raises(PairError, match=rf"^target t: no pairs \(.*{name}: "):
        read_pairs(files, target="t")
    with pytest.raises(PairError, match=rf"^target t: subtask 'b' has no pairs \(.*{name}: "):
        read_pairs(files, target="t", subtask="b")
    with pytest.raises(PairError, match=rf"^target t: subtask 'c' has no pairs \(.*{name}: "):
        read_pairs(files, target="t", subtasks_by_file={"pairs": "b", "a": "c"})


def test_subtask_field(tmp_path):
    rows = [_row(1, topic="x"), _row(2, topic="y"), _row(3, topic="x")]
    pairs = read_pairs([_file(tmp_path, rows)], target="t", subtask_field="topic")
    assert [pair.subtask for pair in pairs] == ["x", "y", "x"]
    rows = [_row(1, topic="x"), _row(2), _row(3, topic=" ")]
    with pytest.raises(PairError, match=r"2 of 3 rows name no subtask at 'topic': rows 2, 3 of .*pairs\.jsonl"):
        read_pairs([_file(tmp_path, rows)], target="t", subtask_field="topic")


def test_authors_file_in_blocks(tmp_path):
    pairs = read_pairs([_file(tmp_path, _authors(6), "p.json")], target="shp", subtask_blocks=3)
    assert [pair.subtask for pair in pairs] == [
        "block_00",
        "block_00",
        "block_01",
        "block_01",
        "block_02",
        "block_02",
    ]
    assert (pairs[0].prompt[0].content, pairs[0].chosen, pairs[0].raw_chosen) == ("q0", "a", " a")
    assert len({pair.pair_id for pair in pairs}) == 6 and all(len(pair.pair_id) == 32 for pair in pairs)


@pytest.mark.parametrize(("num_pairs", "blocks"), [(7, 3), (2, 3)])
def test_blocks_that_do_not_divide(tmp_path, num_pairs, blocks):
    with pytest.raises(PairError, match=rf"{num_pairs} pairs in .* do not divide into {blocks} equal blocks"):
        read_pairs([_file(tmp_path, _authors(num_pairs), "p.json")], target="t", subtask_blocks=blocks)


def test_blocks_need_one_file(tmp_path):
    files = [_file(tmp_path, [_row(i)], f"{i}.jsonl") for i in range(2)]
    with pytest.raises(PairError, match="needs one file, found 2"):
        read_pairs(files, target="t", subtask_blocks=2)


def test_shots_are_the_first_of_each_subtask(tmp_path):
    rows = [_row(i, topic="x" if i in (0, 3, 4) else "y") for i in range(6)]
    pairs = read_pairs([_file(tmp_path, rows)], target="t", subtask_field="topic", shots=2)
    assert [pair.pair_id for pair in pairs] == ["p0", "p1", "p2", "p3"]
    with pytest.raises(PairError, match="4 shots asked for, but subtask 'x' has 3, 'y' has 3"):
        read_pairs([_file(tmp_path, rows)], target="t", subtask_field="topic", shots=4)
    with pytest.raises(ConfigError, match="at least 1"):
        read_pairs([_file(tmp_path, rows)], target="t", shots=0)


def test_a_subtask_without_pairs(tmp_path):
    with pytest.raises(PairError, match="target t: no preference pairs"):
        read_pairs([], target="t", subtask="x")
    with pytest.raises(PairError, match=r"1 pairs .* do not divide into 2"):
        read_pairs([_file(tmp_path, [_row(1)])], target="t", subtask_blocks=2)


def test_equal_and_empty_sides_are_listed_by_id(tmp_path):
    rows = [
        _row(1),
        _row(2, rejected=" good\n"),
        _row(3, chosen="  "),
        _row(4, rejected=""),
        _row(5, chosen="bad"),
    ]
    with pytest.raises(PairError) as caught:
        read_pairs([_file(tmp_path, rows)], target="t")
    message = str(caught.value)
    assert "2 of 5 pairs have an empty side: p3" in message and "p4" in message
    assert "2 of 5 pairs have equal sides: p2" in message and "p5" in message and "p1" not in message


def test_authors_pair_with_equal_sides_is_found_by_its_row(tmp_path):
    file = _file(tmp_path, _authors(1, rejected_target="a "), "p.json")
    with pytest.raises(PairError, match=r"equal sides: [0-9a-f]{32} \(.*p\.json row 1\)"):
        read_pairs([file], target="t")


def test_ids(tmp_path):
    rows = [_row(1, id="000123"), _row(2, id=42), {"prompt": "q", "chosen": "a", "rejected": "b"}]
    ids = [pair.pair_id for pair in read_pairs([_file(tmp_path, rows)], target="t")]
    assert ids[:2] == ["000123", "42"] and len(ids[2]) == 32
    again = read_pairs([_file(tmp_path, rows[::-1])], target="other", subtask="s")
    assert again[0].pair_id == ids[2]
    with pytest.raises(PairError, match=r"neither text nor whole numbers: .*row 1 \(a boolean\)"):
        read_pairs([_file(tmp_path, [_row(1, id=True)])], target="t")


def test_equal_ids(tmp_path):
    with pytest.raises(PairError, match="1 of 2 pairs share an id with a pair of other content or subtask: p1"):
        read_pairs([_file(tmp_path, [_row(1), _row(1, chosen="better")])], target="t")
    with pytest.raises(PairError, match="1 of 2 pairs stand twice: p1"):
        read_pairs([_file(tmp_path, [_row(1), _row(1)])], target="t")
    files = [_file(tmp_path, [_row(1)], f"{name}.jsonl") for name in "ab"]
    with pytest.raises(PairError, match="share an id"):
        read_pairs(files, target="t", subtasks_by_file={"a": "x", "b": "y"})


def test_wrong_rows_are_errors_with_their_places(tmp_path):
    lines = [json.dumps(_row(1)), "{broken", json.dumps({"prompt": "q", "chosen": "a"}), json.dumps(_row(4))]
    with pytest.raises(PairError) as caught:
        read_pairs([_file(tmp_path, "\n".join(lines))], target="t")
    message = str(caught.value)
    assert "2 rows are no usable pairs" in message
    assert "row 2: not_json" in message and "row 3: unknown_schema" in message


def test_formats(tmp_path):
    implicit = {"chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "\n\nHuman: q\n\nAssistant: b"}
    with pytest.raises(PairError, match=r"explicit \(row 1\) and implicit \(row 2\)"):
        read_pairs([_file(tmp_path, [_row(1), implicit])], target="t")
    with pytest.raises(PairError, match="expected the key 'conversations'"):
        read_pairs([_file(tmp_path, [_row(1)])], target="t", format="sharegpt")
    with pytest.raises(PairError, match=r"rose_authors is a \.json file"):
        read_pairs([_file(tmp_path, [_row(1)])], target="t", format="rose_authors")
    with pytest.raises(DataError, match="array of objects, found an object"):
        read_pairs([_file(tmp_path, _authors(1), "p.json")], target="t", format="explicit")
    array = _file(tmp_path, json.dumps([implicit]), "array.json")
    assert read_pairs([array], target="t")[0].chosen == "a"


def test_broken_authors_files(tmp_path):
    with pytest.raises(PairError, match="duplicate_key"):
        read_pairs([_file(tmp_path, '{"q": {}, "q": {}}', "p.json")], target="t")
    with pytest.raises(PairError, match=r"row 1: unknown_schema: .*found an array"):
        read_pairs([_file(tmp_path, '{"q": []}', "p.json")], target="t")
    with pytest.raises(PairError, match="expected the key 'rejected_target'"):
        read_pairs([_file(tmp_path, '{"q": {"sft_target": "a"}}', "p.json")], target="t")


def test_one_way_to_name_subtasks(tmp_path):
    with pytest.raises(ConfigError, match="subtask and subtask_blocks contradict"):
        read_pairs([_file(tmp_path, [_row(1)])], target="t", subtask="x", subtask_blocks=1)


def test_check_over_joined_inputs():
    pair = PreferencePair("p", "s", (), "a", "b", "", "a", "b")
    with pytest.raises(PairError, match="stand twice: p"):
        check_pairs([pair, PreferencePair("p", "s", (), "a", "b", "", "a", "b")], target="t")
    check_pairs([pair], target="t")
