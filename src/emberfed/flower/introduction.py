"""How a client says its name where there are no certificates: what it says is believed.

With certificates this does not exist: there a name is the one its public key was handed to the server under.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import final

import httpx
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

from emberfed.errors import EngineError

PATH = "/v1/emberfed/introduction"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_TIMEOUT_SECONDS = 10.0


@final
@dataclass(frozen=True, slots=True)
class Introduction:
    """Who a client says it is.

    Attributes:
        name: The client's id.
        public_key: The key its node will sign with, PEM.
    """

    name: str
    public_key: bytes


def introduce(server: str, who: Introduction) -> None:
    """Tell a server without certificates (`host:port`) who one is, before the SuperNode connects with that key.

    Raises:
        EngineError: if the server refuses.
        httpx.TransportError: if it is not there.
    """
    body = {"name": who.name, "public_key": who.public_key.decode()}
    answer = httpx.post(f"http://{server}{PATH}", json=body, timeout=_TIMEOUT_SECONDS, trust_env=False)
    if answer.status_code != httpx.codes.NO_CONTENT:
        said = " ".join(answer.text[:300].split())
        raise EngineError(f"the server {server} does not take client {who.name!r} without certificates: {said}")


async def answer(request: Request, register: Callable[[Introduction], str | None]) -> Response:
    """Answer an introduction; `register` returns why it refuses, if it does."""
    try:
        told = json.loads(await request.body())
        who = Introduction(told["name"], told["public_key"].encode())
        if not _NAME.fullmatch(who.name):
            raise ValueError
    except (ValueError, TypeError, KeyError, AttributeError):
        return PlainTextResponse("an introduction has a 'name' (letters, digits, . _ -) and a 'public_key'", 400)
    refused = await run_in_threadpool(register, who)
    return PlainTextResponse(refused, 409) if refused else Response(status_code=204)
