"""What dvai_bridge.py and rendezvous_server.py have in common is the same text in both, and needs nothing of either."""

import ast
import builtins
import re
import symtable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
BRIDGE, RELAY = ROOT / "dvai_bridge.py", ROOT / "rendezvous_server.py"
BLOCK = re.compile(
    r"^# -- begin: shared with [\w.]+: (?P<name>.+) --\n(?P<text>.*?)^# -- end: shared with [\w.]+: (?P=name) --\n",
    re.MULTILINE | re.DOTALL,
)


def read_source(path):
    return path.read_text("utf-8") if path.exists() else ""


def find_blocks(source):
    """Name and text of every marked block, in order."""
    blocks = {match["name"]: match["text"] for match in BLOCK.finditer(source)}
    assert len(blocks) * 2 == len(re.findall(r"^# -- (?:begin|end): shared", source, re.MULTILINE)), "a mark is alone"
    return blocks


def find_bound_names(nodes):
    """What these statements bind at module level."""
    names = set()
    for node in nodes:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names.update((alias.asname or alias.name).partition(".")[0] for alias in node.names)
        else:
            names.update(n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store))
    return names


def find_global_names(table):
    """Every name that is looked up in the module or the builtins."""
    is_module = table.get_type() == "module"
    found = {s.get_name() for s in table.get_symbols() if s.is_referenced() and (is_module or s.is_global())}
    return found.union(*map(find_global_names, table.get_children()))


def find_foreign_names(source):
    """Names that the blocks of a source use and that neither they nor the standard library's imports define."""
    text = "from __future__ import annotations\n" + "".join(find_blocks(source).values())
    imports = [node for node in ast.parse(source).body if isinstance(node, ast.Import | ast.ImportFrom)]
    known = find_bound_names([*ast.parse(text).body, *imports]) | set(dir(builtins))
    return find_global_names(symtable.symtable(text, "blocks", "exec")) - known - {"annotations"}


SHARED = find_blocks(read_source(BRIDGE))


def test_the_bridge_shares_its_websocket():
    assert "class WebSocketParser:" in SHARED["WebSocket"]


@pytest.mark.parametrize("name", dict.fromkeys([*SHARED, *find_blocks(read_source(RELAY))]))
def test_a_block_is_the_same_text_in_both_files(name):
    theirs = find_blocks(read_source(RELAY))
    assert name in SHARED
    assert name not in theirs or theirs[name] == SHARED[name]


@pytest.mark.parametrize("path", [BRIDGE, RELAY], ids=lambda path: path.name)
def test_blocks_need_nothing_of_the_file_they_stand_in(path):
    assert find_foreign_names(read_source(path)) == set()


def test_the_proof_sees_a_block_that_needs_more():
    text = "A = 1\n\n\ndef f(x: Any):\n    return A + x + {}\n"
    block = f"# -- begin: shared with b.py: X --\n{text}# -- end: shared with b.py: X --\n"
    assert find_foreign_names("import re\nB = 2\n" + block.format("re.I + len('')")) == set()
    assert find_foreign_names("import re\nB = 2\n" + block.format("B")) == {"B"}
