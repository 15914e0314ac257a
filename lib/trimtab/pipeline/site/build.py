"""A static site from pages: Sphinx with myst-nb, nothing executed, nothing fetched, now or when it is read."""

import io
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trimtab.errors import InputError
from trimtab.files import atomic, check_path
from trimtab.marks import own_files
from trimtab.pipeline.archive import Filed, find
from trimtab.pipeline.site.pages import write_pages

STATIC = Path(__file__).parent / "static"
KIND = "site"
"""Kind of the site's files in the mark of their folder; see `files.atomic`."""
SETTINGS: dict[str, Any] = {
    "project": "Trimtab",
    "author": "the pipeline",
    "extensions": ["myst_nb", "sphinx-mathjax-offline", "trimtab.pipeline.site.confined"],
    "html_theme": "sphinx_book_theme",
    "html_title": "Trimtab",
    "html_static_path": [str(STATIC)],
    "html_css_files": ["trimtab.css"],
    "html_favicon": str(STATIC / "trimtab.svg"),
    "html_context": {"default_mode": "auto"},
    "html_copy_source": False,
    "html_show_sourcelink": False,
    "html_show_copyright": False,
    "html_last_updated_fmt": None,
    "html_theme_options": {
        "show_toc_level": 2,
        "use_download_button": False,
        "use_fullscreen_button": False,
        "home_page_in_toc": True,
        "navbar_persistent": [],  # a second field for searching, above the one that is there
    },
    "nb_execution_mode": "off",
    "nb_merge_streams": True,
    "nb_ipywidgets_js": {},  # else a page with widgets would fetch them
    "myst_enable_extensions": ["dollarmath", "amsmath", "colon_fence"],
    "suppress_warnings": ["myst.header"],  # a notebook may begin a section two levels down
}
MATHJAX = ("tex-chtml.js", "output")
"""What pages load of `_static/mathjax`; the rest is 20 MB of other ways to load it."""

POLICY = (
    "default-src 'none'; script-src 'self' file: 'unsafe-inline'; style-src 'self' file: 'unsafe-inline'; "
    "img-src 'self' file: data:; font-src 'self' file: data:; connect-src 'self' file:; form-action 'self' file:; "
    "base-uri 'none'"
)
"""What a browser may load for a page: the site's own files (`file:` is one's own disk, where a page is opened from
there; pages of a server cannot reach it), and pictures that are in the page itself."""


def build(root: Path, out: Path, names: Sequence[str]) -> None:
    """Render the named records of a checkout to the folder `out`, which is replaced when all is done. Raises
    InputError for a missing or failed record, and where a page does not render."""
    records = [find(root, name) for name in names]
    render(root, out, records)


def render(root: Path, out: Path, records: Sequence[Filed]) -> None:
    """The same of records that are at hand; `root` is where conf/ and dvc.yaml are."""
    for each in records:
        if each.about["status"] != "complete":
            raise InputError(f"records/{each.label}.ipynb is the record of a failed run: run its stage again first.")
        if each.altered:
            raise InputError(
                f"records/{each.label}.ipynb has been altered since its run: `dvc checkout` it, or run its stage again."
            )
    check_path(out)
    if out.is_dir() and any(out.iterdir()) and KIND not in own_files(out):
        raise InputError(f"{out} is no site that Trimtab wrote: name a new folder, or remove it first.")
    with tempfile.TemporaryDirectory() as folder:
        source, made = Path(folder) / "source", Path(folder) / "html"
        write_pages(root, source, records)
        _sphinx(source, made, Path(folder) / "doctrees")
        for path in (made / "_static/mathjax").iterdir():
            if path.name not in MATHJAX:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        for page in (made / "_static").rglob("*.html"):  # a part of the theme that is no page
            page.unlink()
        for page in made.rglob("*.html"):
            _protect(page)
        with atomic(out, KIND) as partial:
            shutil.copytree(made, partial)


def _protect(page: Path) -> None:
    """Put the policy before anything that it is to govern."""
    text = page.read_text(encoding="utf-8")
    before, head, after = text.partition("<head>")
    if not head:
        raise InputError(f"The site cannot be built: {page.name} has no <head>.")
    policy = f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
    page.write_text(f"{before}{head}\n    {policy}{after}", encoding="utf-8")


def _sphinx(source: Path, out: Path, doctrees: Path) -> None:
    from sphinx.application import Sphinx
    from sphinx.errors import SphinxError
    from sphinx.util.docutils import docutils_namespace, patch_docutils

    told = io.StringIO()
    try:
        with patch_docutils(), docutils_namespace():
            app = Sphinx(
                str(source), None, str(out), str(doctrees), "html", SETTINGS, status=None, warning=told, freshenv=True
            )
            app.env.settings["file_insertion_enabled"] = False  # no file or page of elsewhere, whatever a record says
            app.build()
    except SphinxError as error:
        raise InputError(f"The site cannot be built: {error}") from error
    if told.getvalue().strip():
        raise InputError(f"The site was built with warnings: {told.getvalue().strip()}")
