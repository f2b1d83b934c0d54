"""The command line's own logic; its commands run for real in test_end_to_end.py."""

from pathlib import Path

import pytest

import dvai_bridge
from dvai_bridge import (
    PLANNED_COMMANDS,
    PLANNED_OPTIONS,
    ProgressLine,
    UsageError,
    build_program_name,
    build_survey,
    build_survey_json,
    load_config,
    parse_command_line,
    summarize_usages,
)
from dvai_bridge import Usage as EngineUsage
from tests.test_bridge import found
from tests.test_engine import INFO


@pytest.mark.parametrize("words", [[], ["-c", "64"], ["--model", "x.gguf"], ["serve", "--port", "1"]])
def test_serve_is_the_default_command(words):
    assert parse_command_line(words).command == "serve"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["serve", "--por", "1"], "--por"),  # no abbreviations: they would change meaning with every new option
        (["serve", "x"], "'x'"),
        (["bench", "--port", "1"], "--port"),
        (["serve", "--port"], "--port"),
        *((["serve", option], f"{option} is not in this version") for option in PLANNED_OPTIONS),
        *(([command], f"{command} is not in this version") for command in PLANNED_COMMANDS),
    ],
)
def test_what_is_not_there_is_named(words, message):
    with pytest.raises(UsageError) as caught:
        parse_command_line(words)
    assert message in caught.value.message and "\n" not in caught.value.message


def test_planned_names_are_not_options_already():
    flags = {flag for opt in dvai_bridge.get_options(dvai_bridge.Config).values() for flag in opt.flags}
    assert not flags & set(PLANNED_OPTIONS) and not set(PLANNED_COMMANDS) & set(dvai_bridge.COMMANDS)


def test_the_configuration_file_of_the_data_directory_is_read(tmp_path):
    arguments = parse_command_line(["serve", "--home", str(tmp_path), "--port", "2"])
    directories = load_config(arguments, {})[1]
    directories.data.mkdir(parents=True, exist_ok=True)
    (directories.data / "config.toml").write_text("ctx-size = 77\nport = 1\n")
    config, _ = load_config(arguments, {})
    assert (config.ctx_size, config.port) == (77, 2) and tmp_path in directories.data.parents


def test_a_configuration_file_that_was_named_must_be_sound(tmp_path):
    path = tmp_path / "other.toml"
    for text, words in (("port = ", "other.toml"), ('prot = "1"', "'prot'")):
        path.write_text(text)
        with pytest.raises(UsageError, match=words):
            load_config(parse_command_line(["serve", "--config", str(path)]), {"DVAI_HOME": str(tmp_path)})


def test_progress_is_a_line_every_tenth_where_no_terminal_is(monkeypatch, capsys):
    monkeypatch.setattr(dvai_bridge, "PROGRESS_AFTER_S", 0)
    progress = ProgressLine("loading")
    for step in range(101):
        progress.show(step / 100)
    lines = capsys.readouterr().err.splitlines()
    assert lines == [f"loading: {percent} %" for percent in range(0, 101, 10)]


def test_progress_rewrites_its_line_on_a_terminal_and_quick_work_shows_none(monkeypatch, capsys):
    monkeypatch.setattr(dvai_bridge.sys.stderr, "isatty", lambda: True, raising=False)
    quick = ProgressLine("loading")
    quick.show(0.5)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(dvai_bridge, "PROGRESS_AFTER_S", 0)
    monkeypatch.setattr(dvai_bridge.sys.stderr, "isatty", lambda: True, raising=False)
    slow = ProgressLine("loading")
    slow.show(0.5)
    slow.show(1.0)
    assert capsys.readouterr().err == "\rloading: 50 %\rloading: 100 %\n"


def test_the_survey_gives_a_command_or_the_obstacle():
    models = [
        found(Path("/m/a.gguf"), "a"),
        found(Path("/m/b.gguf"), "b", obstacle="needs about 9 GB and 1 GB are left"),
    ]
    text = "\n".join(build_survey(models, [], "python3 dvai_bridge.py"))
    assert "python3 dvai_bridge.py serve --model /m/a.gguf" in text and "9 GB" in text and "/m/b.gguf" not in text
    shown = build_survey_json(models, [], "python3 dvai_bridge.py")
    assert [model["id"] for model in shown["models"]] == ["dvai-demo", "a", "b"]
    assert [model["obstacle"] for model in shown["models"]][:2] == [None, None] and shown["engines"] == []
    assert "./models" in build_survey([], [], "x")[0]


def test_commands_to_copy_start_as_the_user_started():
    assert build_program_name("/opt/my tools/dvai_bridge.py") == "python3 '/opt/my tools/dvai_bridge.py'"
    assert build_program_name("/usr/local/bin/dvai-bridge") == "dvai-bridge"


def test_rates_leave_out_what_the_cache_gave():
    usages = [
        EngineUsage(prompt_tokens=10, cached_tokens=4, completion_tokens=5, prompt_ms=100.0, predicted_ms=250.0),
        EngineUsage(prompt_tokens=14, cached_tokens=0, completion_tokens=5, prompt_ms=100.0, predicted_ms=250.0),
    ]
    measured = summarize_usages(INFO, 1.5, usages, None)
    assert (measured.prefill_tok_per_s, measured.decode_tok_per_s) == (100.0, 20.0)
    assert (measured.prompt_tokens, measured.completion_tokens) == (20, 10)
