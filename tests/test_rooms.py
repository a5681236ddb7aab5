"""The rooms of spul: what may import what, what a package is called by, and what `import spul` loads and offers."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from graphlib import CycleError, TopologicalSorter
from importlib import import_module
from pathlib import Path

import pytest

import spul

ROOT = Path(spul.__file__).parent
# A room imports those before it. What lies in evaluation/ itself has an order of its own.
ROOMS = (
    *("losses", "models", "records", "data", "prompts", "layers", "gates", "rivals", "evaluation", "training"),
    *("serving", "commands"),
)
HEAVY = ("bitsandbytes", "sklearn", "scipy", "pandas", "matplotlib")


@dataclass(frozen=True)
class Import:
    """An import of a module of spul: of the whole module, or of one of its names."""

    by: str
    module: str
    name: str | None
    line: int
    is_for_types: bool

    def __str__(self) -> str:
        return f"{self.by}:{self.line} imports {self.module}{'' if self.name is None else '.' + self.name}"


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def modules() -> dict[str, tuple[Path, ast.Module]]:
    """Every module of spul, parsed."""
    return {module_name(path): (path, ast.parse(path.read_text("utf-8"))) for path in sorted(ROOT.rglob("*.py"))}


def packages() -> list[str]:
    return [name for name, (path, _) in modules().items() if path.name == "__init__.py"]


def room(module: str) -> str:
    """The room of a module; `python -m spul` stands with the commands that it runs."""
    own = module.split(".")[1]
    return "commands" if own == "__main__" else own


def below(node: ast.AST, is_for_types: bool = False) -> Iterator[tuple[ast.AST, bool]]:
    """All nodes, each with whether it is there for type checkers alone."""
    guarded = node.body if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING") else ()
    for child in ast.iter_child_nodes(node):
        flag = is_for_types or child in guarded
        yield child, flag
        yield from below(child, flag)


@cache
def imports() -> tuple[Import, ...]:
    """Every import of one module of spul by another, wherever it stands in it; those of spul/__init__.py aside."""
    found = []
    for by, (path, tree) in modules().items():
        if by == "spul":
            continue
        package = by if path.name == "__init__.py" else by.rpartition(".")[0]
        for node, is_for_types in below(tree):
            if isinstance(node, ast.Import):
                given = [(alias.name, None) for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                start = ".".join(package.split(".")[: len(package.split(".")) - node.level + 1]) if node.level else ""
                module = ".".join(part for part in (start, node.module) if part)
                given = [
                    (f"{module}.{alias.name}", None) if f"{module}.{alias.name}" in modules() else (module, alias.name)
                    for alias in node.names
                ]
            else:
                continue
            found += [
                Import(by, module, name, node.lineno, is_for_types)
                for module, name in given
                if module.split(".")[0] == "spul"
            ]
    return tuple(found)


def listed(found: list) -> str:
    return "".join(f"\n  {each}" for each in found)


def test_every_folder_is_a_room_and_every_room_a_folder():
    assert {room(name) for name in modules() if name != "spul"} == set(ROOMS)
    assert {path.name for path in ROOT.glob("*.py")} == {"__init__.py", "__main__.py"}
    assert {each.by for each in imports()} > {f"spul.{name}" for name in ROOMS}


def test_imports_only_go_down():
    """Also those for type checkers and those within functions."""
    rank = {name: i for i, name in enumerate(ROOMS)}
    upward = [each for each in imports() if each.module == "spul" or rank[room(each.module)] > rank[room(each.by)]]
    assert not upward, listed(upward)


def test_the_losses_know_nothing_of_spul():
    found = [each for each in imports() if room(each.by) == "losses" and room(each.module) != "losses"]
    assert not found, listed(found)


@pytest.mark.parametrize(
    ("part", "above"),
    [
        ("metrics", ("attacks", "report", "suite", "run")),
        ("attacks", ("report", "suite", "run")),
        ("report", ("suite", "run")),
    ],
)
def test_the_parts_of_evaluation_import_no_part_above_them(part, above):
    found = [
        each
        for each in imports()
        if each.by.startswith(f"spul.evaluation.{part}") and each.module.split(".")[1:2] == ["evaluation"]
        if each.module == "spul.evaluation" or each.module.split(".")[2] in above
    ]
    assert not found, listed(found)


def test_no_modules_import_each_other_in_a_circle():
    """Those for type checkers aside, which are never run; within one room these may point back."""
    graph: dict[str, set[str]] = {name: set() for name in modules()}
    for each in imports():
        if not each.is_for_types and each.by != each.module:
            graph[each.by].add(each.module)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_no_private_name_is_used_across_rooms():
    found = [each for each in imports() if room(each.by) != room(each.module)]
    private = [each for each in found if any(part.startswith("_") for part in f"{each.module}.{each.name}".split("."))]
    assert not private, listed(private)
    for by, (_, tree) in modules().items():  # module._name
        brought = {each.module.rpartition(".")[2] for each in found if each.by == by and each.name is None}
        used = [
            f"{by}:{node.lineno} uses {ast.unparse(node)}"
            for node in ast.walk(tree)
            if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__")
            if isinstance(node.value, ast.Name) and node.value.id in brought
        ]
        assert not used, listed(used)


def test_imports_within_spul_are_relative():
    """And those of another room name the module, so that a room's curated names may change."""
    absolute = [
        f"{by}:{node.lineno}"
        for by, (_, tree) in modules().items()
        for node in ast.walk(tree)
        if (isinstance(node, ast.ImportFrom) and not node.level and (node.module or "").split(".")[0] == "spul")
        or (isinstance(node, ast.Import) and any(alias.name.split(".")[0] == "spul" for alias in node.names))
    ]
    assert not absolute, listed(absolute)
    whole = [each for each in imports() if each.module in packages() and room(each.by) != room(each.module)]
    assert not whole, listed(whole)


def test_no_name_of_a_package_shadows_a_module_of_it():
    shadowed = []
    for name in modules():
        package, _, own = name.rpartition(".")
        module = import_module(name)
        if package and getattr(import_module(package), own) is not module:
            shadowed.append(name)
    assert not shadowed, listed(shadowed)


def test_every_package_has_a_docstring_of_one_line_and_offers_what_it_has():
    for name in packages():
        package = import_module(name)
        assert package.__doc__, name
        assert name == "spul" or "\n" not in package.__doc__.strip(), name
        assert sorted(set(package.__all__)) == sorted(package.__all__), name
        assert [each for each in package.__all__ if not hasattr(package, each)] == [], name


def test_the_public_face_is_small_resolvable_and_documented():
    assert 12 <= len(spul.__all__) <= 17
    assert set(spul.__all__) <= set(dir(spul))
    pages = (ROOT.parent / "docs" / "api.md").read_text("utf-8")
    for name in spul.__all__:
        public = getattr(spul, name)
        assert public.__name__ == name
        assert public.__doc__, name
        assert name in pages, name
    for name in ROOMS:  # import spul; spul.losses.NPO
        assert getattr(spul, name) is import_module(f"spul.{name}")
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = spul.nothing


def test_bitsandbytes_is_imported_where_a_quantized_base_is_met():
    top = [
        f"{by}:{node.lineno}"
        for by, (_, tree) in modules().items()
        for node in tree.body
        if isinstance(node, ast.Import | ast.ImportFrom) and "bitsandbytes" in ast.unparse(node)
    ]
    assert not top, listed(top)


def test_importing_spul_prints_nothing_and_loads_no_heavy_library():
    code = f"import sys, spul; print(*(name for name in {HEAVY} if name in sys.modules), end='')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT.parent)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_test_modules_import_helpers_and_not_each_other():
    for path in Path(__file__).parent.glob("*.py"):
        nodes = [node for node in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(node, ast.ImportFrom)]
        assert not [node.module for node in nodes if (node.module or "").startswith(("test_", "conftest"))], path.name


def test_every_dotted_name_of_spul_in_a_docstring_or_message_resolves():
    for name, (_, tree) in modules().items():
        for node in ast.walk(tree):
            if not (isinstance(node, ast.Constant) and isinstance(node.value, str)):
                continue
            for dotted in re.findall(r"\bspul(?:\.[A-Za-z_]\w*)+", node.value):
                found = spul
                for part in dotted.split(".")[1:]:
                    found = getattr(found, part, None) if found is not None else None
                assert found is not None, f"{name}:{node.lineno} names {dotted}"
