"""The documentation: links lead somewhere, and lines that are quoted are those of the source."""

import re
import textwrap
from pathlib import Path

import pytest

pytestmark = pytest.mark.mpi_skip
ROOT = Path(__file__).parent.parent
PAGES = sorted(path for path in ROOT.rglob("*.md") if not {".venv", "build"} & {*path.relative_to(ROOT).parts})
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
QUOTE = re.compile(r"^From \[([^\]]+)\]\(([^)]+)\):\n\n```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def without_code(text: str) -> str:
    return re.sub(r"^```.*?^```$|^(?: {4}.*\n)+|`[^`\n]*`", "", text, flags=re.MULTILINE | re.DOTALL)


def anchors(text: str) -> set[str]:
    """The names of a page's headings, as they are made for links."""
    titles = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL), re.MULTILINE)
    plain = [re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", title) for title in titles]
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in plain}


def broken(path: Path) -> list[str]:
    """The links of a page that lead nowhere; those to other hosts are not followed."""
    wrong = []
    for link in LINK.findall(without_code(path.read_text())):
        where, _, anchor = link.partition("#")
        if where.startswith(("http:", "https:", "mailto:")):
            continue
        target = path if not where else path.parent / where
        if not target.exists() or (anchor and anchor not in anchors(target.read_text())):
            wrong.append(link)
    return wrong


def misquoted(text: str) -> list[str]:
    """Pieces of quoted code that their files do not hold in that order; "..." stands between pieces."""
    wrong = []
    for path, _, code in QUOTE.findall(text):
        source, at = (ROOT / path).read_text(), 0
        for piece in re.split(r"^\.\.\.$", code, flags=re.MULTILINE):
            lines = textwrap.dedent(piece).strip("\n").splitlines()
            pattern = r"\n".join(rf"(?P=i){re.escape(line)}" if line else "" for line in lines)
            pattern = pattern.replace("(?P=i)", "(?P<i> *)", 1)
            found = re.compile(rf"^{pattern}$", re.MULTILINE).search(source, at)
            if found is None:
                wrong.append(f"{path}: {lines[0]}")
                break
            at = found.end()
    return wrong


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(path):
    assert broken(path) == []


def test_the_tour_quotes_the_source():
    text = (ROOT / "docs" / "tour.md").read_text()
    assert len(QUOTE.findall(text)) == text.count("```python") > 15
    assert misquoted(text) == []


def test_the_index_names_every_page():
    text = (ROOT / "docs" / "index.md").read_text()
    named = {(ROOT / "docs" / link.partition("#")[0]).resolve() for link in LINK.findall(text)}
    assert set((ROOT / "docs").glob("*.md")) - named <= {ROOT / "docs" / "index.md"}


def test_what_is_wrong_is_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "# A `b`, c\n[x](gone.md) [y](#a-b-c) [z](#nowhere) `[not](a-link)` [w](page.md#a-b-c)\n\n    [no](x)\n"
    )
    assert broken(page) == ["gone.md", "#nowhere"]
    quote = "From [cnnmpi/rng.py](../cnnmpi/rng.py):\n\n```python\n{}\n```\n"
    source = (ROOT / "cnnmpi" / "rng.py").read_text().splitlines()
    line = next(line.strip() for line in source if line.strip().startswith("key = np.frombuffer(hashlib"))
    assert misquoted(quote.format(line)) == []
    assert misquoted(quote.format(line + "  # changed")) and misquoted(quote.format(f"x = 1\n...\n{line}"))
