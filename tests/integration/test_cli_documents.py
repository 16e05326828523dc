"""What the command line says of itself: manual pages and completion, as the programs that read them take them."""

from __future__ import annotations

import subprocess
from typing import TYPE_CHECKING

import click
import pytest

from nbdmirror.cli.main import cli
from tests.support.daemon import run_cli
from tests.support.peers import require

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("man")
    assert run_cli("man", directory).returncode == 0
    return directory / "man1"


def test_there_is_a_page_for_every_command(pages: Path) -> None:
    names = {page.stem for page in pages.iterdir()}
    assert {"nbdmirror", *(f"nbdmirror-{name}" for name in cli.list_commands(click.Context(cli)))} <= names


def test_the_pages_are_good_roff(pages: Path) -> None:
    require("man")
    for page in sorted(pages.iterdir()):
        result = subprocess.run(
            ["man", "--warnings", "-E", "UTF-8", "-l", "-Tutf8", page], capture_output=True, text=True, check=False, timeout=30
        )
        assert (result.returncode, result.stderr) == (0, ""), page


def test_a_page_says_what_help_says(pages: Path) -> None:
    text = (pages / "nbdmirror-serve.1").read_text().replace("\\-", "-")
    for option in ("-k, --socket, --unix PATH", "--config FILE", "--metrics WHERE"):
        assert f".B {option}\n" in text
    assert "\n.SH DESCRIPTION\nExport DISK" in text


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_is_a_script_for_the_shell(shell: str, tmp_path: Path) -> None:
    script = run_cli("completion", shell).stdout
    assert "_NBDMIRROR_COMPLETE" in script
    if shell == "bash":
        (tmp_path / "script").write_text(script)
        subprocess.run(["bash", "-n", tmp_path / "script"], check=True, timeout=10)


def test_completion_completes() -> None:
    env = {"_NBDMIRROR_COMPLETE": "bash_complete", "COMP_WORDS": "nbdmirror comple", "COMP_CWORD": "1"}
    assert run_cli(env=env).stdout.split() == ["plain,complete", "plain,completion"]
    env |= {"COMP_WORDS": "nbdmirror serve --conf", "COMP_CWORD": "2"}
    assert run_cli(env=env).stdout.split() == ["plain,--config"]
