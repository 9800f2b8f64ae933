"""Read a report's page as a browser does: its elements, and what is wrong with them."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from html.parser import HTMLParser

VOID = {"meta", "br", "link"}


@dataclass
class Element:
    """An element with the text that is directly or deeper in it."""

    name: str
    attributes: dict[str, str]
    children: "list[Element]" = field(default_factory=list)
    text: str = ""

    def all(self, name: str = "", look: str = "") -> "Iterator[Element]":
        """Elements in it by name and class, in order."""
        for child in self.children:
            looks = child.attributes.get("class", "").split()
            if name in ("", child.name) and (not look or look in looks):
                yield child
            yield from child.all(name, look)

    def one(self, key: str) -> "Element":
        """The element of an id."""
        (found,) = [e for e in self.all() if e.attributes.get("id") == key]
        return found


class _Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.open = [Element("", {})]
        self.faults: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names = [name for name, _ in attrs]
        if len(set(names)) < len(names):
            self.faults.append(f"<{tag}> has an attribute twice")
        element = Element(tag, {name: value or "" for name, value in attrs})
        self.open[-1].children.append(element)
        if tag not in VOID:
            self.open.append(element)

    def handle_endtag(self, tag: str) -> None:
        if self.open[-1].name != tag:
            self.faults.append(f"</{tag}> closes <{self.open[-1].name}>")
        else:
            self.open.pop()

    def handle_data(self, data: str) -> None:
        for element in self.open:
            element.text += data


def read(page: str) -> Element:
    """The page's root; AssertionError where tags do not fit."""
    reader = _Reader()
    reader.feed(page)
    reader.close()
    assert reader.faults == [] and len(reader.open) == 1, reader.faults
    return reader.open[0]


def rows(part: Element, number: int = 0) -> list[list[str]]:
    """The cells of a table in a part of the page."""
    body = list(part.all("tbody"))[number]
    return [[cell.text for cell in row.children] for row in body.all("tr")]
