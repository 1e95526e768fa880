"""Teachers that are only asked: a real HTTP server and real commands, failing half way."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from edgeport.data import answers
from edgeport.data.answers import collect_answers, prompt_key, read_record
from edgeport.distilling import Asked
from edgeport.errors import BadInputError

PROMPTS = ["one", "zwei\nlines", "ein Wort — drei", "four"]


class Endpoint(ThreadingHTTPServer):
    """Answers in capitals.

    Attributes:
        asked: bodies of all requests; headers: their Authorization.
        failures: (status, body) for the next requests, before it answers again.
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked: list[dict[str, Any]] = []
        self.headers: list[str | None] = []
        self.failures: list[tuple[int, bytes]] = []

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1/"


class Handler(BaseHTTPRequestHandler):
    server: Endpoint

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.headers.append(self.headers["Authorization"])
        self.server.asked.append({"path": self.path, **body})
        text = body["messages"][-1]["content"].upper()
        status, answer = 200, json.dumps({"choices": [{"message": {"content": text}}]}).encode()
        if self.server.failures:
            status, answer = self.server.failures.pop(0)
        self.send_response(status)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *_arguments: object) -> None:
        pass


@pytest.fixture
def endpoint(monkeypatch: pytest.MonkeyPatch) -> Iterator[Endpoint]:
    monkeypatch.setattr(answers, "FIRST_WAIT", 0.0)
    server = Endpoint()
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def of(server: Endpoint, record: Path, **more: Any) -> Asked:
    return Asked(endpoint=server.address, model="teacher-1", record=str(record), timeout_seconds=5, **more)


def test_an_endpoint_is_asked_once_and_then_offline(
    endpoint: Endpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOME_KEY", "abc")
    record = tmp_path / "deep" / "answers.jsonl"
    asked = of(endpoint, record, system="Shout.", max_tokens=9, key_variable="SOME_KEY")
    seen: list[tuple[int, int, str]] = []
    found = collect_answers(asked, [*PROMPTS, PROMPTS[0]], progress=lambda *report: seen.append(report))
    assert found == [prompt.upper() for prompt in [*PROMPTS, PROMPTS[0]]]
    assert len(endpoint.asked) == 4  # the repeated prompt was on record
    assert endpoint.asked[1] == {
        "path": "/v1/chat/completions",
        "model": "teacher-1",
        "messages": [{"role": "system", "content": "Shout."}, {"role": "user", "content": "zwei\nlines"}],
        "max_tokens": 9,
        "temperature": 0.0,
    }
    assert set(endpoint.headers) == {"Bearer abc"}
    assert [done for done, _, _ in seen] == [1, 2, 3, 4, 5]
    written = record.read_bytes()
    entries = [json.loads(line) for line in written.decode().split("\n")[:-1]]
    assert [(entry["prompt"], entry["answer"]) for entry in entries] == [(one, one.upper()) for one in PROMPTS]
    # Again: no server, no key, the same bytes.
    monkeypatch.delenv("SOME_KEY")
    moved = asked.model_copy(update={"endpoint": "http://127.0.0.1:1/"})
    assert collect_answers(moved, PROMPTS) == found[:4]
    assert record.read_bytes() == written
    # Other settings are other answers.
    assert len({prompt_key(one, "one") for one in (asked, asked.model_copy(update={"max_tokens": 10}))}) == 2


def test_an_endpoint_that_fails_half_way_keeps_the_work(endpoint: Endpoint, tmp_path: Path) -> None:
    record = tmp_path / "answers.jsonl"
    collect_answers(of(endpoint, record), PROMPTS[:2])
    endpoint.failures = [(400, b'{"error": "no credit left"}')]
    with pytest.raises(BadInputError, match=r"prompt 3 of 4: HTTP 400 .*no credit left") as error:
        collect_answers(of(endpoint, record), PROMPTS)
    assert error.value.where == endpoint.address
    assert str(record) in str(error.value.next_step)
    assert len(endpoint.asked) == 3  # a refusal is not asked again
    assert sorted(read_record(record).values()) == sorted(prompt.upper() for prompt in PROMPTS[:2])
    assert collect_answers(of(endpoint, record), PROMPTS) == [prompt.upper() for prompt in PROMPTS]
    assert [one["messages"][0]["content"] for one in endpoint.asked[3:]] == PROMPTS[2:]


def test_a_busy_endpoint_is_asked_again(endpoint: Endpoint, tmp_path: Path) -> None:
    endpoint.failures = [(503, b""), (429, b"slow down")]
    assert collect_answers(of(endpoint, tmp_path / "a"), ["one"]) == ["ONE"]
    assert len(endpoint.asked) == 3
    endpoint.failures = [(500, b"")] * 4
    with pytest.raises(BadInputError, match="HTTP 500"):
        collect_answers(of(endpoint, tmp_path / "b"), ["one"])
    assert len(endpoint.asked) == 7


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"<html>", "not of the OpenAI form"),
        (b'{"choices": []}', "not of the OpenAI form"),
        (b'{"choices": [{"message": {"content": null}}]}', "holds no text"),
        (b'{"choices": [{"message": {"content": "  "}}]}', "is empty"),
    ],
)
def test_answers_that_are_none(endpoint: Endpoint, tmp_path: Path, body: bytes, words: str) -> None:
    endpoint.failures = [(200, body)]
    with pytest.raises(BadInputError, match=words):
        collect_answers(of(endpoint, tmp_path / "a"), ["one"])
    assert not (tmp_path / "a").exists()


def test_nobody_there_and_no_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answers, "FIRST_WAIT", 0.0)
    asked = Asked(endpoint="http://127.0.0.1:1", model="m", record=str(tmp_path / "a"))
    with pytest.raises(BadInputError, match=r"prompt 1 of 1: .*refused"):
        collect_answers(asked, ["one"])
    with pytest.raises(BadInputError, match="no variable 'NOT_SET_ANYWHERE'"):
        collect_answers(asked.model_copy(update={"key_variable": "NOT_SET_ANYWHERE"}), ["one"])


def command(tmp_path: Path, body: str, **more: Any) -> Asked:
    script = tmp_path / "teacher.py"
    script.write_text(f"import sys\ntext = sys.stdin.buffer.read().decode()\n{body}\n")
    return Asked(command=f"'{sys.executable}' '{script}'", record=str(tmp_path / "answers.jsonl"), **more)


def test_a_command_that_fails_half_way(tmp_path: Path) -> None:
    asked = command(
        tmp_path, "if text == 'bad': sys.exit('out of memory')\nsys.stdout.buffer.write(text[::-1].encode())"
    )
    with pytest.raises(BadInputError, match="prompt 2 of 3: the command ended with 1, out of memory"):
        collect_answers(asked, ["ab—", "bad", "cd"])
    assert list(read_record(Path(asked.record)).values()) == ["—ba"]
    (tmp_path / "teacher.py").write_text("import sys\nprint(sys.stdin.read() + '!')")
    assert collect_answers(asked, ["ab—", "bad", "cd"]) == ["—ba", "bad!", "cd!"]


def test_commands_that_can_not_answer(tmp_path: Path) -> None:
    missing = Asked(command="./no-such-program", record=str(tmp_path / "a"))
    with pytest.raises(BadInputError, match="can't be run"):
        collect_answers(missing, ["one"])
    slow = command(tmp_path, "import time; time.sleep(30)", timeout_seconds=0.2)
    with pytest.raises(BadInputError, match=r"no answer within 0.2 seconds"):
        collect_answers(slow, ["one"])
    with pytest.raises(BadInputError, match="is empty"):
        collect_answers(command(tmp_path, ""), ["one"])


def test_a_record_that_was_cut_off_goes_on(tmp_path: Path) -> None:
    asked = command(tmp_path, "print(text.upper())")
    collect_answers(asked, PROMPTS)
    record = Path(asked.record)
    whole = record.read_bytes()
    record.write_bytes(whole[:-7])
    assert collect_answers(asked, PROMPTS) == [prompt.upper() for prompt in PROMPTS]
    assert record.read_bytes() == whole
    record.write_bytes(b"nonsense\n" + whole)
    with pytest.raises(BadInputError, match="Line 1 of the record is damaged"):
        collect_answers(asked, PROMPTS)
