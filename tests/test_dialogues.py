"""Records in common formats: each gives the intended turns, or an error that names why it gives none."""

import csv
import gzip
import json
import re
from pathlib import Path
from typing import Any

import pytest

from finback import readers
from finback.config import UserError
from finback.data import dialogues, tokenizer
from finback.data.dialogues import read_dialogue
from finback.data.messages import IGNORE, lessons
from finback.data.openai_messages import read_messages
from finback.data.tokenizer import Tokenizer
from finback.data.tools import ToolCall
from finback.data.turn import Message
from tests.toy import WORDS

USER, ANSWER = Message("user", "4+5?"), Message("assistant", "9")
ASKED, SAID = {"role": "user", "content": "4+5?"}, {"role": "assistant", "content": "9"}
THOUGHT = Message("assistant", "9", "five more")
UNLEARNT = Message("assistant", "9", learnt=False)


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return tokenizer.train([WORDS], 320, tmp_path_factory.mktemp("words") / "tokenizer.json")


def called(name: str, arguments: str, id: str | None = None) -> Message:
    return Message("assistant", "", tool_calls=(ToolCall(name, arguments, id),))


CALL = {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": 4}'}}


@pytest.mark.parametrize(
    ("record", "turns"),
    [
        # ShareGPT and similar formats
        ({"conversations": [{"from": "human", "value": "4+5?"}, {"from": "gpt", "value": "9"}]}, (USER, ANSWER)),
        ({"conversations": [{"from": "user", "value": "4+5?"}, {"from": "Assistant", "value": "9"}]}, (USER, ANSWER)),
        ({"conversation": [ASKED, SAID]}, (USER, ANSWER)),
        (
            {"system": "be kind", "conversations": [{"from": "human", "value": "4+5?"}, {"from": "gpt", "value": "9"}]},
            (Message("system", "be kind"), USER, ANSWER),
        ),
        (
            {
                "conversations": [
                    {"from": "human", "value": "4+5?"},
                    {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 4}}'},
                    {"from": "observation", "value": "9"},
                    {"from": "gpt", "value": "9"},
                ]
            },
            (USER, called("add", '{"a": 4}'), Message("tool", "9"), ANSWER),
        ),
        # instructions
        ({"instruction": "4+5?", "input": "", "output": "9"}, (USER, ANSWER)),
        ({"instruction": "Add.", "input": "4 5", "output": "9"}, (Message("user", "Add.\n\n4 5"), ANSWER)),
        ({"instruction": "Add.", "context": "4 5", "response": "9"}, (Message("user", "Add.\n\n4 5"), ANSWER)),
        ({"instruction": "", "input": "4+5?", "output": "9"}, (USER, ANSWER)),
        (
            {"instruction": "4+5?", "output": "9", "history": [["hi", "hello"]], "system": "be kind"},
            (Message("system", "be kind"), Message("user", "hi"), Message("assistant", "hello"), USER, ANSWER),
        ),
        # prompts and completions
        ({"prompt": "4+5?", "completion": "9"}, (USER, ANSWER)),
        ({"prompt": [ASKED], "completion": [SAID]}, (USER, ANSWER)),
        ({"prompt": [ASKED], "completion": "9"}, (USER, ANSWER)),
        ({"prompt": [ASKED, SAID, ASKED], "completion": SAID}, (USER, UNLEARNT, USER, ANSWER)),
        ({"prompt": json.dumps([ASKED]), "completion": json.dumps([SAID])}, (USER, ANSWER)),
        # questions and answers
        ({"question": "4+5?", "answer": 9}, (USER, ANSWER)),
        ({"question": "4+5?", "answer": 4.5}, (USER, Message("assistant", "4.5"))),
        ({"question": "4+5?", "answer": 1e-7}, (USER, Message("assistant", "1e-7"))),
        ({"question": "4+5?", "answer": 1e22}, (USER, Message("assistant", "1e22"))),
        ({"query": "4+5?", "response": "9"}, (USER, ANSWER)),
        ({"problem": "4+5?", "solution": "9"}, (USER, ANSWER)),
        ({"input": "4+5?", "output": "9"}, (USER, ANSWER)),
        ({"question": "Sort 3 1", "answer": "[1, 3]"}, (Message("user", "Sort 3 1"), Message("assistant", "[1, 3]"))),
        ({"prompt": "JSON!", "completion": '{"a": 1}'}, (Message("user", "JSON!"), Message("assistant", '{"a": 1}'))),
        ({"messages": None, "question": "4+5?", "answer": "9", "text": "4+5? 9"}, (USER, ANSWER)),
        # OpenAI's messages
        (
            {
                "messages": [
                    {"role": "user", "content": [{"type": "text", "text": "4+"}, {"type": "text", "text": "5?"}]},
                    SAID,
                ]
            },
            (USER, ANSWER),
        ),
        ({"messages": json.dumps([ASKED, SAID])}, (USER, ANSWER)),
        (
            {"messages": [{"role": "developer", "content": "be kind"}, ASKED, SAID]},
            (Message("system", "be kind"), USER, ANSWER),
        ),
        ({"messages": [ASKED, {"role": "assistant", "content": 9}]}, (USER, ANSWER)),
        ({"conversations": [ASKED, {**SAID, "train": False}, ASKED, SAID]}, (USER, UNLEARNT, USER, ANSWER)),
        ({"messages": [ASKED, {**SAID, "weight": 0}, ASKED, {**SAID, "weight": 1}]}, (USER, UNLEARNT, USER, ANSWER)),
        (
            {
                "messages": [
                    ASKED,
                    {"role": "assistant", "content": None, "tool_calls": [CALL]},
                    {"role": "tool", "tool_call_id": "1", "content": "9"},
                    SAID,
                ]
            },
            (USER, called("add", '{"a": 4}', "1"), Message("tool", "9", tool_call_id="1"), ANSWER),
        ),
        (
            {
                "messages": [
                    ASKED,
                    {"role": "assistant", "content": None, "function_call": {"name": "add", "arguments": '{"a": 4}'}},
                    {"role": "function", "name": "add", "content": "9"},
                    SAID,
                ]
            },
            (USER, called("add", '{"a": 4}'), Message("tool", "9", name="add"), ANSWER),
        ),
        # chains of thought under any key
        *(({"messages": [ASKED, {**SAID, name: "five more"}]}, (USER, THOUGHT)) for name in dialogues.REASONING),
        *(({"question": "4+5?", "answer": "9", name: "five more"}, (USER, THOUGHT)) for name in dialogues.REASONING),
        *(
            ({"prompt": "4+5?", "completion": text}, (USER, THOUGHT))
            for text in (
                "<think>five more</think>9",
                "\n<think>\nfive more\n</think>\n\n9",
                "five more</think>9",
                "<thinking>five more</thinking>\n9",
                "<THINK> five more </ think>9",
                "<|begin_of_thought|>five more<|end_of_thought|>\n\n<|begin_of_solution|> 9 <|end_of_solution|>",
                "<|begin_of_thought|>\nfive more\n<|end_of_thought|>\n9",
                "[THINK]five more[/THINK]9",
            )
        ),
        ({"question": "4+5?", "answer": "<think>\n\n</think>\n\n9"}, (USER, ANSWER)),
        ({"question": "4+5?", "answer": "9", "reasoning": "<think>five more</think>"}, (USER, THOUGHT)),
        ({"question": "4+5?", "answer": "<think>five more</think>9", "reasoning": "five more"}, (USER, THOUGHT)),
        ({"messages": [ASKED, {**SAID, "content": "", "reasoning": "<think>five more</think>9"}]}, (USER, THOUGHT)),
        (
            {
                "messages": [
                    ASKED,
                    {
                        "role": "assistant",
                        "content": [{"type": "thinking", "thinking": "five more"}, {"type": "text", "text": "9"}],
                    },
                ]
            },
            (USER, THOUGHT),
        ),
        (
            {"question": "Tag?", "answer": "It is `<think>`."},
            (Message("user", "Tag?"), Message("assistant", "It is `<think>`.")),
        ),
        # an empty answer is context without labels
        (
            {"messages": [ASKED, {"role": "assistant", "content": None}, ASKED, SAID]},
            (USER, Message("assistant", "", learnt=False), USER, ANSWER),
        ),
    ],
)
def test_a_record_gives_the_turns_that_were_meant(record: dict[str, Any], turns: tuple[Message, ...]) -> None:
    assert read_dialogue(record).messages == turns


@pytest.mark.parametrize(
    ("record", "why"),
    [
        ([ASKED, SAID], "record: not an object"),
        ({"text": "Whales sing."}, "record: no usable field"),
        ({"prompt": "4+5?", "chosen": "9", "rejected": "8"}, "record: no usable field"),
        ({"question": "", "answer": "9"}, "question: empty"),
        ({"question": "4+5?", "answer": ""}, "messages: the answer is empty"),
        ({"question": "4+5?", "answer": None}, "messages: the answer is empty"),
        ({"question": "4+5?", "answer": "<think>five more</think>"}, "messages: the answer is empty"),
        ({"question": "4+5?", "answer": True}, "answer: expected a text"),
        ({"question": "4+5?", "answer": float("nan")}, "answer: expected a text"),
        ({"question": "4+5?", "answer": ["9", "nine"]}, r"answer\[0\]: not an object"),
        (
            {"question": "Which?", "answer": "B", "choices": ["4", "9"]},
            "choices: choices that the question does not show",
        ),
        ({"prompt": "4+5?", "completion": "8", "label": False}, "label: a completion marked as a negative example"),
        ({"messages": [ASKED]}, "messages: there is no assistant turn"),
        ({"messages": [ASKED, {**SAID, "weight": 0}]}, "messages: every answer has weight 0"),
        ({"messages": [ASKED, {**SAID, "weight": 0.5}]}, r"messages\[1\].weight: neither 0 nor 1"),
        ({"messages": [{"role": "user", "content": None}, SAID]}, r"messages\[0\].content: expected a text"),
        ({"messages": [{"role": "user", "content": " "}, SAID]}, r"messages\[0\].content: empty"),
        ({"messages": [{"role": "narrator", "content": "a"}, SAID]}, r"messages\[0\].role: no such role"),
        ({"messages": "not JSON"}, "messages: not a list"),
        ({"conversations": [{"from": "martian", "value": "a"}, {"from": "gpt", "value": "9"}]}, "no such role"),
        ({"conversations": [{"from": "function_call", "value": "add(4)"}]}, "function_call: not a call in JSON"),
        ({"messages": [ASKED, {"role": "tool", "content": "9"}, SAID]}, r"messages\[1\].role: no tool was called"),
        *(
            (
                {
                    "messages": [
                        ASKED,
                        {
                            "role": "assistant",
                            "content": None,
                            "tool_calls": [{"function": {"name": "add", "arguments": bad}}],
                        },
                    ]
                },
                r"messages\[1\].tool_calls: the arguments are not a JSON object",
            )
            for bad in ('{"a": 4', "4, 5", "[4, 5]")
        ),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}, SAID]}, "the model reads text only"),
        ({"question": "4+5?", "answer": "<think>five more"}, "its chain of thought never ends"),
        ({"question": "4+5?", "answer": "<think>a</think>b<think>c</think>9"}, "more than one chain of thought"),
        ({"question": "4+5?", "answer": "Well. <think>a</think>9"}, "a chain of thought within the answer"),
        (
            {"question": "4+5?", "answer": "<think>a</think>9", "reasoning": "b"},
            "differs from the chain of thought in the answer",
        ),
        ({"question": "4+5?", "answer": "9", "reasoning": "a</think>8"}, "differs from the answer after"),
        ({"question": "4+5?", "answer": "9", "reasoning": "a", "thinking": "b"}, "two chains of thought"),
        ({"question": "4\ud800?", "answer": "9"}, r"messages\[0\].content: half a character"),
        ({"question": "4+5?", "answer": "9", "reasoning": "\udc00"}, "half a character"),
    ],
)
def test_what_cannot_be_used_is_named(record: Any, why: str) -> None:
    with pytest.raises(UserError) as raised:
        read_dialogue(record)
    assert re.search(why, f"{raised.value.field}: {raised.value.problem}")


def test_an_unlearnt_turn_is_read_and_not_taught(words: Tokenizer) -> None:
    talk = (
        Message("user", "a"),
        Message("assistant", "bad", learnt=False),
        Message("user", "c"),
        Message("assistant", "good"),
    )
    (lesson,) = lessons(talk, words)
    taught = words.decode([i for i in lesson.labels if i != IGNORE], skip_special=True)
    assert "bad" in words.decode(lesson.ids) and taught == "good"


def test_tools_of_a_record_stand_before_its_calls(words: Tokenizer) -> None:
    tool = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
    for tools in ([tool], [tool["function"]], json.dumps([tool])):
        record = {"tools": tools, "messages": [ASKED, {"role": "assistant", "content": None, "tool_calls": [CALL]}]}
        dialogue = read_dialogue(record)
        (lesson,) = lessons(dialogue.messages, words, dialogue.tools)
        assert "### add" in words.decode(lesson.ids, skip_special=False)


def test_the_server_reads_the_same_messages() -> None:
    messages = [ASKED, {**SAID, "thinking": "five more"}, ASKED, {**SAID, "weight": 0}]
    assert tuple(read_messages(messages)) == (USER, THOUGHT, USER, UNLEARNT)


# ---- files --------------------------------------------------------------------------------------------------------------

ROWS = [{"question": 'He said "no",\nthen?', "answer": "x" * 200_000}, {"question": "Größe; 4,5?", "answer": "2"}]


def write_table(path: Path, separator: str) -> None:
    with path.open("w", newline="", encoding="utf-8-sig") as file:
        writer = csv.DictWriter(file, ["question", "answer"], delimiter=separator)
        writer.writeheader()
        writer.writerows(ROWS)


@pytest.mark.parametrize(
    "name",
    [
        "a.jsonl",
        "a.JSONL",
        "a.ndjson",
        "a.jsonl.gz",
        "a.json",
        "lines.json",
        "data.json",
        "a.csv",
        "b.csv",
        "a.TSV",
        "a.parquet",
    ],
)
def test_every_kind_of_file_holds_the_same_records(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    lines = "\n".join(map(json.dumps, ROWS)).encode()
    if name == "a.parquet":
        arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        parquet.write_table(arrow.Table.from_pylist(ROWS), path)
    elif name.endswith(("csv", "TSV")):
        write_table(path, {"a.csv": ",", "b.csv": ";", "a.TSV": "\t"}[name])
    else:
        listed = {"a.json": json.dumps(ROWS, indent=1), "data.json": json.dumps({"version": 1, "data": ROWS})}
        content = listed[name].encode() if name in listed else lines
        path.write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    found = list(readers.records(path, "mine"))
    assert [record for _, record in found] == ROWS
    places = {"a.json": ":6", "data.json": "[1]", "a.parquet": "[1]", "a.csv": ":4", "b.csv": ":4", "a.TSV": ":4"}
    assert found[1][0] == f"{path}{places.get(name, ':2')}"


def test_lines_that_are_no_records_are_named_and_the_others_read(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": 1}\n{"a": \n\n{"a": 2}\n')
    first, bad, last = readers.records(path, "mine")
    assert (first, last) == ((f"{path}:1", {"a": 1}), (f"{path}:4", {"a": 2}))
    assert bad[0] == f"{path}:2" and isinstance(bad[1], UserError) and bad[1].problem.startswith("not JSON")
    table = tmp_path / "a.csv"
    table.write_text("question,answer\n1,2\n3\n4,5,6\n7,8\n")
    kept = [(where, row) for where, row in readers.records(table, "mine") if not isinstance(row, UserError)]
    assert kept == [(f"{table}:2", {"question": "1", "answer": "2"}), (f"{table}:5", {"question": "7", "answer": "8"})]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", '[{"a": 1}\n {"a": 2}]', r"a\.json:2 = .*not JSON \(a comma"),
        ("a.json", '[{"a": 1},\n', "is not closed"),
        ("a.json", '[{"a": 1}]\n[{"a": 2}]', "text follows it"),
        ("a.csv", 'question,answer\n"x,y\n', r"a\.csv:\d+ = .*not a table"),
        ("a.csv", "answer,answer\n1,2\n", "two columns have the same name"),
        ("a.csv", "", "the file is empty"),
        ("a.csv", "question,answer\n", "the file has no records"),
        ("a.json", "[]", "the file has no records"),
    ],
)
def test_files_that_cannot_be_read_are_refused(name: str, content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=message):
        list(readers.records(tmp_path / name, "mine"))


def test_whole_numbers_in_a_column_of_floats_are_whole(tmp_path: Path) -> None:
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    table = arrow.table({"question": ["a", "b", "c"], "answer": [4.0, 4.5, None]})
    parquet.write_table(table, tmp_path / "a.parquet")
    (_, one), (_, two), (_, three) = readers.records(tmp_path / "a.parquet", "mine", fields=dialogues.FIELDS)
    assert read_dialogue(one).messages[1].content == "4" and read_dialogue(two).messages[1].content == "4.5"
    assert three == {"question": "c"}
    assert [*readers.records(tmp_path / "a.parquet", "mine")][2][1] == {"question": "c", "answer": None}


def test_columns_of_parquet_are_those_that_dialogues_use() -> None:
    names = {
        *dialogues.LISTS,
        *dialogues.BESIDE,
        *dialogues.PAIRS,
        *(n for each in dialogues.PAIRS.values() for n in each),
    }
    assert names <= {*dialogues.FIELDS}
