"""Calls in the forms of families other than DeepSeek and Hermes: by hand, in any pieces, and from partial markup."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finback.serve.parser import Parser
from finback.serve.tool_markup import coerced
from tests.test_parse import Said, fed, parse

PLACE = {
    "type": "object",
    "properties": {
        "city": {"type": "string"},
        "days": {"type": "integer"},
        "wind": {"anyOf": [{"type": "number"}, {"type": "null"}]},
        "tags": {"type": "array"},
    },
}
SCHEMAS = {"place": PLACE, "now": None}
CALLED = [("place", '{"city": "New\\n\\"York\\"", "days": 3, "wind": null, "tags": ["<a>"]}'), ("now", "{}")]

CODER = """<tool_call>
<function=place>
<parameter=city>
New
"York"
</parameter>
<parameter=days>
3
</parameter>
<parameter=wind>
null
</parameter>
<parameter=tags>
["<a>"]
</parameter>
</function>
</tool_call>
<tool_call>
<function=now>
</function>
</tool_call>"""
GLM = """<tool_call>place
<arg_key>city</arg_key>
<arg_value>New
"York"</arg_value>
<arg_key>days</arg_key>
<arg_value>3</arg_value>
<arg_key>wind</arg_key>
<arg_value>null</arg_value>
<arg_key>tags</arg_key>
<arg_value>["<a>"]</arg_value>
</tool_call>
<tool_call>now
</tool_call>"""
KIMI = (
    "<|tool_calls_section_begin|><|tool_call_begin|>functions.place:0<|tool_call_argument_begin|>ARGS<|tool_call_end|>"
    "<|tool_call_begin|>functions.now:1<|tool_call_argument_begin|>{}<|tool_call_end|><|tool_calls_section_end|>"
).replace("ARGS", CALLED[0][1])
SINGULAR = KIMI.replace("tool_calls_section", "tool_call_section")
LLAMA = f'{{"name": "place", "parameters": {CALLED[0][1]}}}; {{"name": "now", "parameters": {{}}}}'
LISTED = f"[{LLAMA.replace('; ', ', ')}]"
HERMES = (
    f'<tool_call>{{"name": "place", "parameters": {CALLED[0][1]}}}</tool_call><tool_call>{{"name": "now"}}</tool_call>'
)


def dsml(wrapper: str, space: str = "") -> str:
    def one(name: str, value: str, is_text: bool) -> str:
        kind = "true" if is_text else "false"
        return f'<｜DSML｜{space}parameter name="{name}" string="{kind}">{value}</｜DSML｜{space}parameter>\n'

    values = (("city", 'New\n"York"', True), ("days", "3", False), ("wind", "null", False), ("tags", '["<a>"]', False))
    place = "".join(one(*value) for value in values)
    return (
        f"<｜DSML｜{wrapper}>\n"
        f'<｜DSML｜{space}invoke name="place">\n{place}</｜DSML｜{space}invoke>\n'
        f'<｜DSML｜{space}invoke name="now"/>\n'
        f"</｜DSML｜{wrapper}>"
    )


FORMS = {
    "Qwen3-Coder": CODER,
    "Qwen3-Coder, bare": CODER.replace("<tool_call>\n", "").replace("\n</tool_call>", ""),
    "GLM-4.5": GLM,
    "GLM-4.7": GLM.replace(">\n<", "><").replace("place\n", "place").replace("now\n", "now"),
    "Kimi K2": KIMI,
    "Kimi K2, singular": SINGULAR,
    "Kimi K2, both": SINGULAR.partition("<|tool_call_end|>")[0] + KIMI[KIMI.index("<|tool_call_end|>") :],
    "Qwen3-Coder, torn": CODER.replace("\n</function>", ""),
    "Llama 3.1": LLAMA,
    "Llama 3.1, by lines": LLAMA.replace("; ", "\n"),
    "a function's JSON": f"<function=place>{CALLED[0][1]}</function>\n<function=now>{{}}</function>",
    "Llama 3.1, marked": "<|python_tag|>" + LLAMA,
    "Llama 3.1, listed": LISTED,
    "Llama 3.1, listed by lines": LISTED.replace("[{", "[\n  {")
    .replace(', {"name', '\n  ,\n{"name')
    .replace("}]", "},\n]\n"),
    "Llama 3.1, listed and marked": "<|python_tag|>" + LISTED,
    "Hermes, listed": f"<tool_call>\n{LISTED}\n</tool_call>",
    "Hermes, with parameters": HERMES,
    "DeepSeek V3.2": dsml("function_calls"),
    "DeepSeek V4": dsml("tool_calls"),
    "DeepSeek V4.1": dsml(" calls", " "),
}


@pytest.mark.parametrize("name", FORMS)
def test_calls_are_read_however_they_are_cut(name: str) -> None:
    text = FORMS[name]
    options: dict[str, Any] = {"schemas": SCHEMAS}
    assert parse(text, **options) == ("", "", CALLED)
    assert parse(f"<think>so</think>\n\n{text}", **options) == ("so", "", CALLED)
    for size in (2, 3, 7):
        assert fed([text[i : i + size] for i in range(0, len(text), size)], **options) == ("", "", CALLED)
    if "Llama" not in name:
        assert parse(f"See:\n{text}\n", **options) == ("", "See:", CALLED)
        fenced = f"```\n{text}\n```"
        assert parse(fenced, **options) == ("", fenced, [])
    assert parse(text, tools=False) == ("", text, [])
    assert fed([text], single_call=True, **options)[2] == CALLED[:1]
    for end in range(len(text)):  # a truncated text gives a part of the calls and nothing else
        calls = fed([text[:end]], **options)[2]
        assert all(
            full.startswith(part) and whole == n for (n, part), (whole, full) in zip(calls, CALLED, strict=False)
        )


def test_kimis_ids_are_the_calls_ids() -> None:
    parsed = Parser(opened=False, tools=True)
    parsed.push(KIMI)
    parsed.end()
    assert [(call.id, call.name) for call in parsed.calls] == [
        ("functions.place:0", "place"),
        ("functions.now:1", "now"),
    ]


HARMONY = (
    "<|channel|>analysis<|message|>4+5=9<|end|><|start|>assistant<|channel|>commentary<|message|>I ask.<|end|>"
    '<|start|>assistant<|channel|>commentary to=functions.add <|constrain|>json<|message|>{"a": 4}<|call|>'
)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (HARMONY, ("4+5=9", "I ask.", [("add", '{"a": 4}')])),
        (HARMONY.replace("commentary to", "analysis to"), ("4+5=9", "I ask.", [("add", '{"a": 4}')])),
        ("<|channel|>final<|message|>It is 9.<|return|>", ("", "It is 9.", [])),
        ("<|start|>assistant to=functions.now<|channel|>commentary<|message|><|call|>", ("", "", [("now", "{}")])),
        ("<|channel|>analysis<|message|>4+5", ("4+5", "", [])),
        ("<|channel|>analysis<|message|>a<|end|><|start|>assistant<|channel|>final<|mess", ("a", "", [])),
    ],
)
def test_channels_by_hand(text: str, said: Said) -> None:
    assert parse(text) == said


@pytest.mark.parametrize(
    "text",
    [
        '{"name": "unknown", "parameters": {}}',
        '{"name": "place"}',
        '{"city": "Paris"}',
        '{"name": "place", "parameters": {',
        "{",
        "[",
        "[]",
        "[1, 2]",
        '["place"]',
        '[[{"name": "place", "parameters": {}}]]',
        '[{"name": "unknown", "parameters": {}}, {"name": "place", "parameters": {}}]',
        "The `<tool_call>` tag, and <function=, and <function=place",
        "<tool_call>unknown\n<arg_key>a</arg_key>\n</tool_call>",
        "<｜DSML｜function_calls>\nnothing",
        "<|python_tag|>print(1)",
        "<|tool_calls_section_begin|> is a mark",
        "<|tool_call_section_begin|><|tool_call_section_end|>",
        "<tool_call>[1]</tool_call>",
    ],
)
def test_what_is_no_call_is_text(text: str) -> None:
    assert parse(text, schemas=SCHEMAS) == ("", text, [])


@pytest.mark.parametrize(
    ("text", "schema", "value"),
    [
        (" 3 ", {"type": "integer"}, "3"),
        ("007", {"type": "integer"}, "7"),
        ("3.5", {"type": "integer"}, '"3.5"'),
        ("1e999", {"type": "number"}, '"1e999"'),
        ("nan", {"type": "number"}, '"nan"'),
        ("True", {"type": "boolean"}, "true"),
        ("None", {"type": ["string", "null"]}, "null"),
        ('{"a": 1}', {"type": "object"}, '{"a": 1}'),
        ('{"a": 1', {"type": "object"}, '"{\\"a\\": 1"'),
        ("3", {"enum": [1, 2, 3]}, "3"),
        ("3", {"type": "string"}, '"3"'),
        ("3", None, '"3"'),
        ("9" * 5000, {"type": "integer"}, '"' + "9" * 5000 + '"'),
    ],
)
def test_values_become_what_the_schema_allows(text: str, schema: Any, value: str) -> None:
    assert coerced(text, schema) == value


PIECES = st.sampled_from(
    [
        *(
            "<tool_call>",
            "</tool_call>",
            "<function=",
            "place",
            ">",
            "<parameter=",
            "city",
            "</parameter>",
            "</function>",
        ),
        *(
            "<arg_key>",
            "</arg_key>",
            "<arg_value>",
            "</arg_value>",
            "<|tool_calls_section_begin|>",
            "<|tool_call_begin|>",
        ),
        *(
            "<|tool_call_argument_begin|>",
            "<|tool_call_end|>",
            "<|python_tag|>",
            '{"name": "place"',
            "[",
            "]",
            ",",
            "<|tool_call_section_begin|>",
            "<|tool_call_section_end|>",
            ', "parameters": {}',
            "}",
        ),
        *(
            "<｜DSML｜function_calls>",
            '<｜DSML｜invoke name="place">',
            '<｜DSML｜parameter name="a" string="true">',
            "\n",
            " ",
            ";",
        ),
        *(
            "</｜DSML｜parameter>",
            "</｜DSML｜invoke>",
            "<|channel|>",
            "<|message|>",
            "analysis",
            "to=functions.f",
            "<|end|>",
            '"',
        ),
    ]
)


@settings(max_examples=300)
@given(st.lists(PIECES, max_size=20).map("".join), st.lists(st.integers(1, 9), max_size=30), st.booleans())
def test_any_cut_gives_the_same(text: str, sizes: list[int], constrained: bool) -> None:
    pieces, at = [], 0
    for size in sizes:
        pieces.append(text[at : at + size])
        at += size
    options: dict[str, Any] = {"schemas": SCHEMAS, "constrained": constrained}
    assert fed([*pieces, text[at:]], **options) == parse(text, **options)
