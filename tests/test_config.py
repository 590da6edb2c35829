"""Knobs: which values fit a field, how `--set` converts a text, and the error when neither works."""

import dataclasses
import json
import pickle
import re
from dataclasses import dataclass, field
from typing import Any, Literal

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from finback.config import UserError, as_json, check_fields, did_you_mean, override, parse
from finback.model.config import TINY, ModelConfig


@dataclass(frozen=True)
class Knobs:
    """One field of every kind."""

    steps: int = 100
    rate: float = 0.5
    shuffle: bool = False
    compute: Literal["auto", "fp32", "bf16"] = "auto"
    sources: tuple[str, ...] = ("chitchat",)
    sizes: tuple[int, ...] = ()
    limit: int | None = None
    mixture: dict[str, float] = field(default_factory=dict)
    model: ModelConfig = TINY
    extra: Any = None
    models: tuple[ModelConfig, ...] = (TINY, TINY)


def changed(path: str, text: str) -> Any:
    """The value that `--set base.<path>=<text>` leaves in that field."""
    value: Any = override(Knobs(), path.split("."), text, "base")
    for name in path.split("."):
        value = getattr(value, name)
    return value


@pytest.mark.parametrize(
    "knobs",
    [
        {},
        {"rate": 1},  # an int is also a float
        {"limit": 7},
        {"sizes": (1, 2)},
        {"mixture": {"chitchat": 1, "chains": 0.5}},
        {"extra": object()},
    ],
)
def test_values_that_fit_pass(knobs: dict[str, Any]) -> None:
    check_fields(Knobs(**knobs), "base")


@pytest.mark.parametrize(
    ("name", "value", "problem"),
    [
        ("steps", "100", "expected int, got str"),
        ("steps", 1.0, "expected int, got float"),
        ("steps", True, "expected int, got bool"),
        ("steps", None, "expected int, got NoneType"),
        ("rate", "0.5", "expected float, got str"),
        ("rate", True, "expected float, got bool"),
        ("rate", float("inf"), "expected float, got NaN or infinity"),
        ("shuffle", 1, "expected bool, got int"),
        ("compute", "fp16", "expected one of auto, fp32, bf16"),
        ("sources", ["chitchat"], "expected tuple[str, ...], got list"),
        ("sources", "chitchat", "expected tuple[str, ...], got str"),
        ("sizes", (1, "2"), "expected tuple[int, ...], got tuple"),
        ("limit", "none", "expected int | None, got str"),
        ("mixture", {"chitchat": "half"}, "expected dict[str, float], got dict"),
        ("mixture", {1: 0.5}, "expected dict[str, float], got dict"),
        ("model", "tiny", "expected ModelConfig, got str"),
    ],
)
def test_values_that_do_not_fit_are_named(name: str, value: Any, problem: str) -> None:
    remedy = "Did you mean 'bf16'?" if name == "compute" else "Correct the value in the recipe."
    text = f"base.{name} = {value!r}: {problem}. {remedy}"
    with pytest.raises(UserError, match=f"^{re.escape(text)}$") as caught:
        check_fields(Knobs(**{name: value}), "base")
    error = caught.value
    assert (error.field, error.value, error.problem) == (f"base.{name}", value, problem)


@pytest.mark.parametrize(
    ("path", "text", "value"),
    [
        ("steps", "300", 300),
        ("steps", "2e6", 2_000_000),
        ("steps", "-3", -3),
        ("rate", "3e-4", 3e-4),
        ("rate", "2", 2.0),
        ("shuffle", "True", True),
        ("shuffle", "false", False),
        ("compute", "bf16", "bf16"),
        ("sources", "chitchat, files", ("chitchat", "files")),
        ("sizes", "1,2e3,", (1, 2000)),
        ("sizes", "", ()),
        ("limit", "None", None),
        ("limit", "12", 12),
        ("model.hidden_size", "64", 64),
        ("model.q_lora_rank", "none", None),
        ("model.scoring_func", "softmax", "softmax"),
    ],
)
def test_texts_become_values_of_the_field(path: str, text: str, value: Any) -> None:
    assert changed(path, text) == value and type(changed(path, text)) is type(value)


def test_an_override_changes_one_field_of_a_copy() -> None:
    before = Knobs()
    after = override(before, ["model", "hidden_size"], "64", "base")
    assert before == Knobs() and after != before
    wider = dataclasses.replace(TINY, hidden_size=64)
    assert after == dataclasses.replace(before, model=wider)
    assert override(before, ["models", "1", "hidden_size"], "64", "base").models == (TINY, wider)


@pytest.mark.parametrize(
    ("path", "text", "message"),
    [
        ("step", "1", "base.step = '1': no such field. Did you mean 'steps'?"),
        ("model.hiden_size", "64", "base.model.hiden_size = '64': no such field. Did you mean 'hidden_size'?"),
        ("steps", "many", "base.steps = 'many': expected int. Write for example 100 or 2e6."),
        ("steps", "1.5", "base.steps = '1.5': expected int. Write for example 100 or 2e6."),
        ("steps", "", "base.steps = '': expected int. Write for example 100 or 2e6."),
        ("steps", "nan", "base.steps = 'nan': expected int. Write for example 100 or 2e6."),
        ("steps", "inf", "base.steps = 'inf': expected int. Write for example 100 or 2e6."),
        ("steps", "1e999", "base.steps = '1e999': expected int. Write for example 100 or 2e6."),
        ("rate", "fast", "base.rate = 'fast': expected float. Write for example 0.5 or 3e-4."),
        ("shuffle", "yes", "base.shuffle = 'yes': expected bool. Write for example true or false."),
        ("compute", "bf61", "base.compute = 'bf61': expected one of auto, fp32, bf16. Did you mean 'bf16'?"),
        ("compute", "int8", "base.compute = 'int8': expected one of auto, fp32, bf16. Use one of them."),
        ("sizes", "1,two", "base.sizes = 'two': expected int. Write for example 100 or 2e6."),
        ("limit", "all", "base.limit = 'all': expected int. Write for example 100 or 2e6."),
        (
            "mixture",
            "chitchat=1",
            "base.mixture = 'chitchat=1': a dict[str, float] cannot be given on the command line. Edit the recipe file.",
        ),
        (
            "model",
            "tiny",
            "base.model = 'tiny': a ModelConfig cannot be given on the command line. Edit the recipe file.",
        ),
        ("steps.more", "1", "base.steps.more = '1': base.steps has no fields. Set base.steps itself."),
        ("models.2.hidden_size", "64", "base.models.2 = '64': no such entry. They are numbered from 0 to 1."),
        ("models.x.hidden_size", "64", "base.models.x = '64': no such entry. They are numbered from 0 to 1."),
        ("models.1", "64", "base.models.1 = '64': base.models has no fields. Set base.models itself."),
        (
            "model.qk_rope_head_dim",
            "7",
            "model.qk_rope_head_dim = 7: rotary pairs need an even number. Use an even number.",
        ),
    ],
)
def test_texts_that_do_not_fit_are_refused(path: str, text: str, message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message) + "$"):
        changed(path, text)


def test_near_words_are_suggested_and_far_ones_listed() -> None:
    assert did_you_mean("learning_rat", ["steps", "learning_rate"]) == "Did you mean 'learning_rate'?"
    assert did_you_mean("zzz", ["steps", "rate"]) == "Known: rate, steps."
    assert did_you_mean("zzz", []) == "Known: none."


@example(2**53 + 1)  # not a float
@given(st.integers())
def test_integers_survive_the_command_line(number: int) -> None:
    assert changed("steps", str(number)) == number


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_floats_survive_the_command_line(number: float) -> None:
    assert changed("rate", repr(number)) == number


@given(st.booleans(), st.lists(st.integers(-(10**9), 10**9)))
def test_booleans_and_tuples_survive_the_command_line(flag: bool, numbers: list[int]) -> None:
    assert changed("shuffle", str(flag)) is flag
    assert changed("sizes", ",".join(map(str, numbers))) == tuple(numbers)


@given(st.text(), st.sampled_from([int, float, bool, tuple[int, ...], int | None, Literal["a", "b"], ModelConfig]))
def test_any_text_is_a_value_or_the_users_mistake(text: str, hint: Any) -> None:
    try:
        parse(text, hint, "base.knob")
    except UserError as error:
        assert error.field == "base.knob" and error.remedy


def test_knobs_become_json_that_names_their_class() -> None:
    knobs = as_json(Knobs(sources=("a", "b"), extra=test_knobs_become_json_that_names_their_class))
    assert json.loads(json.dumps(knobs)) == knobs
    assert knobs["type"] == "Knobs" and knobs["sources"] == ["a", "b"]
    assert knobs["model"]["type"] == "ModelConfig" and knobs["model"]["hidden_size"] == TINY.hidden_size
    assert knobs["extra"] == "test_knobs_become_json_that_names_their_class"


def test_an_error_crosses_processes() -> None:
    error = pickle.loads(pickle.dumps(UserError("rows", -1, "below 0", "Raise it.")))
    assert str(error) == "rows = -1: below 0. Raise it." and error.remedy == "Raise it."
