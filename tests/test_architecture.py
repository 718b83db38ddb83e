"""Dependencies point only downwards (DESIGN §2), and what is pure stays pure."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = {"moe_layer": ROOT / "moe_layer", "eplb": ROOT / "eplb", "moe_kernels": ROOT / "kernels" / "moe_kernels"}

# Arrays in and out; no device, thread, stream or process group (DESIGN §2).
PURE = ("planning", "rounds.protocol")
NOT_PURE = ("torch", "threading", "multiprocessing", "asyncio", "concurrent", "socket", "random")


def modules(package: str) -> dict[str, Path]:
    """Every module of a package, by its dotted name."""
    folder = PACKAGES[package]
    found = {}
    for path in sorted(folder.rglob("*.py")):
        parts = [package, *path.relative_to(folder).with_suffix("").parts]
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(name: str, path: Path) -> set[str]:
    """Dotted names of all that a module imports, wherever in it; `from a import b` gives `a` and `a.b`."""
    inside = name if path.stem == "__init__" else name.rpartition(".")[0]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            if node.level:
                base = inside.split(".")[: len(inside.split(".")) - node.level + 1]
                module = ".".join([*base, *([module] if module else [])])
            found |= {module} | {f"{module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            found |= {argument.value for argument in node.args if isinstance(argument, ast.Constant)}
    return {name for name in found if isinstance(name, str)}


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


@pytest.mark.parametrize(
    ("package", "forbidden"),
    [
        ("moe_kernels", ("moe_layer", "eplb")),
        ("eplb", ("moe_layer", "moe_kernels")),
        ("moe_layer", ("tests", "examples", "bench")),
    ],
)
def test_dependencies_point_downwards(package, forbidden):
    found = modules(package)
    assert len(found) > 5, "the scan finds nothing"
    wrong = {
        name: sorted(one for one in imports(name, path) if any(within(one, other) for other in forbidden))
        for name, path in found.items()
    }
    assert not {name: ones for name, ones in wrong.items() if ones}


def test_the_layer_uses_both():
    """What would also fail if the scan saw no imports."""
    found = set().union(*(imports(name, path) for name, path in modules("moe_layer").items()))
    assert any(within(one, "eplb") for one in found) and any(within(one, "moe_kernels") for one in found)


@pytest.mark.parametrize("part", PURE)
def test_what_is_pure_leads_to_nothing_that_acts(part):
    """Neither itself nor through what it imports, so none of the acting modules either."""
    found = modules("eplb")
    waiting = [(name,) for name in found if within(name, f"eplb.{part}")]
    assert waiting, f"there is no eplb.{part}"
    seen = set()
    while waiting:
        way = waiting.pop()
        all_imports = imports(way[-1], found[way[-1]])
        wrong = sorted(one for one in all_imports if any(within(one, other) for other in NOT_PURE))
        assert not wrong, f"{' → '.join(way)} imports {wrong}"
        # (`import eplb.planning.plan` also runs eplb/__init__.py, which only gathers names.)
        new = {one for one in all_imports if one in found and one != "eplb"} - seen
        seen |= new
        waiting += [(*way, one) for one in new]


def test_the_planning_process_leads_to_no_pytorch():
    """It would take seconds and hundreds of megabytes to start."""
    found, waiting, seen = modules("eplb"), ["eplb.plan_process"], set()
    while waiting:
        name = waiting.pop()
        all_imports = imports(name, found[name])
        assert not [one for one in all_imports if within(one, "torch") or within(one, "pydantic")], name
        new = {one for one in all_imports if one in found and one != "eplb"} - seen
        seen |= new
        waiting += new
    assert "eplb.planning.policy.adaptive" in seen and "eplb.rounds.messages" in seen


@pytest.mark.parametrize("acting", ["relocation", "rounds.exchange", "worker", "controller", "connect"])
def test_what_acts_would_be_found(acting):
    """The scan sees threads and devices where they are."""
    found = {name: path for name, path in modules("eplb").items() if within(name, f"eplb.{acting}")}
    everything = set().union(*(imports(name, path) for name, path in found.items()))
    assert any(within(one, other) for one in everything for other in NOT_PURE)


def in_no_circle(graph: dict[str, set[str]]) -> None:
    done: set[str] = set()

    def visit(name: str, way: tuple[str, ...]) -> None:
        assert name not in way, f"a circle: {' → '.join((*way[way.index(name) :], name))}"
        if name not in done:
            for other in sorted(graph.get(name, ())):
                visit(other, (*way, name))
            done.add(name)

    for name in sorted(graph):
        visit(name, ())


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_go_round_in_no_circle(package):
    found = modules(package)
    graph = {}
    for name, path in found.items():
        if name != package:  # the package's own __init__ only gathers names
            graph[name] = {one for one in imports(name, path) if one in found and one not in (package, name)}
    graph.get("moe_layer.router", set()).discard("moe_layer.hf.fuse")  # imported when `from_config` is called
    in_no_circle(graph)


@pytest.mark.parametrize("package", ["moe_layer", "moe_kernels"])
def test_folders_stand_one_above_the_other(package):
    """No two folders import from each other, also not through others; a file beside the folders counts as one."""
    found = modules(package)
    graph: dict[str, set[str]] = {}
    for name, path in found.items():
        if name != package:
            folder = name.split(".")[1]
            others = {one.split(".")[1] for one in imports(name, path) if one in found and one != package}
            graph.setdefault(folder, set()).update(others - {folder})
    graph.get("router", set()).discard("hf")  # as above
    in_no_circle(graph)


def test_no_top_level_package_named_kernels():
    """An installed `kernels` would overwrite Hugging Face's package of that name."""
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert not list((ROOT / "kernels").glob("*.py"))
    for package in PACKAGES:
        for name, path in modules(package).items():
            wrong = {one for one in imports(name, path) if within(one, "kernels")}
            assert not wrong, f"{name} imports {wrong}"


@pytest.mark.parametrize("package", PACKAGES)
def test_typed(package):
    assert (PACKAGES[package] / "py.typed").is_file()


def test_files_are_of_a_size_to_be_read():
    """One concept a file: none over 350 lines, the median near 100."""
    lines = {
        name: len(path.read_text().splitlines()) for package in PACKAGES for name, path in modules(package).items()
    }
    assert max(lines.values()) <= 350, max(lines, key=lambda name: lines[name])
    assert sorted(lines.values())[len(lines) // 2] <= 140


def test_the_roots_are_the_ones_that_are_installed():
    """`import moe_kernels` finds the folder under kernels/ here, by pytest's `pythonpath`."""
    import moe_kernels

    assert Path(moe_kernels.__file__).parent == PACKAGES["moe_kernels"]
