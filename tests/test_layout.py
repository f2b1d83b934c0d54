"""The module reads top to bottom: a section uses only names defined in itself or above it."""

import ast
import glob
import os
import shutil
import subprocess
import symtable
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MODULES = ["dvai_bridge.py", "rendezvous_server.py"]


@pytest.fixture(scope="module")
def trees():
    """What each module says, which takes seconds to read and is not changed."""
    return {module: ast.parse((ROOT / module).read_text("utf-8")) for module in MODULES}


def read_sections(source):
    """First line number and title of every section, in order."""
    lines = source.splitlines()
    return [(n, line[7:].split(" --")[0]) for n, line in enumerate(lines, 1) if line.startswith("# ---- ")]


def section_of(sections, line):
    return max((i for i, (start, _) in enumerate(sections) if start <= line), default=-1)


def walk_module_level(nodes):
    """Every node that runs at import, without the insides of functions and classes."""
    for node in nodes:
        yield node
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Lambda):
            yield from walk_module_level(ast.iter_child_nodes(node))


def find_definitions(tree):
    """Every name bound at module level, with the line that binds it first."""
    found = {}
    for node in walk_module_level(tree.body):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found.setdefault(node.name, node.lineno)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.setdefault(node.id, node.lineno)
    return found


def find_global_references(table):
    """(line of the function, name) for every global that a function or class body reads."""
    for child in table.get_children():
        if child.get_type() in ("function", "class"):
            for symbol in child.get_symbols():
                if symbol.is_referenced() and symbol.is_global():
                    yield child.get_lineno(), symbol.get_name()
        yield from find_global_references(child)


def find_forward_references(source, tree):
    sections = read_sections(source)
    titles = [title for _, title in sections]
    defined = {k: section_of(sections, line) for k, line in find_definitions(tree).items()}
    found = []
    for line, ref in find_global_references(symtable.symtable(source, "module", "exec")):
        here = section_of(sections, line)
        if defined.get(ref, here) > here:
            found.append(f"{titles[here]}: {ref} is defined in {titles[defined[ref]]}")
    return found


@pytest.mark.parametrize("module", MODULES)
def test_sections_use_only_names_from_above(module, trees):
    assert find_forward_references((ROOT / module).read_text("utf-8"), trees[module]) == []


@pytest.mark.parametrize("module", MODULES)
def test_no_section_gives_a_name_of_another_a_second_meaning(module, trees):
    seen, twice = set(), []
    for node in trees[module].body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names = [node.name]
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names = [(alias.asname or alias.name).partition(".")[0] for alias in node.names]
        elif isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None:
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names = [target.id for target in targets if isinstance(target, ast.Name)]
        else:
            continue
        twice += [name for name in names if name in seen]
        seen.update(names)
    assert twice == []


def test_the_proof_sees_a_forward_reference():
    source = "# ---- One ---\ndef f():\n    return g()\n# ---- Two ---\ndef g():\n    return 1\n"
    assert find_forward_references(source, ast.parse(source)) == ["One: g is defined in Two"]


@pytest.mark.parametrize("module", MODULES)
def test_sections_open_with_a_title_and_a_sentence(module):
    lines = (ROOT / module).read_text("utf-8").splitlines()
    for number, title in read_sections("\n".join(lines)):
        assert len(lines[number - 1]) == 89, title
        assert lines[number].startswith("# ") and lines[number].endswith("."), title


@pytest.mark.parametrize("module", MODULES)
def test_functions_and_classes_stay_small(module, trees):
    nodes = list(ast.walk(trees[module]))
    functions = [n for n in nodes if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
    assert [f.name for f in functions if f.end_lineno - f.lineno >= 60] == []
    classes = [n for n in nodes if isinstance(n, ast.ClassDef)]
    assert [c.name for c in classes if c.end_lineno - c.lineno >= 500] == []


@pytest.mark.parametrize("module", MODULES)
def test_public_names_say_what_they_are(module, trees):
    named = [n for n in trees[module].body if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)]
    assert [n.name for n in named if not n.name.startswith("_") and not ast.get_docstring(n)] == []


@pytest.mark.parametrize("module", MODULES)
def test_the_standard_library_is_enough(module):
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import {module[:-3]}"
    done = subprocess.run([sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize("module", MODULES)
def test_an_older_python_gets_one_sentence(module):
    ast.parse((ROOT / module).read_text("utf-8"), feature_version=(3, 8))
    versions = os.path.expanduser("~/.pyenv/versions/3.*/bin/python3")
    found = {shutil.which(f"python3.{minor}") for minor in (8, 9, 10)} | set(glob.glob(versions))
    for python in sorted(filter(None, found)):
        command = [python, "-c", "import sys; print(sys.version_info[1])"]
        minor = subprocess.run(command, capture_output=True, text=True).stdout.strip()
        if minor in ("8", "9", "10"):
            done = subprocess.run([python, str(ROOT / module)], capture_output=True, text=True)
            assert done.returncode == 1 and done.stdout == "", python
            assert done.stderr.count("\n") == 1 and "3.11" in done.stderr, done.stderr
