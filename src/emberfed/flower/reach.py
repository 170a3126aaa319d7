"""Can a server be reached, and if not, why? Asked by a plain connection, before and after Flower tries."""

from __future__ import annotations

import socket
import ssl
from dataclasses import dataclass
from pathlib import Path
from typing import final

from emberfed.errors import ConfigError

_EXPIRED, _NOT_YET_VALID = 10, 9
_WRONG_NAME = (62, 64)  # X509_V_ERR_HOSTNAME_MISMATCH, X509_V_ERR_IP_ADDRESS_MISMATCH
_WRONG_CA = (7, 18, 19, 20, 21)  # a signature that does not fit, self-signed, or an issuer that is not trusted
_NO_TLS = frozenset({"WRONG_VERSION_NUMBER", "RECORD_LAYER_FAILURE", "HTTP_REQUEST", "PACKET_LENGTH_TOO_LONG"})


@final
@dataclass(frozen=True, slots=True)
class Problem:
    """Why a server cannot be talked to.

    Attributes:
        reason: One line: what is wrong, and what to do.
        lasting: It will not pass by waiting.
    """

    reason: str
    lasting: bool


def host_and_port(address: str) -> tuple[str, int]:
    """Return the parts of `host:port` or `[address]:port`. Raises: ConfigError."""
    host, colon, port = address.rpartition(":")
    bare = host.removeprefix("[").removesuffix("]")
    if not colon or not bare or (":" in bare and bare == host) or "/" in host:
        raise ConfigError(f"server address {address!r} is not HOST:PORT, e.g. flower.example.org:8443 or [::1]:8443")
    if not (port.isascii() and port.isdecimal() and 1 <= int(port) <= 65535):
        raise ConfigError(f"server address {address!r} ends in {port!r}, which is no port; expected 1 to 65535")
    return bare, int(port)


def problem(address: str, ca: Path | None, timeout_seconds: float = 10.0) -> Problem | None:
    """Return why a server cannot be talked to; None: it can.

    Args:
        address: `host:port`.
        ca: The certificates that the server's must be signed by; None: plain HTTP.
        timeout_seconds: How long an answer is waited for.

    Raises:
        ConfigError: If the address is not one.
    """
    host, port = host_and_port(address)
    try:
        with socket.create_connection((host, port), timeout_seconds) as connection:
            return _plain(connection, address) if ca is None else _secured(connection, address, host, ca)
    except socket.gaierror as error:
        return Problem(f"the name {host!r} of the server is not known here ({error.strerror}); check it", False)
    except UnicodeError:
        return Problem(f"the name {host!r} of the server cannot be that of a machine; check it", True)
    except ConnectionRefusedError:
        return Problem(f"nothing listens at {address}; check the address, and whether the server runs", False)
    except TimeoutError:
        return Problem(f"{address} does not answer; check the address, and firewalls between here and there", False)
    except OSError as error:
        return Problem(f"{address} cannot be reached: {error.strerror or error}", False)


def _secured(connection: socket.socket, address: str, host: str, ca: Path) -> Problem | None:
    context = ssl.create_default_context(cafile=str(ca))
    try:
        with context.wrap_socket(connection, server_hostname=host):
            return None
    except ssl.SSLCertVerificationError as error:
        return Problem(_distrust(error, address, host, ca), True)
    except ssl.SSLError as error:
        if error.reason in _NO_TLS:
            return Problem(
                f"{address} does not speak TLS: the server was started without certificates, or another program "
                f"listens there",
                True,
            )
        return Problem(f"{address} broke off the TLS handshake ({error.reason or error})", False)


def _distrust(error: ssl.SSLCertVerificationError, address: str, host: str, ca: Path) -> str:
    if error.verify_code == _EXPIRED:
        return (
            f"the certificate of {address} has expired; make a new one where its CA's key is: emberfed certificates "
            f"DIR --server {host}"
        )
    if error.verify_code == _NOT_YET_VALID:
        return f"the certificate of {address} is not valid yet; check the clocks of both machines"
    if error.verify_code in _WRONG_NAME:
        return (
            f"the certificate of {address} is not for {host!r}; dial a name that it was made for, or make one where "
            f"its CA's key is: emberfed certificates DIR --server {host}"
        )
    if error.verify_code in _WRONG_CA:
        return (
            f"the certificate of {address} is not signed by the CA in {ca}; use the ca.pem that was made with the "
            f"server's certificate"
        )
    return f"the certificate of {address} is not trusted: {error.verify_message}"


def _plain(connection: socket.socket, address: str) -> Problem | None:
    peer = connection.getpeername()[:2]
    try:
        connection.sendall(b"GET / HTTP/1.0\r\n\r\n")
        answer = connection.recv(5)
    except ConnectionError:
        answer = b""
    if answer == b"HTTP/":
        return None
    if answer[:1] == b"\x15" or _speaks_tls(peer, connection.gettimeout()):
        return Problem(f"{address} speaks TLS: give the client its certificates, not leave to talk without them", True)
    return Problem(f"{address} broke off without an answer", False)


def _speaks_tls(peer: tuple[str, int], timeout_seconds: float | None) -> bool:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    try:
        with socket.create_connection(peer, timeout_seconds) as connection, context.wrap_socket(connection):
            return True
    except OSError:
        return False
