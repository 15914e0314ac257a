"""What differs between two equal runs goes from outputs, and every diagnostic stays; in time linear in any text."""

import sys
import tempfile
import time

import pytest
from nbformat.v4 import new_output

from .test_records import display, html, made, shown, text

# Two equal runs


def test_random_names_of_elements_are_counted_and_other_digits_stay():
    plotly = "<div id='{0}'></div><script>Plotly.newPlot('{0}', 1)</script>"
    styler = "<style>#T_{0} th {{}}</style><table id='T_{0}'><td id='T_{0}_row0_col0'></td></table>"
    first = plotly.format("3f2504e0-4f89-41d3-9a0c-0305e82c3301"), styler.format("8f3a2")
    second = plotly.format("0a1b2c3d-4f89-41d3-9a0c-0305e82c3301"), styler.format("0b1c9")
    one, other = (shown(*(display(text_html=each) for each in pair)) for pair in (first, second))
    assert one == other
    assert one[0].data["text/html"].count("name-00001") == 2
    assert one[1].data["text/html"].count("T_00002") == 3
    kept = "<p>run 3f2504e0-4f89-41d3-9a0c-0305e82c3301 at p0123456789</p>"
    assert html(kept) == kept


def test_an_svg_has_no_date_and_no_random_names_and_no_path():
    svg = (
        "<svg><dc:date>{0}</dc:date><clipPath id='p{1}'/><g clip-path='url(#p{1})'/>"
        "<!-- /home/somebody/project/x --></svg>"
    )
    outputs = [shown(new_output("display_data", data={"image/svg+xml": svg.format(*each)}))
               for each in (("2026-01-01", "0123456789"), ("2026-01-02", "abcdefabcd"))]  # fmt: skip
    assert outputs[0] == outputs[1]
    assert "dc:date" not in str(outputs[0])
    assert "somebody" not in str(outputs[0])


def test_widgets_leave_their_text_and_bars_nothing():
    view = {"application/vnd.jupyter.widget-view+json": {"model_id": "a1b2", "version_major": 2}}
    bars = (
        "  0%|          | 0/5 [00:00<?, ?it/s]",
        "loop:  40%|####      | 2/5 [00:01<00:02,  1.20s/it]",
        "HBox(children=(HTML(value='loop'), FloatProgress(value=0.0, max=5.0), HTML(value='')))",
        "0it [00:00, ?it/s]",
    )
    assert shown(*(new_output("display_data", data={**view, "text/plain": bar}) for bar in bars)) == []
    assert shown(new_output("display_data", data=dict(view))) == []
    (slider,) = shown(new_output("display_data", data={**view, "text/plain": "IntSlider(value=3)"}))
    assert slider.data == {"text/plain": "IntSlider(value=3)"}


def test_where_streams_are_cut_does_not_matter():
    whole = "Epoch 1\rEpoch 2\rEpoch 3\nWarning\n\r  5%|5  | 1/20 [00:01<00:19,  1.00s/it]\rdone\n"

    def cut(*places):
        parts = [whole[a:b] for a, b in zip((0, *places), (*places, None), strict=True)]
        return shown(*(new_output("stream", name="stderr", text=part) for part in parts))

    assert cut(5, 9, 40) == cut(8) == cut()
    assert cut()[0].text == "Epoch 3\nWarning\ndone\n"


# Addresses and paths


@pytest.mark.parametrize(
    "text_",
    [
        "checksum 0xdeadbeef01",
        "illegal access at 0x7f00deadbeef, in layer 3",
        "a < b at 0x7f00deadbeef",
        "0x7f00deadbeef>",
    ],
)
def test_digits_that_are_no_address_of_an_object_stay(text_):
    assert text(text_ + "\n") == text_ + "\n"


def test_addresses_of_objects_go():
    assert text("<object object at 0x7f3c5d0a1b20>\n") == "<object object at 0x…>\n"
    assert text("<cell at 0x7f3c5d0a1b20: int object at 0x7f3c5d0a1b21>") == "<cell at 0x…: int object at 0x…>"
    assert text('<code object f at 0x7f3c5d0a1b20, file "x", line 1>') == '<code object f at 0x…, file "x", line 1>'
    assert html("&lt;f at 0x7f3c5d0a1b20&gt;") == "&lt;f at 0x…&gt;"


def test_paths_of_this_machine_are_replaced_as_a_whole_and_nowhere_else(monkeypatch):
    monkeypatch.setenv("HOME", "/grove")
    monkeypatch.setattr(tempfile, "tempdir", "/scrap/a b")
    for kept in (
        "/groveed/x",
        "/data/grove/x",
        "x/grove/y",
        "/grove-2/x",
        "/grove.bak",
        "the QUJD/grove/QUJD= of base64",
    ):
        assert text(kept + "\n") == kept + "\n"
    picture = "<img src='data:image/png;base64,/grove/home/somebody/project'>"
    assert html(picture) == picture
    raw = {"image/png": "/grove/AAAA", "text/plain": "/grove/AAAA"}
    assert shown(new_output("display_data", data=raw))[0].data == {"image/png": "/grove/AAAA", "text/plain": "~/AAAA"}
    for before, becomes in {
        "/grove": "~", "/grove.": "~.", "'/grove/x'": "'~/x'", "x=/grove/y": "x=~/y", "a:/grove/b": "a:~/b",
        "\x1b[32m/grove/x\x1b[0m": "\x1b[32m~/x\x1b[0m", "'\\n/grove/x'": "'\\n~/x'", "cc -I/grove/x": "cc -I~/x",
        "file:///grove/x": "file://~/x", "/home/somebody/project/data": "./data",
        f"{sys.prefix}/lib": "<env>/lib", "File /scrap/a b/ipykernel_12/345.py:3": "File <cell>:3",
        "\x1b[32m/scrap/ipykernel_12/345.py\x1b[39m": "\x1b[32m<cell>\x1b[39m",
    }.items():  # fmt: skip
        assert text(before + "\n") == becomes + "\n"


# Time


ADVERSARIES = [
    "a", "[", "/", "\r", "|", "|||", "0", " ", "=", "\n", "%|", "%", "<", "data:", "data:a/b;c=d;", "id=", "id = ",
    "\x1b[", "\n\x1b[A", "QUJDRA/+", "ipykernel_1/", "/ipykernel_1/1.py", " at 0x1234567", "<dc:date>", "0123abcd-",
    "T_abcde", "| 1/2 [00:00<00:00, 1it/s", "\r1%|1|", " [00:00, ", "/home/somebody/project", "\ud800",
    "<a id=p0123456789>",
]  # fmt: skip


def seconds(kind: str, content: str) -> float:
    output = new_output("stream", name="stderr", text=content) if kind == "stream" else display(**{kind: content})
    began = time.process_time()
    made(output)
    return time.process_time() - began


@pytest.mark.parametrize("unit", ADVERSARIES)
@pytest.mark.parametrize("kind", ["stream", "text_html"])
def test_a_record_takes_time_linear_in_any_text(kind, unit):
    small, large = (unit * (size // len(unit)) for size in (60_000, 240_000))
    seconds(kind, small)
    once, fourfold = (min(seconds(kind, each) for _ in range(2)) for each in (small, large))
    assert fourfold < 9 * once + 0.2


def test_two_real_runs_with_widgets_svg_sets_and_random_names_are_equal(run):
    cells = (
        "from tqdm.auto import tqdm\nfor _ in tqdm(range(3), desc='loop'):\n    pass\nfrom pathlib import Path\n"
        "Path(out).write_text('x')",
        "import ipywidgets\nipywidgets.IntSlider(value=3)",
        "%config InlineBackend.figure_formats = ['svg']\nimport matplotlib.pyplot as plt\n"
        "fig, axis = plt.subplots()\naxis.plot([1, 2], marker='o')\nplt.show()",
        "import uuid\nfrom IPython.display import HTML\nHTML(f'<div id=\"{uuid.uuid4()}\"></div>')",
        "print(object(), {'a', 'b', 'c', 'd'})",
    )
    one, other = (run(*cells)[1] for _ in range(2))
    assert str(one.cells[-5:]) == str(other.cells[-5:])
    assert "IntSlider(value=3)" in str(one.cells)
    assert "image/svg+xml" in str(one.cells)
    assert "loop" not in str([cell.get("outputs") for cell in one.cells])
