"""Model output split into reasoning, content and calls: by hand, in any pieces, and from garbage."""

import json
import re
import time
from itertools import count
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from finback.serve.deltas import Delta, ParsedCall, fresh_id
from finback.serve.parser import Parser
from finback.serve.tool_calls import ToolForm

QUICK = settings(max_examples=300)

CALLS, END_CALLS = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
CALL, END_CALL, SEP = "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>", "<｜tool▁sep｜>"
MARKS = (CALLS, END_CALLS, CALL, END_CALL, SEP, "<tool_call>", "</tool_call>", "<think>", "</think>")

Said = tuple[str, str, list[tuple[str, str]]]  # reasoning, content, calls


def v3(*calls: tuple[str, str]) -> str:
    inner = "\n".join(f"{CALL}function{SEP}{name}\n```json\n{args}\n```{END_CALL}" for name, args in calls)
    return CALLS + inner + END_CALLS


def v31(*calls: tuple[str, str]) -> str:
    return CALLS + "".join(f"{CALL}{name}{SEP}{args}{END_CALL}" for name, args in calls) + END_CALLS


def qwen(*calls: tuple[str, str]) -> str:
    return "\n".join(f'<tool_call>\n{{"name": "{name}", "arguments": {args}}}\n</tool_call>' for name, args in calls)


def parser(opened: bool = False, tools: bool = True, form: ToolForm | None = None, **more: bool) -> Parser:
    """A parser that numbers its calls 0, 1, …"""
    numbers = count()
    return Parser(opened, tools, form, new_id=lambda: str(next(numbers)), **more)


def whole(parsed: Parser) -> Said:
    return parsed.reasoning, parsed.content, [(c.name, c.arguments) for c in parsed.calls]


def put_together(deltas: list[Delta]) -> Said:
    """The message that a client assembles from a stream; checks the rules for deltas."""
    calls: list[tuple[str, str]] = []
    for delta in deltas:
        assert delta.text or delta.name, "an empty delta"
        if delta.kind != "tool":
            assert delta.name is None and delta.call_id is None and delta.index == 0
        elif delta.name is not None:
            assert (delta.index, delta.text) == (len(calls), "")
            assert delta.call_id in (str(len(calls)), f"functions.{delta.name}:{len(calls)}")  # Kimi writes its own ids
            calls.append((delta.name, ""))
        else:
            assert delta.call_id is None and delta.index == len(calls) - 1
            calls[-1] = (calls[-1][0], calls[-1][1] + delta.text)
    text = {k: "".join(d.text for d in deltas if d.kind == k) for k in ("reasoning", "content")}
    return text["reasoning"], text["content"], calls


def fed(pieces: list[str], **options: Any) -> Said:
    """Parses pieces; the sum of the deltas must equal the whole."""
    parsed = parser(**options)
    deltas = [delta for piece in pieces for delta in parsed.push(piece)] + parsed.end()
    assert put_together(deltas) == whole(parsed) and parsed.end() == []
    return whole(parsed)


def parse(text: str, **options: Any) -> Said:
    """Parses at once and character by character, with the same result."""
    said = fed([text], **options)
    assert fed(list(text), **options) == said
    return said


F = "```"
CHAINS: list[tuple[bool, str, str, str]] = [  # opened, said, reasoning, content
    (False, "9", "", "9"),
    (False, "", "", ""),
    (False, " 9\n", "", " 9\n"),
    (False, "<think>4+5</think>9", "4+5", "9"),
    (False, "\n <think>4+5</think>9", "4+5", "9"),
    (False, "<think>\n 4+5\n\n</think>\n\n9\n", " 4+5", "9\n"),
    (False, "<think>\n\n4\n\n5 \t\n</think>\r\n9", "\n4\n\n5", "9"),
    (False, "<think>\n\n</think>\n\n9", "", "9"),
    (False, "<think></think>", "", ""),
    (False, "<think>4+5\n", "4+5", ""),
    (False, "<think>4+5 </thin", "4+5 </thin", ""),
    (False, "<thin", "", "<thin"),
    (False, "<think", "", "<think"),
    (False, "9 <think>4</think>", "", "9 <think>4</think>"),
    (False, "4</think>9", "", "4</think>9"),
    (False, "</think>9", "", "9"),
    (False, " </think>\n\n9", "", "9"),
    (False, "</think></think>9</think>8", "", "9</think>8"),
    (False, "<think>4</think>9</think><think>8</think>", "4", "9</think><think>8</think>"),
    (False, "<think>4</think>\n</think>9", "4", "9"),
    (False, "<think>a <think> b</think>9", "a <think> b", "9"),
    (False, f"{F}\n<think>4</think>\n{F}", "", f"{F}\n<think>4</think>\n{F}"),
    (False, f"<think>4</think>{F}\n</think>\n<think>\n{F}", "4", f"{F}\n</think>\n<think>\n{F}"),
    (True, "4+5</think>9", "4+5", "9"),
    (True, "\n4+5\n</think>\n9", "4+5", "9"),
    (True, " 4+5</think>9", " 4+5", "9"),
    (True, "4+5", "4+5", ""),
    (True, "", "", ""),
    (True, " \n", "", ""),
    (True, "</think>9", "", "9"),
    (True, "\n\n</think>\n\n9", "", "9"),
    (True, "<think>\n4</think>9", "4", "9"),
    (True, "4 <think> 5</think>9", "4 <think> 5", "9"),
    # code fences in the chain: closed, closed just before the tag, and never closed
    (True, f"{F}py\nx = 1\n{F}\n</think>9", f"{F}py\nx = 1\n{F}", "9"),
    (True, f"{F}py\nx = 1\n{F}</think>9", f"{F}py\nx = 1\n{F}", "9"),
    (True, f"{F}py\nx = 1\n</think>9", f"{F}py\nx = 1", "9"),
    (True, f"{F}py\nit isn't </think>It's 9", f"{F}py\nit isn't", "It's 9"),
    (True, f"{F}py\nprint('hi</think>9\nisn't it", f"{F}py\nprint('hi", "9\nisn't it"),
    (True, f"{F}</think>Use `9`", F, "Use `9`"),
    # quoted in code: plain text
    (True, f'{F}py\na.split("</think>")\n{F}\nyes</think>9', f'{F}py\na.split("</think>")\n{F}\nyes', "9"),
    (True, f"{F}\nf'<think>{{x}}</think>{{y}}'\n</think>9", f"{F}\nf'<think>{{x}}</think>{{y}}'", "9"),
    (True, "~~~\n`</think>`\n~~~\n</think>9", "~~~\n`</think>`\n~~~", "9"),
    (True, 'a.split("</think>")', 'a.split("', '")'),  # no fence
    (True, f'{F}\n"a" </think>9"', f'{F}\n"a"', '9"'),  # no quotation mark is open
    (True, f'{F}\n"</think>', f'{F}\n"', ""),
    (True, f"{F}a{F} '</think>'9", f"{F}a{F} '", "'9"),  # not a fence: its line contains backticks
]


@pytest.mark.parametrize("tools", [False, True])
@pytest.mark.parametrize(("opened", "text", "reasoning", "content"), CHAINS)
def test_chains_by_hand(opened: bool, text: str, reasoning: str, content: str, tools: bool) -> None:
    assert parse(text, opened=opened, tools=tools) == (reasoning, content, [])


SUN = ("get_weather", '{"city": "Paris", "days": [1, {"a": "}]"}]}')
SEA = ("find", '{\n  "q": "a \\"b\\" ```x``` <tool_cal"\n}')
FORMS = {ToolForm.V3: v3, ToolForm.V31: v31, ToolForm.QWEN: qwen}


@pytest.mark.parametrize("forced", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_calls_in_all_forms(form: ToolForm, forced: bool) -> None:
    write, options = FORMS[form], {"form": form if forced else None}
    assert parse(write(SUN), **options) == ("", "", [SUN])
    assert parse(write(SUN, SEA, SUN), **options) == ("", "", [SUN, SEA, SUN])
    assert parse(f"<think>4\n</think>\n\nSee:\n{write(SUN)}\n", **options) == ("4", "See:", [SUN])
    assert parse(f"<think>{write(SEA)}</think>9", **options) == (write(SEA), "9", [])
    assert parse(f"{write(SUN)}\n", opened=True, **options)[1:] == ("", [])
    assert parse(write(SUN) + "\nThat is it. ", **options) == ("", "That is it. ", [SUN])
    assert parse(f"a\n{write(SUN)}\n b {write(SEA)}", **options) == ("", "a\n b", [SUN, SEA])
    quoted = f"Say\n{F}\n{write(SUN)}\n{F}\n"
    assert parse(quoted, **options) == ("", quoted, [])
    assert parse(f"{quoted}{write(SUN)}", **options) == ("", quoted.rstrip(), [SUN])
    assert parse(f"Say\n{F}\nx\n{F}{write(SUN)}", **options) == ("", f"Say\n{F}\nx\n{F}", [SUN])
    assert parse(write(SUN), tools=False) == ("", write(SUN), [])
    others = [f for f in FORMS if f.opener != form.opener]
    assert all(parse(write(SUN), form=f) == ("", write(SUN), []) for f in others)
    assert all(parse(write(SUN) + FORMS[f](SEA)) == ("", FORMS[f](SEA), [SUN]) for f in others)  # the first one decides


def test_two_calls_in_one_piece_are_four_deltas() -> None:
    deltas = parser().push(v31(SUN, ("now", "{}")))
    assert deltas == [
        Delta("tool", "", 0, SUN[0], "0"),
        Delta("tool", SUN[1], 0),
        Delta("tool", "", 1, "now", "1"),
        Delta("tool", "{}", 1),
    ]


@pytest.mark.parametrize("write", FORMS.values())
def test_arguments_stream_as_they_arrive(write: Any) -> None:
    parsed = parser()
    text = write(SUN)
    start = text.index("Paris")
    assert parsed.push(text[:start]) == [Delta("tool", "", 0, SUN[0], "0"), Delta("tool", '{"city": "', 0)]
    assert parsed.push("Par") == [Delta("tool", "Par", 0)]
    assert parsed.push("is<") == [Delta("tool", "is", 0)]  # may become the closing tag
    assert parsed.push("<") == [Delta("tool", "<", 0)]
    assert [c.arguments for c in parsed.calls] == ['{"city": "Paris<']


def test_text_is_held_back_no_longer_than_needed() -> None:
    parsed = parser()
    seen = [
        parsed.push(piece)
        for piece in ("\n<th", "ink>", "\na", " b", " \n", "</thi", "nk", ">", "\n", "9 ", "<", "tool_", "x")
    ]
    reasoning, content = "reasoning", "content"
    assert seen == [
        [],
        [],
        [Delta(reasoning, "a")],
        [Delta(reasoning, " b")],
        [],
        [],
        [],
        [],
        [],
        [Delta(content, "9")],
        [],
        [],
        [Delta(content, " <tool_x")],
    ]
    plain = Parser(opened=False, tools=False)
    assert [plain.push(p) for p in ("9 ", "<tool_call>")] == [[Delta(content, "9 ")], [Delta(content, "<tool_call>")]]


ODD: list[tuple[str, Said]] = [
    # Qwen: order, spacing, missing or extra markup
    ('<tool_call>{"arguments": {"a": 1}, "name": "f"}</tool_call>', ("", "", [("f", '{"a": 1}')])),
    ('<tool_call> { "name" :"f" , "id": 7, "arguments" : {"a":1} } </tool_call> ', ("", "", [("f", '{"a":1}')])),
    ('<tool_call>{"name": "f"}</tool_call>', ("", "", [("f", "{}")])),
    ('<tool_call>{"name": "f", "arguments": null}</tool_call>', ("", "", [("f", "{}")])),
    ('<tool_call>{"name": "f", "arguments": "{\\"a\\": 1}"}</tool_call>', ("", "", [("f", '{"a": 1}')])),
    ('<tool_call>{"name": "f" "arguments": {}}}\n</tool_call>', ("", "", [("f", "{}")])),
    ('<tool_call>{"name": "f", "arguments": {"a": 1}\n</tool_call>', ("", "", [("f", '{"a": 1}')])),
    ('<tool_call>{"name": "f", "arguments": {"a": 1</tool_call>b', ("", "b", [("f", '{"a": 1')])),
    ('<tool_call>{"name": "f", "arguments": {"a": "x}}\n</tool_call>b', ("", "b", [("f", '{"a": "x}}\n')])),
    (
        '<tool_call>{"name": "f", "arguments": {"a": "</tool_call>"}}</tool_call>b',
        ("", "b", [("f", '{"a": "</tool_call>"}')]),
    ),
    ('<tool_call>{"name": "f", "arguments": {}}\nb', ("", "b", [("f", "{}")])),
    ('<tool_call>{"name": "f", "arguments": {}}<tool_call>{"name": "g"}', ("", "", [("f", "{}"), ("g", "{}")])),
    ('<tool_call>{"name": "f", \'arguments\': {}}</tool_call>', ("", "'arguments': {}}", [("f", "")])),
    ('<tool_call>{"name": "f", "arguments": {"a": [1, "b', ("", "", [("f", '{"a": [1, "b')])),
    (
        '<tool_call>{"name": "f", "arguments": {"a": 1}, "arguments": {"a": 2}, "name": "g"}</tool_call>',
        ("", "", [("f", '{"a": 1}')]),
    ),
    # not a call
    ("The `<tool_call>` tag", ("", "The `<tool_call>` tag", [])),
    ("a <tool_call>\n", ("", "a <tool_call>\n", [])),
    ('<tool_call>{"arguments": {"a": 1}}</tool_call>b', ("", '<tool_call>{"arguments": {"a": 1}}</tool_call>b', [])),
    ("a <tool_call>\n{'name': 1}\n</tool_call> b", ("", "a <tool_call>\n{'name': 1}\n</tool_call> b", [])),
    ('<tool_call>{"name": 5}</tool_call>', ("", '<tool_call>{"name": 5}</tool_call>', [])),
    ('<tool_call>{"name": "ge', ("", '<tool_call>{"name": "ge', [])),
    (f"a {CALLS} b", ("", f"a {CALLS} b", [])),
    (f"{CALLS}{END_CALLS}", ("", f"{CALLS}{END_CALLS}", [])),
    (f"{CALLS}{CALL}f{END_CALL}{END_CALLS}", ("", f"{CALLS}{CALL}f{END_CALL}{END_CALLS}", [])),
    (f"{CALLS}{CALL}f{{}}", ("", f"{CALLS}{CALL}f{{}}", [])),
    (f"{CALLS}{CALL}function{SEP}ge", ("", f"{CALLS}{CALL}function{SEP}ge", [])),
    (f"a {END_CALLS}{CALL}</tool_call>{SEP}", ("", f"a {END_CALLS}{CALL}</tool_call>{SEP}", [])),
    # DeepSeek: mixed forms, missing ends
    (f"{CALLS}{CALL}function{SEP}{{}}{END_CALL}{END_CALLS}", ("", "", [("function", "{}")])),
    (f"{CALLS}{CALL} f {SEP} {{}} {END_CALL} {END_CALLS} ", ("", "", [("f", "{}")])),
    (f"{CALLS}{CALL}f{SEP}{F}\n{{}}\n{F}\n{END_CALL}{END_CALLS}", ("", "", [("f", "{}")])),
    (f"{CALLS}{CALL}function{SEP}f\n{{}}{END_CALL}{END_CALLS}", ("", "", [("f", "{}")])),
    (f"{CALLS}{CALL}function{SEP}f{F}json\n{{}}{END_CALL}{END_CALLS}", ("", "", [("f", "{}")])),
    (f"{CALLS}{CALL}f{SEP}{END_CALL}{END_CALLS}", ("", "", [("f", "{}")])),
    (f"{CALLS}{CALL}f{SEP}a < b{END_CALL}{END_CALLS}", ("", "", [("f", "a < b")])),
    (f"{CALLS}{CALL}f{SEP}{{}}{CALL}g{SEP}{{}}{END_CALLS}b", ("", "b", [("f", "{}"), ("g", "{}")])),
    (f"{CALLS}{CALL}f{SEP}{{}}{END_CALL}\nb", ("", "b", [("f", "{}")])),
    (f"a{CALLS}{CALL}f{SEP}{{}}{END_CALL}{CALL}g{END_CALL}{END_CALLS}b", ("", f"a{CALL}g{END_CALL}b", [("f", "{}")])),
    (f'{CALLS}{CALL}f{SEP}{{"a": "b', ("", "", [("f", '{"a": "b')])),
]


@pytest.mark.parametrize(("text", "said"), ODD)
def test_odd_markup_by_hand(text: str, said: Said) -> None:
    assert parse(text) == said


def test_a_forced_form_takes_a_tool_called_function() -> None:
    assert parse(v31(("function", "[1]")), form=ToolForm.V31) == ("", "", [("function", "[1]")])
    assert parse(v3(("function", "[1]")), form=ToolForm.V3) == parse(v3(("function", "[1]")))


def test_an_answer_that_a_grammar_holds_is_read_as_such() -> None:
    """The engine ends a chain at the first closing tag, and the grammar determines what is a string."""
    marks = f'{{"a": "{END_CALL}{END_CALLS}</tool_call>"}}'
    for form, write in FORMS.items():
        said = f'Say "</think>{write(("f", marks), SEA)}'
        assert parse(said, opened=True, form=form, constrained=True) == ('Say "', "", [("f", marks), SEA])
        for length in range(len(write(("f", marks)))):
            parsed = parser(form=form, constrained=True)
            parsed.push(write(("f", marks))[:length])
            parsed.end()
            assert all(marks.startswith(call.arguments) for call in parsed.calls)
            assert parsed.called == (marks in [call.arguments for call in parsed.calls])
    assert parse(f'{F}\n"</think>{{"a": "x"}}', opened=True, constrained=True) == (f'{F}\n"', '{"a": "x"}', [])


@pytest.mark.parametrize("write", FORMS.values())
def test_calls_behind_the_first_can_be_left_out(write: Any) -> None:
    said = f"See {write(SUN, SEA, SUN)} it."
    assert parse(said, single_call=True) == ("", "See it.", [SUN])


PARTS = st.sampled_from(
    [
        *MARKS,
        F,
        F + "json",
        "~~~~",
        "\n",
        "\r\n",
        " ",
        "function",
        "name",
        '"name": "f"',
        '"arguments": {',
        '"',
        "'",
        "`",
        "\\",
        "{",
        "}",
        "[",
        "]",
        ",",
        ":",
        "<",
        "<th",
        "</",
        "<｜tool▁",
        "9",
        "it isn't",
        "鲸",
        v3(SUN),
        v31(SEA),
        qwen(SUN, SEA),
    ]
)
TEXT = st.one_of(st.lists(PARTS, max_size=25).map("".join), st.text(max_size=60))


@QUICK
@example(f"<think>{F}\n'</think>\n'", [9, 3], True, True)
@given(TEXT, st.lists(st.integers(1, 12), max_size=40), st.booleans(), st.booleans())
def test_any_cut_gives_the_same(text: str, sizes: list[int], opened: bool, tools: bool) -> None:
    pieces, at = [], 0
    for size in sizes:
        pieces.append(text[at : at + size])
        at += size
    options = {"opened": opened, "tools": tools}
    assert fed([*pieces, text[at:]], **options) == parse(text, **options)


@QUICK
@given(TEXT, st.booleans(), st.sampled_from([None, *ToolForm]))
def test_nothing_visible_is_lost_or_made_up(text: str, opened: bool, form: ToolForm | None) -> None:
    reasoning, content, calls = parse(text, opened=opened, form=form)
    if not calls:
        start = re.sub(r"^\s*(</?think>)?", "", text)

        def bare(said: str) -> str:
            return re.sub(r"\s|</?think>", "", said)

        assert bare(reasoning + content) == bare(start)
    assert all(name.strip() == name != "" for name, _ in calls)


@pytest.mark.parametrize("write", FORMS.values())
@pytest.mark.parametrize("before", ["", "See:\n\n", "<think>4+5</think>\n"])
def test_a_text_that_breaks_off_says_less_but_nothing_else(write: Any, before: str) -> None:
    text = before + write(SUN, SEA)
    for end in range(len(text)):
        reasoning, content, calls = fed([text[:end]])
        assert "4+5".startswith(reasoning) or end < len("<think>4+5</think>")
        for (name, arguments), (theirs, full) in zip(calls, (SUN, SEA), strict=False):
            assert name == theirs and full.startswith(arguments)
        rest = "".join(content.removeprefix("See:").split())  # incomplete markup
        assert "".join(text[:end].split()).endswith(rest)


@pytest.mark.parametrize("write", FORMS.values())
def test_markup_that_becomes_a_call_is_never_content(write: Any) -> None:
    text = f"Look: {write(SUN, SEA)}"
    for first in range(len(text)):
        for second in {first + 1, first + 5, len(text)}:
            parsed = parser()
            deltas = [
                d for p in (text[:first], text[first:second], text[second:]) for d in parsed.push(p)
            ] + parsed.end()
            assert "".join(d.text for d in deltas if d.kind == "content") == "Look:"


@QUICK
@given(
    st.recursive(
        st.one_of(
            st.none(),
            st.booleans(),
            st.integers(),
            st.text(max_size=8),
            st.sampled_from(["</tool_call>", "```", "<｜"]),
        ),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
        max_leaves=8,
    ).map(lambda value: {"x": value}),
    st.sampled_from(list(FORMS)),
    st.booleans(),
    st.sampled_from([None, 2]),
)
def test_any_arguments_survive(arguments: dict[str, Any], form: ToolForm, escape: bool, indent: int | None) -> None:
    raw = json.dumps(arguments, ensure_ascii=escape, indent=indent)
    assert parse(FORMS[form](("f", raw), SUN)) == ("", "", [("f", raw), SUN])


def test_ids_are_drawn_one_per_call() -> None:
    parsed = Parser(opened=False, tools=True)
    first = [d.call_id for d in parsed.push(qwen(SUN, SEA)) if d.name]
    assert [c.id for c in parsed.calls] == first and len(set(first)) == 2
    assert all(re.fullmatch("call_[0-9a-f]{24}", each or "") for each in (*first, fresh_id()))
    assert parsed.calls[0] == ParsedCall(first[0] or "", *SUN)


def test_half_a_character_in_a_name_can_be_sent_on() -> None:
    ((name, _),) = parse('<tool_call>{"name": "a\\ud83d"}</tool_call>')[2]
    name.encode()


def test_long_texts_take_no_time() -> None:
    start = time.process_time()
    for text in (
        "a <b " * 40_000,
        "\n" * 20_000,
        "<tool_call>" * 3000,
        F * 20_000,
        f"{CALLS}{CALL}" * 2000,
        "<tool_call>{" + "[" * 40_000,
    ):
        fed([text])
        fed([text[i : i + 5] for i in range(0, len(text), 5)], opened=True)
        fed([text[i : i + 5] for i in range(0, len(text), 5)])
    assert time.process_time() - start < 60
