"""The site in a real browser: no errors, no requests elsewhere, links that lead somewhere, search, folding."""

from urllib.parse import urldefrag, urljoin

import pytest


@pytest.fixture
def page(browser, served):
    """A page of which everything that went wrong is in `.wrong`."""
    opened = browser.new_page()
    opened.set_default_timeout(300_000)
    opened.wrong = []
    opened.on("console", lambda message: opened.wrong.append(message.text) if message.type == "error" else None)
    opened.on("pageerror", lambda error: opened.wrong.append(str(error)))
    opened.on("dialog", lambda dialog: (opened.wrong.append(f"dialog {dialog.message}"), dialog.dismiss()))
    opened.on("request", lambda r: None if r.url.startswith((served, "data:", "blob:")) else opened.wrong.append(r.url))
    opened.on("response", lambda r: opened.wrong.append(f"{r.status} {r.url}") if r.status >= 400 else None)
    yield opened
    opened.close()


def test_every_page_opens_without_errors_and_every_link_leads_somewhere(page, served):
    todo, seen, targets, ids = {f"{served}/index.html"}, set(), set(), {}
    while todo:
        url = todo.pop()
        seen.add(url)
        page.goto(url, wait_until="load")
        page.wait_for_timeout(200)
        ids[url] = page.eval_on_selector_all("[id]", "them => them.map(each => each.id)")
        links = page.eval_on_selector_all("a[href]", "them => them.map(a => a.getAttribute('href'))")
        for link in links:
            whole = urljoin(url, link)
            if whole.startswith(served):
                targets.add(whole)
                if urldefrag(whole).url.endswith(".html"):
                    todo |= {urldefrag(whole).url} - seen
    assert page.wrong == []
    assert f"{served}/records/repetition/implicit.html" in seen
    for target in targets:
        url, fragment = urldefrag(target)
        assert url in seen or page.request.get(url).ok, target
        assert not fragment or fragment in ids[url], target


def test_claims_are_on_the_front_page_with_their_verdicts(page, served):
    page.goto(f"{served}/index.html")
    row = page.locator("tr", has_text="The untrained model repeats far more than people do")
    assert "0.396 (0.275 to unbounded)" in row.inner_text()
    assert row.locator(".verdict").inner_text() == "held"
    row.get_by_role("link", name="repetition_compare").click()
    assert page.title().startswith("Record repetition_compare")


def test_search_finds_a_claim(page, served):
    page.goto(f"{served}/search.html?q=untrained+repeats")
    page.wait_for_selector("#search-results li a")
    assert "index.html" in " ".join(page.eval_on_selector_all("#search-results a", "them => them.map(a => a.href)"))
    assert page.wrong == []


def test_code_and_parameters_fold(page, served):
    page.goto(f"{served}/records/repetition_compare.html")
    code, parameters = page.get_by_text("some code"), page.get_by_text("of the MAUVE-like divergence")
    for hidden, summary in ((code, "Show code cell source"), (parameters, "other than by default")):
        assert not hidden.is_visible()
        page.locator("summary", has_text=summary).first.click()
        assert hidden.is_visible()


def test_a_phone_can_read_it_and_the_dark_has_contrast(browser, served):
    context = browser.new_context(viewport={"width": 390, "height": 800}, color_scheme="dark")
    phone = context.new_page()
    phone.set_default_timeout(300_000)
    for name in ("index", "run", "records/repetition_compare", "records/repetition/implicit"):
        phone.goto(f"{served}/{name}.html")
        assert phone.evaluate("document.documentElement.scrollWidth") <= 390, f"{name} is wider than the phone"
    assert phone.evaluate("document.documentElement.dataset.theme") == "dark"
    background = phone.evaluate("getComputedStyle(document.body).backgroundColor")
    assert max(map(int, background.removeprefix("rgb(").removesuffix(")").split(", "))) < 64
    context.close()


def test_what_a_model_wrote_does_not_run(page, served):
    page.goto(f"{served}/records/repetition/implicit.html")
    page.wait_for_timeout(500)
    assert page.wrong == []
    assert 'alert("1")' in page.locator("article").inner_text()


@pytest.mark.parametrize("how", ["served", "opened from the disk"])
def test_no_request_leaves_whatever_a_record_holds_and_nothing_is_moved(browser, served, site, how):
    start = served if how == "served" else site.as_uri()
    page = browser.new_page()
    page.set_default_timeout(300_000)
    asked, wrong = [], []
    page.on("request", lambda request: asked.append(request.url))
    page.on("pageerror", lambda error: wrong.append(str(error)))
    for name in ("index", "run", "records/repetition/implicit", "records/repetition_compare"):
        page.goto(f"{start}/{name}.html", wait_until="load")
        page.wait_for_timeout(500)
        assert page.evaluate("document.styleSheets.length") > 1, name
        assert page.url.startswith(start)
    assert wrong == []
    assert [url for url in asked if not url.startswith((start, "data:", "blob:"))] == []
    page.goto(f"{start}/records/repetition/implicit.html")
    outside = """[...document.querySelectorAll('.cell_output *')].filter(each => {
        const cell = each.closest('.cell_output').getBoundingClientRect(), own = each.getBoundingClientRect();
        return own.width && (own.top < cell.top - 40 || own.left < cell.left - 40 || own.bottom > cell.bottom + 40);
    }).length"""
    assert page.evaluate(outside) == 0
    blocked = """url => new Promise(done => {
        document.addEventListener("securitypolicyviolation", event => done(event.blockedURI));
        document.body.append(Object.assign(new Image(), {src: url}));
        setTimeout(() => done("nothing"), 5000);
    })"""
    assert page.evaluate(blocked, "http://elsewhere.invalid/y").startswith("http://elsewhere.invalid")
    page.close()
