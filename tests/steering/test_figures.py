"""Figures by what they hold: values, token texts, labels; and no text of a token can become a formula or markup."""

import copy
import json
import warnings

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from matplotlib.cbook import is_math_text

from trimtab.errors import InputError
from trimtab.interventions import compare_lenses, lens, next_tokens, steer, token_text, wrap
from trimtab.plots import figure
from trimtab.steering.analysis import cosines
from trimtab.steering.figures import (
    draw,
    for_matplotlib,
    for_plotly,
    interactive,
    plot_comparison,
    plot_cosines,
    plot_norms,
)
from trimtab.steering.panels import comparison_panels, difference_panel, lens_panel, shown

TEXT = "a $x$ <b>\n"


@pytest.fixture(scope="module")
def comparison(tiny_llama, tokenizer):
    sharp = copy.deepcopy(tiny_llama)
    with torch.no_grad():
        sharp.lm_head.weight.mul_(20)
    wrapped = wrap(sharp, tokenizer)
    ids = torch.tensor([tokenizer(TEXT)["input_ids"]])
    vectors = torch.randn(1, 16, generator=torch.Generator().manual_seed(2))
    view = steer(wrapped, [1], lambda: vectors)
    return compare_lenses(wrapped, view, ids, targets=next_tokens(ids), top=3)


@pytest.mark.parametrize(
    ("colour", "field"), [("probability", "top_probabilities"), ("entropy", "entropy"), ("kl", "kl")]
)
def test_a_panel_holds_the_lens(comparison, tokenizer, colour, field):
    found = comparison.clean
    panel = lens_panel(found, tokenizer, colour=colour)
    values = getattr(found, field)[:, 0]
    np.testing.assert_array_equal(panel.values, values[..., 0] if colour == "probability" else values)
    assert panel.limits[0] == 0
    assert panel.limits[1] >= panel.values.max()
    assert "".join(panel.tokens) == TEXT
    assert panel.cells[2][4] == token_text(tokenizer, int(found.top_ids[2, 0, 4, 0]))
    lines = panel.hover[2][4]
    assert lines[0] == "after block 2, position 4"
    for line, i, p in zip(lines[1:4], found.top_ids[2, 0, 4], found.top_probabilities[2, 0, 4], strict=True):
        assert line == f"{p:.3f} {shown(token_text(tokenizer, int(i)))}"
    assert lines[-1].startswith(f"target {shown(TEXT[5])}: rank {int(found.target_rank[2, 0, 4])}, probability ")
    assert not panel.hover[2][-1][-1].startswith("target")  # the last token has no next


def test_positions_can_be_chosen(comparison, tokenizer):
    panel = lens_panel(comparison.clean, tokenizer, colour="target", positions=[3, 5])
    assert panel.tokens == [TEXT[3], TEXT[5]]
    np.testing.assert_allclose(panel.values, comparison.clean.target_probability[:, 0, [3, 5]])
    assert panel.hover[0][1][0] == "after block 0, position 5"
    with pytest.raises(InputError, match="positions 0 to 9, not"):
        lens_panel(comparison.clean, tokenizer, positions=[10])
    with pytest.raises(InputError, match="texts 0 to 0, not 1"):
        lens_panel(comparison.clean, tokenizer, row=1)


def test_padding_is_left_out(tiny_llama, tokenizer):
    ids, mask = torch.tensor([[40, 41, 42, 1], [40, 41, 1, 1]]), torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]])
    found = lens(wrap(tiny_llama, tokenizer), ids, mask)
    assert lens_panel(found, tokenizer, row=1).values.shape == (3, 2)
    with pytest.raises(InputError, match="given no target"):
        lens_panel(found, tokenizer, colour="target")


def test_the_difference_names_what_changed(comparison, tokenizer):
    panel = difference_panel(comparison, tokenizer)
    np.testing.assert_array_equal(panel.values, comparison.kl[:, 0])
    assert (panel.values[0] == 0).all()  # below the steered block
    assert (panel.values[1:] > 0).all()
    tops = [one.top_ids[:, 0, :, 0] for one in (comparison.clean, comparison.steered)]
    same = (tops[0] == tops[1]).numpy()
    assert not same.all()
    assert [[cell == "" for cell in line] for line in panel.cells] == same.tolist()
    layer, position = np.argwhere(~same)[0]
    assert panel.cells[layer][position] == token_text(tokenizer, int(tops[1][layer, position]))
    change = difference_panel(comparison, tokenizer, colour="target")
    np.testing.assert_array_equal(change.values, comparison.target_change[:, 0])
    assert change.limits[0] == -change.limits[1]
    assert change.colours != panel.colours
    assert change.hover[2][4][-1] == f"target's log-probability {float(comparison.target_change[2, 0, 4]):+.3g} nats"


def test_clean_and_steered_share_a_scale(comparison, tokenizer):
    clean, steered, change = comparison_panels(comparison, tokenizer, colour="entropy", difference="target")
    assert (clean.title, steered.title) == ("Clean", "Steered")
    assert clean.limits == steered.limits
    assert clean.limits[1] == max(clean.values.max(), steered.values.max())
    np.testing.assert_array_equal(steered.values, comparison.steered.entropy[:, 0])
    np.testing.assert_array_equal(change.values, comparison.target_change[:, 0])


def test_drawn_cells_and_labels(comparison, tokenizer):
    panels = comparison_panels(comparison, tokenizer, difference="target")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a glyph that the font lacks warns
        made = draw(panels)
        made.canvas.draw()
    axes = made.axes[:3]
    for axis, panel in zip(axes, panels, strict=True):
        texts = [text.get_text() for text in axis.texts]
        assert texts == [for_matplotlib(cell) for line in panel.cells for cell in line]
        assert not any(map(is_math_text, texts))
        np.testing.assert_array_equal(axis.images[0].get_array().filled(np.nan), panel.values)
        assert axis.get_ylabel() == "after block"
        assert [label.get_text() for label in axis.get_yticklabels()] == ["0", "1", "2"]
        ticks = [label.get_text() for label in axis.get_xticklabels()]
        assert ticks == ["a", "␣", r"\$", "x", r"\$", "␣", "<", "b", ">", "↵"]
        assert axis.images[0].colorbar.ax.get_ylabel() == panel.label
    assert panels[0].label == "probability of the top token"
    assert "nats" in panels[2].label


def test_a_comparison_in_one_call(comparison, tokenizer):
    made = plot_comparison(comparison, tokenizer, last=3)
    assert [axis.get_title() for axis in made.axes[:3]] == ["Clean", "Steered", "Steered against clean"]
    np.testing.assert_array_equal(made.axes[2].images[0].get_array(), comparison.kl[:, 0, -3:])
    assert plot_comparison(comparison, tokenizer).axes[0].images[0].get_array().shape == (3, 10)


def test_no_text_becomes_a_formula_or_markup():
    hostile = "$\\alpha$ <b>&amp;\t\u202e"
    assert shown(hostile) == "$\\alpha$␣<b>&amp;⇥[U+202E]"
    assert shown(hostile, 4) == "$\\a…"
    for text in (hostile, "$", "$$", "\\$", "a$b$c", "中文\ufffd", "\x00"):
        drawn = for_matplotlib(text)
        assert not is_math_text(drawn)
        escaped = for_plotly(text)
        assert not set("<$") & set(escaped)
    assert for_matplotlib("中\\frac") == "□\\frac"
    assert for_plotly("<b>$&") == "&lt;b&gt;&#36;&amp;"


def test_the_interactive_one_holds_the_same(comparison, tokenizer):
    panels = comparison_panels(comparison, tokenizer)
    made = json.loads(interactive(panels).to_json())
    assert [note["text"] for note in made["layout"]["annotations"]] == ["Clean", "Steered", "Steered against clean"]
    for trace, panel in zip(made["data"], panels, strict=True):
        assert trace["type"] == "heatmap"
        assert trace["text"] == [[for_plotly(cell, 9) for cell in line] for line in panel.cells]
        assert trace["hovertext"][2][4].startswith("after block 2" if panel is not panels[2] else "clean ")
        assert trace["hovertext"][2][4].count("<br>") == len(panel.hover[2][4]) - 1
        assert trace["colorbar"]["title"]["text"] == panel.label
    assert made["layout"]["xaxis3"]["ticktext"][2] == "&#36;"
    assert made["layout"]["xaxis3"]["ticktext"][6] == "&lt;"
    assert len(json.loads(interactive(panels[:1]).to_json())["data"]) == 1


def test_norms_and_cosines(tmp_path):
    vectors = torch.randn(3, 16, generator=torch.Generator().manual_seed(0))
    made, (left, right) = figure(2)
    plot_norms(left, [1, 4, 7], {"seed 0": vectors.norm(dim=1), "seed 1": vectors.norm(dim=1) * 2})
    plot_cosines(right, [1, 4, 7], cosines(vectors))
    np.testing.assert_allclose(left.lines[1].get_ydata(), 2 * vectors.norm(dim=1))
    assert left.lines[0].get_xdata().tolist() == [1, 4, 7]
    assert "norm" in left.get_ylabel()
    assert [text.get_text() for text in left.get_legend().get_texts()] == ["seed 0", "seed 1"]
    np.testing.assert_allclose(right.images[0].get_array(), cosines(vectors))
    assert right.images[0].get_clim() == (-1, 1)
    assert [label.get_text() for label in right.get_xticklabels()] == ["1", "4", "7"]
    made.savefig(tmp_path / "figure.png")
    assert not plt.get_fignums()
