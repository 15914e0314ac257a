"""The project's own files agree with one another: notebooks, dvc.yaml, params.yaml, conf/, lock and environment."""

import dataclasses
import re
import shlex
import subprocess
import tomllib
from pathlib import Path

import nbformat
import pytest
import yaml
from packaging.requirements import Requirement

from trimtab.activations.writing import ActivationsConfig
from trimtab.corpus import CorpusConfig
from trimtab.pipeline.fetch import FetchConfig
from trimtab.pipeline.parameters import collect, declared_parameters
from trimtab.pipeline.scales import compose
from trimtab.rebased.mqar_training import MQARConfig
from trimtab.rebased.pretraining import PretrainConfig
from trimtab.rebased.text import TextConfig
from trimtab.repetition.config import CompareConfig, RepetitionConfig
from trimtab.sae import SAEConfig
from trimtab.sae.interpretability import InterpretConfig
from trimtab.sae.probing import ProbeConfig
from trimtab.sae.splicing import SpliceConfig
from trimtab.steering.config import ControlsConfig, LensConfig, SteeringConfig

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted(ROOT.glob("notebooks/*.ipynb"))
STAGES = yaml.safe_load((ROOT / "dvc.yaml").read_text(encoding="utf-8"))["stages"]
CONFIGURATIONS = {
    "fetch": FetchConfig,
    "corpus": CorpusConfig,
    "activations": ActivationsConfig,
    "activations_random": ActivationsConfig,
    "sae": SAEConfig,
    "sae_random": SAEConfig,
    "sae_splice": SpliceConfig,
    "sae_interpret": InterpretConfig,
    "sae_probe": ProbeConfig,
    "steering": SteeringConfig,
    "steering_controls": ControlsConfig,
    "steering_lens": LensConfig,
    "mqar": MQARConfig,
    "pretrain_text": TextConfig,
    "pretrain": PretrainConfig,
    "repetition": RepetitionConfig,
    "repetition_compare": CompareConfig,
}
NOT_FIELDS = {"arms", "arm"}
"""Keys of a section that choose among what other stages made; checked where the stage opens it."""
SCALES = sorted(path.stem for path in ROOT.glob("conf/scale/*.yaml"))


def options(stage: dict) -> tuple[str, dict[str, list[str]]]:
    """(notebook, {option: values}) of a stage's `trimtab run` command."""
    words = shlex.split(stage["cmd"])
    assert words[:2] == ["trimtab", "run"]
    found: dict[str, list[str]] = {}
    for flag, value in zip(words[3::2], words[4::2], strict=True):
        found.setdefault(flag, []).append(value)
    return words[2], found


NOTEBOOK_STAGES = {name: stage for name, stage in STAGES.items() if "trimtab run" in stage["cmd"]}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
class TestSources:
    def test_no_outputs_and_nothing_of_this_machine(self, path):
        notebook = nbformat.read(path, as_version=4)
        nbformat.validate(notebook)
        for cell in notebook.cells:
            assert not cell.get("outputs")
            assert cell.get("execution_count") is None
            assert set(cell.metadata) <= {"tags"}
        assert set(notebook.metadata) == {"kernelspec"}
        assert notebook.metadata.kernelspec.name == "python3"

    def test_it_opens_with_a_question_and_ends_with_results(self, path):
        notebook = nbformat.read(path, as_version=4)
        first = notebook.cells[0]
        assert first.cell_type == "markdown"
        assert "**Question.**" in first.source
        assert "**Answer.**" in first.source
        assert "stage.finish(" in notebook.cells[-1].source
        prose = sum(cell.cell_type == "markdown" for cell in notebook.cells)
        assert prose >= len(notebook.cells) - prose, "a record should read as a story: at least as much prose as code"
        assert any("## Limits" in cell.source for cell in notebook.cells)
        assert any("assert " in cell.source for cell in notebook.cells if cell.cell_type == "code")

    def test_one_of_its_figures_stands_for_the_record(self, path):
        cells = [cell for cell in nbformat.read(path, as_version=4).cells if "figure" in cell.metadata.get("tags", [])]
        drawing = "figure(" in path.read_text(encoding="utf-8")
        assert len(cells) == int(drawing), "the page of records shows the cell tagged `figure`"

    def test_functions_longer_than_ten_lines_belong_in_the_library(self, path):
        for cell in nbformat.read(path, as_version=4).cells:
            for body in re.findall(r"^def .*\n((?:(?: .*)?\n?)*)", cell.source, flags=re.MULTILINE):
                assert len(body.rstrip().splitlines()) <= 10

    def test_it_is_a_stage_and_has_literal_parameters_with_quick_defaults(self, path):
        stages = [stage for stage in NOTEBOOK_STAGES.values() if options(stage)[0] == f"notebooks/{path.name}"]
        assert stages
        declared = declared_parameters(nbformat.read(path, as_version=4), path.name)
        for name in ("out", "results"):
            if name in declared:
                assert declared[name][1].startswith("scratch/"), (
                    "by hand, a notebook must not write into the pipeline's data"
                )


@pytest.mark.parametrize("path", sorted(ROOT.glob("notebooks/explore/*.ipynb")), ids=lambda p: p.stem)
def test_notebooks_to_explore_have_parameters_and_no_outputs(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert declared_parameters(notebook, path.name)
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in notebook.cells)
    assert set(notebook.metadata) == {"kernelspec"}


@pytest.mark.parametrize("name", NOTEBOOK_STAGES)
class TestStages:
    def test_parameters_sections_and_names_match(self, name):
        stage = NOTEBOOK_STAGES[name]
        path, given = options(stage)
        assert given["--section"] == stage["params"], "sections injected and sections tracked differ"
        notebook = nbformat.read(ROOT / path, as_version=4)
        sections = {
            s: yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))[s] for s in given["--section"]
        }
        single = [pair.partition("=")[::2] for pair in given.get("--set", []) + given.get("--out", [])]
        filled = collect(notebook, path, sections, dict(single))
        declared = declared_parameters(notebook, path)
        left = {key: default for key, (_, default) in declared.items() if key not in filled}
        made = [dep for dep in stage["deps"] if dep.startswith("data/") and not dep.startswith("data/inputs/")]
        roots = {dep.split("/")[1] for dep in made}
        inputs = [*left.values(), *(v for _, _, v in (pair.partition("=") for pair in given.get("--set", [])))]
        read = {value.split("/")[1] for value in inputs if value.startswith("data/")}
        assert read == roots, "inputs, by default or set, and data in deps differ"
        assert all(value.startswith("data/") for value in left.values()), "a parameter is left to its quick default"

    def test_outputs_are_declared_so_that_the_run_cache_works(self, name):
        stage = NOTEBOOK_STAGES[name]
        path, given = options(stage)
        outs = {pair.partition("=")[2] for pair in given["--out"]}
        metrics = [next(iter(m)) for m in stage["metrics"]]
        assert all(next(iter(m.values())) == {"cache": False} for m in stage["metrics"])
        record = given.get("--record", [f"records/{Path(path).name}"])[0]
        assert {*stage["outs"], *metrics} == {*outs, record, record.replace(".ipynb", ".log")}
        assert all(isinstance(out, str) for out in stage["outs"]), "an uncached out would disable the run cache"

    def test_it_depends_on_no_executed_notebook(self, name):
        assert not any(dep.startswith("records") for dep in NOTEBOOK_STAGES[name]["deps"])
        assert all((ROOT / dep).exists() for dep in NOTEBOOK_STAGES[name]["deps"] if not dep.startswith("data/"))


@pytest.mark.parametrize("section", CONFIGURATIONS)
@pytest.mark.parametrize("scale", SCALES)
def test_sections_are_exactly_the_fields_of_their_dataclass_at_every_scale(section, scale, tmp_path):
    compose(ROOT, tmp_path / "params.yaml", scale)
    composed = yaml.safe_load((tmp_path / "params.yaml").read_text(encoding="utf-8"))
    kind = CONFIGURATIONS[section]
    tuples = kind is not FetchConfig
    values = {key: tuple(v) if tuples and isinstance(v, list) else v for key, v in composed[section].items()}
    fields = {field.name for field in dataclasses.fields(kind)}
    assert set(values) - (NOT_FIELDS - fields) == fields
    kind(**{key: value for key, value in values.items() if key in fields})
    assert composed["base"]["scale"] == scale


def test_params_yaml_is_the_composed_default(tmp_path):
    compose(ROOT, tmp_path / "params.yaml")
    assert yaml.safe_load((tmp_path / "params.yaml").read_text(encoding="utf-8")) == yaml.safe_load(
        (ROOT / "params.yaml").read_text(encoding="utf-8")
    )


def locked() -> dict[str, list[Requirement]]:
    lines = [
        line
        for line in (ROOT / "requirements.lock").read_text(encoding="utf-8").splitlines()
        if line and line[0] not in "#-"
    ]
    found: dict[str, list[Requirement]] = {}
    for requirement in map(Requirement, lines):
        found.setdefault(re.sub(r"[-_.]+", "-", requirement.name).lower(), []).append(requirement)
    return found


def test_the_lock_satisfies_pyproject_and_holds_no_cuda():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = project["dependencies"] + [r for extra in project["optional-dependencies"].values() for r in extra]
    pins = locked()
    for requirement in map(Requirement, wanted):
        for pin in pins[re.sub(r"[-_.]+", "-", requirement.name).lower()]:
            (version,) = [s.version for s in pin.specifier]
            assert requirement.specifier.contains(version), f"{pin} does not satisfy {requirement}: run `make lock`"
    assert not [name for name in pins if re.match(r"nvidia|cuda|triton", name)]
    assert all(pin.url is None for group in pins.values() for pin in group)


def test_the_conda_environment_installs_the_lock_and_nothing_else():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))
    *packages, pip = environment["dependencies"]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert packages == [f"python{project['requires-python']}", "pip"]
    assert pip == {"pip": ["-r requirements.lock", "-e ."]}


def test_no_path_of_this_machine_is_committed():
    home = str(Path.home())
    for place in {str(ROOT.parent) + "/", home + "/"} - {"/"}:
        found = subprocess.run(
            ["git", "grep", "-lF", "-e", place], cwd=ROOT, capture_output=True, encoding="utf-8", check=False
        )
        assert not found.stdout.strip(), f"{place} stands in {found.stdout}"


def claims_of(page: Path) -> list[str]:
    return [
        line
        for line in page.read_text(encoding="utf-8").splitlines()
        if re.match(r"\| .* \| \*\*(held|not held|inconclusive)\*\* \|", line)
    ]


def test_the_readme_shows_the_verdicts_of_the_committed_records():
    recorded = claims_of(ROOT / "records/README.md")
    assert recorded
    assert claims_of(ROOT / "README.md") == recorded, "run `trimtab report`"


def test_what_is_annotated_with_shapes_is_checked_when_tests_run():
    options = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["pytest"]["ini_options"]
    checked = options["addopts"].split("--jaxtyping-packages=")[1].split(",")[:-1]
    annotated = {
        f"trimtab.{path.relative_to(ROOT / 'lib/trimtab').with_suffix('').parts[0]}"
        for path in ROOT.glob("lib/trimtab/**/*.py")
        if "from jaxtyping import" in path.read_text(encoding="utf-8")
    }
    assert set(checked) == annotated
