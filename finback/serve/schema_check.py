"""Compiles schemas in another process before the engine sees them: a hard one would block the engine for all requests."""

import asyncio
import contextlib
import hashlib
import json
import sys
from collections import OrderedDict
from typing import Literal

from finback.serve.errors import ApiError, bad
from finback.serve.prepare import PreparedRequest

PATIENCE = 1.0  # seconds; ordinary schemas take a hundredth of it
KNOWN = 256  # checked schemas to remember


class SchemaChecker:
    """Checks schemas one at a time; used on the event loop only."""

    def __init__(self) -> None:
        self._process: asyncio.subprocess.Process | None = None
        self._lock = asyncio.Lock()
        self._valid: OrderedDict[bytes, None] = OrderedDict()  # digests, least recently used first

    async def check(self, prepared: PreparedRequest) -> None:
        """ApiError 400 for a schema or grammar that the engine cannot enforce, or not in reasonable time."""
        grammar = prepared.grammar
        assert grammar is not None, "nothing to check"
        if grammar.schema is not None:
            await self._check("json_schema", grammar.schema, grammar.param)
            return
        assert grammar.grammar is not None, "a schema or a grammar"
        try:
            await self._check("lark", grammar.grammar, grammar.param)
        except ApiError:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(PATIENCE):
                    for param, schema in grammar.schemas.items():  # find the one at fault
                        await self._check("json_schema", schema, param)
            raise
        for param, schema in grammar.schemas.items():
            await self._check("json_schema", schema, param)

    async def _check(self, kind: Literal["json_schema", "lark"], text: str, param: str) -> None:
        line = json.dumps([kind, text]).encode() + b"\n"
        digest = hashlib.sha256(line).digest()
        if digest not in self._valid:
            async with self._lock:
                await self._compile(line, param)
        self._valid[digest] = None
        self._valid.move_to_end(digest)
        if len(self._valid) > KNOWN:
            self._valid.popitem(last=False)

    async def _compile(self, line: bytes, param: str) -> None:
        try:
            process = self._process = self._process or await self._start()
            assert process.stdin is not None and process.stdout is not None, "started with pipes"
            process.stdin.write(line)
            async with asyncio.timeout(PATIENCE):
                await process.stdin.drain()
                answer = await process.stdout.readline()
            problem = json.loads(answer)
        except TimeoutError:
            await self.close()
            raise bad("the schema is too complex; simplify it", param) from None
        except (OSError, ValueError):  # the process has died, perhaps because of this schema
            await self.close()
            raise ApiError(503, "schemas cannot be checked at the moment", param) from None
        except asyncio.CancelledError:  # otherwise the next check would read this one's answer
            await self.close()
            raise
        if problem:
            raise bad(f"the schema cannot be enforced: {_in_one_line(problem)}", param)

    async def _start(self) -> asyncio.subprocess.Process:
        command = (sys.executable, "-m", "finback.serve.schema_child")
        pipe, quiet = asyncio.subprocess.PIPE, asyncio.subprocess.DEVNULL
        start = asyncio.create_subprocess_exec
        process = await start(*command, stdin=pipe, stdout=pipe, stderr=quiet, limit=1 << 20)
        assert process.stdout is not None, "started with pipes"
        await process.stdout.readline()  # it has started
        return process

    async def close(self) -> None:
        """Ends the process that checks schemas."""
        process, self._process = self._process, None
        if process is not None:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.communicate()


def _in_one_line(problem: str) -> str:
    """The first line, and the reason, which llguidance writes on a later line if a regex is invalid."""
    first, *others = problem.splitlines()
    why = next((line.removeprefix("error:") for line in others if line.startswith("error: ")), "")
    return f"{first}{why}"[:500]
