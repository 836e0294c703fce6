"""The workflows of CI: their actions are pinned, their uploads exist, and they cover the promised versions."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))

# Only a checkout has workflows; a source distribution and the tests of a wheel do not.
pytestmark = pytest.mark.skipif(not WORKFLOWS, reason="not a checkout: there is no .github folder")


@pytest.fixture(params=WORKFLOWS, ids=lambda path: path.name)
def workflow(request: pytest.FixtureRequest) -> str:
    """Provide the text of each workflow."""
    path: Path = request.param
    return path.read_text(encoding="utf-8")


def steps_of(workflow: str) -> list[str]:
    """Return the steps that use an action, each with its inputs."""
    return [step for step in re.split(r"(?m)^ +- (?=\w)", workflow) if "uses: " in step]


def test_every_action_is_pinned_by_the_hash_of_a_commit(workflow: str) -> None:
    """Each action is pinned by a hash, which, unlike a tag, cannot be moved; a comment names its release."""
    for step in steps_of(workflow):
        assert re.search(r"uses: [\w-]+/[\w.-]+@[0-9a-f]{40}  # v\d+\.\d+\.\d+$", step, re.MULTILINE), step


def test_every_workflow_limits_what_runs_at_the_same_time(workflow: str) -> None:
    """Each workflow has a concurrency group, and each job a time limit."""
    head, jobs = re.split(r"(?m)^jobs:$", workflow)
    assert re.search(r"(?m)^concurrency:", head)
    assert len(re.findall(r"(?m)^    timeout-minutes:", jobs)) == len(re.findall(r"(?m)^  [\w-]+:$", jobs))


def test_an_upload_from_a_hidden_folder_includes_hidden_files(workflow: str) -> None:
    """Uploads from a folder whose name begins with a dot, and only those, include hidden files."""
    for step in steps_of(workflow):
        if "actions/upload-artifact" in step:
            hidden = re.search(r"path: (.*/)?\.\w", step) is not None
            assert hidden == ("include-hidden-files: true" in step), step
            assert "if-no-files-found: error" in step, step


def test_the_tests_run_on_every_python_that_is_promised() -> None:
    """The classifiers of the package, the matrices of the workflows and the wheels name the same versions of Python."""
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    promised = re.findall(r"Python :: (3\.\d+)", project)
    for name in ("ci.yml", "nightly.yml"):
        text = (ROOT / ".github" / "workflows" / name).read_text(encoding="utf-8")
        matrix = re.search(r"python: \[(.*)\]", text)
        assert matrix is not None
        assert re.findall(r"3\.\d+", matrix[1]) == promised, name
    wheels = re.search(r"(?m)^build = \[(.*)\]", project)
    assert wheels is not None
    assert [f"3.{minor}" for minor in re.findall(r"cp3(\d+)", wheels[1])] == promised


def test_the_notes_of_a_release_are_its_section_of_the_changelog() -> None:
    """The script of the release workflow prints the section of a version, and fails if there is none."""
    script = str(ROOT / ".github" / "release_notes")
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    section = re.search(r"(?ms)^## (\S+).*?\n(.*?)(?=^## |\Z)", changelog)
    assert section is not None
    done = subprocess.run([script, section[1]], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == section[2].strip()
    done = subprocess.run([script, "0.0.0"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert "no section '## 0.0.0'" in done.stderr


def test_the_hooks_are_what_ci_runs() -> None:
    """Every linter and type checker of `.ci/run` is a hook, with the same options."""
    hooks = re.sub(r"\s+", " ", (ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8").replace("\\\n", " ")
    for options in ("mypy --config-file pyproject.toml -p fastsm", "stubtest fastsm --mypy-config-file pyproject.toml"):
        assert options in hooks
        assert options in script.replace("fastsm/pyproject.toml", "pyproject.toml")
    for linter in ("ruff check", "cython-lint", "--ignore-unused-allowlist --ignore-disjoint-bases"):
        assert linter in hooks
        assert linter in script
