"""Files outside the package that name its version, commands and folders agree with it."""

import json
import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml
from typer.main import get_command

from finback import __version__
from finback.cli import app
from tests.toy import ROOT


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def options_of(command: str) -> set[str]:
    """The options of a command."""
    found = get_command(app).commands[command]  # type: ignore[attr-defined]
    return {name for parameter in found.params for name in parameter.opts}


def test_one_version_and_one_licence() -> None:
    project, citation = tomllib.loads(read("pyproject.toml"))["project"], yaml.safe_load(read("CITATION.cff"))
    assert project["version"] == __version__ == citation["version"]
    assert project["license"] == citation["license"] == "MIT" and read("LICENSE").startswith("MIT License")
    assert {"cff-version", "title", "message", "authors"} <= citation.keys()


def test_the_image_copies_what_there_is_and_all_that_the_package_needs() -> None:
    copied = [word for line in re.findall(r"^COPY (.*)$", read("Dockerfile"), re.M) for word in line.split()[:-1]]
    assert all((ROOT / name).exists() for name in copied)
    let_in = {line.removeprefix("!") for line in read(".dockerignore").splitlines() if line.startswith("!")}
    assert set(copied) == let_in, ".dockerignore must admit exactly what is copied"


def test_services_serve_with_options_that_exist() -> None:
    compose = yaml.safe_load(read("compose.yaml"))["services"]["finback"]["command"]
    unit = re.search(r"^ExecStart=(.*)$", read("deploy/finback.service"), re.M)
    assert unit is not None
    words = unit[1].split()
    for command in (compose, words[1:]):
        assert command[0] == "serve" and "--key-file" in command
        assert {word for word in command if word.startswith("--")} <= options_of("serve")


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not installed")
def test_the_unit_is_one_that_systemd_takes(tmp_path: Path) -> None:
    unit = tmp_path / "finback.service"
    unit.write_text(read("deploy/finback.service").replace("/opt/finback/.venv/bin/finback", "/bin/true"))
    done = subprocess.run(["systemd-analyze", "verify", str(unit)], capture_output=True, text=True)
    assert str(unit) not in done.stderr and "finback.service" not in done.stderr, done.stderr


def test_workflows_and_forms_are_yaml_and_name_our_pythons() -> None:
    forms = [yaml.safe_load(path.read_text()) for path in (ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml")]
    assert len(forms) == 2 and all({"name", "description", "body"} <= form.keys() for form in forms)
    jobs = yaml.safe_load(read(".github/workflows/test.yml"))["jobs"]
    versions = jobs["install"]["strategy"]["matrix"]["python-version"]
    needed = tomllib.loads(read("pyproject.toml"))["project"]["requires-python"]
    assert f">={versions[0]}" == needed, json.dumps(versions)
