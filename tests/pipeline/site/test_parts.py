"""The parts of a page: outputs that cannot act, parameters with their meanings, the graph."""

import re
from html.parser import HTMLParser

import pytest

from tests.pages import Reader
from trimtab.errors import InputError
from trimtab.files import atomic
from trimtab.pipeline.site import display, graph
from trimtab.pipeline.site.build import KIND, POLICY, render
from trimtab.pipeline.site.parameters import Annotated, comments

from .conftest import LONG, record

ACTING = set("\x1b\u202e\u202c\u2066\u200b\x00\x9b")


def test_what_a_model_wrote_is_text_and_nothing_else(hostile, root):
    page = display.page_of(hostile, Annotated.of(root))
    code = page.cells[-1]
    assert code.metadata.tags == ["hide-input"]
    stream, html, script, picture = code.outputs[:4]
    assert not ACTING & set(stream.text)
    assert len(stream.text) < 4_000
    assert f"{LONG - display.LONGEST_LINE:,} characters more" in stream.text
    shown = Reader(html.data["text/html"])
    names = {name for name, _ in shown.tags}
    assert "script" not in names
    assert not {key for _, attributes in shown.tags for key in attributes if key.startswith("on")}
    assert all("fixed" not in str(attributes.get("style")) for _, attributes in shown.tags)
    assert not ACTING & set(html.data["text/html"])
    assert list(script.data) == ["text/plain"]
    assert not picture.metadata
    head = page.cells[1].source
    assert not ACTING & set(head)
    assert "<script" not in head
    assert "script" in Reader(head[head.index("<details class=parameters") :]).text


def test_parameters_other_than_by_default_are_told_with_their_meaning(root):
    changed = record("repetition_compare", clusters=9, shown=4)
    head = display.page_of(changed, Annotated.of(root)).cells[1].source
    assert "4 parameters, 1 other than by default: clusters" in head
    row = next(part for part in head.split("<tr") if "<code>clusters</code>" in part)
    for word in ("class=changed", "<code>9</code>", "<td>8</td>", "of the MAUVE-like divergence"):
        assert word in row


def test_a_comment_behind_a_parameter_counts_before_those_above_it_and_both_before_a_reference():
    text = "# whole\na:\n  # above\n  # it\n  x: 1\n  y: ???  # behind\n  z: ${a.x}\n\nb:\n  x: [1, 2]   # other\n"
    assert comments(text) == {"a": {"x": "above it", "y": "behind", "z": "as a.x"}, "b": {"x": "other"}}


def test_every_parameter_says_what_it_means(root):
    found = comments((root / "conf/config.yaml").read_text(encoding="utf-8"))
    assert found["sae_random"]["latents"] == "as sae.latents"
    composed = Annotated.of(root).defaults
    keys = {(section, key) for section, values in composed.items() if isinstance(values, dict) for key in values}
    assert {(section, key) for section, key in keys if not found[section][key]} == set()


def test_stages_of_one_name_are_one_box_and_what_goes_without_saying_is_not_drawn():
    stages = [("a", []), ("b@1", ["a"]), ("b@2", ["a"]), ("c", ["a", "b@1", "b@2"])]
    edges, counts = graph.of_pipeline(stages)
    assert edges == [("a", "b"), ("b", "c")]
    assert counts == {"a": 1, "b": 2, "c": 1}
    picture = graph.svg(edges, counts, {"b": "records/b.html"})
    read = Reader(picture.replace("/>", "></rect>").replace("<path", "<rect"))
    assert "b × 2" in read.text
    assert ("a", {"href": "records/b.html"}) in read.tags


def test_every_stage_of_the_pipeline_is_drawn_apart_from_the_others(root):
    edges, counts = graph.of_pipeline(graph.stages_of(root))
    assert ("sae", "sae_compare") in edges
    assert ("corpus", "sae_compare") not in edges
    places = graph.layout(edges, counts)
    assert set(places) == set(counts)
    several = list(places.values())
    for i, (x, y) in enumerate(several):
        for u, v in several[:i]:
            assert abs(x - u) >= graph.WIDTH or abs(y - v) >= graph.HEIGHT
    for before, after in edges:
        assert places[before][1] < places[after][1]


def test_a_failed_record_is_not_rendered(root, tmp_path):
    failed = record("corpus")
    failed.record.metadata["trimtab"]["status"] = "failed"
    with pytest.raises(InputError, match=r"corpus\.ipynb is the record of a failed run"):
        render(root, tmp_path / "site", [failed])
    assert not (tmp_path / "site").exists()


def test_a_page_that_does_not_render_is_an_error_and_loses_nothing(root, tmp_path):
    broken = record("corpus", prose="```{nonsense}\n```")
    with atomic(tmp_path / "site", KIND) as folder:
        folder.mkdir()
        (folder / "index.html").write_text("the old one", encoding="utf-8")
    with pytest.raises(InputError, match="nonsense"):
        render(root, tmp_path / "site", [broken])
    assert (tmp_path / "site/index.html").read_text(encoding="utf-8") == "the old one"


def test_an_altered_record_is_not_rendered(root, tmp_path):
    altered = record("corpus")
    altered.record.cells[2].source = "Another text."
    with pytest.raises(InputError, match=r"corpus\.ipynb has been altered since its run"):
        render(root, tmp_path / "site", [altered])


def test_a_folder_of_somebody_else_is_not_made_a_site(root, tmp_path):
    (tmp_path / "notes.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(InputError, match="is no site that Trimtab wrote"):
        render(root, tmp_path, [record("corpus")])
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_record_whose_title_is_gone_has_a_page(root):
    bare = record("corpus")
    bare.record.cells = bare.record.cells[-1:]
    assert display.page_of(bare, Annotated.of(root)).cells[0].source == "# corpus"


class Loads(HTMLParser):
    """What a page would load, send, or be led to without being asked; styles, and classes of the record's own part."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[str] = []
        self.styles: list[str] = []
        self.tags: list[tuple[str, dict]] = []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        self.tags.append((tag, given))
        self.styles.append(given.get("style") or "")
        for key in (
            "src",
            "srcset",
            "poster",
            "data",
            "background",
            "action",
            "formaction",
            "ping",
            "cite",
            "xlink:href",
        ):
            self.found += [given[key]] if given.get(key) else []
        if "href" in given and tag != "a":
            self.found.append(given["href"])
        if tag == "meta" and (given.get("http-equiv") or "").lower() == "refresh":
            self.found.append(given["content"])


def test_nothing_on_the_pages_loads_from_elsewhere_or_moves(site):
    pages = list(site.rglob("*.html"))
    assert len(pages) > 4
    for path in pages:
        page = Loads(path.read_text(encoding="utf-8"))
        assert not [url for url in page.found if "://" in url or url.startswith("//")], path
        assert not [style for style in page.styles if re.search(r"url|position|expression|-\d|\\\\", style)], path
        names = [name for name, _ in page.tags]
        assert names[:3] == ["html", "head", "meta"]
        assert page.tags[2][1] == {"http-equiv": "Content-Security-Policy", "content": POLICY}
    text = (site / "records/repetition/implicit.html").read_text(encoding="utf-8")
    article = text[text.index("<article") : text.index("</article>")]
    part = Loads(article)
    assert not {"iframe", "svg", "object", "video", "script", "link", "meta", "base", "form"} & {
        t for t, _ in part.tags
    }
    classes = {each for _, given in part.tags for each in (given.get("class") or "").split()}
    assert not {each for each in classes if re.match(r"position|top-|stretched|modal", each)}
    assert [given["src"] for tag, given in part.tags if tag == "img" and ":" in given["src"]] == []
    assert "Over everything." in article


def test_the_policy_names_nothing_beyond_the_sites_own_files():
    assert POLICY.startswith("default-src 'none'")
    assert not re.search(r"https?:|\*|unsafe-eval", POLICY)
