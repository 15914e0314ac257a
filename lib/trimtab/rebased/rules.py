"""What the sections of linear attention need of one another."""

from trimtab.rebased.text_comparison import check_arms
from trimtab.rules import Section, rule, told
from trimtab.validation import require


@rule("mqar")
def _mqar(mqar: Section) -> None:
    for arm in ("rebased", "based", "rebased-square", "rebased-norm", "softmax", "conv"):
        require(arm in mqar["arms"], "arms", mqar["arms"], f"a list that holds {arm}, which a claim is about")


@rule("pretrain", "pretrain_text")
def _pretrain(pretrain: Section, text: Section) -> None:
    size = text["vocabulary"]
    require(pretrain["vocabulary"] == size, "vocabulary", pretrain["vocabulary"], f"{size}, as in `pretrain_text`")


@rule("pretrain_compare", "pretrain")
def _pretrain_compare(compare: Section, pretrain: Section) -> None:
    told("arms", check_arms, compare["arms"])
