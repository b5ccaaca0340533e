"""Pictures by URL: http and https from public addresses, `data:` and `file:`.

A fetch has one bound on its time and one on its bytes, whatever the server does. A host's name is resolved
once, all its addresses are checked, and the connection goes to one of these: the name may mean another
machine a moment later. Every redirect is checked in the same way. Proxies of the environment are not used,
because a proxy would resolve the name again; cookies and passwords are never sent.
"""

from __future__ import annotations

import base64
import binascii
import io
import ipaddress
import re
import socket
import ssl
import time
import zlib
from http.client import HTTPConnection, HTTPException, HTTPResponse, InvalidURL, responses
from threading import Thread
from typing import Any
from urllib.parse import SplitResult, quote, unquote, unquote_to_bytes, urljoin, urlsplit
from urllib.request import url2pathname

from foveate.errors import FoveateError
from foveate.picture.limits import Limits

REDIRECTS = 5
ONWARD = (301, 302, 303, 307, 308)
CHUNK = 2**16
# What a broken URL or an odd answer makes the standard library raise.
ODD = (
    OSError,
    HTTPException,
    ValueError,
    ArithmeticError,
    AttributeError,
    TypeError,
    LookupError,
    zlib.error,
)
PORTS = {"http": 80, "https": 443}
LONGEST = 120  # characters of a name in a message
_URL = re.compile(r"\s*([a-z][a-z0-9+.-]+):(//)?", re.IGNORECASE)
UNICAST = ipaddress.ip_network("2000::/3")  # the part of IPv6 that is given out


def scheme(text: str) -> str | None:
    """The scheme of a URL, in lower case; None for what is not one, `C:\\cat.png` for example."""
    found = _URL.match(text)
    if found is None:
        return None
    name = found[1].lower()
    return name if found[2] or name in ("data", "file", "http", "https") else None


def named(text: str) -> str:
    """A path or URL as messages show it: on one line, not too long, and without what a URL keeps secret."""
    kind = scheme(text)
    if kind == "data":
        text = text.strip()[:40] + "..."
    elif kind is not None:
        text = re.sub(r"//[^/?#\\]*@", "//", text.strip())  # user name and password
        text = re.split(r"[?#]", text, maxsplit=1)[0]  # may hold a token
    if len(text) > LONGEST:
        text = f"{text[: LONGEST // 2]}...{text[-LONGEST // 4 :]}"
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text
    )


def fetch(url: str, limits: Limits) -> bytes:
    """What an http or https URL holds.

    Raises:
        FoveateError: another scheme, an address that is not public, too many redirects, an answer other than
            200, too much or too slow, a broken connection.
    """
    end, at = time.monotonic() + limits.seconds, url.strip()
    for _ in range(REDIRECTS + 1):
        try:
            body, onward = _get(at, end, limits)
            if onward is None:
                return body
            at = urljoin(at, onward)
        except FoveateError as error:
            raise FoveateError(f"no picture could be fetched from {named(url)}: {error}") from None
        except TimeoutError:
            raise FoveateError(
                f"no picture could be fetched from {named(url)}: it took longer than {limits.seconds:g} s"
            ) from None
        except ODD as error:
            raise FoveateError(f"no picture could be fetched from {named(url)}: {_reason(error)}") from None
    raise FoveateError(
        f"no picture could be fetched from {named(url)}: it redirects more than {REDIRECTS} times"
    )


def decode(url: str, limits: Limits) -> bytes:
    """What a `data:` URL holds. Raises `FoveateError` for broken base64 and for too many bytes."""
    head, comma, body = url.strip().partition(",")
    if not comma:
        raise FoveateError(f"{named(url)} has no comma before its data: expected data:image/png;base64,...")
    if len(body) > 3 * limits.max_bytes:  # a byte may take three characters
        raise _too_much(named(url), limits)
    if not head.lower().endswith(";base64"):
        data = unquote_to_bytes(body)
    else:
        letters = "".join(unquote(body).split()).rstrip("=").replace("-", "+").replace("_", "/")
        try:
            data = base64.b64decode(letters + "=" * (-len(letters) % 4), validate=True)
        except (binascii.Error, ValueError):
            raise FoveateError(f"{named(url)} is not valid base64") from None
    if len(data) > limits.max_bytes:
        raise _too_much(named(url), limits)
    return data


def local_path(url: str) -> str:
    """The path of a `file:` URL. Raises `FoveateError` for files of other machines."""
    parts = urlsplit(url.strip())
    if parts.netloc not in ("", "localhost"):
        raise FoveateError(f"{named(url)} names a file of another machine: write file:///path/to/picture.png")
    return url2pathname(parts.path)


def _too_much(what: str, limits: Limits) -> FoveateError:
    return FoveateError(
        f"{what} is larger than max_bytes {limits.max_bytes}: make it smaller, or raise max_bytes of "
        "foveate.Limits"
    )


def _get(url: str, end: float, limits: Limits) -> tuple[bytes, str | None]:
    """One request: the body, or where it redirects to."""
    parts = urlsplit(url)
    if parts.scheme not in PORTS:
        raise FoveateError(f"it leads to {parts.scheme or 'nothing'}, not to http or https")
    if parts.username is not None or parts.password is not None:
        raise FoveateError("it holds a user name or a password, which are not sent: leave them out")
    host = parts.hostname
    if not host:
        raise FoveateError("it names no host")
    if not host.isascii():
        host = host.encode("idna").decode()
    port = parts.port or PORTS[parts.scheme]
    with _connected(_addresses(host, port, end, limits), end) as plain:
        secure = parts.scheme == "https"
        plain.settimeout(_left(end))
        used = ssl.create_default_context().wrap_socket(plain, server_hostname=host) if secure else plain
        with used:
            request = _Request(host, port)
            request.default_port = PORTS[parts.scheme]  # which the Host header leaves out
            request.sock = _Timed(used, end)
            request.putrequest("GET", _target(parts), skip_accept_encoding=True)
            for name, value in (("Accept", "image/*"), ("Accept-Encoding", "identity")):
                request.putheader(name, value)
            request.putheader("User-Agent", "foveate")
            request.putheader("Connection", "close")
            request.endheaders()
            return _read(request.getresponse(), limits)


def _target(parts: SplitResult) -> str:
    """Path and query as a request names them: with letters and spaces that need it quoted."""
    kept = "/%:@!$&'()*+,;=~-._[]"
    target = quote(parts.path or "/", safe=kept)
    return f"{target}?{quote(parts.query, safe=kept + '?')}" if parts.query else target


def _read(response: HTTPResponse, limits: Limits) -> tuple[bytes, str | None]:
    if response.status in ONWARD:
        onward = response.getheader("Location")
        if onward is None:
            raise FoveateError(f"it answers {response.status} without saying where to")
        return b"", onward
    if response.status != 200:
        raise FoveateError(f"it answers {response.status} {responses.get(response.status, '')}".rstrip())
    coding = (response.getheader("Content-Encoding") or "identity").strip().lower()
    if coding not in ("identity", "gzip", "x-gzip", "deflate"):
        raise FoveateError(f"it is compressed as {named(coding)}, which is not read")
    if response.length is not None and response.length > limits.max_bytes:
        raise _too_much("it", limits)
    unpack = None if coding == "identity" else zlib.decompressobj(zlib.MAX_WBITS | 32)
    body, sent = bytearray(), 0
    while (unpack is None or not unpack.eof) and (chunk := response.read(CHUNK)):
        sent += len(chunk)
        body += chunk if unpack is None else unpack.decompress(chunk, limits.max_bytes + 1 - len(body))
        if max(sent, len(body)) > limits.max_bytes:
            raise _too_much("it", limits)
    if response.length if unpack is None else not unpack.eof:
        raise FoveateError("the connection broke off")
    return bytes(body), None


def _addresses(host: str, port: int, end: float, limits: Limits) -> list[Any]:
    """All addresses of a host, as `socket.connect` takes them. Raises `FoveateError` if one is not public."""
    found: list[Any] = []

    def resolve() -> None:
        try:
            found.extend(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM))
        except (OSError, UnicodeError) as error:
            found.append(error)

    thread = Thread(target=resolve, daemon=True)  # the system's resolver knows no bound on its time
    thread.start()
    thread.join(_left(end))
    if not found:
        raise TimeoutError
    if isinstance(found[0], Exception):
        raise FoveateError(f"the host {named(host)} is not known")
    if not limits.private:
        for *_, address in found:
            if not public(address[0]):
                raise FoveateError(
                    f"{named(host)} is {address[0]}, which is not a public address: save the picture and "
                    "give its file, or allow private addresses (private of foveate.Limits in Python, "
                    "--allow-private on the command line)"
                )
    return found


def public(address: str) -> bool:
    """Whether an IP address belongs to the public internet, and to one machine of it."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        inner = ip.ipv4_mapped or ip.sixtofour
        if inner is not None:
            return public(str(inner))
        if ip not in UNICAST:
            return False
    return ip.is_global and not ip.is_multicast and not ip.is_reserved


def _connected(addresses: list[Any], end: float) -> socket.socket:
    """A connection to the first of these addresses that answers."""
    problem: OSError = OSError("no address")
    for family, kind, protocol, _, address in addresses:
        connection = socket.socket(family, kind, protocol)
        try:
            connection.settimeout(_left(end))
            connection.connect(address)
            return connection
        except OSError as error:
            connection.close()
            problem = error
    raise problem


def _left(end: float) -> float:
    """Seconds until `end`. Raises `TimeoutError` if there are none."""
    left = end - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left


class _Request(HTTPConnection):
    """A request over a connection that stands already."""

    sock: Any

    def connect(self) -> None:
        raise HTTPException("the connection broke off")


class _Timed:
    """A connection that ends at a set time, however often a little comes. Its owner closes it."""

    def __init__(self, connection: socket.socket, end: float) -> None:
        self.connection, self.end = connection, end

    def sendall(self, data: bytes) -> None:
        self.connection.settimeout(_left(self.end))
        self.connection.sendall(data)

    def makefile(self, mode: str) -> io.BufferedReader:
        return io.BufferedReader(_TimedReader(self.connection, self.end))

    def close(self) -> None:
        pass


class _TimedReader(io.RawIOBase):
    def __init__(self, connection: socket.socket, end: float) -> None:
        self.connection, self.end = connection, end

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        self.connection.settimeout(_left(self.end))
        return self.connection.recv_into(buffer)


def _reason(error: Exception) -> str:
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"its certificate is not valid: {error.verify_message}"
    if isinstance(error, (InvalidURL, ValueError)):  # whose text may hold a password
        return "it is not a valid URL"
    if isinstance(error, HTTPException):
        return "its answer is not valid HTTP"
    if isinstance(error, zlib.error):
        return "its compressed data is broken"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return named((str(error).splitlines() or [""])[0] or type(error).__name__)
