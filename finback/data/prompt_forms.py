"""Which form a model's prompts have that has no Jinja template, by name: the one registry of them."""

from collections.abc import Mapping

from finback.config import UserError, did_you_mean
from finback.data.prompt_form import PromptForm
from finback.data.template import CALL_PROBE
from finback.data.tokenizer import OWN_FORM, Tokenizer
from finback.data.tools import ToolCall
from finback.data.v3_forms import R1Form, V31Form, V32Form
from finback.data.v4_form import MAXIMUM, Efforts, V4Form, V41Form

OWN = R1Form()
FORMS: Mapping[str, PromptForm] = {
    OWN_FORM: OWN,
    "v3.1": V31Form(),
    "v3.2": V32Form(),
    "v4": V4Form(),
    "v4-april": V4Form(Efforts("", "", MAXIMUM)),
    "v4.1": V41Form(),
}


def form_of(tokenizer: Tokenizer) -> PromptForm:
    """The form of a tokenizer without a template; UserError where its files name one that nobody knows."""
    if (form := FORMS.get(tokenizer.form)) is None:
        remedy = did_you_mean(tokenizer.form, FORMS)
        raise UserError("prompt_form", tokenizer.form, f"no such form, in {tokenizer.path}", remedy)
    return form


def knows_developer(tokenizer: Tokenizer) -> bool:
    """Whether a developer may ask in the model's dialogues."""
    return tokenizer.template is None and form_of(tokenizer).has_developer


def tells_effort(tokenizer: Tokenizer) -> bool:
    """Whether the model's prompts say how long to think."""
    return tokenizer.template is None and form_of(tokenizer).has_efforts


def call_example(tokenizer: Tokenizer) -> str:
    """A call of the function f as the model's dialogues show it; "" where its template fails at one."""
    if tokenizer.template is None:
        return "".join(form_of(tokenizer).calls([ToolCall("f", "{}")]))
    try:
        return tokenizer.template.render_prompt(CALL_PROBE)
    except UserError:
        return ""
