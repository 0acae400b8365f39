"""A model behind HTTP: OpenAI's completions, on this machine, with nothing but the standard library.

    POST /v1/completions     {"prompt": "Once", "max_tokens": 100, "stream": true}
    GET  /v1/models          the one model that is served
    GET  /health             {"status": "ok"}

There is no password and no encryption, so it listens on the loopback interface unless told otherwise. Web pages cannot
reach it there: requests must name this machine as their host, and bodies must be declared as JSON, which browsers do
not let other sites do. Everything a client can make large has a limit (`Limits`), and errors have OpenAI's form.
"""

from __future__ import annotations

import contextlib
import ipaddress
import json
import os
import secrets
import signal
import socket
import socketserver
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from tinylm.engine.completions import Completion, Limits, Refusal, Request, shown

LOOPBACK = ("localhost", "127.0.0.1", "::1")


class Handler(BaseHTTPRequestHandler):
    """One connection, one request: the answer always closes it."""

    server: Server
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "tinylm", ""
    unread = False  # whether some of the request may be left

    def setup(self) -> None:
        super().setup()
        self.connection.settimeout(self.server.limits.reading)  # each read and each write
        # ... and of the whole request: a byte every few seconds would hold the thread for ever.
        self.slow = threading.Timer(self.server.limits.reading, self.hang_up)
        self.slow.daemon = True
        self.slow.start()

    def hang_up(self) -> None:
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RD)

    def finish(self) -> None:
        self.slow.cancel()
        super().finish()
        if self.unread:  # closing now would reset the connection, and the client might lose the answer that says why
            with contextlib.suppress(OSError):
                self.connection.shutdown(socket.SHUT_WR)
                self.connection.settimeout(0.5)
                for _ in range(64):
                    if not self.connection.recv(1 << 16):
                        break

    def handle(self) -> None:
        with contextlib.suppress(ConnectionError, TimeoutError):  # the client went away: there is nobody to tell
            super().handle()

    def do_GET(self) -> None:
        """Find the page, and turn whatever goes wrong into an error object."""
        self.close_connection, self.unread = True, True
        try:
            self.check_host()
            path = self.path.split("?", 1)[0]
            pages = {"/health": self.health, "/v1/models": self.models, "/v1/completions": self.completions}
            pages[f"/v1/models/{self.server.name}"] = self.model
            if path not in pages:
                hint = "; a model without a chat format is asked with /v1/completions" if "chat" in path else ""
                raise Refusal(404, f"nothing at {shown(path)}{hint}", code="not_found")
            allowed = ("POST",) if path == "/v1/completions" else ("GET", "HEAD")
            if self.command not in allowed:
                raise Refusal(405, f"{path} takes {' and '.join(allowed)}, not {self.command}")
            pages[path]()
        except Refusal as refusal:
            self.refuse(refusal)
        except (ConnectionError, TimeoutError):
            raise
        except ValueError as error:  # what the engine says about a prompt or a setting
            self.refuse(Refusal(400, str(error)))
        except Exception as error:  # a fault of ours must not take the answer's form away
            self.server.say(f"tinylm: {type(error).__name__}: {error}")
            self.refuse(Refusal(500, "the server failed; its terminal says how", code="internal_error"))

    do_HEAD = do_POST = do_PUT = do_DELETE = do_PATCH = do_OPTIONS = do_GET

    # The pages.

    def health(self) -> None:
        self.send(200, {"status": "ok", "model": self.server.name})

    def models(self) -> None:
        self.send(200, {"object": "list", "data": [self.server.about]})

    def model(self) -> None:
        self.send(200, self.server.about)

    def completions(self) -> None:
        request = Request.parse(self.body(), self.server.name, self.server.limits)
        with self.server.turn(self.given_up):
            ends = time.monotonic() + self.server.limits.seconds
            completion = Completion(self.server.engine, request, ends, self.given_up)
            head = {"id": f"cmpl-{secrets.token_hex(12)}", "object": "text_completion", "created": int(time.time())}
            head["model"] = self.server.name
            if request.stream:
                self.send_stream(completion, head)
            else:
                for _ in completion:
                    pass
                if not self.complete(completion):
                    return
                parts = enumerate(zip(completion.texts, completion.reasons, strict=True))
                choices = [choice_of(at, text, reason) for at, (text, reason) in parts]
                self.send(200, {**head, "choices": choices, "usage": completion.usage()})

    def send_stream(self, completion: Completion, head: dict[str, Any]) -> None:
        """Server-sent events, one per piece; an error after the first is an event, too."""
        pieces = iter(completion)
        first = next(pieces, None)  # what is wrong with a prompt shows here, while the status can still say so
        self.send_response(200)
        for name, value in (("Content-Type", "text/event-stream; charset=utf-8"), ("Cache-Control", "no-store")):
            self.send_header(name, value)
        self.end_headers()
        more = {"usage": None} if completion.request.usage else {}
        done = 0

        def close(until: int) -> None:
            nonlocal done
            for at in range(done, until):
                self.event({**head, "choices": [choice_of(at, "", completion.reasons[at])], **more})
            done = max(done, until)

        try:
            while first is not None:
                at, piece = first
                close(at)  # choices come one after the other
                self.event({**head, "choices": [choice_of(at, piece, None)], **more})
                first = next(pieces, None)
            if not self.complete(completion):
                return
            close(len(completion.texts))
            if more:
                self.event({**head, "choices": [], "usage": completion.usage()})
            self.event("[DONE]")
        except (ConnectionError, TimeoutError):
            raise
        except Exception as error:  # the status is sent already
            if not isinstance(error, Refusal):
                self.server.say(f"tinylm: {type(error).__name__}: {error}")
                error = Refusal(500, "the server failed; its terminal says how", code="internal_error")
            self.event(error.body())

    # What they share.

    def check_host(self) -> None:
        """Refuse names that only look like this machine: DNS rebinding, where a site's own name leads to 127.0.0.1."""
        if self.request_version == "HTTP/0.9":
            self.request_version = "HTTP/1.0"  # for the answer to have a status
            raise Refusal(400, "a request line ends in HTTP/1.1")
        if self.request_version >= "HTTP/1.1" and len(self.headers.get_all("Host") or ()) != 1:
            raise Refusal(400, "a request needs one Host header")
        host = self.headers.get("Host", "")
        name = host.rpartition(":")[0] if not host.endswith("]") and ":" in host else host
        if self.server.only_loopback and name.strip("[]").lower() not in ("", *LOOPBACK):
            raise Refusal(403, f"host {shown(host)} is not this machine; use {self.server.url}", code="wrong_host")

    def body(self) -> Any:
        """The request's JSON. Raises Refusal."""
        kind = self.headers.get("Content-Type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise Refusal(415, f"Content-Type is {shown(kind)}; send application/json")
        if "Transfer-Encoding" in self.headers:
            raise Refusal(411, "send a Content-Length, not a Transfer-Encoding")
        lengths = self.headers.get_all("Content-Length") or []
        if not lengths:
            raise Refusal(411, "send a Content-Length")
        if len(lengths) > 1 or not (lengths[0].isascii() and lengths[0].isdigit()):
            raise Refusal(400, f"Content-Length {shown(', '.join(lengths))} is no length")
        if len(lengths[0]) > 18 or (length := int(lengths[0])) > self.server.limits.body:
            raise Refusal(413, f"the body has more than {self.server.limits.body} bytes", code="too_large")
        data = b""
        with contextlib.suppress(TimeoutError):
            data = self.rfile.read(length)
        if len(data) < length:
            limit = self.server.limits.reading
            raise Refusal(408, f"the body ended before {length} bytes, or took more than {limit:g} s")
        self.slow.cancel()
        self.unread = False
        try:
            return json.loads(data.decode())
        except (ValueError, RecursionError) as error:
            raise Refusal(400, f"the body is no JSON: {shown(str(error))}", code="invalid_json") from None

    def complete(self, completion: Completion) -> bool:
        """Whether all of it was made; if not, the client is gone, or a Refusal is raised: the server stops."""
        if None in completion.reasons and self.server.stopping.is_set():
            raise Refusal(503, "the server is shutting down", code="shutdown")
        return None not in completion.reasons

    def given_up(self) -> bool:
        """Whether the server stops, or the client has closed its side of the connection."""
        if self.server.stopping.is_set():
            return True
        self.connection.settimeout(0)
        try:
            return not self.connection.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return False
        except OSError:
            return True
        finally:
            self.connection.settimeout(self.server.limits.reading)

    def send(self, status: int, content: dict[str, Any], headers: dict[str, str] | None = None) -> None:
        data = json.dumps(content).encode() + b"\n"
        self.send_response(status)
        about = {"Content-Type": "application/json", "Content-Length": str(len(data)), "Cache-Control": "no-store"}
        for name, value in {**about, **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def event(self, content: dict[str, Any] | str) -> None:
        text = content if isinstance(content, str) else json.dumps(content)
        self.wfile.write(f"data: {text}\n\n".encode())

    def refuse(self, refusal: Refusal) -> None:
        headers = {429: {"Retry-After": "1"}, 503: {"Retry-After": "1"}}.get(refusal.status, {})
        if refusal.status == 405:
            headers = {"Allow": "POST" if "completions" in self.path else "GET, HEAD"}
        self.send(refusal.status, refusal.body(), headers)

    def end_headers(self) -> None:
        self.send_header("Connection", "close")
        self.send_header("X-Content-Type-Options", "nosniff")
        super().end_headers()

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """What the standard library refuses by itself, such as a header that is too long, in the same form."""
        self.close_connection = True
        self.command = getattr(self, "command", None) or "GET"
        self.request_version = "HTTP/1.1"  # an answer without headers, HTTP/0.9, is nothing anybody expects
        self.send(code, Refusal(code, message or HTTPStatus(code).phrase).body())

    def log_message(self, format: str, *args: Any) -> None:
        text = format % args
        self.server.say("".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in text))


def choice_of(at: int, text: str, reason: str | None) -> dict[str, Any]:
    """One entry of `choices`."""
    return {"index": at, "text": text, "logprobs": None, "finish_reason": reason}


class Server(ThreadingHTTPServer):
    """Serves one engine until `shutdown()`; `port` 0 takes a free one, and `url` says which.

    Args:
        engine: an `Engine`.
        name: of the model, in /v1/models.
        limits: of requests. say: gets a line for each request.

    Raises:
        OSError: the address cannot be listened on.
    """

    daemon_threads = True
    allow_reuse_address = os.name == "posix"
    request_queue_size = 64

    def __init__(
        self,
        engine: Any,
        name: str,
        host: str = "127.0.0.1",
        port: int = 8000,
        limits: Limits | None = None,
        say: Callable[[str], None] = lambda line: None,
    ) -> None:
        self.engine, self.name, self.limits, self.say = engine, name, limits or Limits(), say
        self.about = {"id": name, "object": "model", "created": int(time.time()), "owned_by": "tinylm"}
        self.stopping, self.threads = threading.Event(), set[threading.Thread]()
        self.lock, self.free, self.waiting = threading.Lock(), threading.Semaphore(self.limits.running), 0
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            super().__init__((host, port), Handler)
        except (OSError, OverflowError) as error:
            raise OSError(f"cannot listen on {host} port {port}: {error}; choose another with --port") from None
        address = self.server_address[0]
        self.only_loopback = ipaddress.ip_address(str(address)).is_loopback
        self.url = f"http://{f'[{host}]' if ':' in host else host}:{self.server_port}"

    def server_bind(self) -> None:
        # Not HTTPServer's, which asks the name service for this machine's name and may wait for seconds.
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), self.server_address[1]

    @contextlib.contextmanager
    def turn(self, given_up: Callable[[], bool]) -> Iterator[None]:
        """Wait for the right to generate. Raises Refusal where too many wait already, or too long."""
        if not self.free.acquire(blocking=False):
            with self.lock:
                if self.waiting >= self.limits.waiting:
                    raise Refusal(429, f"{self.waiting} requests wait already; try again later", code="too_many")
                self.waiting += 1
            ends = time.monotonic() + self.limits.patience
            try:
                while not self.free.acquire(timeout=0.1):
                    if given_up() or time.monotonic() > ends:
                        raise Refusal(503, f"no turn within {self.limits.patience:g} s; try again later", code="busy")
            finally:
                with self.lock:
                    self.waiting -= 1
        try:
            yield
        finally:
            self.free.release()

    def process_request(self, request: Any, client_address: Any) -> None:
        with self.lock:
            self.threads = {thread for thread in self.threads if thread.is_alive()}
            full = len(self.threads) >= self.limits.connections
        if not full:
            thread = threading.Thread(target=self.process_request_thread, args=(request, client_address), daemon=True)
            self.threads.add(thread)
            thread.start()
            return
        data = json.dumps(Refusal(503, "too many open connections; try again later", code="busy").body()).encode()
        head = (
            "HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\nConnection: close\r\nRetry-After: 1"
        )
        with contextlib.suppress(OSError):
            request.setblocking(False)  # the thread that accepts connections waits for nobody
            request.send(f"{head}\r\nContent-Length: {len(data)}\r\n\r\n".encode() + data)
        self.shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        error = sys.exc_info()[1]
        self.say(f"tinylm: {type(error).__name__}: {error}")

    def server_close(self) -> None:
        """Stop listening, let running generations end within a token, and wait for them."""
        self.stopping.set()
        super().server_close()
        ends = time.monotonic() + 5
        for thread in list(self.threads):
            thread.join(max(0.0, ends - time.monotonic()))


def serve(server: Server) -> None:
    """Serve until Ctrl-C or SIGTERM, which raise KeyboardInterrupt here once everything is closed."""

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    before = None
    if threading.current_thread() is threading.main_thread():
        before = signal.signal(signal.SIGTERM, stop)
    try:
        server.serve_forever(poll_interval=0.2)
    finally:
        server.server_close()
        if before is not None:
            signal.signal(signal.SIGTERM, before)
