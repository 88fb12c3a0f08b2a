"""The HTTP server, in threads of the process that uses it."""

import contextlib
import json
import socket
import struct
import sys
import threading
import uuid
from collections.abc import Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

from tests.gcs.faults import Faults
from tests.gcs.store import Refused, Store


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: "Server"

    def _serve(self) -> None:
        fault = self.server.faults.draw()
        if fault == "cut the request":
            return self._reset()
        body = self._body()
        if fault == "stall":
            self.server.faults.stall()
        if fault == "refuse":
            return self._answer(503, *_error(503, "Service Unavailable"))
        if fault == "busy":
            return self._answer(429, *_error(429, "Too Many Requests"))
        try:
            status, content, headers = self._work(body)
        except Refused as error:
            status = error.status
            content, headers = _error(status, str(error))
        if fault == "lose the answer":
            return self._reset()
        self._answer(status, content, headers, is_cut=fault == "cut the answer")

    do_GET = do_POST = do_PUT = do_DELETE = _serve

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", "0")))
        chunks = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def _reset(self) -> None:
        """Closes the connection as a broken network does, by RST."""
        self.close_connection = True
        linger = struct.pack("ii", 1, 0)
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RD)
        self.connection.close()

    def _answer(
        self, status: int, content: bytes, headers: dict[str, str], is_cut: bool = False
    ) -> None:
        with contextlib.suppress(OSError):  # the client is gone
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if is_cut and content:
                self.wfile.write(content[: len(content) // 2])
                self.wfile.flush()
                return self._reset()
            self.wfile.write(content)
        return None

    def _work(self, body: bytes) -> tuple[int, bytes, dict[str, str]]:
        """Status, content and headers of the answer; raises Refused."""
        url = urlsplit(self.path)
        query = dict(parse_qsl(url.query, keep_blank_values=True))
        parts = [unquote(part) for part in url.path.strip("/").split("/")]
        is_upload, is_download = parts[0] == "upload", parts[0] == "download"
        parts = parts[1:] if is_upload or is_download else parts
        if refusal := self.server.refusals.get(self.command):
            why = {401: "Anonymous caller does not have access.", 403: "Access denied."}
            raise Refused(refusal, why[refusal])
        store, expected = self.server.store, query.get("ifGenerationMatch")
        match self.command, parts[2:]:
            case "GET", ["b", bucket]:
                store.bucket(bucket)
                return _json({"kind": "storage#bucket", "name": bucket, "id": bucket})
            case "GET", ["b", bucket, "o"]:
                return _json(store.list(bucket, query))
            case "GET", ["b", bucket, "o", name]:
                found = store.get(bucket, name)
                if query.get("ifGenerationNotMatch") == str(found.generation):
                    return 304, b"", {}
                if query.get("alt") != "media":
                    return _json(found.resource())
                if expected not in (None, str(found.generation)):
                    raise Refused(412, "At least one of the pre-conditions did not hold.")
                status, content, headers = _ranged(found.content, self.headers.get("Range"))
                headers["x-goog-generation"] = str(found.generation)
                return status, content, headers
            case "DELETE", ["b", bucket, "o", name]:
                store.delete(bucket, name, expected)
                return 204, b"", {}
            case "POST" | "PUT", ["b", bucket, "o"] if is_upload:
                return self._upload(bucket, query, body)
        raise Refused(501, f"{self.command} {self.path} is not implemented")

    def _upload(
        self, bucket: str, query: dict[str, str], body: bytes
    ) -> tuple[int, bytes, dict[str, str]]:
        store, expected = self.server.store, query.get("ifGenerationMatch")
        match query.get("uploadType"):
            case "media":
                return _json(store.put(bucket, query["name"], body, expected).resource())
            case "multipart":
                boundary = self.headers["Content-Type"].partition("boundary=")[2].strip("'\"")
                _, about, rest = body.split(b"--" + boundary.encode(), 2)
                content = rest[: rest.rindex(b"--" + boundary.encode())]
                name = json.loads(about.partition(b"\r\n\r\n")[2] or about.partition(b"\n\n")[2])
                ending = b"\r\n\r\n" if b"\r\n\r\n" in content else b"\n\n"
                content = content.partition(ending)[2].removesuffix(b"\n").removesuffix(b"\r")
                return _json(store.put(bucket, name["name"], content, expected).resource())
            case "resumable" if "upload_id" not in query:
                store.bucket(bucket)
                key = uuid.uuid4().hex
                name = query.get("name") or json.loads(body)["name"]
                self.server.uploads[key] = (name, bytearray(), expected)
                host = self.headers["Host"]
                place = f"http://{host}/upload/storage/v1/b/{bucket}/o?uploadType=resumable"
                return 200, b"{}", {"Location": f"{place}&upload_id={key}"}
            case "resumable":
                return self._resume(bucket, query["upload_id"], body)
        raise Refused(501, f"{self.path} is not implemented")

    def _resume(self, bucket: str, key: str, body: bytes) -> tuple[int, bytes, dict[str, str]]:
        if key not in self.server.uploads:
            raise Refused(404, "No such upload.")
        name, content, expected = self.server.uploads[key]
        place, _, total = self.headers.get("Content-Range", "bytes 0-/*").partition("/")
        if body:  # a chunk that is sent again replaces itself
            content[int(place.removeprefix("bytes ").partition("-")[0]) :] = body
        if total == "*" and not place.endswith("*"):
            whole = "Content-Range" not in self.headers
        else:
            whole = total != "*" and int(total) == len(content)
        if not whole:
            headers = {"Range": f"bytes=0-{len(content) - 1}"} if content else {}
            return 308, b"", headers
        made = self.server.store.put(bucket, name, bytes(content), expected)
        return _json(made.resource())

    def log_message(self, *args: object) -> None:
        """Says nothing."""


class Server(ThreadingHTTPServer):
    """Serves the buckets in `store`, each connection in a thread.

    Attributes:
      faults: faults that requests meet.
      refusals: for a method, such as "GET", the status of every answer.
    """

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, buckets: Sequence[str], faults: Faults | None = None):
        super().__init__(("localhost", 0), _Handler)
        self.store = Store(list(buckets))
        self.faults = faults or Faults(0.0)
        self.refusals: dict[str, int] = {}
        self.uploads: dict[str, tuple[str, bytearray, str | None]] = {}

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignores clients that are gone."""
        if not isinstance(sys.exception(), OSError | ValueError):
            super().handle_error(request, client_address)

    @property
    def environment(self) -> dict[str, str]:
        """Variables by which programs use this server for gs://, without credentials."""
        address = f"http://localhost:{self.server_address[1]}"
        return {
            "STORAGE_EMULATOR_HOST": address,  # gcsfs, google.cloud.storage
            "TENSORSTORE_GCS_HTTP_URL": address,
            "GOOGLE_AUTH_TOKEN_FOR_TESTING": "none",  # TensorStore's
            "NO_GCE_CHECK": "true",
            # gcsfs would ask by gRPC whether a bucket has real folders.
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
        }


@contextlib.contextmanager
def serving(buckets: Sequence[str], faults: Faults | None = None) -> Iterator[Server]:
    """A server in threads of this process."""
    with Server(buckets, faults) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        yield server
        server.shutdown()


def _json(content: dict[str, Any]) -> tuple[int, bytes, dict[str, str]]:
    return 200, json.dumps(content).encode(), {"Content-Type": "application/json"}


def _error(status: int, message: str) -> tuple[bytes, dict[str, str]]:
    _, content, headers = _json({"error": {"code": status, "message": message}})
    return content, headers


def _ranged(content: bytes, wanted: str | None) -> tuple[int, bytes, dict[str, str]]:
    if not wanted:
        return 200, content, {}
    first, _, last = wanted.removeprefix("bytes=").partition("-")
    start = int(first) if first else max(len(content) - int(last), 0)
    end = min(int(last) + 1, len(content)) if first and last else len(content)
    if start >= len(content):
        raise Refused(416, "The requested range cannot be satisfied.")
    headers = {"Content-Range": f"bytes {start}-{end - 1}/{len(content)}"}
    return 206, content[start:end], headers
