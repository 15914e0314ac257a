"""dvc.yaml is read as DVC itself reads it, and what does not fit is one sentence."""

import pytest
import yaml

from trimtab.errors import InputError
from trimtab.pipeline.stages import stages

RUN = "trimtab run n.ipynb --section a --set arm=${item.arm} --out out=data/${item.arm}"
STAGE = {"matrix": {"arm": "${a.arms}"}, "cmd": RUN, "params": ["a"], "outs": ["data/${item.arm}"]}


def told(tmp_path, stage, parameters="a: {arms: [x, y-2]}", name="s"):
    (tmp_path / "dvc.yaml").write_text(yaml.safe_dump({"stages": {name: stage}}), encoding="utf-8")
    (tmp_path / "params.yaml").write_text(parameters, encoding="utf-8")
    return stages(tmp_path)


def test_stages_are_those_that_dvc_resolves(root):
    from dvc.repo import Repo

    ours = {stage.name: stage for stage in stages(root)}
    with Repo(str(root)) as repo:
        theirs = list(repo.index.stages)
    assert list(ours) == [stage.addressing for stage in theirs]
    for stage in theirs:
        mine = ours[stage.addressing]
        assert mine.command == stage.cmd
        assert sorted(mine.outs) == sorted(out.def_path for out in stage.outs)
        assert sorted(mine.deps) == sorted(dep.def_path for dep in stage.deps if dep.def_path != "params.yaml")
        assert mine.record is None or mine.record in mine.outs
        assert set(mine.outputs.values()) <= set(mine.outs)


def test_a_stage_tells_what_it_runs_with(root):
    stage = next(stage for stage in stages(root) if stage.name == "sae@topk-16")
    assert (stage.notebook, stage.sections) == ("notebooks/sae.ipynb", ["base", "sae"])
    assert (stage.settings, stage.record) == ({"arm": "topk-16"}, "records/sae/topk-16.ipynb")
    assert stage.outputs == {"out": "data/sae/topk-16", "results": "data/results/sae/topk-16.json"}


def test_matrices_of_several_columns_lists_and_literals_are_named_as_dvc_names_them(tmp_path):
    matrix = {"one": ["a", 2], "two": [True, {"x": "left"}]}
    found = told(tmp_path, {"matrix": matrix, "cmd": "echo ${item.one}"})
    assert [stage.name for stage in found] == ["s@a-true", "s@a-two1", "s@2-true", "s@2-two1"]
    assert [stage.command for stage in found] == ["echo a", "echo a", "echo 2", "echo 2"]
    (found,) = told(tmp_path, {"cmd": ["echo \\${x} ${a.arms[1]}", "trimtab run n.ipynb --set lr=1e-5"]})
    assert found.command == "echo ${x} y-2 && trimtab run n.ipynb --set lr=1e-5"
    assert (found.settings, found.record) == ({"lr": 1e-5}, "records/n.ipynb")


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ("a: {arms: abc}", "`arms` of section `a` must be a list of at least one item, .* not 'abc'"),
        ("a: {arms: []}", "`arms` of section `a` must be a list of at least one item"),
        ("a: {arms: [x, x]}", "`arms` of section `a` holds 'x' twice"),
        ("a: {arms: ['x y']}", "`arms` of section `a` holds 'x y', which cannot be part of the name"),
        ("a: {arms: [../x]}", "`arms` of section `a` holds '../x', which cannot be part of the name"),
        ("a: {arms: [-x]}", "`arms` of section `a` holds '-x', which cannot be part of the name"),
        ("a: {arms: [null]}", "`arms` of section `a` holds None, which cannot be part|must be a string"),
        ("a: {arns: [x]}", r"Section `a` lacks `arms`, which stage `s` of dvc.yaml takes .*; did you mean `arns`\?"),
        ("a: 3", "Section `a` is 3, and has no `arms`"),
        ("b: {arms: [x]}", "params.yaml lacks section `a`"),
    ],
)
def test_sections_that_a_matrix_cannot_take_are_named(tmp_path, parameters, message):
    with pytest.raises(InputError, match=message) as caught:
        told(tmp_path, STAGE, parameters)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        (3, "stage `s` must be a mapping with `cmd`"),
        ({"cmd": None}, "stage `s` needs `cmd`"),
        ({"cmd": []}, "stage `s` needs `cmd`"),
        ({"cmd": "x", "dep": ["y"]}, r"stage `s` has `dep`, which is not one of its keys; did you mean `deps`\?"),
        ({"cmd": "x", "wdir": "y"}, "stage `s` has `wdir`, which is not one of its keys"),
        ({"foreach": ["x"], "do": {"cmd": "x"}}, "stage `s` has `(foreach|do)`, which is not"),
        ({"cmd": "x", "outs": "y"}, "`outs` of stage `s` must be a list, not 'y'"),
        ({"cmd": "x", "deps": [1]}, "`deps` of stage `s` must be a list of strings"),
        ({"cmd": "echo 'x"}, "`cmd` of stage `s` is no command line: No closing quotation"),
        ({"cmd": "trimtab run"}, "`cmd` of stage `s` does not fit `trimtab run`: .*notebook"),
        ({"cmd": "trimtab run n.ipynb --sections a"}, "does not fit `trimtab run`: unrecognized arguments: --sections"),
        ({"cmd": "trimtab run n.ipynb --set lr"}, "--set 'lr' is not NAME=VALUE"),
        ({"cmd": "trimtab run n.ipynb --set lr=1 --set lr=2"}, "--set gives `lr` twice"),
        ({"cmd": "echo ${item.x}", "matrix": {"y": [1]}}, "The matrix of stage `s` of dvc.yaml lacks `x`"),
        ({"cmd": "x", "matrix": ["y"]}, "`matrix` of stage `s` must be a mapping"),
        ({"cmd": "echo ${a.arms}"}, "`arms` of section `a` must be a string or a number, as stage `s`"),
        ({"cmd": "echo ${a.arms.9}"}, "has no `9`"),
    ],
)
def test_stages_that_do_not_fit_are_named(tmp_path, stage, message):
    with pytest.raises(InputError, match=message) as caught:
        told(tmp_path, stage)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"stages: [", "dvc.yaml is not valid YAML"),
        (b"\xff", "dvc.yaml is not UTF-8 text"),
        (b"- a", "dvc.yaml does not hold a mapping"),
        (b"stages: 3", "`stages` must be a mapping"),
        (b"stages: {a: {cmd: x}, a: {cmd: y}}", 'found duplicate key "a"'),
    ],
    ids=range(5),
)
def test_a_broken_file_is_told_in_one_sentence(tmp_path, content, message):
    (tmp_path / "dvc.yaml").write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        stages(tmp_path)
    assert "\n" not in str(caught.value)


def test_params_yaml_is_asked_for_only_where_a_stage_mentions_it(tmp_path):
    assert [stage.name for stage in told(tmp_path, {"cmd": "x"})] == ["s"]
    (tmp_path / "params.yaml").unlink()
    assert [stage.name for stage in stages(tmp_path)] == ["s"]
    told(tmp_path, STAGE)
    (tmp_path / "params.yaml").unlink()
    with pytest.raises(InputError, match=r"params\.yaml is missing in .*: compose it with `trimtab compose`"):
        stages(tmp_path)
