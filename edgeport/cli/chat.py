"""`edgeport chat BUNDLE`."""

from __future__ import annotations

import sys

import typer

from edgeport.cli.options import Debug, Verbose
from edgeport.cli.run import (
    BundleFolder,
    MostTokens,
    Seed,
    Temperature,
    Threads,
    TopK,
    TopP,
    _write,
    open_conversation,
    speed,
)


def chat(
    bundle: BundleFolder,
    most: MostTokens = 256,
    temperature: Temperature = 0.0,
    top_k: TopK = None,
    top_p: TopP = None,
    seed: Seed = 0,
    threads: Threads = 1,
    verbose: Verbose = False,
    debug: Debug = False,
) -> None:
    """Chat with a bundle's language model. /new forgets the conversation; an empty line or Ctrl-D ends it.

    \b
    Examples:
      edgeport chat out/smollm2
      edgeport chat out/smollm2 --temperature 0.7 --seed 1
      printf 'Hello!\\nAnd in French?\\n' | edgeport chat out/smollm2

    What was said stays in the model's cache: only the new turn is read. Ctrl-C ends an answer, not the chat.
    """
    from edgeport.cli.console import working
    from edgeport.errors import BadInputError
    from edgeport.runtime.large_pages import use_large_pages

    with working(verbose=verbose or debug) as watcher:
        watcher.stage("load", str(bundle))
        conversation = open_conversation(
            bundle, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed, threads=threads
        )
        use_large_pages()  # takes as long as 260 tokens gain: for a chat, not for one answer
    conversation.texts.rendered([{"role": "user", "content": "?"}])  # refuses a model without a template at once
    while True:
        print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line.strip():
            print(file=sys.stderr)
            raise typer.Exit(0)
        if line.strip() == "/new":
            conversation.messages.clear()
            continue
        try:
            record = conversation.say(line.strip(), most, _write)
        except KeyboardInterrupt:
            print("\n[stopped]", file=sys.stderr)
            continue
        except BadInputError as error:
            print(f"error: {error}", file=sys.stderr)
            print("[/new begins another conversation]", file=sys.stderr)
            continue
        print()
        print(f"[{speed(record, conversation.tokens)}]", file=sys.stderr)
