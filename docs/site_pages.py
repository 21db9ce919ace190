"""The site's pages that other files already hold, written while mkdocs builds it (a hook, see mkdocs.yml).

    README.md, by its sections         index, installation, training, layout
    CONTRIBUTING.md                    contributing
    configs/                           recipes, and a page for each file
    kernels/, hardware_report.json     a page for each operator: docstrings and figures
    aligntok, kernels                  api/: the public names
    benchmarks/results/                hardware_report, drill

Links between files of the repository become links between pages.
"""

import json
import posixpath
import re
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from public_names import lazy_names, operators, private_modules

ROOT = Path(__file__).resolve().parent.parent
# Page -> (its title, None for the README's own beginning; the README's sections on it). Every section is on one page.
README_PAGES = {
    "index.md": (
        None,
        ["Quickstart", "Usage", "Kernels", "Benchmarks", "Results", "Contributing", "Citation", "Licence"],
    ),
    "installation.md": ("Installation", ["Installation"]),
    "training.md": ("Training at full size", ["Training at full size", "Commands"]),
    "layout.md": ("Project layout", ["Project layout"]),
}
RESULTS = "benchmarks/results"
MODULE_TITLES = {"_dispatch": "Which implementation runs", "_philox": "Noise"}
RECIPE_GROUPS = {
    "": "Published settings, and the quickstart",
    "ablations": "The paper's ablations",
    "study": "The laptop study",
}


def on_files(files: Any, config: Any) -> Any:
    """mkdocs asks for the files of the site: add the generated ones."""
    from mkdocs.structure.files import File

    for uri, text in pages().items():
        files.append(File.generated(config, uri, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """mkdocs has read a page: follow its links into the repository."""
    uri = page.file.src_uri
    return relink(markdown, origins().get(uri, f"docs/{uri}"), uri)


def pages() -> dict[str, str]:
    """Every generated page, by its address below docs/."""
    found = readme_pages((ROOT / "README.md").read_text(encoding="utf-8"))
    for uri, origin in origins().items():
        if uri not in found:
            text = (ROOT / origin).read_text(encoding="utf-8")
            found[uri] = recipe_page(uri, origin, text) if origin.endswith(".yaml") else text
    found["recipes.md"] = recipes_page()
    for op, names in operators().items():
        found[f"kernels/{op}.md"] = operator_page(op, names)
    found["api/aligntok.md"] = aligntok_page()
    found["api/kernels.md"] = kernels_page()
    return found


def origins() -> dict[str, str]:
    """Generated page -> the file of the repository that it shows, from which its links start."""
    found = {uri: "README.md" for uri in README_PAGES}
    found |= {"contributing.md": "CONTRIBUTING.md"}
    found |= {f"{name}.md": f"{RESULTS}/{name}.md" for name in ("hardware_report", "drill")}
    return found | {f"recipes/{name}.md": f"configs/{name}.yaml" for name in recipes()}


def addresses() -> dict[str, str]:
    """File or folder of the repository -> the page that shows it."""
    found = {origin: uri for uri, origin in origins().items()}  # the README: readme_page
    found |= {f"kernels/{op}.py": f"kernels/{op}.md" for op in operators()}
    return found | {"configs": "recipes.md"}


def relink(markdown: str, origin: str, uri: str) -> str:
    """Links of a file of the repository, for its page at `uri`."""
    known = addresses()

    def link(match: re.Match) -> str:
        target, anchor = match[1], match[2] or ""
        if re.match(r"[a-z]+:|#|/", target):
            return match[0]
        path = posixpath.normpath(posixpath.join(posixpath.dirname(origin), target))
        page = known.get(path, path.removeprefix("docs/") if path.startswith("docs/") else None)
        if path == "README.md":
            page = readme_page(anchor.removeprefix("#"))
        if page is None:
            return match[0]
        return f"]({posixpath.relpath(page, posixpath.dirname(uri) or '.')}{anchor})"

    return re.sub(r"\]\(([^)\s#]+)(#[^)\s]*)?\)", link, markdown)


def sections(text: str) -> dict[str, str]:
    """Title -> text of the `## ` sections of a page; "" is what comes before the first."""
    beginning, *rest = re.split(r"^## (.+)$", text, flags=re.MULTILINE)
    return {"": beginning.strip()} | {title: body.strip() for title, body in zip(rest[::2], rest[1::2], strict=True)}


def readme_pages(readme: str) -> dict[str, str]:
    """The README's sections, each on its page.

    Raises:
        LookupError: a section has no page, or a page wants one that is not there.
    """
    found = sections(readme)
    wanted = [name for _, names in README_PAGES.values() for name in names]
    if sorted(wanted) != sorted(found.keys() - {""}):
        raise LookupError(
            f"README.md has the sections {sorted(found.keys() - {''})}, the site's pages {sorted(wanted)}"
        )
    written = {}
    for uri, (title, names) in README_PAGES.items():
        start = found[""] if title is None else f"# {title}"
        parts = [found[name] if name == title else f"## {name}\n\n{found[name]}" for name in names]
        written[uri] = "\n\n".join([start, *parts]) + "\n"
    return written


def readme_page(anchor: str) -> str:
    """The page with a section of the README."""
    pages = [uri for uri, (_, names) in README_PAGES.items() if anchor in map(slug, names)]
    return pages[0] if pages else "index.md"


def recipes() -> dict[str, Path]:
    """Name -> file of every recipe."""
    folder = ROOT / "configs"
    return {path.relative_to(folder).with_suffix("").as_posix(): path for path in sorted(folder.rglob("*.yaml"))}


def described(recipe: str) -> str:
    """The comment at the head of a recipe, as one line."""
    lines = []
    for line in recipe.splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.lstrip("# "))
    return " ".join(lines)


def recipes_page() -> str:
    """All recipes in tables: what each is based on, and its own first lines."""
    parts = [
        "# Recipes",
        "`--config NAME` takes one of these names, or the path of a file of your own; "
        "[Training at full size](training.md) says how values are overridden.",
    ]
    for group, title in RECIPE_GROUPS.items():
        rows = []
        for name, path in recipes().items():
            if name.rpartition("/")[0] == group:
                text = path.read_text(encoding="utf-8")
                base = re.search(r"^base: *(\S+)", text, flags=re.MULTILINE)
                below = posixpath.normpath(posixpath.join(group, base[1])) if base else ""
                cell = f"[{below}](recipes/{below}.md)" if base else ""
                rows.append(f"| [{name}](recipes/{name}.md) | {described(text)} | {cell} |")
        parts += [f"## {title}", "\n".join(["| recipe | what it is | on top of |", "|---|---|---|", *rows])]
    return "\n\n".join(parts) + "\n"


def recipe_page(uri: str, origin: str, text: str) -> str:
    """One recipe as it is."""
    name = uri.removeprefix("recipes/").removesuffix(".md")
    back = posixpath.relpath("recipes.md", posixpath.dirname(uri))
    return f"# {name}\n\n`{origin}`; all others: [Recipes]({back}).\n\n```yaml\n{text}```\n"


def operator_page(op: str, names: list[str]) -> str:
    """Formula and functions from the docstrings of kernels/<op>.py, figures from the hardware report."""
    references = [f"{name}_reference" for name in names]
    parts = [
        f"# {op}",
        where_it_lies(op),
        directive(f"aligntok.kernels.{op}", show_root_heading=False, show_root_toc_entry=False, members=names),
        "## In plain PyTorch",
        "What every other implementation is compared with.",
        *(
            directive(f"aligntok.kernels.{op}.{name}", heading_level=3, show_root_full_path=False, show_source=True)
            for name in references
        ),
        *figures(op),
    ]
    return "\n\n".join(parts) + "\n"


def where_it_lies(op: str) -> str:
    """The files of an operator, and what else is said of it."""
    sources = [f"kernels/{op}.py", *sorted(f"csrc/{path.name}" for path in (ROOT / "csrc").glob(f"{op}*.c*"))]
    tests = sorted(path.name for path in (ROOT / "tests" / "kernels").glob(f"test_{op}*.py"))
    code = ", ".join(f"`{source}`" for source in sources)
    tested = ", ".join(f"`{test}`" for test in tests)
    results = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    timed = [title for title, text in sections(results).items() if title and f"bench_{op} " in text]
    measured = "".join(f" Measured on a CPU: [{title}](../results.md#{slug(title)})." for title in timed)
    return (
        f"Source: {code}. Tests: {tested} in `tests/kernels/`. Benchmark: `python -m benchmarks.bench_{op}`. "
        f"Callers and implementations: [the overview](../kernels.md).{measured}"
    )


def slug(title: str) -> str:
    """A heading's anchor."""
    return re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", title).strip().lower())


def directive(identifier: str, **options: Any) -> str:
    """What mkdocstrings replaces by the documentation of an object."""
    lines = [f"      {name}: {json.dumps(value)}" for name, value in options.items()]
    return "\n".join([f"::: {identifier}", *(["    options:", *lines] if lines else [])])


def figures(op: str) -> list[str]:
    """What the hardware report says of an operator: traffic, predicted times, machine code."""
    report = (ROOT / RESULTS / "hardware_report.md").read_text(encoding="utf-8")
    data = json.loads((ROOT / RESULTS / "hardware_report.json").read_text(encoding="utf-8"))
    made_by = sections(report)[""].split("\n\n")[1]
    parts = ["## Figures", f"{made_by} [How they are counted](../hardware_report.md#traffic-and-roofline)."]
    traffic = traffic_table(op, sections(report)["Traffic and roofline"])
    code = code_table([row for row in data["code"] if row["op"] == op])
    cuda = cuda_table([row for row in data["cuda"] if row["source"].startswith(f"{op}_cuda")])
    if traffic:
        parts += ["### Memory traffic and predicted times", *traffic]
    if code:
        parts += ["### Machine code of the Triton kernels", *code]
    if cuda:
        parts += ["### Machine code of the CUDA kernels", *cuda]
    if not traffic + code + cuda:
        parts.append(f"The report has no figures of `{op}`.")
    return parts


def traffic_table(op: str, section: str) -> list[str]:
    """The report's lines of one operator, as far as a page is wide, and its warnings about that operator."""
    head, _, *lines = [line for line in section.splitlines() if line.startswith("|")]
    names = [cell.strip() for cell in head.strip("| ").split("|")]
    rows = [[cell.strip() for cell in line.strip("| ").split("|")] for line in lines]
    kept = [name for name in names if name.endswith(" MB") or name.endswith("(predicted)")]
    columns = ["workload", *(name for name in kept if name != "with re-reads MB")]
    columns.insert(2, "of minimum")
    cells = [[row[names.index(name)] for name in columns] for row in rows if row[names.index("op")] == op]
    if not cells:
        return []
    warnings = [sentence for sentence in re.split(r"(?<=\.) ", section.split("\n\n")[0]) if f"`{op}`" in sentence]
    note = "No GPU has run this: the times are **predictions** from data sheets."
    return [" ".join([note, *warnings]), table(columns, cells)]


def code_table(rows: list[dict[str, Any]]) -> list[str]:
    """One line for each kernel and architecture, with the range over its codes."""
    groups: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["kernel"], row["arch"]), []).append(row)
    cells = []
    for (kernel, arch), codes in groups.items():
        spread = [span([code[name] for code in codes]) for name in ("registers", "spilled_bytes")]
        shared = span([code["shared"] / 1024 for code in codes], ".1f")
        occupancy = span([code["occupancy"] for code in codes], ".0%")
        tensor_cores = span([code["hmma"] + code["hgmma"] for code in codes])
        cells.append([f"`{kernel}`", f"sm_{arch}", str(len(codes)), *spread, shared, occupancy, tensor_cores])
    columns = [
        "kernel",
        "for",
        "codes",
        "registers",
        "bytes spilled",
        "shared KiB",
        "occupancy",
        "tensor-core instructions",
    ]
    note = "From the smallest to the largest over the distinct codes that the workloads need."
    return [note, table(columns, cells)] if cells else []


def cuda_table(rows: list[dict[str, Any]]) -> list[str]:
    """One line for each instance of a CUDA kernel, with its figures on every architecture."""
    names = ("registers", "spilled_bytes", "shared")
    instances: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        instances.setdefault(row["kernel"], []).append(row)
    cells = []
    for kernel, found in instances.items():
        figures = (" / ".join(str(row[name]) for row in found) for name in names)
        cells.append([f"`{kernel}`", " / ".join(f"sm_{row['arch']}" for row in found), *figures])
    return [table(["kernel", "for", "registers", "bytes spilled", "bytes shared"], cells)] if cells else []


def span(values: list[float], form: str = "") -> str:
    """Smallest and largest of some numbers, once where they are equal."""
    ends = dict.fromkeys(format(value, form) for value in (min(values), max(values)))
    return " to ".join(ends)


def table(columns: list[str], cells: list[list[str]]) -> str:
    """A Markdown table."""
    rule = "|---" * len(columns) + "|"
    return "\n".join([f"| {' | '.join(columns)} |", rule, *(f"| {' | '.join(row)} |" for row in cells)])


def aligntok_page() -> str:
    """The names that `import aligntok` gives."""
    whole = directive("aligntok", show_root_heading=False, show_root_toc_entry=False, members=False)
    return "\n\n".join(["# aligntok", whole, *(directive(f"aligntok.{name}") for name in sorted(lazy_names()))]) + "\n"


def kernels_page() -> str:
    """The names of `aligntok.kernels` that are no operators, and links to those that are."""
    ops = operators()
    lines = [f"- [{', '.join(f'`{name}`' for name in names)}](../kernels/{op}.md)" for op, names in ops.items()]
    whole = directive("aligntok.kernels", show_root_heading=False, show_root_toc_entry=False, members=False)
    parts = ["# aligntok.kernels", whole, "## Operators", "\n".join(lines)]
    for module, names in private_modules().items():
        title = MODULE_TITLES.get(module, module)
        parts.append(directive(f"aligntok.kernels.{module}", heading=title, toc_label=title, members=names))
    return "\n\n".join(parts) + "\n"
