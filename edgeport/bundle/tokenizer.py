"""Tokenizer files as device runtimes read them.

transformers 5 names a class "TokenizersBackend" in tokenizer_config.json, which onnxruntime-extensions (the tokenizer
of onnxruntime-genai) refuses, and notes how it was opened on this machine. What the device runtimes need of the class
is only that the tokenizer is the one in tokenizer.json.
"""

from __future__ import annotations

import json

CONFIG = "tokenizer_config.json"
KNOWN_CLASS = "PreTrainedTokenizerFast"
CLASSES = {"TokenizersBackend": KNOWN_CLASS, "PreTrainedTokenizer": KNOWN_CLASS}
OF_THIS_MACHINE = ("backend", "is_local", "local_files_only", "name_or_path", "tokenizer_file")


def device_config(text: str) -> str:
    """tokenizer_config.json with a class that device runtimes know, and nothing of the machine that wrote it."""
    config = json.loads(text)
    for key in OF_THIS_MACHINE:
        config.pop(key, None)
    name = str(config.get("tokenizer_class") or KNOWN_CLASS)
    config["tokenizer_class"] = CLASSES.get(name, name)
    return json.dumps(config, indent=2, ensure_ascii=False, sort_keys=True) + "\n"
