"""The rendezvous of ranks, which also checks that all of them are about to run the same. Does not import torch.

Rank 0 listens and writes its address to the store; the others connect and declare what they are about to run. A store
outlives ranks that are restarted, so rank 0 also writes a name that is unique to this meeting.
"""

import ipaddress
import json
import os
import platform
import secrets
import socket
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from finback.config import UserError
from finback.parallel.heartbeat import DEFAULT_WAIT, GRACE, WAIT, Heartbeat, Line, readable
from finback.runs.folder import Interrupted

ARRIVAL = 5  # factor on the wait for silent ranks at the start, when slow imports delay some of them
KEY = "finback/meeting"
TURN = 0.1  # seconds between two polls


class Store(Protocol):
    """The methods of torch's TCPStore that a meeting uses."""

    def set(self, key: str, value: str, /) -> Any:
        """Sets a key."""
        ...

    def get(self, key: str, /) -> bytes:
        """Waits for a key and returns its value."""
        ...

    def check(self, keys: list[str], /) -> bool:
        """Whether all keys are set."""
        ...


@dataclass(frozen=True)
class Party:
    """A rank that takes part in a meeting."""

    rank: int
    size: int
    # values that must agree on all ranks
    declared: Mapping[str, Any]
    # whether the rank has been asked to stop
    stopping: Callable[[], bool] = lambda: False
    # seconds that a rank may be silent
    wait: float = DEFAULT_WAIT

    @property
    def all_declared(self) -> dict[str, Any]:
        """`declared`, and the number of ranks."""
        return {"WORLD_SIZE": self.size, **self.declared}

    def __str__(self) -> str:
        return f"rank {self.rank} ({platform.node()}, pid {os.getpid()})"


def meet(store: Store, party: Party, address: tuple[str, int]) -> tuple[str, Heartbeat]:
    """Waits until all ranks have connected; returns the meeting's name and this rank's heartbeat.

    UserError, on all ranks: their declarations differ, or a rank does not come. Interrupted, on all ranks: one was asked to
    stop. `address` is that of the store.
    """
    name, lines = (_receive if party.rank == 0 else _call)(store, party, address)
    return name, Heartbeat(party.rank, party.wait, lines)


def differences(mine: Mapping[str, Any], theirs: Mapping[str, Any], who: str) -> UserError | None:
    """An error about the first field whose value on another rank differs from rank 0's, naming up to three more; or None."""
    names = [n for n in [*mine, *(n for n in theirs if n not in mine)] if mine.get(n) != theirs.get(n)]
    if not names:
        return None
    first, *rest = names
    more = f"; {len(rest)} more differ: {', '.join(rest[:3])}" if rest else ""
    remedy = "Start all ranks with the same recipe, settings, seed and versions."
    return UserError(first, mine.get(first), f"on rank 0, but {who} has {theirs.get(first)!r}{more}", remedy)


class _Patience:
    """Reports periodically which ranks are missing, and gives up in the end: rank 0 first, so that it can tell the others."""

    def __init__(self, party: Party) -> None:
        self.party, self.begin, self.said = party, time.monotonic(), 1
        self.most = ARRIVAL if party.rank == 0 else ARRIVAL + 1

    def look(self, missing: Callable[[], str]) -> None:
        """Prints what is missing once per wait; UserError after `most` waits."""
        waited = time.monotonic() - self.begin
        if waited < self.said * self.party.wait:
            return
        problem = f"{missing()} in {waited:.0f} s"
        if self.said >= self.most:
            raise UserError("WORLD_SIZE", self.party.size, problem, f"Check whether it runs; {WAIT} changes the wait.")
        print(f"{self.party}: {problem}", file=sys.stderr, flush=True)
        self.said += 1


# ---- rank 0 ----------------------------------------------------------------------------------------------------------


class _Host:
    """Rank 0's side of the meeting: accepts and checks the connections of other ranks."""

    def __init__(self, server: socket.socket, name: str, party: Party) -> None:
        self.server, self.name, self.party = server, name, party
        self.lines: list[Line] = []
        self.came: dict[int, Line] = {}
        self.error: UserError | Interrupted | None = None

    @property
    def is_full(self) -> bool:
        return len(self.came) >= self.party.size - 1

    def missing(self) -> str:
        absent = [str(rank) for rank in range(1, self.party.size) if rank not in self.came]
        return f"rank{'s' * (len(absent) > 1)} {', '.join(absent[:8])} of {self.party.size} did not come"

    def turn(self) -> None:
        """Accepts connections and reads messages; UserError if a rank's declaration differs from this one's."""
        for ready in readable(self.lines, TURN, self.server):
            if ready is self.server:
                self.lines.append(Line(self.server.accept()[0], -1))
                continue
            for message in ready.read():
                self._admit(ready, message)
        for line in [line for line in self.lines if line.closed]:
            line.socket.close()
            if self.came.get(line.rank) is line:
                del self.came[line.rank]
        self.lines = [line for line in self.lines if not line.closed]

    def _admit(self, line: Line, hello: dict[str, Any]) -> None:
        if hello.get("meeting") != self.name:  # a rank of an earlier start, or not a rank at all
            line.closed = True
            return
        line.rank, line.who = hello["rank"], hello["who"]
        self.came[line.rank] = line
        if self.error is not None:
            self._answer(line)
        elif hello["stop"]:
            raise Interrupted
        elif error := differences(self.party.all_declared, hello["declared"], line.who):
            raise error

    def refuse(self, error: UserError | Interrupted) -> None:
        """Sends the error to all ranks, including those that connect within the next GRACE seconds."""
        self.error, until = error, time.monotonic() + GRACE
        for line in self.lines:
            self._answer(line)
        while not self.is_full and time.monotonic() < until:
            self.turn()
        for line in self.lines:
            line.socket.close()

    def _answer(self, line: Line) -> None:
        if isinstance(self.error, UserError):
            line.send(wrong=[self.error.field, self.error.value, self.error.problem, self.error.remedy])
        else:
            line.send(go=self.error is None, who=str(self.party))

    def welcome(self) -> list[Line]:
        """Lets all ranks continue; returns their lines."""
        for line in self.came.values():
            self._answer(line)
        return [self.came[rank] for rank in sorted(self.came)]


def _receive(store: Store, party: Party, address: tuple[str, int]) -> tuple[str, list[Line]]:
    """Rank 0's part of `meet`: the meeting's name and the line to each other rank."""
    patience = _Patience(party)
    seen_as, bind = _own_address(address)
    with _listening(bind, party.size) as server:
        host = _Host(server, secrets.token_hex(8), party)
        store.set(KEY, json.dumps([host.name, seen_as, server.getsockname()[1]]))
        try:
            while not host.is_full:
                if party.stopping():
                    raise Interrupted
                host.turn()
                patience.look(host.missing)
        except (UserError, Interrupted) as error:
            host.refuse(error)
            raise
    return host.name, host.welcome()


def _own_address(store: tuple[str, int]) -> tuple[str, str]:
    """The address at which other ranks reach this process, and the one to listen on.

    This is the local address of a connection to the store. If the store is on this machine, it is the store's own address,
    by which the others find it.
    """
    family, kind, _, _, where = socket.getaddrinfo(*store, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as probe:  # connecting UDP only chooses a local address and sends nothing
        probe.connect(where)
        mine = probe.getsockname()[0]
    if not ipaddress.ip_address(mine.partition("%")[0]).is_loopback:
        return mine, mine
    is_local = store[0] == "localhost" or _is_loopback(store[0])
    return store[0], mine if is_local else ""


def _is_loopback(text: str) -> bool:
    try:
        return ipaddress.ip_address(text).is_loopback
    except ValueError:
        return False


def _listening(bind: str, ranks: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in bind else socket.AF_INET
    return socket.create_server((bind, 0), family=family, backlog=ranks)


# ---- the others ------------------------------------------------------------------------------------------------------


def _call(store: Store, party: Party, address: tuple[str, int]) -> tuple[str, list[Line]]:
    """The other ranks' part of `meet`: connects to the rank 0 that the store names, and retries until it answers."""
    patience = _Patience(party)
    while True:
        meeting = _meeting(store)
        line = _dial(meeting) if meeting is not None else None
        if meeting is not None and line is not None:
            name, is_in = str(meeting[0]), False
            try:
                is_in = _ask(line, name, party, patience, lambda name=name: name == (_meeting(store) or [""])[0])  # type: ignore[misc]
            finally:
                if not is_in:
                    line.socket.close()
            if is_in:
                return name, [line]
        if party.stopping() and time.monotonic() - patience.begin > GRACE:
            raise Interrupted
        patience.look(lambda: "rank 0 did not answer")
        time.sleep(TURN)


def _meeting(store: Store) -> list[Any] | None:
    """The meeting's name and the host and port of rank 0; None if the store has none yet."""
    return json.loads(store.get(KEY)) if store.check([KEY]) else None  # type: ignore[no-any-return]


def _dial(meeting: list[Any]) -> Line | None:
    try:
        return Line(socket.create_connection((meeting[1], meeting[2]), timeout=GRACE))
    except OSError:  # an address of an earlier start, or rank 0 does not listen yet
        return None


def _ask(line: Line, name: str, party: Party, patience: _Patience, is_current: Callable[[], bool]) -> bool:
    """Declares what this rank is about to run; returns True once all may continue, False if it must connect again."""
    told = None
    while not line.closed and is_current():
        if told != party.stopping():
            told = party.stopping()
            hello = {"rank": party.rank, "who": str(party), "declared": party.all_declared, "stop": told}
            line.send(meeting=name, **hello)
        for _ in readable([line], TURN):
            for message in line.read():
                if "wrong" in message:
                    raise UserError(*message["wrong"])
                if not message["go"]:
                    raise Interrupted
                line.who = message["who"]
                return True
        patience.look(lambda: "rank 0 is still waiting for other ranks: no start")
    return False
