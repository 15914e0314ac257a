"""What a record's prose may bring to its page: a Sphinx extension that takes out what loads, leads astray or moves.

Prose is the author's, and its links stay. Pictures from elsewhere, raw HTML beyond `calm`, redirections, downloads of
files of the building machine and the theme's classes for placing things do not.
"""

import re
from typing import Any

from docutils import nodes  # type: ignore[import-untyped]
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.transforms import SphinxTransform

from trimtab.pipeline.site.calm import is_calm, is_simple, seen

_LINKS = ("http://", "https://", "mailto:")
_MOVING = re.compile(
    r"(?:position|fixed|sticky|top|bottom|start|end|translate|m[tbsexy]?|d|z|vw|vh|min-v|modal|offcanvas|dropdown|toast|"
    r"collapse|navbar|stretched|visually|invisible|bd|pst|sd|float|overflow|opacity|w|h)(?:-.*)?\Z"
)


class Confined(SphinxTransform):
    """Applied to a record's page when all of it has been read."""

    default_priority = 950

    def apply(self, **_: Any) -> None:
        if not self.env.docname.startswith("records/"):
            return
        for node in list(self.document.findall(nodes.Element)):
            match node:
                case nodes.raw() if not (node.get("format") == "html" and is_calm(node.astext())):
                    node.replace_self(nodes.literal(text=node.astext()))
                case nodes.math() | nodes.math_block() if not is_simple(node.astext()):
                    kind = nodes.literal if isinstance(node, nodes.math) else nodes.literal_block
                    node.replace_self(kind(text=node.astext()))
                case nodes.image() if re.match(r"(?!data:)(?:[\w+.-]+:|//)", node["uri"], re.IGNORECASE):
                    node.replace_self(nodes.literal(text=node.get("alt") or node["uri"]))
                case nodes.meta():
                    node.parent.remove(node)
                case addnodes.download_reference():
                    node.replace_self(node.children)
                case nodes.reference() if re.match(r"[\w+.-]+:|//", node.get("refuri", "")):
                    if not node["refuri"].lower().startswith(_LINKS):
                        node.replace_self(node.children)
                case nodes.container() if "cell" not in " ".join(node["classes"]):
                    node["classes"] = [each for each in node["classes"] if not _MOVING.match(each)]
        for text in list(self.document.findall(nodes.Text)):
            plain = text.astext().replace("\xa0", " ")
            if seen(plain) != plain:
                text.parent.replace(text, nodes.Text(seen(plain)))


def setup(app: Sphinx) -> dict[str, Any]:
    """What Sphinx asks of an extension."""
    app.add_transform(Confined)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
