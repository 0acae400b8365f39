"""The HTTP server: what it answers, what it refuses, what it does under load and when it is stopped."""

import contextlib
import http.client
import json
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from tinylm.engine.completions import Limits
from tinylm.engine.serve import Server, serve

ROOT = Path(__file__).parents[1]
POST = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"


class Words:
    """An engine that counts: "w0 w1 w2 ...", one token a word; `seen` keeps what it was asked."""

    def __init__(self, end=1000, pause=0.0):
        self.end, self.pause, self.seen, self.running, self.most = end, pause, [], 0, 0
        self.gate = threading.Event()  # a generation waits for it
        self.gate.set()

    def ids(self, prompt, **settings):
        self.seen.append((prompt, settings))
        self.running += 1
        self.most = max(self.most, self.running)
        try:
            self.gate.wait(30)
            if prompt == "bad":
                raise ValueError("prompt = 'bad': give another")
            if prompt == "broken":
                raise RuntimeError("secret of the inside")
            for number in range(min(settings["tokens"], self.end)):
                time.sleep(self.pause)
                if prompt == "breaks" and number == 2:
                    raise RuntimeError("secret of the inside")
                yield number * 100 + settings["seed"] % 100
        finally:
            self.running -= 1

    def piece(self, token):
        return f"w{token // 100}s{token % 100} ".encode()

    prefix = "w0"

    def encode(self, text):
        return text.split()


@contextlib.contextmanager
def served(engine=None, **limits):
    """(server, engine); checks that closing it leaves no generation behind."""
    engine = engine or Words()
    said = []
    server = Server(engine, "tiny", port=0, limits=Limits(**limits), say=said.append)
    server.said = said
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield server, engine
    finally:
        server.shutdown()
        server.server_close()
        thread.join(5)
    assert not thread.is_alive()
    assert engine.running == 0


def until(condition):
    ends = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < ends
        time.sleep(0.01)


def connect(server):
    return http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=30)


def ask(server, method="POST", path="/v1/completions", body=None, headers=None):
    """(status, content, headers); a dict as body goes out as JSON."""
    connection = connect(server)
    data = json.dumps(body).encode() if isinstance(body, dict | list) else body
    with contextlib.closing(connection):
        connection.request(method, path, data, {"Content-Type": "application/json", **(headers or {})})
        answer = connection.getresponse()
        text = answer.read()
    assert answer.getheader("Content-Type") == "application/json"
    assert answer.getheader("Access-Control-Allow-Origin") is None
    return answer.status, json.loads(text) if text else None, answer.headers


def raw(server, data, wait=30):
    """What comes back for bytes as they are."""
    with socket.create_connection(("127.0.0.1", server.server_port), timeout=wait) as client:
        client.sendall(data)
        parts = []
        with contextlib.suppress(ConnectionError):
            while part := client.recv(65536):
                parts.append(part)
    return b"".join(parts)


def events(server, body):
    connection = connect(server)
    with contextlib.closing(connection):
        connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
        answer = connection.getresponse()
        assert answer.status == 200
        assert answer.getheader("Content-Type").startswith("text/event-stream")
        blocks = answer.read().decode().split("\n\n")
    assert blocks.pop() == ""
    assert all(block.startswith("data: ") for block in blocks)
    return [json.loads(block[6:]) if block != "data: [DONE]" else "[DONE]" for block in blocks]


def refused(answer, status, said, param=None):
    got, content, _ = answer
    error = content["error"]
    assert set(content) == {"error"}
    assert set(error) == {"message", "type", "param", "code"}
    assert (got, error["param"]) == (status, param)
    assert said in error["message"]
    assert error["type"] == {429: "rate_limit_error"}.get(
        status, "server_error" if status >= 500 else "invalid_request_error"
    )


@pytest.fixture(scope="module")
def running():
    with served(Words(end=40), body=5000, tokens=100, choices=4, reading=20) as (server, engine):
        yield server, engine


def test_a_completion(running):
    server, engine = running
    body = {"model": "tiny", "prompt": "a b", "max_tokens": 3, "temperature": 0.5, "top_p": 0.9, "seed": 7}
    status, content, _ = ask(server, body={**body, "stop": ["x"], "user": "me", "top_k": 5, "logprobs": None})
    assert status == 200
    assert content["object"] == "text_completion"
    assert content["model"] == "tiny"
    assert content["id"].startswith("cmpl-")
    assert content["choices"] == [{"index": 0, "text": "w0s7 w1s7 w2s7 ", "logprobs": None, "finish_reason": "length"}]
    assert content["usage"] == {"prompt_tokens": 2, "completion_tokens": 3, "total_tokens": 5}
    prompt, settings = engine.seen[-1]
    assert prompt == "a b"
    assert settings == {
        "tokens": 3, "temperature": 0.5, "top_k": 5, "top_p": 0.9, "min_p": 0.0, "repetition_penalty": 1.0, "seed": 7,
    }  # fmt: skip


def test_a_stop_text_ends_a_completion(running):
    body = {"prompt": "a", "max_tokens": 9, "seed": 7, "stop": ["nowhere", "s7 w3"]}
    _, content, _ = ask(running[0], body=body)
    assert content["choices"][0]["text"] == "w0s7 w1s7 w2"
    assert content["choices"][0]["finish_reason"] == "stop"
    assert content["usage"]["completion_tokens"] == 4
    pieces = [event["choices"][0] for event in events(running[0], {**body, "stream": True})[:-1]]
    assert "".join(piece["text"] for piece in pieces) == "w0s7 w1s7 w2"
    assert [piece["finish_reason"] for piece in pieces] == [None] * (len(pieces) - 1) + ["stop"]


def test_what_encoding_puts_in_front_is_not_there(running):
    _, content, _ = ask(running[0], body={"max_tokens": 2, "seed": 7})
    assert content["choices"][0]["text"] == "s7 w1s7 "


def test_a_text_that_ends_by_itself_says_so(running):
    _, content, _ = ask(running[0], body={"prompt": "a", "max_tokens": 90})
    assert content["choices"][0]["finish_reason"] == "stop"
    assert content["usage"]["completion_tokens"] == 40


def test_openais_defaults(running):
    server, engine = running
    ask(server, body={"prompt": "a"})
    assert engine.seen[-1][1]["tokens"] == 16
    assert engine.seen[-1][1]["temperature"] == 1.0
    seeds = set()
    for _ in range(3):
        ask(server, body={"prompt": "a", "max_tokens": 1})
        seeds.add(engine.seen[-1][1]["seed"])
    assert len(seeds) == 3  # another text each time


def test_several_choices_and_prompts(running):
    _, content, _ = ask(running[0], body={"prompt": ["a", "b"], "n": 2, "max_tokens": 1, "seed": 50})
    assert [c["text"] for c in content["choices"]] == ["w0s50 ", "w0s51 ", "w0s52 ", "w0s53 "]
    assert [c["index"] for c in content["choices"]] == [0, 1, 2, 3]


def test_streams_events_as_openai_does(running):
    ask_for = {"prompt": "a", "n": 2, "max_tokens": 2, "seed": 1, "stream": True}
    got = events(running[0], {**ask_for, "stream_options": {"include_usage": True}})
    assert got.pop() == "[DONE]"
    last = got.pop()
    assert last["choices"] == []
    assert last["usage"] == {"prompt_tokens": 1, "completion_tokens": 4, "total_tokens": 5}
    assert len({event["id"] for event in got}) == 1
    parts = [event["choices"][0] for event in got]
    assert [(p["index"], p["text"], p["finish_reason"]) for p in parts] == [
        (0, "w0s1 ", None), (0, "w1s1 ", None), (0, "", "length"),
        (1, "w0s2 ", None), (1, "w1s2 ", None), (1, "", "length"),
    ]  # fmt: skip
    assert all(event["usage"] is None for event in got)
    assert "usage" not in events(running[0], ask_for)[0]
    assert events(running[0], {"prompt": "a", "max_tokens": 0, "stream": True})[-1] == "[DONE]"


def test_models_and_health(running):
    server, _ = running
    assert ask(server, "GET", "/health")[:2] == (200, {"status": "ok", "model": "tiny"})
    status, content, _ = ask(server, "GET", "/v1/models")
    assert (status, content["object"], [m["id"] for m in content["data"]]) == (200, "list", ["tiny"])
    assert ask(server, "GET", "/v1/models/tiny")[1]["owned_by"] == "tinylm"
    assert ask(server, "HEAD", "/health")[:2] == (200, None)


@pytest.mark.parametrize(
    ("body", "status", "said", "param"),
    [
        ({"echo": True}, 400, "echo is not offered", "echo"),
        ({"logprobs": 5}, 400, "logprobs is not offered", "logprobs"),
        ({"logprobs": 0}, 400, "logprobs is not offered", "logprobs"),
        ({"best_of": 3}, 400, "ask for n", "best_of"),
        ({"suffix": "x"}, 400, "do not fill gaps", "suffix"),
        ({"logit_bias": {"5": 1}}, 400, "logit_bias", "logit_bias"),
        ({"presence_penalty": 0.5}, 400, "repetition_penalty", "presence_penalty"),
        ({"max_tokens": 101}, 400, "max_tokens = 101: must be a whole number from 0 to 100", "max_tokens"),
        ({"max_tokens": -1}, 400, "max_tokens = -1", "max_tokens"),
        ({"max_tokens": True}, 400, "max_tokens = True", "max_tokens"),
        ({"max_tokens": "5"}, 400, "max_tokens = '5'", "max_tokens"),
        ({"max_tokens": 1.5}, 400, "max_tokens = 1.5", "max_tokens"),
        ({"temperature": -0.1}, 400, "from 0 to 2", "temperature"),
        ({"temperature": float("nan")}, 400, "temperature = nan", "temperature"),
        ({"top_p": 0}, 400, "above 0 to 1", "top_p"),
        ({"seed": 2**70}, 400, "seed =", "seed"),
        ({"n": 0}, 400, "n = 0", "n"),
        ({"n": 5}, 400, "n = 5", "n"),
        ({"n": 3, "prompt": ["a", "b"]}, 400, "more than 4 completions", "n"),
        ({"prompt": [1, 2, 3]}, 400, "token ids are not taken", "prompt"),
        ({"prompt": []}, 400, "prompt must be", "prompt"),
        ({"prompt": {"a": 1}}, 400, "prompt must be", "prompt"),
        ({"prompt": "\ud800"}, 400, "surrogate", "prompt"),
        ({"stop": ["a"] * 5}, 400, "up to 4", "stop"),
        ({"stop": ""}, 400, "none of them empty", "stop"),
        ({"stop": 3}, 400, "stop must be", "stop"),
        ({"stream": "yes"}, 400, "stream = 'yes'", "stream"),
        ({"stream": 1}, 400, "stream = 1", "stream"),
        ({"stream_options": {"x": 1}}, 400, "include_usage", "stream_options"),
        ({"model": "gpt-4"}, 404, "this server has 'tiny'", "model"),
        ({"temprature": 1}, 400, "unknown field 'temprature'", "temprature"),
        ({"prompt": "bad"}, 400, "prompt = 'bad': give another", None),
        ({"prompt": "bad", "stream": True}, 400, "prompt = 'bad': give another", None),
        ([1], 400, "no JSON object", None),
        (b"{", 400, "no JSON", None),
        (b"", 400, "no JSON", None),
        (b"\xff\xfe{}", 400, "no JSON", None),
        (b"[" * 4900, 400, "no JSON", None),
        (b'{"seed": ' + b"1" * 4800 + b"}", 400, "", None),
        (b" " * 5001, 413, "more than 5000 bytes", None),
    ],
)
def test_what_is_refused(running, body, status, said, param):
    server, engine = running
    before = len(engine.seen)
    answer = ask(server, body={"prompt": "x", **body} if isinstance(body, dict) else body)
    refused(answer, status, said, param)
    assert len(engine.seen) - before == (said.startswith("prompt = 'bad'"))


def test_nothing_asked_for_is_nothing_refused(running):
    off = {"echo": False, "logprobs": None, "best_of": 1, "presence_penalty": 0, "logit_bias": {}, "suffix": None}
    assert ask(running[0], body={"prompt": "a", "max_tokens": 1, "stop": None, "n": None, **off})[0] == 200


def test_faults_inside_are_not_told(running):
    answer = ask(running[0], body={"prompt": "broken"})
    refused(answer, 500, "the server failed")
    assert "secret" not in json.dumps(answer[1])
    assert any("secret of the inside" in line for line in running[0].said)
    got = events(running[0], {"prompt": "breaks", "stream": True})  # after two words
    assert [e["choices"][0]["text"][:2] for e in got[:2]] == ["w0", "w1"]
    assert got[2]["error"]["type"] == "server_error"
    assert len(got) == 3


def test_pages_and_methods(running):
    server, _ = running
    refused(ask(server, "GET", "/"), 404, "nothing at '/'")
    refused(ask(server, "POST", "/v1/chat/completions", {}), 404, "without a chat format")
    refused(ask(server, "GET", "/v1/models/other"), 404, "nothing at")
    refused(ask(server, "GET", "/../../etc/passwd"), 404, "nothing at")
    answer = ask(server, "GET", "/v1/completions")
    refused(answer, 405, "takes POST, not GET")
    assert answer[2]["Allow"] == "POST"
    refused(ask(server, "DELETE", "/v1/models"), 405, "takes GET and HEAD")
    refused(ask(server, "OPTIONS", "/v1/completions", headers={"Origin": "http://evil.example"}), 405, "POST")
    refused(ask(server, "BREW", "/health"), 501, "")


def test_other_sites_cannot_use_a_browser(running):
    server, engine = running
    before = len(engine.seen)
    port = server.server_port
    for host in (
        "evil.example",
        f"evil.example:{port}",
        "127.0.0.1.evil.example",
        f"localhost@evil:{port}",
        "[::2]:80",
    ):
        refused(ask(server, body={"prompt": "a"}, headers={"Host": host}), 403, "is not this machine")
        refused(ask(server, "GET", "/v1/models", headers={"Host": host}), 403, "is not this machine")
    for host in ("localhost", f"LOCALHOST:{port}", f"127.0.0.1:{port}", f"[::1]:{port}", "[::1]"):
        assert ask(server, "GET", "/health", headers={"Host": host})[0] == 200
    for kind in ("text/plain", "application/x-www-form-urlencoded", "", "multipart/form-data; a=application/json"):
        refused(ask(server, body=b'{"prompt": "a"}', headers={"Content-Type": kind}), 415, "send application/json")
    assert len(engine.seen) == before
    assert ask(server, body={"prompt": "a"}, headers={"Content-Type": "application/json; charset=utf-8"})[0] == 200


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (b"garbage\r\n\r\n", b"400"),
        (b"GET /health\r\n\r\n", b"400"),
        (b"GET /health HTTP/1.1\r\n\r\n", b"400"),  # no host
        (b"GET /health HTTP/1.1\r\nHost: localhost\r\nHost: evil\r\n\r\n", b"400"),
        (b"GET /health HTTP/9.9\r\nHost: localhost\r\n\r\n", b"505"),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"505"),
        (b"GET /" + b"a" * 70000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n", b"414"),
        (b"GET /health HTTP/1.1\r\nHost: localhost\r\n" + b"A: b\r\n" * 150 + b"\r\n", b"431"),
        (b"GET /health HTTP/1.1\r\nHost: localhost\r\nA: " + b"b" * 70000 + b"\r\n\r\n", b"431"),
        (POST + b"\r\n{}", b"411"),
        (
            POST + b"Transfer-Encoding: chunked\r\nContent-Length: 2\r\n\r\n2\r\n{}\r\n0\r\n\r\n",
            b"411",
        ),
        *[
            (POST + b"Content-Length: " + length + b"\r\n\r\n{}", status)
            for length, status in [
                (b"-1", b"400"),
                (b"2x", b"400"),
                (b"+2", b"400"),
                ("²".encode(), b"400"),
                (b"2\r\nContent-Length: 3", b"400"),
                (b"99999", b"413"),
                (b"1" * 30, b"413"),
            ]
        ],
    ],
)
def test_malformed_requests(running, request_, status):
    answer = raw(running[0], request_)
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.split()[1] == status
    assert b"Content-Type: application/json" in head
    assert set(json.loads(body)["error"]) == {"message", "type", "param", "code"}
    assert ask(running[0], "GET", "/health")[0] == 200


def test_a_slow_sender_is_cut_off():
    with served(reading=0.5) as (server, _), socket.create_connection(("127.0.0.1", server.server_port)) as client:
        client.settimeout(20)
        with contextlib.suppress(ConnectionError):
            for letter in b"GET /health HTTP/1.1\r\nX: " + b"x" * 10:
                client.send(bytes([letter]))
                time.sleep(0.05)  # each byte is soon enough, all of them together are not
            assert client.recv(1000) == b""
        assert b"ended before 9 bytes" in raw(server, POST + b"Content-Length: 9\r\n\r\n{", wait=20)


def test_so_many_at_once_and_no_more():
    with served(running=1, waiting=1) as (server, engine):
        engine.gate.clear()
        answers = []
        body = {"prompt": "a", "max_tokens": 10}
        threads = [threading.Thread(target=lambda: answers.append(ask(server, body=body))) for _ in range(2)]
        threads[0].start()
        until(lambda: engine.running == 1)
        threads[1].start()
        until(lambda: server.waiting == 1)
        answer = ask(server, body=body)
        refused(answer, 429, "1 requests wait already")
        assert answer[2]["Retry-After"]
        engine.gate.set()
        for thread in threads:
            thread.join(30)
        assert [status for status, _, _ in answers] == [200, 200]
        assert engine.most == 1
        assert ask(server, body=body)[0] == 200


def test_nobody_waits_for_ever():
    with served(running=1, patience=0.3) as (server, engine):
        engine.gate.clear()
        long = threading.Thread(target=ask, args=(server,), kwargs={"body": {"prompt": "a"}})
        long.start()
        until(lambda: engine.running == 1)
        refused(ask(server, body={"prompt": "a"}), 503, "no turn within 0.3 s")
        assert server.waiting == 0
        engine.gate.set()
        long.join(30)


def test_a_request_has_so_much_time():
    with served(Words(pause=0.05), seconds=0.4) as (server, _):
        began = time.monotonic()
        _, content, _ = ask(server, body={"prompt": ["a", "b"], "max_tokens": 100})
        assert time.monotonic() - began < 8  # of 10
        assert content["choices"][0]["finish_reason"] == "length"
        assert 0 < content["usage"]["completion_tokens"] < 30


def test_connections_are_counted():
    with served(connections=2) as (server, _), contextlib.ExitStack() as stack:
        for _ in range(2):
            stack.enter_context(socket.create_connection(("127.0.0.1", server.server_port)))
        until(lambda: len(server.threads) == 2)
        answer = raw(server, b"")
        assert answer.startswith(b"HTTP/1.1 503")
        assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["code"] == "busy"
        stack.close()
        until(lambda: not any(thread.is_alive() for thread in server.threads))
        assert ask(server, "GET", "/health")[0] == 200


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_stops_its_generation(stream):
    with served(Words(end=10**9, pause=0.01), tokens=10**9) as (server, engine):
        connection = connect(server)
        body = json.dumps({"prompt": "a", "max_tokens": 10**8, "stream": stream})
        connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
        until(lambda: engine.running == 1)
        connection.sock.close()
        connection.close()
        until(lambda: engine.running == 0)


def test_a_client_that_does_not_read_is_cut_off():
    """What it was sent fills the buffers on the way; then nobody waits for it."""
    with served(Words(end=10**9), tokens=10**9, reading=0.3) as (server, engine), socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect(("127.0.0.1", server.server_port))
        body = json.dumps({"prompt": "a", "max_tokens": 10**8, "stream": True}).encode()
        client.sendall(POST + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        until(lambda: engine.running == 1)
        until(lambda: engine.running == 0)
        assert ask(server, "GET", "/health")[0] == 200


def test_closing_ends_what_runs():
    with served(Words(end=10**9, pause=0.01), tokens=10**9) as (server, engine):
        answers = []
        body = {"prompt": "a", "max_tokens": 10**8}
        threads = [
            threading.Thread(target=lambda: answers.append(ask(server, body=body))),
            threading.Thread(target=lambda: answers.append(events(server, {**body, "stream": True})[-1])),
        ]
        for thread in threads:
            thread.start()
        until(lambda: engine.running == 2)
        server.shutdown()
        server.server_close()
        for thread in threads:
            thread.join(30)
        (plain,) = (a for a in answers if isinstance(a, tuple))
        (event,) = (a for a in answers if isinstance(a, dict))
        refused(plain, 503, "shutting down")
        assert event["error"]["code"] == "shutdown"


def test_clients_of_all_kinds_at_once():
    with served(Words(end=20), running=4, waiting=64, connections=128) as (server, _):
        answers = [None] * 24

        def go(i):
            answers[i] = ask(server, body={"prompt": "a", "max_tokens": 20, "seed": i})[1]["choices"][0]["text"]

        threads = [threading.Thread(target=go, args=(i,)) for i in range(24)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert answers == ["".join(f"w{k}s{i} " for k in range(20)) for i in range(24)]


def test_addresses():
    with served() as (server, _):
        with pytest.raises(OSError, match=f"cannot listen on 127.0.0.1 port {server.server_port}.*--port"):
            Server(Words(), "x", port=server.server_port)
        assert server.url == f"http://127.0.0.1:{server.server_port}"
    with pytest.raises(OSError, match="cannot listen"):
        Server(Words(), "x", port=70000)
    with pytest.raises(OSError, match="cannot listen"):
        Server(Words(), "x", host="no.such.host.invalid", port=0)
    with pytest.raises(ValueError, match="seconds = 0"):
        Limits(seconds=0)
    everywhere = Server(Words(), "x", host="0.0.0.0", port=0)
    assert not everywhere.only_loopback
    everywhere.server_close()


def test_log_lines_hold_no_control_characters(running):
    raw(running[0], b"GET /\x1b[31m HTTP/1.1\r\nHost: localhost\r\n\r\n")
    assert any("[31m" in line for line in running[0].said)
    assert not any("\x1b" in line for line in running[0].said)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_close_it(number):
    code = (
        "import sys; sys.path.insert(0, 'tests'); from test_serve import *\n"
        "server = Server(Words(end=10**9, pause=0.01), 'tiny', port=0)\n"
        "print(server.url, flush=True)\n"
        "try: serve(server)\n"
        "except KeyboardInterrupt: print('closed', server.engine.running)"
    )
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    port = int(process.stdout.readline().rpartition(":")[2])
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    body = json.dumps({"prompt": "a", "max_tokens": 4000, "stream": True})
    connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
    connection.getresponse().read(10)
    process.send_signal(number)
    out, _ = process.communicate(timeout=30)
    assert out == "closed 0\n"


def test_serve_needs_no_main_thread():
    server = Server(Words(), "tiny", port=0)
    thread = threading.Thread(target=serve, args=(server,))
    thread.start()
    assert ask(server, "GET", "/health")[0] == 200
    server.shutdown()
    thread.join(5)
    assert not thread.is_alive()
