"""Answers of a teacher that is only asked: any command, or an endpoint of the OpenAI kind.

Each answer is appended to a record file as soon as it is there, one JSON object a line, under the hash of the prompt
and of who was asked how. What is on record is never asked again, so a run that broke off goes on where it was, and one
that is repeated needs neither the command nor a network.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from edgeport.distilling import Asked
from edgeport.errors import BadInputError
from edgeport.storage import hash_value

TRIES = 4
"""Times that an endpoint is asked for one answer before it has failed."""

BUSY = frozenset({408, 429, 500, 502, 503, 504})
"""Answers of HTTP after which asking again may help (RFC 9110, section 15; RFC 6585, section 4)."""

FIRST_WAIT = 1.0
"""Seconds before the second try; each wait is twice the one before."""

Ask = Callable[[str], str]
Progress = Callable[[int, int, str], None]


class _FailedError(Exception):
    """The teacher gave no answer; the text says why."""


def prompt_key(asked: Asked, prompt: str) -> str:
    """The hash that a prompt's answer is recorded under: of the prompt, the command or model, and the settings. The
    endpoint's address is no part of it: a model may move."""
    who = {"command": asked.command} if asked.command else {"model": asked.model}
    settings = {} if asked.command else {"max_tokens": asked.max_tokens, "temperature": asked.temperature}
    return hash_value({"prompt": prompt, "system": asked.system, **who, **settings})


def read_record(path: Path) -> dict[str, str]:
    """Answers by key; a last line that was not finished is cut off.

    Raises:
        BadInputError: the file can't be read, or another line is damaged.
    """
    if not path.exists():
        return {}
    try:
        data = path.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        if len(whole) < len(data):
            with path.open("r+b") as file:
                file.truncate(len(whole))
        found = {}
        for number, line in enumerate(whole.decode().split("\n")[:-1], 1):
            try:
                entry = json.loads(line)
                found[str(entry["key"])] = str(entry["answer"])
            except (json.JSONDecodeError, KeyError, TypeError) as error:
                raise BadInputError(
                    f"Line {number} of the record is damaged.",
                    where=path,
                    next_step="Remove the line; its prompt is asked again.",
                ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise BadInputError(f"The record can't be read: {error}.", where=path) from error
    return found


def collect_answers(asked: Asked, prompts: Sequence[str], *, progress: Progress | None = None) -> list[str]:
    """The answer to each prompt: from the record, or asked for and recorded.

    Args:
        progress: called with (answers there, prompts in all, what they are).

    Raises:
        BadInputError: the teacher failed (what it answered before is on record), or the record can't be used.
    """
    path = Path(asked.record)
    known = read_record(path)
    ask: Ask | None = None
    answers = []
    for index, prompt in enumerate(prompts):
        key = prompt_key(asked, prompt)
        if key not in known:
            ask = ask or (_command(asked) if asked.command else _endpoint(asked))
            try:
                known[key] = ask(prompt)
            except _FailedError as failure:
                raise BadInputError(
                    f"The teacher failed at prompt {index + 1} of {len(prompts)}: {failure}.",
                    where=asked.endpoint or asked.command,
                    next_step=f"The answers so far are kept in {path}; the same command goes on from there.",
                ) from failure
            _append(path, {"key": key, "prompt": prompt, "answer": known[key]})
        answers.append(known[key])
        if progress is not None:
            progress(index + 1, len(prompts), "answers of the teacher")
    return answers


def _append(path: Path, entry: dict[str, str]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab") as file:
            file.write((json.dumps(entry, ensure_ascii=False) + "\n").encode())
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise BadInputError(f"The record can't be written: {error}.", where=path) from error


def _command(asked: Asked) -> Ask:
    """Asks a command: the prompt on stdin, the answer on stdout."""
    words = shlex.split(asked.command or "")

    def ask(prompt: str) -> str:
        text = prompt if asked.system is None else f"{asked.system}\n\n{prompt}"
        try:
            done = subprocess.run(
                words, input=text.encode(), capture_output=True, timeout=asked.timeout_seconds, check=False
            )
        except (OSError, ValueError) as error:
            raise _FailedError(f"the command can't be run, {error}") from error
        except subprocess.TimeoutExpired as error:
            raise _FailedError(f"no answer within {asked.timeout_seconds:g} seconds") from error
        if done.returncode != 0:
            said = done.stderr.decode(errors="replace").strip().splitlines()
            raise _FailedError(f"the command ended with {done.returncode}" + (f", {said[-1]}" if said else ""))
        return _checked(done.stdout.decode(errors="replace").strip())

    return ask


def _endpoint(asked: Asked) -> Ask:
    """Asks an endpoint of the OpenAI kind: POST ENDPOINT/chat/completions."""
    headers = {"Content-Type": "application/json"}
    if asked.key_variable is not None:
        if asked.key_variable not in os.environ:
            raise BadInputError(
                f"The environment has no variable {asked.key_variable!r}.",
                where="key_variable of [compress.data.teacher]",
                next_step="Set it to the endpoint's key, or leave key_variable out.",
            )
        headers["Authorization"] = f"Bearer {os.environ[asked.key_variable]}"
    address = f"{(asked.endpoint or '').rstrip('/')}/chat/completions"

    def ask(prompt: str) -> str:
        messages = [] if asked.system is None else [{"role": "system", "content": asked.system}]
        body = {
            "model": asked.model,
            "messages": [*messages, {"role": "user", "content": prompt}],
            "max_tokens": asked.max_tokens,
            "temperature": asked.temperature,
        }
        request = urllib.request.Request(address, json.dumps(body).encode(), headers)
        return _checked(_content(_posted(request, asked.timeout_seconds)))

    return ask


def _posted(request: urllib.request.Request, timeout: float) -> bytes:
    """The body of the answer, asked for again while the endpoint is busy."""
    for attempt in range(1, TRIES + 1):
        try:
            with urllib.request.urlopen(request, timeout=timeout) as answer:
                body: bytes = answer.read()
                return body
        except urllib.error.HTTPError as error:
            said = error.read(300).decode(errors="replace").strip()
            if error.code not in BUSY or attempt == TRIES:
                raise _FailedError(f"HTTP {error.code} {error.reason}" + (f", {said}" if said else "")) from error
        except (OSError, ValueError) as error:  # not reached, cut off, or timed out
            if attempt == TRIES:
                raise _FailedError(str(getattr(error, "reason", error)) or type(error).__name__) from error
        time.sleep(FIRST_WAIT * 2 ** (attempt - 1))
    raise AssertionError("the last attempt returns or raises")


def _content(body: bytes) -> str:
    try:
        answer: Any = json.loads(body)["choices"][0]["message"]["content"]
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise _FailedError(f"the answer is not of the OpenAI form: {body[:200].decode(errors='replace')}") from error
    if not isinstance(answer, str):
        raise _FailedError("the answer holds no text")
    return answer.strip()


def _checked(answer: str) -> str:
    if not answer:
        raise _FailedError("the answer is empty")
    return answer
