"""Certificates and keys: what is made fits together and is private, and what does not fit is refused by name."""

from __future__ import annotations

import shutil
import socket
import ssl
import stat
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.x509.oid import NameOID

from emberfed.cli import certificates as command
from emberfed.errors import ConfigError, EngineError, StorageError
from emberfed.flower import reach
from emberfed.flower.certificates import client_files, make, own_key, read_private_key, server_files

PEM = serialization.Encoding.PEM


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("certificates")
    make(folder, ["localhost", "127.0.0.1"], ["anna", "ben"], 30)
    return folder


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(made, tmp_path / "certificates"))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def issue(
    ca_key: ec.EllipticCurvePrivateKey,
    issuer: x509.Name,
    key: ec.EllipticCurvePrivateKey,
    days: tuple[int, int],
    ca: bool = False,
) -> x509.Certificate:
    """A certificate for localhost that is valid between two days from now, as another tool may make it."""
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"issued {key.public_key().public_numbers().x}"[:60])])
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now + timedelta(days=days[0]))
        .not_valid_after(now + timedelta(days=days[1]))
        .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
        .sign(ca_key, hashes.SHA256())
    )


def authority(folder: Path) -> tuple[ec.EllipticCurvePrivateKey, x509.Name]:
    key = serialization.load_pem_private_key((folder / "ca.key").read_bytes(), None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    return key, x509.load_pem_x509_certificate((folder / "ca.pem").read_bytes()).subject


def reissue(folder: Path, days: tuple[int, int]) -> None:
    """Give the server another certificate for the same key."""
    key = serialization.load_pem_private_key((folder / "server" / "server.key").read_bytes(), None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    certificate = issue(*authority(folder), key, days)
    (folder / "server" / "server.pem").write_bytes(certificate.public_bytes(PEM))


@contextmanager
def listening(folder: Path | None) -> Iterator[str]:
    """A server that answers anything by a line of HTTP, on TLS if a folder is given."""
    stop = threading.Event()
    plain = socket.create_server(("127.0.0.1", 0))
    plain.settimeout(0.05)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    if folder is not None:
        context.load_cert_chain(folder / "server.pem", folder / "server.key")

    def answer() -> None:
        while not stop.is_set():
            with suppress(OSError):
                connection, _ = plain.accept()
                connection.settimeout(5)
                with connection if folder is None else context.wrap_socket(connection, server_side=True) as one:
                    one.recv(1000)
                    one.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

    thread = threading.Thread(target=answer)
    thread.start()
    try:
        yield f"localhost:{plain.getsockname()[1]}"
    finally:
        stop.set()
        thread.join()
        plain.close()


def test_what_is_made_fits_together(made: Path) -> None:
    server = server_files(made / "server")
    assert server.names == ("localhost", "127.0.0.1")
    assert timedelta(days=29) < server.valid_until - datetime.now(UTC) <= timedelta(days=30)
    assert sorted(server.clients) == ["anna", "ben"]
    for name, public in server.clients.items():
        files = client_files(made / name)
        signed = read_private_key(files.key).sign(b"hello", ec.ECDSA(hashes.SHA256()))
        public.verify(signed, b"hello", ec.ECDSA(hashes.SHA256()))
        assert isinstance(public.curve, ec.SECP384R1)


def test_keys_are_private_and_the_ca_s_is_handed_to_nobody(made: Path) -> None:
    keys = sorted(path.relative_to(made).as_posix() for path in made.rglob("*.key"))
    assert keys == ["anna/client.key", "ben/client.key", "ca.key", "server/server.key"]
    assert {stat.S_IMODE((made / key).stat().st_mode) for key in keys} == {0o600}
    secrets = {(made / key).read_bytes() for key in keys}
    assert len(secrets) == 4
    assert not any(data in secrets for name, data in contents(made).items() if name not in keys)


def test_a_client_that_is_added_changes_nothing_else(folder: Path) -> None:
    before = contents(folder)
    assert make(folder, [], ["cleo"], 30) == [folder / "server", folder / "cleo"]
    after = contents(folder)
    assert {name: after[name] for name in before} == before
    added = {"cleo/ca.pem", "cleo/client.key", "cleo/client.pub", "server/clients/cleo.pub"}
    assert after.keys() - before.keys() == added
    assert sorted(server_files(folder / "server").clients) == ["anna", "ben", "cleo"]


def test_a_renewed_server_is_still_signed_by_what_clients_have(folder: Path) -> None:
    before = contents(folder)
    make(folder, ["*.example.org", "::1"], [], 400)
    after = contents(folder)
    assert {name for name in after if after[name] != before[name]} == {"server/server.key", "server/server.pem"}
    assert server_files(folder / "server").names == ("*.example.org", "::1")


@pytest.mark.parametrize(
    ("servers", "clients", "days", "told"),
    [
        ([], [], 30, "nothing to make"),
        ([], ["anna"], 30, "no server yet"),
        (["host"], ["../anna"], 30, "cannot be named '../anna'"),
        (["host"], ["server"], 30, "cannot be named 'server'"),
        (["host"], ["anna", "anna"], 30, "named twice"),
        (["0.0.0.0"], [], 30, "nobody can dial"),
        (["https://host"], [], 30, "without port and scheme"),
        (["host:8443"], [], 30, "without port and scheme"),
        (["müller.example"], [], 30, "no host name"),
        (["host"], [], 0, "0 days"),
        (["host"], [], 5000, "5000 days"),
    ],
)
def test_a_request_that_cannot_be_met_writes_nothing(
    tmp_path: Path, servers: list[str], clients: list[str], days: int, told: str
) -> None:
    with pytest.raises(ConfigError, match=told):
        make(tmp_path / "new", servers, clients, days)
    assert not (tmp_path / "new").exists()


def test_no_key_is_overwritten(folder: Path) -> None:
    before = contents(folder)
    with pytest.raises(ConfigError, match="'anna' has a key already"):
        make(folder, [], ["dora", "anna"], 30)
    assert contents(folder) == before


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="file"):
        make(tmp_path / "file" / "folder", ["host"], [], 30)


@pytest.mark.parametrize(
    ("days", "told"), [((-9, -1), "expired certificate, valid until"), ((1, 9), "valid only from")]
)
def test_dates_are_checked(folder: Path, days: tuple[int, int], told: str) -> None:
    reissue(folder, days)
    with pytest.raises(EngineError, match=told):
        server_files(folder / "server")


def test_files_of_two_federations_do_not_mix(folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    make(other, ["localhost"], ["anna"], 30)
    shutil.copy(other / "server" / "ca.pem", folder / "server" / "ca.pem")
    with pytest.raises(EngineError, match="not signed by this CA"):
        server_files(folder / "server")
    shutil.copy(other / "server" / "server.key", folder / "server" / "server.key")
    with pytest.raises(EngineError, match="do not belong together"):
        server_files(folder / "server")
    shutil.copy(other / "anna" / "client.key", folder / "anna" / "client.key")
    with pytest.raises(EngineError, match="do not belong together"):
        client_files(folder / "anna")
    shutil.copy(other / "ca.key", folder / "ca.key")
    with pytest.raises(EngineError, match="do not belong together"):
        make(folder, [], ["cleo"], 30)


@pytest.mark.parametrize("name", ["ca.pem", "server.pem", "server.key", "clients/anna.pub"])
def test_a_server_s_file_that_is_missing_or_damaged_is_named(folder: Path, name: str) -> None:
    path = folder / "server" / name
    path.write_bytes(b"-----BEGIN NOTHING-----\n")
    with pytest.raises(EngineError, match=name):
        server_files(folder / "server")
    if not name.startswith("clients"):
        path.unlink()
        with pytest.raises(EngineError, match=f"{name} is missing"):
            server_files(folder / "server")


@pytest.mark.parametrize("name", ["ca.pem", "client.key"])
def test_a_client_s_file_that_is_missing_or_damaged_is_named(folder: Path, name: str) -> None:
    path = folder / "anna" / name
    path.write_bytes(b"garbage")
    with pytest.raises(EngineError, match=name):
        client_files(folder / "anna")
    path.unlink()
    with pytest.raises(EngineError, match=f"{name} is missing"):
        client_files(folder / "anna")


def test_one_key_cannot_be_two_clients(folder: Path) -> None:
    clients = folder / "server" / "clients"
    shutil.copy(clients / "anna.pub", clients / "zoe.pub")
    with pytest.raises(EngineError, match="'anna' and 'zoe' have the same key"):
        server_files(folder / "server")


def test_keys_that_flower_does_not_take_are_refused(folder: Path) -> None:
    key = ed25519.Ed25519PrivateKey.generate()
    none = serialization.NoEncryption()
    (folder / "anna" / "client.key").write_bytes(key.private_bytes(PEM, serialization.PrivateFormat.OpenSSH, none))
    with pytest.raises(EngineError, match="secp384r1"):
        client_files(folder / "anna")
    public = key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    (folder / "server" / "clients" / "anna.pub").write_bytes(public)
    with pytest.raises(EngineError, match=r"anna\.pub .* secp384r1"):
        server_files(folder / "server")


def test_files_of_other_tools_do(folder: Path) -> None:
    """A server's certificate by way of an intermediate one, a bundle of CAs, and keys as `openssl ec` writes them."""
    none = serialization.NoEncryption()
    top, between, own, client = (ec.generate_private_key(ec.SECP256R1()) for _ in range(4))
    root = issue(top, issue(top, x509.Name([]), top, (-1, 9)).subject, top, (-1, 9), ca=True)
    intermediate = issue(top, root.subject, between, (-1, 9), ca=True)
    server = folder / "server"
    chain = [issue(between, intermediate.subject, own, (-1, 9)), intermediate]
    (server / "server.pem").write_bytes(b"".join(one.public_bytes(PEM) for one in chain))
    (server / "server.key").write_bytes(own.private_bytes(PEM, serialization.PrivateFormat.TraditionalOpenSSL, none))
    bundle = (folder / "ca.pem").read_bytes() + root.public_bytes(PEM)
    (server / "ca.pem").write_bytes(bundle)
    public = client.public_key().public_bytes(PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    (server / "clients" / "anna.pub").write_bytes(public)
    assert server_files(server).clients["anna"] == client.public_key()
    assert reachable(folder / "server", server / "ca.pem") is None
    (folder / "anna" / "client.pub").unlink()
    (folder / "anna" / "client.key").write_bytes(client.private_bytes(PEM, serialization.PrivateFormat.PKCS8, none))
    assert read_private_key(client_files(folder / "anna").key).public_key() == client.public_key()


def test_a_key_of_one_s_own_is_made_once(tmp_path: Path) -> None:
    path = own_key(tmp_path / "state" / "client.key")
    first = path.read_bytes()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert own_key(path).read_bytes() == first
    assert isinstance(read_private_key(path).curve, ec.SECP384R1)


def reachable(server: Path | None, ca: Path | None, host: str = "localhost") -> reach.Problem | None:
    with listening(server) as address:
        return reach.problem(f"{host}:{address.rpartition(':')[2]}", ca)


def refused(server: Path | None, ca: Path | None, host: str = "localhost") -> str:
    found = reachable(server, ca, host)
    assert found is not None
    assert found.lasting
    return found.reason


def test_a_client_trusts_its_server(made: Path) -> None:
    assert reachable(made / "server", made / "anna" / "ca.pem") is None
    assert reachable(made / "server", made / "anna" / "ca.pem", "127.0.0.1") is None
    assert reachable(None, None) is None


def test_a_client_says_why_it_does_not_trust_a_server(folder: Path, tmp_path: Path) -> None:
    ca = folder / "anna" / "ca.pem"
    make(tmp_path / "other", ["localhost"], [], 30)
    assert "not signed by the CA" in refused(tmp_path / "other" / "server", ca)
    assert "does not speak TLS" in refused(None, ca)
    assert "speaks TLS" in refused(folder / "server", None)
    make(folder, ["example.org"], [], 30)
    assert "is not for 'localhost'" in refused(folder / "server", ca)
    reissue(folder, (-9, -1))
    assert "has expired" in refused(folder / "server", ca)
    reissue(folder, (1, 9))
    assert "not valid yet" in refused(folder / "server", ca)


def test_a_server_that_is_not_there_may_come(made: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        quiet = reach.problem(f"127.0.0.1:{port}", made / "anna" / "ca.pem", timeout_seconds=0.2)
    absent = reach.problem(f"127.0.0.1:{port}", None)
    nameless = reach.problem("nowhere.invalid:1", None)
    for found, told in ((quiet, "does not answer"), (absent, "nothing listens"), (nameless, "'nowhere.invalid'")):
        assert found is not None
        assert told in found.reason
        assert not found.lasting


@pytest.mark.parametrize(
    "address", ["host", "host:", "host:x", "host:0", "host:65536", "::1:80", "https://host:80", ":80", "host:٣"]
)
def test_addresses_are_checked(address: str) -> None:
    with pytest.raises(ConfigError, match="server address"):
        reach.host_and_port(address)


def test_addresses_are_read() -> None:
    assert reach.host_and_port("example.org:8443") == ("example.org", 8443)
    assert reach.host_and_port("[::1]:1") == ("::1", 1)


def test_the_command_tells_what_goes_where(tmp_path: Path) -> None:
    document, shown = command.make(tmp_path, ["example.org"], ["anna"], 30)
    assert document["made"] == [str(tmp_path / "server"), str(tmp_path / "anna")]
    assert document["hosts"] == ["example.org"]
    assert document["clients"] == ["anna"]
    assert "example.org" in str(shown[1])
    assert str(tmp_path / "ca.key") in str(shown[2])
