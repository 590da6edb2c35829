"""Runs in a separate environment (`make test-slow` creates it): V4's and V4.1's prompts and answers by DeepSeek's
recipe, and V3.2's prompts by SGLang."""

import importlib.util
import json
import sys
import sysconfig
from pathlib import Path
from typing import Any

import deepseek_recipe as recipe

NAMES = {"v4": "DeepSeek-V4-Pro", "v4.1": "DeepSeek-V4.1-Flash"}
FORMS = {"v4": recipe.DeepseekV4Encoding, "v4.1": recipe.DeepseekV41Encoding}


def by_recipe(form: str, tokenizer: str, requests: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each chat request's prompt as text and as ids, and the message parsed from its `answer`."""
    words = recipe.Tokenizer.from_file(tokenizer)
    encoding = FORMS[form]().with_tokenizer(words)
    found = []
    for request in requests:
        answer = request.pop("answer")
        asked = recipe.ChatCompletionRequest({"model": NAMES[form], **request}).convert(recipe.ConversionOptions())
        prompt = encoding.render_conversation(asked.conversation).prompt
        found.append({"prompt": prompt, "ids": encoding.encode(asked.conversation), "read": read(asked, answer)})
    return found


def read(asked: Any, answer: str) -> dict[str, Any]:
    """The message parsed from an answer by the recipe's stream processor."""
    generator = recipe.ChatCompletionRequest.chunk_generator(asked, "id", "model")
    processor = recipe.StreamProcessor(generator, asked.parsing_options)
    response = recipe.ChatCompletionResponse("id", "model", 0, 0, 0)
    chunks = [recipe.InferenceChunk.ready(), recipe.InferenceChunk.text(answer, 1)]
    chunks.append(recipe.InferenceChunk.finish(recipe.InferenceFinishReason.Stop))
    for made in (*map(processor.push, chunks), processor.finish()):
        for chunk in made:
            response.accumulate(chunk)
    return dict(json.loads(response.to_json())["choices"][0]["message"])


def by_sglang(requests: list[dict[str, Any]]) -> list[str]:
    """V3.2's prompts, with tools in the first system message, where SGLang's server puts them."""
    path = Path(sysconfig.get_path("purelib")) / "sglang/srt/entrypoints/openai/encoding_dsv32.py"
    spec = importlib.util.spec_from_file_location("encoding_dsv32", path)
    assert spec is not None and spec.loader is not None
    encoder = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(encoder)  # loads the file alone: the package imports what only servers need
    found = []
    for request in requests:
        messages = request["messages"]
        if messages[0]["role"] != "system":
            messages = [{"role": "system", "content": ""}, *messages]
        messages[0] |= {name: request[name] for name in ("tools", "response_format") if request.get(name)}
        found.append(encoder.encode_messages(messages, "thinking" if request["think"] else "chat"))
    return found


def main() -> None:
    given = json.load(sys.stdin)
    form, requests = given["form"], given["requests"]
    print(json.dumps(by_sglang(requests) if form == "v3.2" else by_recipe(form, given["tokenizer"], requests)))


if __name__ == "__main__":
    main()
