"""A bundle as a model of EleutherAI's lm-evaluation-harness: `--model edgeport --model_args bundle=PATH`.

The harness asks three things of a model (https://github.com/EleutherAI/lm-evaluation-harness, docs/model_guide.md): how
likely a text is after another, how likely a whole text is, and what it writes. All three are answered by the shipped
file in its runtime and through its cache: a context at once, then token by token.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from lm_eval import utils
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from scipy.special import log_softmax  # type: ignore[import-untyped]
from tqdm import tqdm  # type: ignore[import-untyped]

from edgeport.bundle.read import read_bundle, verify_files
from edgeport.errors import BadInputError
from edgeport.runtime.conversation import open_texts
from edgeport.runtime.generate import Sampling, generate
from edgeport.runtime.session import open_tokens
from edgeport.storage import hash_file

SAMPLING = {"do_sample", "temperature", "top_k", "top_p", "until", "max_gen_toks"}
NEW_TOKENS = 256
"""Of an answer at most, where a task does not say."""


@register_model("edgeport")
class EdgeportLM(TemplateLM):  # type: ignore[misc]
    """A bundle's language model.

    Args:
        bundle: the folder that `edgeport export` wrote; its files are checked.
        threads: of the runtime.
        max_length: tokens at once; None takes what the cache holds.
        batch_size, max_batch_size, device: as the harness gives them to every model. A device reads one text at a time
            where the bundle says, so that they change nothing.

    Raises:
        BadInputError: the folder is no bundle, was changed, or holds no language model with a cache and a tokenizer.
    """

    def __init__(
        self,
        bundle: str,
        threads: int = 1,
        max_length: int | None = None,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        device: str | None = None,
    ) -> None:
        super().__init__()
        found = read_bundle(Path(bundle))
        verify_files(found)
        if found.artifact.encoder is not None:
            raise BadInputError("The model is no causal language model.", where=bundle)
        self._tokens = open_tokens(found.artifact, threads=int(threads))
        texts = open_texts(found.root / found.manifest.assets)
        self.tokenizer, self._stop = texts.tokenizer, texts.stop
        if self.tokenizer.eos_token_id is None:
            raise BadInputError("The tokenizer names no token that ends a text.", where=found.root)
        if max_length is not None and not 1 < int(max_length) <= self._tokens.context:
            raise BadInputError(
                f"{max_length} tokens are out of range.", where="max_length", allowed=f"2 to {self._tokens.context}"
            )
        self.max_length = int(max_length or self._tokens.context)
        self._info = {
            "edgeport_target": found.manifest.target.name,
            "edgeport_recipe": found.manifest.recipe.name,
            "edgeport_runtime": self._tokens.name,
            "edgeport_manifest_sha256": hash_file(found.root / "manifest.json"),
        }
        self._held: tuple[list[int], np.ndarray | None] = ([], None)

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """The token that stands before a text without a context."""
        begin = self.tokenizer.bos_token_id
        return self.eot_token_id if begin is None else int(begin)

    @property
    def tokenizer_name(self) -> str:
        """What the harness keeps its requests under."""
        return f"edgeport__{self._info['edgeport_manifest_sha256']}"

    def get_model_info(self) -> dict[str, str]:
        """What was measured, for the harness's results."""
        return self._info

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """A text's tokens: with special ones as the tokenizer has it, unless the text begins with one already."""
        if add_special_tokens is None and string.startswith(self.tokenizer.decode(self.prefix_token_id)):
            add_special_tokens = False
        how = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        return [int(token) for token in self.tokenizer.encode(string, **how)]

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A conversation as the bundle's chat template writes it."""
        text = self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )
        return str(text)

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        """For each (key, context, continuation) the log-likelihood, nats, and whether every token is the likeliest."""
        found = []
        for key, context, continuation in tqdm(requests, disable=disable_tqdm, desc="edgeport: log-likelihoods"):
            answer = self._likelihood(context, continuation)
            found.append(answer)
            if key is not None:
                self.cache_hook.add_partial("loglikelihood", key, answer)
        return found

    def _likelihood(self, context: list[int], continuation: list[int]) -> tuple[float, bool]:
        # The last token is only predicted: one more fits than the cache holds. What is too long loses its beginning.
        whole = (context + continuation)[-(self.max_length + 1) :]
        count = min(len(continuation), len(whole) - 1)
        prefix, end = whole[:-count], whole[-count:]
        held, scores = self._held
        if prefix == held and scores is not None:
            self._tokens.rewind(len(prefix))
        else:
            self._tokens.rewind()
            scores = self._tokens.feed(np.asarray(prefix, np.int64)).copy()
            self._held = (prefix, scores)
        rows = [scores, *(self._tokens.feed(np.asarray([token], np.int64)).copy() for token in end[:-1])]
        logs = log_softmax(np.stack(rows).astype(np.float64), axis=1)
        return float(logs[np.arange(count), end].sum()), bool((logs.argmax(axis=1) == end).all())

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """The log-likelihood of each whole text, nats: in windows of `max_length` tokens, with what context fits."""
        found = []
        for request in tqdm(requests, disable=disable_tqdm, desc="edgeport: whole texts"):
            (text,) = request.args
            windows = utils.get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            pairs = [utils.make_disjoint_window(window) for window in windows]
            total = sum(self._likelihood(context, continuation)[0] for context, continuation in pairs)
            found.append(total)
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), total)
        return found

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """What the model writes after each context, up to one of the task's stop texts.

        Raises:
            BadInputError: a task asks for a way to generate that bundles don't have, or for more than the cache holds.
        """
        found = []
        end = self.tokenizer.decode([self.eot_token_id])
        for request in tqdm(requests, disable=disable_tqdm, desc="edgeport: answers"):
            context, asked = request.args
            how = dict(normalize_gen_kwargs(asked, NEW_TOKENS))
            stop = handle_stop_sequences(how["until"], eos=end)
            text = self._write(context, how, stop)
            found.append(text)
            self.cache_hook.add_partial("generate_until", (context, asked), text)
        return found

    def _write(self, context: str, how: dict[str, Any], stop: list[str]) -> str:
        unknown = sorted(name for name in set(how) - SAMPLING if how[name] not in (None, 1, False))
        if unknown:
            raise BadInputError(
                f"A task asks for {unknown[0]}={how[unknown[0]]}.", where="generation_kwargs", allowed=sorted(SAMPLING)
            )
        most = int(how["max_gen_toks"])
        if most >= self.max_length:
            raise BadInputError(
                f"A task asks for answers of {most} tokens; the cache holds {self.max_length}.",
                where="max_gen_toks",
                allowed=f"at most {self.max_length - 1}",
                next_step="Give --gen_kwargs max_gen_toks=N, or export with a larger --context.",
            )
        sampling = Sampling()
        if how.get("do_sample"):
            sampling = Sampling(float(how.get("temperature") or 1.0), how.get("top_k"), how.get("top_p"))
        prompt = np.asarray(self.tok_encode(context)[-(self.max_length - most) :], np.int64)
        self._tokens.rewind()
        self._held = ([], None)
        _, new = generate(self._tokens, prompt, most=most, stop=self._stop, sampling=sampling)
        ids: list[int] = []
        text = ""
        for token in new:
            ids.append(token)
            text = self.tokenizer.decode(ids, skip_special_tokens=True)
            if any(mark and mark in text for mark in stop):
                break
        return str(postprocess_generated_text(text, stop, None))
