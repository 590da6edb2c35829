"""Registry of the prompt forms of models without a Jinja template, by name."""

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
    """The form of a tokenizer without a template; UserError if its files name an unknown one."""
    if (form := FORMS.get(tokenizer.form)) is None:
        remedy = did_you_mean(tokenizer.form, FORMS)
        raise UserError("prompt_form", tokenizer.form, f"no such form, in {tokenizer.path}", remedy)
    return form


def knows_developer(tokenizer: Tokenizer) -> bool:
    """Whether the model's dialogues have turns of a developer."""
    return tokenizer.template is None and form_of(tokenizer).has_developer


def tells_effort(tokenizer: Tokenizer) -> bool:
    """Whether the model's prompts state the effort of thinking."""
    return tokenizer.template is None and form_of(tokenizer).has_efforts


def call_example(tokenizer: Tokenizer) -> str:
    """A call of a function f as in the model's dialogues; "" if its template cannot render one."""
    if tokenizer.template is None:
        return "".join(form_of(tokenizer).calls([ToolCall("f", "{}")]))
    try:
        return tokenizer.template.render_prompt(CALL_PROBE)
    except UserError:
        return ""
