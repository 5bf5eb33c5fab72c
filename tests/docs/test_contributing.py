"""The files for contributors parse, and say what the project does: linters, version, license."""

from __future__ import annotations

import pathlib
import shlex

import pytest
import yaml

import distpad
import suites

pytestmark = pytest.mark.one_stack

ROOT = pathlib.Path(__file__).resolve().parents[2]
TEMPLATES = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))
FIELDS = {"markdown", "textarea", "input", "dropdown", "checkboxes"}  # that GitHub's forms know


def read(path: pathlib.Path):
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def test_pre_commit_runs_the_linters_of_ci():
    (repository,) = read(ROOT / ".pre-commit-config.yaml")["repos"]
    hooks = repository["hooks"]
    assert repository["repo"] == "local"  # of the project's environment, so that versions agree
    assert all((hook["language"], hook["pass_filenames"]) == ("system", False) for hook in hooks)
    entries = [shlex.split(hook["entry"]) for hook in hooks]
    commands = [entry[2] if entry[:2] == ["bash", "-c"] else shlex.join(entry) for entry in entries]
    (lint,) = (suite for suite in suites.SUITES if suite.name == "lint")
    assert " && ".join(commands) == lint.command


@pytest.mark.parametrize("path", TEMPLATES, ids=lambda path: path.name)
def test_issue_templates_are_forms(path):
    form = read(path)
    assert form["name"] and form["description"] and form["body"]
    ids = [field["id"] for field in form["body"] if field["type"] != "markdown"]
    assert {field["type"] for field in form["body"]} <= FIELDS and len(ids) == len(set(ids))
    assert all(field["attributes"].get("label") or field["type"] == "markdown" for field in form["body"])


def test_there_are_two_issue_templates():
    assert [path.name for path in TEMPLATES] == ["bug_report.yml", "feature_request.yml"]


def test_the_citation_is_of_this_version():
    citation = read(ROOT / "CITATION.cff")
    assert citation["cff-version"] == "1.2.0" and citation["title"] == "distpad" and citation["authors"]
    assert (citation["version"], citation["license"]) == (distpad.__version__, "Apache-2.0")
