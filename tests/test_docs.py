"""Check the documents: links, length of sentences, generated pages, and snippets."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
INDEX = ROOT / "docs" / "README.md"
DOCS = sorted((ROOT / "docs").glob("*.md"))
FRONT = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "RELIABILITY.md"]
PLAIN = [*DOCS, *FRONT]
LONGEST_SENTENCE = 35


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def prose(text: str) -> str:
    """A document without code blocks, tables and figures. A span of code counts as one word."""
    text = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    text = re.sub(r"^( {4,}|\|).*$", "", text, flags=re.MULTILINE)
    text = re.sub(r"!\[[^\]]*\]\([^)]*\)", "", text)
    return re.sub(r"`[^`]+`", "code", text)


def sentences(text: str) -> list[str]:
    """The sentences of a document. A heading, list item or paragraph also ends a sentence."""
    blocks = re.split(r"\n\s*\n|\n(?=\s*(?:[-*]|\d+\.) )|^#.*$", prose(text), flags=re.MULTILINE)
    blocks = (re.sub(r"\]\([^)]*\)", "]", block) for block in blocks)
    return [s for block in blocks for s in re.split(r"(?<=[.?!])\s+", " ".join(block.split()))]


def anchors(text: str) -> set[str]:
    """Anchors of the headings, as GitHub makes them."""
    text = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def snippets(path: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", path.read_text(), re.MULTILINE | re.DOTALL)


def test_sentences_and_anchors_are_found():
    text = (
        "# A `b` c, d\n\nOne two;\nthree. Four\n\n- five `x y z`\n- six\n\n| a; b |\n\n```\nx;\n```"
    )
    assert [s for s in sentences(text) if s] == ["One two; three.", "Four", "- five code", "- six"]
    assert prose(text).count(";") == 1
    assert anchors(text) == {"a-b-c-d"}


@pytest.mark.parametrize("path", [*DOCS, *FRONT, *ROOT.glob("benchmarks/*.md")], ids=name_of)
def test_links_resolve(path):
    text = re.sub(r"`[^`\n]+`", "", re.sub(r"```.*?```", "", path.read_text(), flags=re.DOTALL))
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"https?://", link):
            continue
        file, _, anchor = link.partition("#")
        target = path if not file else path.parent / file
        assert target.exists(), link
        assert not anchor or anchor in anchors(target.read_text()), link


@pytest.mark.parametrize("path", PLAIN, ids=name_of)
def test_sentences_are_short(path):
    long = [s for s in sentences(path.read_text()) if len(s.split()) > LONGEST_SENTENCE]
    assert not long
    assert prose(path.read_text()).count(";") <= 1


@pytest.mark.parametrize("path", [*DOCS, FRONT[1]], ids=name_of)
def test_named_files_exist(path):
    """Files of this repository in code spans."""
    for span in re.findall(r"`([\w./-]+)`", path.read_text()):
        folder = span.split("/")[0]
        if folder in ("tests", "scripts", "lighthouse", "train_configs", "examples", "benchmarks"):
            assert (ROOT / span).exists(), span


def test_the_index_lists_every_page():
    linked = re.findall(r"\]\(([\w-]+\.md)\)", INDEX.read_text())
    assert {*linked} == {path.name for path in DOCS} - {INDEX.name}
    assert len({*linked}) == len(linked)


def test_the_generated_page_is_up_to_date():
    import make_docs

    assert make_docs.PAGE.read_text() == make_docs.page(), "run scripts/make_docs.py"


def test_every_field_of_ours_is_described():
    import make_docs

    for section in make_docs.SECTIONS.values():
        known = make_docs.docstrings(section)
        assert set(make_docs.own_fields(section)) - {"override"} <= known.keys()


def test_the_drawing_is_of_a_legal_selection():
    import draw_method

    found = draw_method.kinds(draw_method.example())
    kept = [int((level > 0).sum()) for level in found]
    # The coarsest level has all entries. Each level below has the children of 128 selected entries.
    assert kept == [256, 256, 512]
    assert [int((level == draw_method.REFINED).sum()) for level in found] == [0, 128, 128]
    assert draw_method.window_start(found) > 0
    assert draw_method.FIGURE.is_file()


def test_ci_covers_the_oldest_versions_and_runs_scripts_that_exist():
    ci = (ROOT / ".github" / "workflows" / "ci.yml").read_text()
    project = (ROOT / "pyproject.toml").read_text()
    oldest_torch = re.search(r'"torch>=([\d.]+),', project)[1]
    oldest_python = re.search(r'requires-python = ">=([\d.]+)"', project)[1]
    assert re.search(r'torch: \["([\d.]+)"', ci)[1].startswith(oldest_torch)
    assert re.search(r'python: \["([\d.]+)"', ci)[1] == oldest_python
    scripts = re.findall(r"scripts/\w+\.sh", ci)
    assert scripts and all((ROOT / script).is_file() for script in scripts)


def test_pre_commit_lints_with_the_tested_version():
    pinned = re.search(r"^ruff==.+$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)[0]
    hooks = (ROOT / ".pre-commit-config.yaml").read_text()
    assert set(re.findall(r"ruff==[\d.]+", hooks)) == {pinned}


# tests/huggingface/ runs the snippets of huggingface.md.
PAGES = [FRONT[0], *(path for path in DOCS if path.stem != "huggingface")]
SNIPPETS = [(path, text) for path in PAGES for text in snippets(path)]


def test_there_are_snippets():
    assert len(SNIPPETS) >= 5


@pytest.mark.parametrize(("path", "text"), SNIPPETS, ids=[name_of(path) for path, _ in SNIPPETS])
def test_snippets_run(path, text):
    exec(text, {})
