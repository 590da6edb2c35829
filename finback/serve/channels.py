"""Texts in channels, as gpt-oss writes them (harmony): <|channel|>analysis<|message|>…<|end|><|start|>assistant<|channel|>….

analysis is the chain of thought, final and commentary the answer, and what is sent to=functions.NAME a call.
"""

import re

from finback.serve.deltas import DeltaCollector
from finback.serve.incremental import IncrementalReader, Wait

START, CHANNEL, MESSAGE = "<|start|>", "<|channel|>", "<|message|>"
ENDS = ("<|end|>", "<|return|>", "<|call|>")
ASSISTANT = "assistant"
_RECIPIENT = re.compile(r"to=functions\.([\w.-]+)")


def read(reader: IncrementalReader, sink: DeltaCollector, tools: bool) -> Wait[None]:
    """Read messages to the end of the text; the first one's start, or its channel's mark, has just been read."""
    answered = False
    while True:
        head = yield from reader.before((MESSAGE, *ENDS))
        if not (yield from reader.match((MESSAGE,))):
            if (yield from reader.match(ENDS)):
                continue
            return  # a head that breaks off says nothing
        channel = re.match(r"\s*(\w*)", head.rpartition(CHANNEL)[2])
        kind, recipient = channel[1] if channel else "", _RECIPIENT.search(head)
        is_call = bool(recipient and tools)
        if recipient and is_call:
            sink.call(recipient[1])
        is_chain = kind == "analysis" and not is_call  # calls are made there too
        answered = yield from _message(reader, sink, answered, is_chain, is_call)


def _message(
    reader: IncrementalReader, sink: DeltaCollector, follows: bool, is_chain: bool, is_call: bool
) -> Wait[bool]:
    """The text of one message, to the next one's start; whether an answer has been written by then."""
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
