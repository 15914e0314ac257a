"""A new experiment: notebook, section, stage and test in one go, from a template that runs as it stands."""

import keyword
import re
from pathlib import Path

import yaml

from trimtab.errors import InputError
from trimtab.files import atomic

TEMPLATE = Path(__file__).parent / "template"
NAME = re.compile(r"[a-z][a-z0-9_]*")
SECTION = """
{name}:
  blocks: 400              # of held-out text
  shuffles: 3              # of their tokens: what the control is drawn by
"""
SMOKE = "{name}: {{blocks: 20, shuffles: 2}}\n"
STAGE = """\
  {name}:
    cmd: >-
      trimtab run notebooks/{name}.ipynb --section base --section {name}
      --out results=data/results/{name}.json
    params: [base, {name}]
    deps:
      - notebooks/{name}.ipynb
      - lib/trimtab/claims.py
      - data/corpus
    outs:
      - records/{name}.ipynb
      - records/{name}.log
    metrics:
      - data/results/{name}.json: {{cache: false}}

"""
REPORT = "  report:\n"
REPORTED = "      - data/results\n    outs:\n      - records/README.md"


def add_experiment(root: Path, name: str) -> list[Path]:
    """Write notebooks/NAME.ipynb and tests/test_NAME.py, and put a section NAME into conf/config.yaml, the smoke scale
    and params.yaml, and a stage NAME into dvc.yaml; returns what was written or changed.

    Raises InputError, and changes nothing, for a name that is none or is taken, and where dvc.yaml has no stage
    `report` of the usual form.
    """
    if not NAME.fullmatch(name) or keyword.iskeyword(name):
        raise InputError(f"{name!r} is no name for an experiment: small letters, digits and _, a letter first.")
    made = {root / f"notebooks/{name}.ipynb": "notebook.ipynb", root / f"tests/test_{name}.py": "test_notebook.txt"}
    pipeline = root / "dvc.yaml"
    stages = pipeline.read_text(encoding="utf-8")
    taken = [str(path.relative_to(root)) for path in made if path.exists()]
    taken += [f"stage {name} of dvc.yaml"] if name in yaml.safe_load(stages)["stages"] else []
    sections = {path: path.read_text(encoding="utf-8") for path in (root / "conf/config.yaml", root / "params.yaml")}
    taken += [f"section {name} of {path.name}" for path, text in sections.items() if name in yaml.safe_load(text)]
    if taken:
        raise InputError(f"{name} is taken: there is {' and '.join(taken)} already.")
    if stages.count(f"\n{REPORT}") != 1 or stages.count(REPORTED) != 1:
        raise InputError(
            "dvc.yaml: the stage `report` is not in its usual form: add the new stage by hand, like another."
        )
    stages = stages.replace(f"\n{REPORT}", f"\n{STAGE.format(name=name)}{REPORT}")
    stages = stages.replace(REPORTED, f"      - records/{name}.ipynb\n{REPORTED}")
    smoke = root / "conf/scale/smoke.yaml"
    config, parameters = sections
    values = SMOKE if yaml.safe_load(sections[parameters])["base"]["scale"] == "smoke" else SECTION
    texts = {
        path: (TEMPLATE / source).read_text(encoding="utf-8").replace("NAME", name) for path, source in made.items()
    }
    texts |= {
        pipeline: stages,
        config: sections[config].rstrip("\n") + "\n" + SECTION.format(name=name),
        parameters: sections[parameters].rstrip("\n") + "\n" + values.format(name=name).lstrip("\n"),
        smoke: smoke.read_text(encoding="utf-8").rstrip("\n") + "\n" + SMOKE.format(name=name),
    }
    for path, text in texts.items():
        with atomic(path) as partial:
            partial.write_text(text, encoding="utf-8")
    return list(texts)
