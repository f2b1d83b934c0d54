"""Write the generated tables into README.md:  python3 tests/update_readme.py

A table stands between `<!-- generated: NAME -->` and `<!-- end -->`; what is there is replaced.
"""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import dvai_bridge  # noqa: E402
import rendezvous_server  # noqa: E402

README = ROOT / "README.md"


def build_tables():
    tables = {f"options {g}": dvai_bridge.build_options_table(dvai_bridge.Config, g) for g in dvai_bridge.OPTION_GROUPS}
    tables["relay settings"] = rendezvous_server.build_settings_table()
    return tables | {"packages": dvai_bridge.build_packages_table()}


def update(text):
    """The README's text with every generated table as the module gives it now."""
    tables = build_tables()
    return re.sub(
        r"(<!-- generated: (.+?) -->\n).*?(<!-- end -->)",
        lambda match: match[1] + "\n" + tables[match[2]].strip("\n") + "\n\n" + match[3],
        text,
        flags=re.DOTALL,
    )


if __name__ == "__main__":
    README.write_text(update(README.read_text("utf-8")), "utf-8")
