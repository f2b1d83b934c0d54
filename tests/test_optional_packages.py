"""Section Optional packages: what is installed is seen without being imported."""

import subprocess
import sys
from pathlib import Path

import dvai_bridge
from dvai_bridge import OPTIONAL_PACKAGES, build_packages_table, find_packages

FOLDER = Path(dvai_bridge.__file__).parent


def test_extras_exist_in_the_packaging():
    import tomllib

    extras = tomllib.loads((FOLDER / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for optional in OPTIONAL_PACKAGES:
        assert optional.extra in extras
        if optional.module != "jinja2":  # comes with llama-cpp-python
            assert extras[optional.extra][0].startswith(optional.package)


def test_found_and_missing_packages(tmp_path, monkeypatch):
    (tmp_path / "zeroconf.py").write_text("raise SystemExit('it must not be imported')")
    (tmp_path / "zeroconf-1.2.3.dist-info").mkdir()
    (tmp_path / "zeroconf-1.2.3.dist-info" / "METADATA").write_text("Name: zeroconf\nVersion: 1.2.3\n")
    (tmp_path / "qrcode.py").write_text("")
    program = (
        "import sys; sys.path[:0] = sys.argv[1:]; sys.modules['websockets'] = None\n"
        "import dvai_bridge as b; before = set(sys.modules)\n"
        "for optional, version in b.find_packages(): print(optional.module, version, sep='=')\n"
        "assert not {o.module for o in b.OPTIONAL_PACKAGES} & (set(sys.modules) - before)\n"
    )
    arguments = [sys.executable, "-S", "-c", program, str(FOLDER), str(tmp_path)]
    result = subprocess.run(arguments, capture_output=True, text=True, timeout=60, check=True)
    assert result.stdout.split() == [
        "llama_cpp=None",
        "cryptography=None",
        "zeroconf=1.2.3",
        "websockets=None",
        "qrcode=of",
        "unknown",
        "version",
        "jinja2=None",
    ]


def test_a_module_without_a_spec_is_not_there(monkeypatch):
    import types

    monkeypatch.setitem(sys.modules, "qrcode", types.ModuleType("qrcode"))
    assert {optional.module: version for optional, version in find_packages()}["qrcode"] is None


def test_table_has_a_row_for_each():
    rows = build_packages_table().splitlines()
    assert len(rows) == 2 + len(OPTIONAL_PACKAGES)
    assert all(row.count("|") == 4 for row in rows)
    assert "| zeroconf (`discovery`) |" in rows[4]
