"""Parses texts in channels, as gpt-oss writes them (harmony): <|channel|>analysis<|message|>…<|end|><|start|>assistant<|channel|>….

analysis is the chain of thought, final and commentary are the answer, and a message sent to=functions.NAME is a call.
"""

import re

from finback.serve.deltas import DeltaCollector
from finback.serve.incremental import IncrementalReader, Wait

START, CHANNEL, MESSAGE = "<|start|>", "<|channel|>", "<|message|>"
ENDS = ("<|end|>", "<|return|>", "<|call|>")
ASSISTANT = "assistant"
_RECIPIENT = re.compile(r"to=functions\.([\w.-]+)")


def read(reader: IncrementalReader, sink: DeltaCollector, tools: bool) -> Wait[None]:
    """Reads messages to the end of the text; the start of the first message, or its channel mark, has just been read."""
    answered = False
    while True:
        head = yield from reader.before((MESSAGE, *ENDS))
        if not (yield from reader.match((MESSAGE,))):
            if (yield from reader.match(ENDS)):
                continue
            return  # an incomplete header is dropped
        channel = re.match(r"\s*(\w*)", head.rpartition(CHANNEL)[2])
        kind, recipient = channel[1] if channel else "", _RECIPIENT.search(head)
        is_call = bool(recipient and tools)
        if recipient and is_call:
            sink.call(recipient[1])
        is_chain = kind == "analysis" and not is_call  # calls may be made in analysis too
        answered = yield from _message(reader, sink, answered, is_chain, is_call)


def _message(
    reader: IncrementalReader, sink: DeltaCollector, follows: bool, is_chain: bool, is_call: bool
) -> Wait[bool]:
    """Reads the text of one message, up to the start of the next. Returns whether an answer has been written by then."""
    wrote = False
    while True:
        text, end = yield from reader.until((*ENDS, START))
        if text and is_chain:
            sink.think(text)
        elif text and is_call:
            sink.arguments(text)
        elif text:
            sink.text(("\n\n" if follows and not wrote else "") + text)
        wrote = wrote or bool(text)
        if not text:
            break
    if is_chain:
        sink.end_chain()
    if is_call and end and not wrote:
        sink.arguments("{}")
    if is_call and end:
        sink.end_call()
    return follows or (wrote and not is_chain and not is_call)
