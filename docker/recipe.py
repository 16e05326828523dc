"""Runs the steps of a Dockerfile in directories instead of an engine, with chroot, as root: does the recipe work?

    docker/recipe.py DOCKERFILE ROOT SCRATCH

ROOT is a pristine system such as debootstrap makes. Each stage starts from a copy of it under SCRATCH, which is left there
to look at: SCRATCH/0 and so on, the last of which is the image. At the end the health check and the command are tried.

Rules:
1. An instruction that is not known here is an error, not a step that is left out.
2. Nothing of the machine is changed, and nothing stays mounted: /proc, /dev and /sys are mounted in a namespace of its own.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

_META: Final = frozenset(("LABEL", "EXPOSE", "VOLUME", "STOPSIGNAL", "HEALTHCHECK", "ENTRYPOINT", "CMD"))
_ENTER: Final = """
set -e
root=$1; shift
mount --make-rprivate /
for dir in proc dev sys; do mount --rbind /$dir "$root/$dir"; done
exec chroot --userspec="$user" "$root" "$@"
"""
# What apt and pip need to know of the machine's network.
_PASSED: Final = re.compile(r"PIP_\w+|\w+_proxy|SSL_CERT_FILE", re.IGNORECASE)
_TRIALS: Final = (
    "nbdmirror version",
    "truncate -s 1M disk",
    "nbdmirror serve disk -k /run/nbdmirror/s --metrics 0 --run 'nbdmirror compare disk \"$uri\"'",
)


@dataclass
class Stage:
    """A stage of the build. `meta` has what only an engine looks at."""

    root: Path
    user: str = "0:0"
    directory: str = "/"
    environment: dict[str, str] = field(default_factory=lambda: {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin"})
    meta: dict[str, str] = field(default_factory=dict)

    def run(self, command: str) -> None:
        """A shell command, in the stage; raises CalledProcessError."""
        print(f"+ {command}", flush=True)
        outer = {name: value for name, value in os.environ.items() if _PASSED.fullmatch(name)}
        inner = [f"{name}={value}" for name, value in {**outer, **self.environment}.items()]
        script = f"cd {shlex.quote(self.directory)} && {command}"
        argv = ["unshare", "-m", "sh", "-c", _ENTER, "sh", str(self.root), "env", "-i", *inner, "/bin/sh", "-ec", script]
        subprocess.run(argv, check=True, env={**os.environ, "user": self.user})

    def path(self, name: str) -> Path:
        """A path of the stage, on this machine."""
        return self.root / os.path.normpath(Path(self.directory) / name).lstrip("/")


def instructions(text: str) -> list[tuple[str, str]]:
    """The instructions of a Dockerfile: word and rest, continued lines joined."""
    lines = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n", " ", "\n".join(lines))
    return [(word, rest.strip()) for word, _, rest in (line.partition(" ") for line in joined.splitlines())]


def build(dockerfile: Path, pristine: Path, scratch: Path) -> Stage:
    """Run every step; the last stage is the image."""
    stages: dict[str, Stage] = {}
    stage = Stage(pristine)
    for word, rest in instructions(dockerfile.read_text()):
        print(f"{word} {rest}", flush=True)
        if word == "FROM":
            name = rest.partition(" AS ")[2] or str(len(stages))
            stage = stages[name] = Stage(scratch / str(len(stages)))
            subprocess.run(["cp", "-a", pristine, stage.root], check=True)
        elif word == "RUN":
            stage.run(rest)
        elif word == "COPY":
            copy(stage, rest.split(), stages, dockerfile.parents[1])
        elif word == "WORKDIR":
            stage.directory = rest
            stage.path(".").mkdir(parents=True, exist_ok=True)
        elif word == "ENV":
            stage.environment |= dict(each.split("=", 1) for each in shlex.split(rest))
        elif word == "USER":
            stage.user = rest
        elif word in _META:
            stage.meta[word] = rest
        elif word != "ARG":  # which have defaults
            raise SystemExit(f"{dockerfile}: {word} is not known here")
    return stage


def copy(stage: Stage, words: list[str], stages: dict[str, Stage], context: Path) -> None:
    """COPY [--from=STAGE] SOURCE... TARGET."""
    origin = context
    if words[0].startswith("--from="):
        origin = stages[words.pop(0).removeprefix("--from=")].root
    *sources, target = words
    for source in sources:
        found = origin / source.lstrip("/")
        to = stage.path(target)
        if found.is_dir():
            shutil.copytree(found, to, symlinks=True, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy2(found, to / found.name if target.endswith("/") else to)


def main() -> None:
    """See the top."""
    dockerfile, pristine, scratch = (Path(word).resolve() for word in sys.argv[1:4])
    scratch.mkdir(parents=True)
    image = build(dockerfile, pristine, scratch)
    for trial in _TRIALS:
        image.run(trial)
    check = json.loads(image.meta["HEALTHCHECK"].partition("CMD ")[2])
    entry = [*json.loads(image.meta["ENTRYPOINT"]), *json.loads(image.meta["CMD"])]
    image.run(shlex.join(entry))
    image.run(f"nbdmirror serve disk -k /run/nbdmirror/s --run {shlex.quote(shlex.join(check))}")
    print(f"the recipe works; the image is {image.root}")


if __name__ == "__main__":
    main()
