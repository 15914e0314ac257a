"""JupyterLab as `make lab` opens it, in a real browser: the map and the states of the stages, links, a figure."""

import re
import secrets
import shlex
import socket
import subprocess
import time
import urllib.request

import nbformat
import pytest
import torch

from tests.smoke import ROOT, environment
from trimtab.pipeline.scales import copy_project
from trimtab.rebased.model import LanguageModel, ModelConfig

LIMIT = 300_000
"""Milliseconds that a kernel may take to start and to import torch: how long it does is the machine's affair."""


def recipe() -> list[list[str]]:
    """The commands of Jupyter that `make lab` runs."""
    lines = (ROOT / "Makefile").read_text(encoding="utf-8").splitlines()
    return [shlex.split(line, comments=True) for line in lines if line.startswith("\tjupyter lab")]


def test_commits_leave_outputs_of_source_notebooks_out_and_the_file_agrees(tmp_path):
    """As the hook does that `make lab` installs: DVC compares the bytes of the working tree, not of the commit."""
    project = tmp_path / "project"
    copy_project(ROOT, project, "smoke")

    def call(*command: str) -> subprocess.CompletedProcess[str]:
        who = {
            f"GIT_{role}_{key}": "trimtab@localhost" for role in ("AUTHOR", "COMMITTER") for key in ("NAME", "EMAIL")
        }
        return subprocess.run(
            command, cwd=project, env=environment(project) | who, capture_output=True, encoding="utf-8"
        )

    assert "\t-pre-commit install\n" in (ROOT / "Makefile").read_text(encoding="utf-8")
    assert call("pre-commit", "install").returncode == 0
    path = project / "notebooks/mqar.ipynb"
    before = path.read_text(encoding="utf-8")
    notebook = nbformat.reads(before, as_version=4)
    code = next(cell for cell in notebook.cells if cell.cell_type == "code")
    code.outputs, code.execution_count = [nbformat.v4.new_output("stream", text="said")], 3
    nbformat.write(notebook, path)
    assert call("git", "add", "notebooks").returncode == 0
    refused = call("git", "commit", "-m", "with outputs")
    assert refused.returncode != 0
    assert "strip outputs" in refused.stdout + refused.stderr
    assert path.read_text(encoding="utf-8") == before


@pytest.fixture(scope="module")
def lab(tmp_path_factory, browser):
    """(address, token) of JupyterLab in a clean copy that holds a small model of recall."""
    project = tmp_path_factory.mktemp("lab") / "project"
    copy_project(ROOT, project, "smoke")
    torch.manual_seed(0)
    LanguageModel(ModelConfig(64, d_model=16, mixers=("conv", "rebased"), d_k=4)).save(project / "data/mqar/model")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    token = secrets.token_hex(16)
    options = ["--no-browser", "--allow-root", f"--ServerApp.port={port}", "--ServerApp.port_retries=0"]
    options += ["--ServerApp.ip=127.0.0.1", f"--IdentityProvider.token={token}"]
    log = (project.parent / "lab.log").open("w", encoding="utf-8")
    *before, start = recipe()
    for command in before:
        subprocess.run(command, cwd=project, env=environment(project), check=True, capture_output=True)
    server = subprocess.Popen([*start, *options], cwd=project, env=environment(project), stdout=log, stderr=log)
    address, deadline = f"http://127.0.0.1:{port}", time.monotonic() + 120
    while True:
        try:
            urllib.request.urlopen(f"{address}/api", timeout=5).close()
            break
        except OSError:
            assert server.poll() is None, (project.parent / "lab.log").read_text(encoding="utf-8")
            assert time.monotonic() < deadline, "JupyterLab does not answer"
            time.sleep(0.5)
    yield address, token
    server.terminate()
    server.wait(timeout=60)


@pytest.fixture
def page(browser, lab):
    opened = browser.new_page(viewport={"width": 1400, "height": 1000})
    opened.set_default_timeout(LIMIT)
    opened.elsewhere = []
    address = lab[0]
    inside = (address, address.replace("http", "ws"), "data:", "blob:")
    opened.on("request", lambda r: None if r.url.startswith(inside) else opened.elsewhere.append(r.url))
    yield opened
    opened.close()


def run_all(page) -> None:
    """Run the notebook that is open, from its menu."""
    page.get_by_text("Python 3 (ipykernel) | Idle").wait_for()
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
    page.get_by_text("Python 3 (ipykernel) | Busy").wait_for()
    page.get_by_text("Python 3 (ipykernel) | Idle").wait_for()


def test_it_opens_on_the_map_whose_links_lead_to_notebooks_that_run(page, lab):
    address, token = lab
    page.goto(f"{address}/?token={token}")
    page.wait_for_url("**/lab/tree/notebooks/explore/start.ipynb**")
    page.get_by_role("menuitem", name="Git", exact=True).wait_for()  # jupyterlab-git
    page.locator(".jp-NotebookPanel .nbdime-toolbarButton").first.wait_for()
    run_all(page)
    picture = page.locator(".overview svg.pipeline")
    picture.wait_for()
    assert "repetition_compare" in picture.text_content()
    row = page.locator("tr", has=page.locator("code", has_text=re.compile("^mqar$"))).first
    assert "never run" in row.inner_text()
    assert "dvc repro mqar" in row.inner_text()
    page.get_by_text("No record is here yet").wait_for()
    page.get_by_role("link", name="Recall", exact=True).click()
    page.wait_for_url("**/notebooks/explore/recall.ipynb**")
    run_all(page)
    page.mouse.move(800, 500)
    page.mouse.wheel(0, 20_000)  # what is out of sight is not drawn
    page.locator(".js-plotly-plot .heatmaplayer image").first.wait_for()
    assert "of 8 right" in page.locator(".jp-NotebookPanel:visible").inner_text()
    assert page.elsewhere == []
