"""Notebooks as pipeline stages: run one, record it, report on all. Nothing outside this package knows of notebooks."""

import sys

# nbformat imports jsonschema, and that, where it is installed, a grammar of international addresses, which takes over a
# second to build, in every command and every kernel, and which no notebook's schema asks for.
sys.modules.setdefault("rfc3987_syntax", None)  # type: ignore[arg-type]
