"""A cold load reads the disk: the system holds nothing of the file any more."""

import os

import psutil
import pytest

from edgeport.export.artifact import Artifact
from edgeport.validate.memory import forget


def in_memory(path):
    """The path lies on a file system that has no disk to read from."""
    mounts = [part for part in psutil.disk_partitions(all=True) if path.is_relative_to(part.mountpoint)]
    return max(mounts, key=lambda part: len(part.mountpoint)).fstype in ("tmpfs", "ramfs") if mounts else False


def held(path):
    """The file's first page can be read without waiting for the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        return bool(os.preadv(handle, [bytearray(4096)], 0, os.RWF_NOWAIT))
    except BlockingIOError:
        return False
    finally:
        os.close(handle)


@pytest.mark.skipif(not hasattr(os, "RWF_NOWAIT"), reason="only Linux can tell what it holds")
def test_forgotten_files_are_not_held(tmp_path):
    if in_memory(tmp_path):
        pytest.skip("temporary files lie in memory")
    path = tmp_path / "model.onnx"
    path.write_bytes(os.urandom(1 << 16))
    try:
        assert held(path)
    except OSError:
        pytest.skip("this file system can't tell what it holds")
    assert forget(Artifact("onnxruntime", "cpu", tmp_path, "model.onnx", (), ()))
    assert not held(path)
    path.read_bytes()
    assert held(path)
