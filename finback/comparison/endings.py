"""Maps the finish reasons of many servers to a few kinds, and finds stop tokens left in texts. Does not import torch."""

import re
from typing import Literal

# filtered: the server withheld the answer; broken: the server failed; unknown: reported under the server's own word
Ending = Literal["stop", "length", "filtered", "refused", "tools", "broken", "unknown"]

_WORDS: dict[Ending, str] = {
    "stop": "stop stopped eos eos_token eos_token_id eos_found eot end end_turn end_of_turn end_of_text end_of_sequence endoftext "
    "stop_sequence stop_sequences stop_sequence_hit stop_token stop_string stop_str stop_word complete completed finish "
    "finished done success succeeded normal null none",
    "length": "length length_limit max_tokens max_token max_tokens_reached max_length max_new_tokens max_output_tokens "
    "max_completion_tokens model_length token_limit token_limit_reached limit error_limit truncated incomplete context_length "
    "max_context_length context_window context_length_exceeded context_window_exceeded model_context_window_exceeded",
    "filtered": "content_filter content_filtered content_filtering safety recitation blocklist blocked prohibited_content spii "
    "image_safety sensitive sensitive_content guardrail guardrails guardrail_intervened moderation moderated error_toxic "
    "data_inspection_failed",
    "refused": "refusal refused refuse",
    "tools": "tool tool_call tool_calls tool_use function_call function_calls malformed_function_call unexpected_tool_call "
    "too_many_tool_calls",
    "broken": "error abort aborted cancel cancelled canceled user_cancel timeout timed_out failed failure network_error server_error "
    "internal_error overloaded disconnected insufficient_system_resource",
}
_ENDINGS: dict[str, Ending] = {word: ending for ending, words in _WORDS.items() for word in words.split()}
# <|im_end|>, <|eot_id|>, <｜end▁of▁sentence｜>, turn markers, </s> if only markers follow; quoted ones are part of the answer
_STOP_TOKEN = re.compile(
    r"(?<![\"'`])(?:<\|start_header_id\|>(?:assistant<\|end_header_id\|>)?|<\|(?:im_)?start\|>(?:assistant\b)?|<\|channel\|>(?:final\b)?"
    r"|<[|｜](?:[^|｜<>\s]{0,30}(?:end|eo[dmst])[^|｜<>\s]{0,30}|return|message|user|observation)[|｜]>"
    r"|<(?:end_of_turn|start_of_turn|eos|eos_token|eot|eod)>|\[(?:/INST|EOS)\]|</s>(?=\s*(?:$|</?s>|\[INST\])))",
    re.IGNORECASE,
)


def ending(finish: str) -> Ending:
    """The kind of a finish_reason: `stop`, STOP, end_turn, EndTurn, FINISH_REASON_STOP and "" are all "stop"."""
    words = re.sub(r"(?<=[a-z])(?=[A-Z])|[\s.-]+", "_", finish.strip()).lower()
    return _ENDINGS.get(words.removeprefix("finish_reason_"), "unknown") if words else "stop"


def before_stop_token(text: str) -> tuple[str, str]:
    """The text before its first stop token, and that token ("" if there is none); leading stop tokens are skipped."""
    start, first = 0, ""
    for match in _STOP_TOKEN.finditer(text):
        first = first or match[0]
        if before := text[start : match.start()].strip():
            return before, first
        start = match.end()
    return text[start:].strip(), first
