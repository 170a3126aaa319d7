"""Who may be the server, and who a client: a certificate authority (CA) for one federation, and checks of its files.

    DIR/ca.pem, ca.key              the CA; its key stays offline
    DIR/server/                     for the server: ca.pem, server.pem, server.key, clients/NAME.pub
    DIR/NAME/                       for client NAME: ca.pem, client.key, client.pub

The server shows a certificate, which clients check against the CA. A client signs what it sends with its key, which the
server knows by the public half; its file's name is the client's id. Files of the same names from elsewhere do as well.
Keys are ECDSA on P-384, the curve that Flower's own tools take.
"""

from __future__ import annotations

import ipaddress
import os
import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from pathlib import Path
from typing import final

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.types import PrivateKeyTypes, PublicKeyTypes
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from emberfed import storage
from emberfed.errors import ConfigError, EngineError

_CLIENT = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
_HOST_LABEL = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?")
_RESERVED = ("server", "ca.pem", "ca.key")
_CA_DAYS = 3650
_LEEWAY = timedelta(hours=1)  # certificates are valid from before they are made: other machines' clocks differ
_UNREADABLE = (ValueError, TypeError, UnsupportedAlgorithm)


@final
@dataclass(frozen=True, slots=True)
class ServerFiles:
    """What a server shows, and whom it knows.

    Attributes:
        ca: The file of the CA's certificate.
        certificate: The file of the server's certificate, and of those between it and the CA's.
        key: The file of its private key.
        names: The hosts that it is for: names and addresses that clients dial.
        valid_until: When the server's certificate expires.
        clients: The clients' public keys by the clients' ids.
    """

    ca: Path
    certificate: Path
    key: Path
    names: tuple[str, ...]
    valid_until: datetime
    clients: Mapping[str, ec.EllipticCurvePublicKey]


@final
@dataclass(frozen=True, slots=True)
class ClientFiles:
    """What a client checks the server by, and signs with.

    Attributes:
        ca: The file of the CA's certificate.
        key: The file of the client's private key.
    """

    ca: Path
    key: Path


def make(folder: Path, servers: Sequence[str], clients: Sequence[str], days: int) -> list[Path]:
    """Make a federation's certificates and keys, or add to those there are.

    Args:
        folder: Where; a folder that has a CA keeps it.
        servers: Host names and addresses that clients dial; the server gets a new key and certificate for them. None:
            it keeps what it has.
        clients: Ids of new clients.
        days: How long the server's certificate is valid.

    Returns:
        The folders to hand out: the server's, then each new client's.

    Raises:
        ConfigError: If a name cannot be used, a client is there already, or nothing is asked for.
        EngineError: If a file that is there cannot be read.
        StorageError: If writing fails.
    """
    names = [_host(name) for name in servers]
    _check_request(folder, servers, clients, days)
    ca, ca_key = _authority(folder)
    if names:
        _make_server(folder / "server", ca, ca_key, names, timedelta(days=days))
    for client in clients:
        _make_client(folder, client, ca)
    return [folder / name for name in (*(["server"] if names or clients else []), *clients)]


def server_files(folder: Path) -> ServerFiles:
    """Check a server's folder, and return what is in it.

    Raises:
        EngineError: If a file is missing or unreadable, a certificate expired, not signed by the CA or for another key,
            or two clients have the same key.
    """
    ca, certificate, key = folder / "ca.pem", folder / "server.pem", folder / "server.key"
    authorities, chain = _certificates(ca), _certificates(certificate)
    for one in (*authorities, *chain):
        _check_dates(one, ca if one in authorities else certificate)
    if _public_bytes(chain[0].public_key()) != _public_bytes(_private_key(key).public_key()):
        raise EngineError(f"{key} is not the key of {certificate}: they do not belong together; copy both again")
    _check_chain(chain, authorities, certificate, ca)
    clients, problems = client_keys(folder)
    if problems:
        raise problems[0]
    return ServerFiles(ca, certificate, key, _names(chain[0], certificate), chain[0].not_valid_after_utc, clients)


def client_keys(folder: Path) -> tuple[dict[str, ec.EllipticCurvePublicKey], list[EngineError]]:
    """Return the clients' keys that lie in a server's folder, by the clients' ids, and what is wrong with others."""
    names: dict[bytes, str] = {}
    keys, problems = {}, []
    for path in sorted((folder / "clients").glob("*.pub")):
        try:
            keys[path.stem] = _client_key(path, names)
        except EngineError as problem:
            problems.append(problem)
    return keys, problems


def client_files(folder: Path) -> ClientFiles:
    """Check a client's folder, and return what is in it.

    Raises:
        EngineError: If a file is missing or unreadable, the CA's certificate expired, or the keys do not belong
            together.
    """
    ca, key, public = folder / "ca.pem", folder / "client.key", folder / "client.pub"
    for one in _certificates(ca):
        _check_dates(one, ca)
    private = read_private_key(key)
    if public.exists() and _public_bytes(_public_key(public)) != _public_bytes(private.public_key()):
        raise EngineError(f"{key} is not the key of {public}: they do not belong together; copy both again")
    return ClientFiles(ca, key)


def read_private_key(path: Path) -> ec.EllipticCurvePrivateKey:
    """Return a client's private key. Raises: EngineError if there is none that Flower takes."""
    key = _private_key(path)
    if not isinstance(key, ec.EllipticCurvePrivateKey) or not isinstance(key.curve, _CURVES):
        raise EngineError(f"{path} is not a key on one of the curves {_curves()}; make one: {_HOW_TO_MAKE}")
    return key


def own_key(path: Path) -> Path:
    """Make a private key for a client without certificates, unless it has one; return `path`. Raises: StorageError."""
    if not path.exists():
        _write_private(path, _openssh(_new_key()))
    return path


_CURVES = (ec.SECP256R1, ec.SECP384R1, ec.SECP521R1)
_HOW_TO_MAKE = "emberfed certificates DIR --client NAME"


def _curves() -> str:
    return ", ".join(curve.name for curve in _CURVES)


def _check_request(folder: Path, servers: Sequence[str], clients: Sequence[str], days: int) -> None:
    """Refuse before anything is written. Raises: ConfigError."""
    if not servers and not clients:
        raise ConfigError("nothing to make: name the server's host (--server), clients (--client), or both")
    if not servers and not (folder / "server" / "server.pem").exists():
        raise ConfigError(f"{folder} has no server yet: say what hosts clients will dial, --server HOST")
    if not 1 <= days <= _CA_DAYS:
        raise ConfigError(f"a certificate cannot be valid for {days} days; expected 1 to {_CA_DAYS}")
    for client in clients:
        if not _CLIENT.fullmatch(client) or client in _RESERVED:
            raise ConfigError(
                f"a client cannot be named {client!r}; expected letters, digits, '_', '-' and '.', at most 64, and "
                f"none of {', '.join(_RESERVED)}"
            )
        if clients.count(client) > 1:
            raise ConfigError(f"client {client!r} is named twice")
        for there in (folder / client, folder / "server" / "clients" / f"{client}.pub"):
            if there.exists():
                raise ConfigError(f"client {client!r} has a key already ({there}); remove that for a new one")


def _host(name: str) -> x509.GeneralName:
    """Return a host as certificates have it. Raises: ConfigError."""
    try:
        address = ipaddress.ip_address(name.removeprefix("[").removesuffix("]"))
    except ValueError:
        pass
    else:
        if address.is_unspecified:
            raise ConfigError(f"--server {name}: nobody can dial that address; name the host as clients dial it")
        return x509.IPAddress(address)
    labels = name.removeprefix("*.").split(".")
    if len(name) > 253 or not all(_HOST_LABEL.fullmatch(label) for label in labels):
        raise ConfigError(
            f"--server {name!r} is no host name or address; expected one as clients dial it, without port and scheme"
        )
    return x509.DNSName(name)


def _authority(folder: Path) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
    """Return the CA of a folder, made now if there is none."""
    certificate, key = folder / "ca.pem", folder / "ca.key"
    if not certificate.exists() and not key.exists():
        private = _new_key()
        _write_private(key, _pem(private))
        _write(certificate, _self_signed(private).public_bytes(serialization.Encoding.PEM))
    ca = _certificates(certificate)[0]
    _check_dates(ca, certificate)
    private_key = _private_key(key)
    if not isinstance(private_key, ec.EllipticCurvePrivateKey):
        raise EngineError(f"{key} is not an elliptic-curve key; a CA from elsewhere must sign its own certificates")
    if _public_bytes(private_key.public_key()) != _public_bytes(ca.public_key()):
        raise EngineError(f"{key} is not the key of {certificate}: they do not belong together")
    return ca, private_key


def _self_signed(key: ec.EllipticCurvePrivateKey) -> x509.Certificate:
    # A name of its own: a client that has another federation's CA is told so, and not of a bad signature.
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"emberfed CA {secrets.token_hex(4)}")])
    return (
        _builder(name, name, key.public_key(), key.public_key(), datetime.now(UTC) + timedelta(days=_CA_DAYS))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(signs_certificates=True), critical=True)
        .sign(key, hashes.SHA384())
    )


def _make_server(
    folder: Path,
    ca: x509.Certificate,
    ca_key: ec.EllipticCurvePrivateKey,
    names: Sequence[x509.GeneralName],
    valid: timedelta,
) -> None:
    key = _new_key()
    until = min(datetime.now(UTC) + valid, ca.not_valid_after_utc)
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "emberfed server")])
    certificate = (
        _builder(subject, ca.subject, key.public_key(), ca_key.public_key(), until)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(signs_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .sign(ca_key, hashes.SHA384())
    )
    _write(folder / "ca.pem", ca.public_bytes(serialization.Encoding.PEM))
    _write_private(folder / "server.key", _pem(key))
    _write(folder / "server.pem", certificate.public_bytes(serialization.Encoding.PEM))


def _make_client(folder: Path, client: str, ca: x509.Certificate) -> None:
    key = _new_key()
    public = key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    line = public + f" {client}\n".encode()
    _write_private(folder / client / "client.key", _openssh(key))
    _write(folder / client / "client.pub", line)
    _write(folder / client / "ca.pem", ca.public_bytes(serialization.Encoding.PEM))
    _write(folder / "server" / "clients" / f"{client}.pub", line)


def _builder(
    subject: x509.Name,
    issuer: x509.Name,
    key: ec.EllipticCurvePublicKey,
    issuer_key: ec.EllipticCurvePublicKey,
    until: datetime,
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(datetime.now(UTC) - _LEEWAY)
        .not_valid_after(until)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key), critical=False)
    )


def _usage(signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _client_key(path: Path, names: dict[bytes, str]) -> ec.EllipticCurvePublicKey:
    """Return a client's key, and add its name to those of other keys. Raises: EngineError."""
    key = _public_key(path)
    if not _CLIENT.fullmatch(path.stem) or path.stem in _RESERVED:
        raise EngineError(f"{path}: a client cannot be named {path.stem!r}; name the file after the client")
    other = names.setdefault(_public_bytes(key), path.stem)
    if other != path.stem:
        raise EngineError(f"clients {other!r} and {path.stem!r} have the same key in {path.parent}; make one anew")
    return key


def _public_key(path: Path) -> ec.EllipticCurvePublicKey:
    data = _read(path)
    load = serialization.load_pem_public_key if data.startswith(b"-----") else serialization.load_ssh_public_key
    try:
        key: PublicKeyTypes | None = load(data)
    except _UNREADABLE:
        key = None
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, _CURVES):
        raise EngineError(f"{path} is no public key on one of the curves {_curves()}; make one: {_HOW_TO_MAKE}")
    return key


def _private_key(path: Path) -> PrivateKeyTypes:
    data = _read(path)
    openssh = b"OPENSSH PRIVATE KEY" in data
    try:
        if openssh:
            return serialization.load_ssh_private_key(data, None)
        return serialization.load_pem_private_key(data, None)
    except _UNREADABLE:
        raise EngineError(
            f"{path} is no private key that can be read, in PEM or OpenSSH's form without a password"
        ) from None


def _certificates(path: Path) -> list[x509.Certificate]:
    try:
        return x509.load_pem_x509_certificates(_read(path))
    except _UNREADABLE:
        raise EngineError(f"{path} holds no certificate in PEM form; copy it again") from None


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise EngineError(f"{path} is missing; make it with `emberfed certificates`, or copy it here") from None
    except OSError as error:
        raise EngineError(f"{path} cannot be read: {error.strerror}") from None


def _check_dates(certificate: x509.Certificate, path: Path) -> None:
    now = datetime.now(UTC)
    if certificate.not_valid_after_utc < now:
        raise EngineError(
            f"{path}: expired certificate, valid until {certificate.not_valid_after_utc:%Y-%m-%d %H:%M} UTC; make a "
            f"new one: emberfed certificates DIR --server HOST"
        )
    if certificate.not_valid_before_utc > now:
        raise EngineError(
            f"{path}: the certificate is valid only from {certificate.not_valid_before_utc:%Y-%m-%d %H:%M} UTC; check "
            f"this machine's clock"
        )


def _check_chain(
    chain: Sequence[x509.Certificate], authorities: Sequence[x509.Certificate], certificate: Path, ca: Path
) -> None:
    """Refuse a certificate from which no signatures lead to the CA. Raises: EngineError."""
    for issued, issuer in pairwise(chain):
        if not _signed(issued, issuer):
            break
        if _any_signed(issued, authorities):
            return
    else:
        if _any_signed(chain[-1], authorities):
            return
    raise EngineError(f"{certificate} is not signed by this CA, {ca}: they do not belong together; copy both again")


def _any_signed(issued: x509.Certificate, authorities: Sequence[x509.Certificate]) -> bool:
    return any(_signed(issued, authority) for authority in authorities)


def _signed(issued: x509.Certificate, issuer: x509.Certificate) -> bool:
    try:
        issued.verify_directly_issued_by(issuer)
    except (InvalidSignature, *_UNREADABLE):
        return False
    return True


def _names(certificate: x509.Certificate, path: Path) -> tuple[str, ...]:
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        raise EngineError(f"{path} names no host (subjectAltName): no client would accept it; make it anew") from None
    addresses = names.get_values_for_type(x509.IPAddress)
    return (*names.get_values_for_type(x509.DNSName), *(str(address) for address in addresses))


def _new_key() -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP384R1())


def _pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _openssh(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption()
    )


def _public_bytes(key: PublicKeyTypes) -> bytes:
    return key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)


def _write(path: Path, data: bytes) -> None:
    storage.write(path, data)


def _write_private(path: Path, data: bytes) -> None:
    """Write a file that nobody else may read, at no moment. Raises: StorageError."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    with storage.explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(data)
            os.fsync(file.fileno())
        temporary.replace(path)
        storage.sync_folder(path.parent)
