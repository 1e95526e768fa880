"""`edgeport run BUNDLE PROMPT`: what a bundle's language model answers or writes down, from its file and its cache."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from edgeport.cli.options import AsJson, Debug, Verbose

if TYPE_CHECKING:
    from edgeport.runtime.conversation import Conversation
    from edgeport.runtime.decoder import Tokens
    from edgeport.runtime.generate import Generation
    from edgeport.runtime.transcript import Transcriber

MostTokens = Annotated[int, typer.Option("--max-new-tokens", "-n", min=1, help="Tokens to generate at most.")]
Temperature = Annotated[float, typer.Option(help="0 takes the best token always (greedy).")]
TopK = Annotated[int | None, typer.Option(help="Choose among the k best tokens.", show_default="all")]
TopP = Annotated[float | None, typer.Option(help="Choose among the best tokens with this share.", show_default="all")]
Seed = Annotated[int, typer.Option(help="Of the draws, with a temperature.")]
Threads = Annotated[int, typer.Option(min=1, help="Of the runtime.")]
BundleFolder = Annotated[
    Path, typer.Argument(metavar="BUNDLE", help="A folder that `edgeport export` wrote.", show_default=False)
]


def open_conversation(
    bundle: Path, *, temperature: float, top_k: int | None, top_p: float | None, seed: int, threads: int
) -> Conversation:
    """Check a bundle's files and load its model and tokenizer.

    Raises:
        BadInputError: the folder is no bundle, was changed, or holds no language model with a cache.
    """
    from edgeport.bundle.read import read_bundle, verify_files
    from edgeport.errors import BadInputError
    from edgeport.runtime.conversation import Conversation, open_texts
    from edgeport.runtime.generate import Sampling
    from edgeport.runtime.session import open_tokens

    sampling = Sampling(temperature, top_k, top_p, seed)
    found = read_bundle(bundle)
    verify_files(found)
    if found.artifact.encoder is not None:
        raise BadInputError(
            "The model writes one text for one input: it holds no conversation.",
            where=bundle,
            next_step="`edgeport run` runs it.",
        )
    tokens = open_tokens(found.artifact, threads=threads)
    return Conversation(tokens, open_texts(bundle / found.manifest.assets), sampling)


def open_transcriber(
    bundle: Path, *, temperature: float, top_k: int | None, top_p: float | None, seed: int, threads: int
) -> Transcriber:
    """Check a bundle's files and load its encoder-decoder and tokenizer.

    Raises:
        BadInputError: the folder is no bundle, was changed, or holds no encoder-decoder with a cache.
    """
    from edgeport.bundle.read import read_bundle, verify_files
    from edgeport.runtime.generate import Sampling
    from edgeport.runtime.transcript import Transcriber

    sampling = Sampling(temperature, top_k, top_p, seed)
    found = read_bundle(bundle)
    verify_files(found)
    speech, assets = found.manifest.modality == "audio", bundle / found.manifest.assets
    return Transcriber(found.artifact, assets, speech=speech, sampling=sampling, threads=threads)


def speed(record: Generation, tokens: Tokens) -> str:
    """How fast it went, in words."""
    if record.encoder_seconds:
        words = f"{record.encoder_seconds + record.first_seconds:.2f} s to the first token"
        words += f", {record.encoder_seconds:.2f} s of it the encoder; {len(record.ids)} new tokens"
        return words + (f", {record.decode_rate:.1f}/s" if record.steps else "")
    words = f"{record.prompt} prompt tokens, {record.prefill_rate:.0f}/s; {len(record.ids)} new tokens"
    words += f", {record.decode_rate:.1f}/s" if record.steps else ""
    return words if tokens.vendor_kernels else f"{words}; by {tokens.name}: no device's speed"


def document(record: Generation, text: str, runtime: str) -> dict[str, Any]:
    """A generation as JSON values; rates are tokens a second."""
    return {
        "text": text,
        "finish": record.finish,
        "runtime": runtime,
        "prompt_tokens": record.prompt,
        "new_tokens": len(record.ids),
        "ids": record.ids,
        "time_to_first_token_s": record.encoder_seconds + record.first_seconds,
        "prefill_tokens_per_s": record.prefill_rate,
        "decode_tokens_per_s": record.decode_rate,
    }


def _write(piece: str) -> None:
    sys.stdout.write(piece)
    sys.stdout.flush()


def run(
    bundle: BundleFolder,
    prompt: Annotated[
        str | None, typer.Argument(metavar="[PROMPT]", help="What to say; - reads it from stdin.", show_default=False)
    ] = None,
    audio: Annotated[
        Path | None, typer.Option(help="A recording to write down: WAV, 16 kHz, mono, 16 bits.", show_default=False)
    ] = None,
    language: Annotated[str | None, typer.Option(help="Of the recording, such as de.", show_default="en")] = None,
    raw: Annotated[bool, typer.Option("--raw", help="Continue the text as it is, without the chat template.")] = False,
    most: MostTokens = 128,
    temperature: Temperature = 0.0,
    top_k: TopK = None,
    top_p: TopP = None,
    seed: Seed = 0,
    threads: Threads = 1,
    as_json: AsJson = False,
    verbose: Verbose = False,
    debug: Debug = False,
) -> None:
    """Let a bundle's language model answer, or write a recording down, and stream the text.

    \b
    Examples:
      edgeport run out/smollm2 "What is the capital of France?"
      edgeport run out/smollm2 "Once upon a time" --raw --max-new-tokens 64
      edgeport run out/smollm2 "Tell me a story." --temperature 0.7 --top-p 0.9 --seed 1
      edgeport run out/smollm2 - --json < prompt.txt
      edgeport run out/whisper --audio speech.wav

    It ends at the model's stop token, after --max-new-tokens, or when the cache is full; the line on stderr says
    which. A reference evaluator (Core ML) answers slowly, and its speed says nothing about a device.
    """
    from edgeport.bundle.read import read_bundle
    from edgeport.cli.console import answer, working
    from edgeport.errors import BadInputError
    from edgeport.runtime.transcript import Transcriber

    pieces: list[str] = []
    show = pieces.append if as_json else _write
    draws: dict[str, Any] = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed}
    with working(verbose=verbose or debug) as watcher:
        watcher.stage("load", str(bundle))
        encodes = read_bundle(bundle).artifact.encoder is not None
        model = (open_transcriber if encodes else open_conversation)(bundle, threads=threads, **draws)
    text = sys.stdin.read() if prompt == "-" else prompt
    if isinstance(model, Transcriber):
        record = model.answer(most, show, text=text, audio=audio, language=language)
    elif text is None or audio is not None or language is not None:
        raise BadInputError("The model continues texts.", where=bundle, allowed="a PROMPT, and no recording")
    else:
        chats = model.texts.chats and not raw
        ids = model.texts.chat_ids([{"role": "user", "content": text}]) if chats else model.texts.ids(text)
        record = model.answer(ids, most, show)
    if as_json:
        answer(document(record, "".join(pieces), model.tokens.name), as_json, lambda _console: None)
        return
    print()
    why = {"stop": "", "length": ", cut at --max-new-tokens", "context": ", the cache is full", None: ""}[record.finish]
    print(f"[{speed(record, model.tokens)}{why}]", file=sys.stderr)
