"""The project's own files: one version, citation, forms, workflow, source distribution, notebook."""

from __future__ import annotations

import contextlib
import io
import json
import re
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml

import spul

ROOT = Path(__file__).parents[1]


def text_of(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def test_the_version_is_written_in_one_place():
    assert version("spul") == spul.__version__
    assert re.fullmatch(r"\d+\.\d+\.\d+(\.dev\d+|rc\d+)?", spul.__version__)
    project = text_of("pyproject.toml").split("[build-system]")[1]
    assert 'dynamic = ["version"]' in project
    assert 'attr = "spul.__version__"' in project
    assert not re.search(r"^version *= *[\"']", project, re.MULTILINE)
    assert yaml.safe_load(text_of("CITATION.cff"))["version"] == spul.__version__
    found = [path for path in (ROOT / "spul").rglob("*.py") if "__version__ =" in path.read_text(encoding="utf-8")]
    assert [path.name for path in found] == ["__init__.py"]


def test_the_citation_names_the_papers_authors():
    citation = yaml.safe_load(text_of("CITATION.cff"))
    assert (citation["cff-version"], citation["license"]) == ("1.2.0", "Apache-2.0")
    paper = citation["preferred-citation"]
    assert paper["title"] in text_of("README.md").replace("title   = {", "")
    assert [one["family-names"] for one in paper["authors"]] == ["Bhaila", "Van", "Wu"]


@pytest.mark.parametrize("form", ["fault", "result", "wish"])
def test_issue_forms_have_what_a_form_needs(form):
    found = yaml.safe_load(text_of(f".github/ISSUE_TEMPLATE/{form}.yml"))
    assert {"name", "description", "body"} <= set(found)
    ids = [field.get("id") for field in found["body"] if field["type"] != "markdown"]
    assert len(ids) == len(set(ids)) >= 1
    for field in found["body"]:
        assert field["type"] in ("markdown", "textarea", "input")
        assert set(field["attributes"]) & {"label", "value"}


def test_the_workflow_runs_the_projects_check_on_pythons_that_the_project_supports():
    workflow = yaml.safe_load(text_of(".github/workflows/ci.yml"))
    jobs = workflow["jobs"]
    assert ".ci/run" in [step.get("run") for step in jobs["run"]["steps"]]
    tested = [
        *jobs["run"]["strategy"]["matrix"]["python"],
        jobs["oldest-python"]["steps"][1]["with"]["python-version"],
    ]
    lowest = re.search(r'requires-python = ">=([\d.]+)"', text_of("pyproject.toml"))[1]
    assert sorted(tested, key=lambda one: int(one[2:])) == ["3.10", "3.11", "3.12", "3.13"]
    assert lowest == "3.10"


def test_what_tests_read_is_in_the_source_distribution():
    listed = text_of("MANIFEST.in")
    grafted = re.findall(r"^graft (.+)$", listed, re.MULTILINE)
    included = re.search(r"^include (.+)$", listed, re.MULTILINE)[1].split()
    for name in included:
        assert (ROOT / name).is_file(), name
    tests = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").glob("*.py"))
    read = set(re.findall(r'(?:text_of\(|ROOT / )f?"([^"{]+)', tests)) - {
        "models"
    }  # of the package, whose folder is ROOT there
    assert {"mkdocs.yml", "CITATION.cff", "docs/command-line.md"} <= read
    always = ["pyproject.toml", "spul"]
    assert [name for name in read if name.split("/")[0] not in [*grafted, *included, *always]] == []


def test_pages_of_the_site_are_all_in_its_navigation_once():
    navigation = text_of("mkdocs.yml").split("\nnav:\n")[1]
    pages = re.findall(r"[\w-]+\.md", navigation)
    assert sorted(pages) == sorted(path.name for path in (ROOT / "docs").glob("*.md"))
    sections = re.findall(r"^  - (\w+):$", navigation, re.MULTILINE)
    assert sections == ["Try", "Use", "Choose", "Prove", "Serve", "Extend"]


# ---- the notebook ----


def cells() -> list[str]:
    notebook = json.loads(text_of("examples/quickstart.ipynb"))
    assert notebook["nbformat"] == 4
    return ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]


def test_the_notebook_is_saved_without_output():
    for cell in json.loads(text_of("examples/quickstart.ipynb"))["cells"]:
        assert cell.get("outputs", []) == []
        assert cell.get("execution_count") is None


def test_the_notebook_runs_from_top_to_bottom(tmp_path, monkeypatch):
    """With a few steps of training; .ci/run checks what the same settings forget, by the quick start."""
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    settings = "BASE_STEPS, STEPS, TOKENS = 350, 600, 30"
    assert sum(settings in cell for cell in cells()) == 1
    namespace: dict = {"__name__": "__main__"}
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        for cell in cells():
            exec(compile(cell.replace(settings, "BASE_STEPS, STEPS, TOKENS = 2, 2, 3"), "notebook", "exec"), namespace)
            if "make_splits()" in cell:  # few rows suffice here
                namespace["splits"] = {name: rows.select(range(8)) for name, rows in namespace["splits"].items()}
    text = printed.getvalue()
    for said in ("before: {", "with the prompt: {", "reloaded: {", "## Is it forgotten?", "the evidence is whole"):
        assert said in text
    assert "served since" in text
    before, detached = (re.search(rf"{name}: (.*)", text)[1] for name in ("before", "prompt detached"))
    assert before == detached
