"""Write scripts/requirements.lock: the exact versions, here and now, of all that edgeport[all,lm-eval,dev] needs.

Run it in an environment in which the tests pass: `python scripts/lock.py`.
"""

from __future__ import annotations

import tomllib
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parent.parent
GROUPS = ("executorch", "coreml", "lm-eval", "dev")
HEADER = """\
# Exact versions of everything that edgeport[all,lm-eval,dev] needs: written by scripts/lock.py, used by scripts/setup.
# torch is asked for without a local version, so that a CPU build is taken where your pip configuration offers one.
"""


def closure(wanted: list[Requirement]) -> dict[str, str]:
    """Installed versions of the requirements and of everything they need, by name."""
    found: dict[str, str] = {}
    seen: set[tuple[str, tuple[str, ...]]] = set()
    while wanted:
        requirement = wanted.pop()
        extras = tuple(sorted(requirement.extras))
        name = canonicalize_name(requirement.name)
        if (name, extras) in seen:
            continue
        seen.add((name, extras))
        dist = metadata.distribution(name)
        found[name] = Version(dist.version).public
        for line in dist.requires or []:
            needed = Requirement(line)
            marker = needed.marker
            if marker is None or any(marker.evaluate({"extra": extra}) for extra in ("", *extras)):
                wanted.append(needed)
    return found


def main() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = list(project["dependencies"])
    for group in GROUPS:
        lines += project["optional-dependencies"][group]
    versions = closure([Requirement(line) for line in lines])
    pins = [f"{name}=={version}\n" for name, version in sorted(versions.items())]
    (ROOT / "scripts" / "requirements.lock").write_text(HEADER + "".join(pins))


if __name__ == "__main__":
    main()
