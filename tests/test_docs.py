"""The documents: every operator has its page, every link leads somewhere, the layout is that of the folders.

The site itself is built by `make docs`, with warnings as errors.
"""

import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from test_imports import LEVEL

import aligntok
from aligntok import kernels

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def load(name: str):
    """A module of docs/, which is no package."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def site():
    """What writes the generated pages."""
    return load("site_pages")


@pytest.fixture(scope="module")
def pages(site) -> dict[str, str]:
    """Every page of the site, as Markdown, by its address."""
    written = {path.name: path.read_text(encoding="utf-8") for path in (ROOT / "docs").glob("*.md")}
    found = written | site.pages()
    return {uri: site.relink(text, site.origins().get(uri, f"docs/{uri}"), uri) for uri, text in found.items()}


def links(text: str) -> Iterator[tuple[str, str]]:
    """(target, anchor) of every link and picture that leads to another file."""
    for target, _, anchor in re.findall(r"\]\(([^)\s#]+)(#([^)\s]*))?\)", text):
        if not re.match(r"[a-z]+:", target):
            yield target, anchor


def anchors(site, text: str) -> set[str]:
    """What a link can point at within a page."""
    return {site.slug(title) for title in re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE)}


def nav() -> list[str]:
    """Addresses in the site's navigation."""

    def below(entry) -> Iterator[str]:
        values = entry if isinstance(entry, list) else entry.values() if isinstance(entry, dict) else [entry]
        for value in values:
            yield from [value] if isinstance(value, str) else below(value)

    return list(below(yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]))


def test_every_operator_has_a_page_and_its_place_in_the_navigation(pages):
    wanted = [f"kernels/{op}.md" for op in kernels.operators()]
    assert sorted(uri for uri in pages if uri.startswith("kernels/")) == wanted
    assert [uri for uri in nav() if uri.startswith("kernels/")] == wanted


def test_the_api_reference_has_every_public_name(pages):
    names = load("public_names")
    assert names.lazy_names() == aligntok._PUBLIC
    assert set(names.kernel_names()) == set(kernels.__all__)
    for name in aligntok.__all__:
        assert f"::: aligntok.{name}\n" in pages["api/aligntok.md"]
    for name, module in names.kernel_names().items():
        page = pages["api/kernels.md" if module.startswith("_") else f"kernels/{module}.md"]
        assert f"::: aligntok.kernels.{module}\n" in page and f'"{name}"' in page


@pytest.mark.parametrize("op", kernels.operators())
def test_the_page_of_an_operator_has_its_figures_and_calls_times_predicted(op, pages, site):
    page = pages[f"kernels/{op}.md"]
    assert "| registers | bytes spilled |" in page and f"benchmarks.bench_{op}" in page
    assert (" us, " in page) == ("the times are **predictions**" in page)
    for title in re.findall(r"\[([^]]+)\]\(\.\./results\.md#", page):
        assert f"## {title}\n" in (ROOT / "docs" / "results.md").read_text(encoding="utf-8")


def test_the_figures_are_those_of_the_report(site):
    rows = [
        {"kernel": "_f", "arch": 80, "registers": 31, "spilled_bytes": 0, "shared": 2048, "occupancy": 1.0},
        {"kernel": "_f", "arch": 80, "registers": 40, "spilled_bytes": 8, "shared": 2048, "occupancy": 0.5},
    ]
    [_, table] = site.code_table([row | {"hmma": 4, "hgmma": 0} for row in rows])
    assert table.splitlines()[-1] == "| `_f` | sm_80 | 2 | 31 to 40 | 0 to 8 | 2.0 | 50% to 100% | 4 |"


def test_every_page_in_the_navigation_exists_and_no_other(pages):
    assert sorted(nav()) == sorted(uri for uri in pages if not uri.startswith("recipes/"))


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_between_files_lead_somewhere(document, site):
    for target, anchor in links(document.read_text(encoding="utf-8")):
        path = document.parent / target
        assert path.exists(), f"{document.name} links to {target}"
        if anchor:
            assert anchor in anchors(site, path.read_text(encoding="utf-8")), f"{document.name}: {target}#{anchor}"


def test_links_between_pages_lead_somewhere(pages, site):
    for uri, text in pages.items():
        for target, anchor in links(text):
            path = (ROOT / "docs" / uri).parent.joinpath(target).resolve()
            page = path.relative_to(ROOT / "docs").as_posix()
            assert page in pages or path.exists(), f"{uri} links to {target}"
            if anchor:
                assert anchor in anchors(site, pages[page]), f"{uri}: {target}#{anchor}"


def test_a_section_of_the_readme_without_a_page_is_refused(site):
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    with pytest.raises(LookupError, match="News"):
        site.readme_pages(readme + "\n## News\n\nSomething.\n")


def layout(site) -> list[str]:
    """Paths in the list of the README's layout."""
    section = site.sections((ROOT / "README.md").read_text(encoding="utf-8"))["Project layout"]
    return [line.split("  ")[0] for line in section.split("```")[1].strip().splitlines()]


def test_what_the_layout_names_exists(site):
    section = site.sections((ROOT / "README.md").read_text(encoding="utf-8"))["Project layout"]
    inside = [f"aligntok/{path}" for path in re.findall(r"(?:zoo|training)/\w+", section)]
    beside = re.findall(r"`([\w/.]+)`", section)
    assert {"csrc", "tests", "tests/test_imports.py"} <= set(beside) and "aligntok/zoo/converters" in inside
    missing = [path for path in (*layout(site), *inside, *beside) if not (ROOT / path).exists()]
    assert missing == []


def test_the_layout_has_every_folder_in_the_order_of_imports(site):
    rooms = [f"aligntok.{Path(path).stem}" for path in layout(site)]
    folders = {f"aligntok.{path.parent.name}" for path in (ROOT / "aligntok").glob("*/__init__.py")}
    assert folders | {"aligntok.kernels"} <= set(rooms)
    levels = [LEVEL[room] for room in rooms]
    assert levels == sorted(levels, reverse=True)


def test_the_citation_names_the_paper_and_this_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert f'version = "{citation["version"]}"' in (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert "independent implementation" in citation["title"]
    assert citation["preferred-citation"]["url"].endswith("2509.25162")
