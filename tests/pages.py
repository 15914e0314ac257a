"""HTML as a browser reads it, for the tests of what is shown; and text that would like to be more than text."""

from html.parser import HTMLParser

HOSTILE = '<script>alert("1")</script> \x1b[31mred\x1b[0m \u202eabc\u202c \u200b\u2066 & \' "quoted" </td> \x00\x9b'


class Reader(HTMLParser):
    """Tags with attributes, text, and as `marked` the text within spans; unclosed or crossed tags fail."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.text, self.marked, self.open = "", [], []
        self.feed(source)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data
        if "span" in self.open:
            self.marked.append(data)
