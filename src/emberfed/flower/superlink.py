"""The SuperLink's process: Flower's application on two sockets, and an end when its servers are gone.

The public one, TLS where there are certificates, passes nothing but the routes of SuperNodes, whose every call is
signed with the node's key. All others (Flower's Control API knows no authentication) are on the loopback, for processes
that know the secret of the state folder. `server_process` starts it: `python -m emberfed.flower.superlink`.
"""

from __future__ import annotations

import asyncio
import binascii
import fcntl
import gc
import hmac
import json
import os
import resource
import signal
import socket
import sys
import time
import traceback
from base64 import b64decode
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Lock
from typing import final

import anyio.to_thread
import uvicorn
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_pem_public_key
from flwr.common.constant import HEARTBEAT_DEFAULT_INTERVAL, NOOP_ACCOUNT_NAME, NOOP_FLWR_AID, TRANSPORT_TYPE_GRPC_RERE
from flwr.proto.node_pb2 import NodeInfo
from flwr.server.superlink.linkstate import LinkState
from flwr.supercore.constant import FLEET_HTTP_PUBLIC_KEY_HEADER, NodeStatus
from flwr.supercore.primitives.asymmetric import public_key_to_bytes, uses_nist_ec_curve
from flwr.superlink.cli.flower_superlink import SuperLinkLifespan
from flwr.superlink.config_loader import SuperLinkLifespanConfig, load_control_authn_plugin
from flwr.superlink.main import create_app
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from emberfed.errors import EngineError
from emberfed.flower import introduction
from emberfed.flower.certificates import client_keys, server_files
from emberfed.flower.introduction import Introduction
from emberfed.flower.server_state import SECRET_HEADER, Running, ServerState, Serving, hold, wait_for

# An object of Flower's is 5 MB and a little; messages without their content are far smaller.
_LARGEST_BODY_BYTES = 16 * 2**20
_LARGE_BODIES = ("/v1/fleet/push-object", "/v1/fleet/push-messages")
# All else is ids and keys, in some hundred bytes. Flower reads a body before it looks at the signature.
_SMALL_BODY_BYTES = 64 * 2**10
_MOST_CONNECTIONS = 1000
_MOST_FILES = 4096
# Each has a connection to the database, with a cache of 64 MB of its own; writers wait for each other anyway.
_THREADS = 6
_WATCH_SECONDS = 0.5
_LOCK_SECONDS = 10.0
_SHUTDOWN_SECONDS = 2


@final
class FleetOnly:
    """What the public socket serves: SuperNodes' routes, and introductions where there are no certificates."""

    def __init__(self, app: ASGIApp, nodes: Nodes, *, introductions: bool) -> None:
        """Take Flower's application, and whether names are believed."""
        self._app = app
        self._nodes = nodes
        self._introductions = introductions

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or refuse it."""
        if scope["type"] != "http":
            return
        request = Request(scope, receive)
        introduced = self._introductions and scope["path"] == introduction.PATH
        if not introduced and not scope["path"].startswith("/v1/fleet/"):
            await PlainTextResponse("not found", 404)(scope, receive, send)
        elif scope["method"] == "POST" and (refusal := self._refusal(request, _body_bytes(request))) is not None:
            await refusal(scope, receive, send)
        elif introduced:
            await (await introduction.answer(request, self._nodes.introduce))(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    def _refusal(self, request: Request, body_bytes: int | None) -> PlainTextResponse | None:
        """Return the answer to a request whose body is not read."""
        largest_bytes = _LARGEST_BODY_BYTES if request.scope["path"] in _LARGE_BODIES else _SMALL_BODY_BYTES
        if body_bytes is None or body_bytes > largest_bytes:
            return PlainTextResponse("too large, or without a length", 413)
        if body_bytes > _SMALL_BODY_BYTES and not self._nodes.knows(_told_key(request)):
            return PlainTextResponse("not a client of this server", 401)
        return None


@final
class SecretOnly:
    """What the loopback serves: everything, to those who know the secret."""

    def __init__(self, app: ASGIApp, secret: str) -> None:
        """Take Flower's application and the secret."""
        self._app = app
        self._secret = secret.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or refuse it."""
        if scope["type"] == "http":
            told = Request(scope).headers.get(SECRET_HEADER, "").encode()
            if not hmac.compare_digest(told, self._secret):
                await PlainTextResponse("not found", 404)(scope, receive, send)
                return
        await self._app(scope, receive, send)


@final
class Nodes:
    """The nodes that may connect: those whose public keys are in a folder, each under the name of its file."""

    def __init__(self, state: LinkState, certificates: Path | None) -> None:
        """Take Flower's state and the server's certificates; None where clients introduce themselves."""
        self._state = state
        self._certificates = certificates
        self._seen: tuple[bool, dict[str, tuple[int, int]]] | None = None
        self._registering = Lock()
        self._keys = frozenset(node.public_key for node in self._known())

    def knows(self, key: bytes) -> bool:
        """Tell whether a public key is one of those that may connect."""
        return key in self._keys

    def follow(self) -> None:
        """Register the keys that came and withdraw those that went, if the folder is no more what it was.

        A file that cannot be used keeps no other from its effect: what a key is withdrawn for cannot wait.

        Raises: EngineError naming the files that cannot be used, once for the same state of the folder.
        """
        if self._certificates is None:
            return
        folder = self._certificates / "clients"
        files = {path.stem: path.stat() for path in sorted(folder.glob("*.pub"))}
        found = folder.is_dir(), {name: (file.st_mtime_ns, file.st_size) for name, file in files.items()}
        if found == self._seen:
            return
        self._seen = found
        with self._registering:
            known = self._known()
            if known and not folder.is_dir():  # a disk that is not mounted: Flower would keep that for good
                raise EngineError(f"{folder} is gone; no key is withdrawn for that: put it back, or make it empty")
            keys, problems = client_keys(self._certificates)
            wanted = {name: public_key_to_bytes(key) for name, key in keys.items()}
            for node in known:
                if node.name not in files or wanted.get(node.name, node.public_key) != node.public_key:
                    self._state.delete_node(NOOP_FLWR_AID, node.node_id)
            here = {(node.name, node.public_key) for node in known}
            for name, key in wanted.items():
                if (name, key) not in here:
                    try:
                        self._create(name, key)
                    except EngineError as problem:
                        problems.append(problem)
            self._keys = frozenset(node.public_key for node in self._known())
        if problems:
            raise EngineError("; ".join(map(str, problems)))

    def introduce(self, who: Introduction) -> str | None:
        """Take a name with its key, if no other node is connected under it; return why not otherwise."""
        try:
            key = _public_key(who.public_key)
        except ValueError as error:
            return f"its public key cannot be used: {error}"
        with self._registering:
            for node in self._known():
                if node.name == who.name and node.public_key == key:
                    return None
                if node.name == who.name and node.status == NodeStatus.ONLINE:
                    return (
                        f"another client is connected as {who.name!r}: take another name, or stop it and wait a minute"
                    )
                if node.name == who.name or node.public_key == key:
                    self._state.delete_node(NOOP_FLWR_AID, node.node_id)
            try:
                self._create(who.name, key)
            except EngineError as error:
                return str(error)
            finally:
                self._keys = frozenset(node.public_key for node in self._known())
        return None

    def _known(self) -> list[NodeInfo]:
        statuses = [NodeStatus.REGISTERED, NodeStatus.ONLINE, NodeStatus.OFFLINE]
        return list(self._state.get_node_info(owner_aids=[NOOP_FLWR_AID], statuses=statuses))

    def _create(self, name: str, key: bytes) -> None:
        try:
            self._state.create_node(NOOP_FLWR_AID, NOOP_ACCOUNT_NAME, key, HEARTBEAT_DEFAULT_INTERVAL, name=name)
        except ValueError as error:
            raise EngineError(
                f"the key of client {name!r} was withdrawn before, which Flower keeps for good: make the client a new "
                f"key, or start with a new state folder"
            ) from error


def _body_bytes(request: Request) -> int | None:
    """Return what a request says of its length; None: nothing that can be a length."""
    length = request.headers.get("content-length", "")
    return int(length) if length.isdecimal() and len(length) < 20 else None


def _told_key(request: Request) -> bytes:
    """Return the public key that a request says it is signed with; without one, nothing."""
    try:
        return b64decode(request.headers.get(FLEET_HTTP_PUBLIC_KEY_HEADER, ""), validate=True)
    except (ValueError, binascii.Error):
        return b""


def _public_key(told: bytes) -> bytes:
    """Return a public key as nodes send it. Raises: ValueError."""
    try:
        key = load_pem_public_key(told)
    except UnsupportedAlgorithm as error:
        raise ValueError("an algorithm that is not known") from error
    if not isinstance(key, ec.EllipticCurvePublicKey) or not uses_nist_ec_curve(key):
        raise ValueError("not a key on a NIST curve, such as P-384")
    return public_key_to_bytes(key)


@final
class _Server(uvicorn.Server):
    """A server that leaves signals to us: there are two in one process."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Capture none."""
        yield


@final
class _Process:
    """The two servers and the watch over them."""

    def __init__(self, state: ServerState, serving: Serving, public: socket.socket, private: socket.socket) -> None:
        """Make ready to serve on two listening sockets."""
        self._state = state
        self._serving = serving
        self._sockets = public, private
        app = create_app(_lifespan(state), SuperLinkLifespan)
        folder = None if serving.certificates is None else Path(serving.certificates)
        self._nodes = Nodes(app.state.linkstate_factory.state(), folder)
        self._public = _Server(
            uvicorn.Config(
                FleetOnly(app, self._nodes, introductions=folder is None),
                interface="asgi3",
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                limit_concurrency=_MOST_CONNECTIONS,
                timeout_graceful_shutdown=_SHUTDOWN_SECONDS,
                ssl_certfile=None if folder is None else folder / "server.pem",
                ssl_keyfile=None if folder is None else folder / "server.key",
            )
        )
        self._private = _Server(
            uvicorn.Config(
                SecretOnly(app, state.secret()),
                interface="asgi3",
                lifespan="on",
                log_config=None,
                access_log=False,
                timeout_graceful_shutdown=_SHUTDOWN_SECONDS,
            )
        )

    async def serve(self) -> None:
        """Serve until told to end, or left alone for the grace period."""
        if self._serving.certificates is not None:
            server_files(Path(self._serving.certificates))
        self._nodes.follow()
        anyio.to_thread.current_default_thread_limiter().total_tokens = _THREADS
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._end)
        public, private = self._sockets
        await asyncio.gather(
            self._private.serve(sockets=[private]), self._public.serve(sockets=[public]), self._watch(private)
        )

    def _end(self) -> None:
        self._private.should_exit = self._public.should_exit = True

    async def _watch(self, private: socket.socket) -> None:
        while not (self._private.started and self._public.started):
            if self._private.should_exit or self._public.should_exit:
                return self._end()
            await asyncio.sleep(0.02)
        self._state.write_running(Running(os.getpid(), private.getsockname()[1], self._serving))
        left_alone_since: float | None = None
        while not self._private.should_exit:
            await asyncio.sleep(_WATCH_SECONDS)
            await asyncio.to_thread(self._follow)
            alone = hold(self._state.servers, fcntl.LOCK_EX)
            if alone is None:
                left_alone_since = None
                continue
            left_alone_since = time.monotonic() if left_alone_since is None else left_alone_since
            if time.monotonic() - left_alone_since >= self._serving.grace_seconds:
                # Still locked: a server that comes now waits until this process is gone, and starts another.
                return self._end()
            os.close(alone)
        return None

    def _follow(self) -> None:
        try:
            self._nodes.follow()
        except (EngineError, OSError) as error:
            print(error, file=sys.stderr, flush=True)


def _lifespan(state: ServerState) -> SuperLinkLifespanConfig:
    """Return what Flower's application needs; its addresses and certificates are the business of our own servers."""
    return SuperLinkLifespanConfig(
        control_address="",
        health_server_address=None,
        host="127.0.0.1",
        port=0,
        insecure=True,
        certificates=None,
        superexec_auth_secret=None,  # the whole loopback asks for a secret
        authn_plugin=load_control_authn_plugin(),
        event_log_plugin=None,
        fleet_event_log_plugin=None,
        enable_event_log=False,
        artifact_provider=None,
        enable_supernode_auth=True,
        fleet_api_type=TRANSPORT_TYPE_GRPC_RERE,
        fleet_api_address=None,
        simulation=False,
        ssl_ca_certfile=None,
        ssl_certfile=None,
        ssl_keyfile=None,
        database=str(state.database),
        isolation="process",
        runtime_dependency_install=False,
    )


def _allow_files() -> None:
    """See that as many connections as there may be leave files for the database and for our servers."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if 0 <= soft < _MOST_FILES:  # -1 is: as many as you like
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(_MOST_FILES, hard) if hard >= 0 else _MOST_FILES, hard))


def main(root: str, serving: str, public: str, private: str) -> None:
    """Serve.

    Args:
        root: The state folder.
        serving: `Serving`, as JSON.
        public: The file descriptor of the public socket.
        private: The file descriptor of the loopback's.
    """
    state = ServerState(Path(root))
    _allow_files()
    wait_for(state.alive, fcntl.LOCK_EX, _LOCK_SECONDS, "another SuperLink has this state folder")
    sockets = [socket.socket(fileno=int(descriptor)) for descriptor in (public, private)]
    process = _Process(state, Serving(**json.loads(serving)), sockets[0], sockets[1])
    asyncio.run(process.serve())
    gc.freeze()  # a quick end: the server waits for it


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except Exception as failed:
        traceback.print_exc()
        sys.exit(" ".join(str(failed).split()))  # the log's last line, which the server tells
