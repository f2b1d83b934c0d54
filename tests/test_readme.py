"""The README says what the program does: its tables are the module's, its commands and routes exist."""

import re

import dvai_bridge
import rendezvous_server
from tests.support import MODULE
from tests.update_readme import update

README = MODULE.parent / "README.md"
TEXT = README.read_text("utf-8")


def test_the_tables_are_the_modules():
    assert update(TEXT) == TEXT, "run: python3 tests/update_readme.py"


def test_every_flag_that_it_names_exists():
    parser = dvai_bridge.build_parser()
    options = set(parser._option_string_actions)
    for action in parser._actions:
        for command in (getattr(action, "choices", None) or {}).values():
            options |= set(command._option_string_actions)
    options |= set(rendezvous_server.build_parser()._option_string_actions)
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", TEXT)) - {"--strict"}
    assert named <= options, named - options


def test_every_command_that_it_shows_exists():
    shown = set(re.findall(r"dvai_bridge\.py ([a-z]+)", TEXT))
    assert shown and shown <= set(dvai_bridge.COMMANDS)


def test_links_within_it_have_targets():
    headings = {heading.lower().replace(" ", "-") for heading in re.findall(r"^#+ (.+)$", TEXT, re.MULTILINE)}
    assert set(re.findall(r"\]\(#(.+?)\)", TEXT)) <= headings
