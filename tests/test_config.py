"""Options: one definition, four sources, one precedence."""

import dataclasses

import pytest

from dvai_bridge import (
    Config,
    DelegationConfig,
    OffloadConfig,
    UsageError,
    build_config,
    build_options_table,
    build_parser,
    get_options,
    normalize_config,
    parse_integer,
    parse_list,
    parse_switch,
)


def test_defaults_need_nothing():
    config = build_config()
    assert config.host is None and config.port is None and config.model is None


def test_precedence_is_flag_environment_file_default():
    file = {"ctx-size": 100, "port": 1}
    environ = {"DVAI_CTX_SIZE": "200", "LLAMA_ARG_CTX_SIZE": "150"}
    assert build_config(file=file).ctx_size == 100
    assert build_config(file=file, environ={"LLAMA_ARG_CTX_SIZE": "150"}).ctx_size == 150
    assert build_config(file=file, environ=environ).ctx_size == 200
    assert build_config(file=file, environ=environ, flags={"ctx_size": "300"}).ctx_size == 300


SEED_HEX, SEED = "21" * 32, "ISEhISEhISEhISEhISEhISEhISEhISEhISEhISEhISE"


def test_a_seed_has_two_spellings_and_stands_on_no_command_line():
    for text in (SEED_HEX, SEED_HEX.upper(), SEED):
        config = build_config(environ={"DVAI_SEED": text})
        assert config.offload.seed == SEED and SEED not in repr(config)
    for text in ("21" * 31, SEED + "A", SEED[:-1] + "F", SEED[:-1] + "=", "x" * 64):
        with pytest.raises(UsageError) as caught:
            build_config(environ={"DVAI_SEED": text})
        assert text not in caught.value.message and "32 bytes" in caught.value.message
    with pytest.raises(UsageError, match="DVAI_SEED"):
        build_config(flags={"offload.seed": SEED})


def test_an_empty_environment_variable_is_not_a_value():
    assert build_config(environ={"DVAI_PORT": ""}).port is None


def test_toml_types_mean_what_text_means():
    config = build_config(file={"cors-origins": ["http://a", "http://b"], "verbose": True, "port": 8080})
    assert config.cors_origins == ("http://a", "http://b") and config.verbose is True and config.port == 8080


@pytest.mark.parametrize(
    ("sources", "words"),
    [
        ({"flags": {"port": "70000"}}, ["--port", "'70000'", "0 to 65535"]),
        ({"flags": {"port": "８０"}}, ["--port", "whole number"]),
        ({"environ": {"DVAI_PARALLEL": "0"}}, ["DVAI_PARALLEL", "1 to 64"]),
        ({"environ": {"LLAMA_ARG_N_PARALLEL": "x"}}, ["LLAMA_ARG_N_PARALLEL"]),
        ({"file": {"prot": 1}}, ["config file", "'prot'"]),
        ({"file": {"port": {"a": 1}}}, ["config file: port", "dict"]),
        ({"file": {"port": 1.5}}, ["config file: port", "whole number"]),
        ({"flags": {"engine": "cuda"}}, ["--engine", "auto, builtin"]),
        ({"flags": {"allowed_hosts": "a,,b"}}, ["--allowed-hosts"]),
    ],
)
def test_a_wrong_value_names_its_place(sources, words):
    with pytest.raises(UsageError) as caught:
        build_config(**sources)
    assert all(word in caught.value.message for word in words), caught.value.message
    assert caught.value.exit_code == 2


def test_a_key_is_refused_on_the_command_line_and_hidden_everywhere():
    with pytest.raises(UsageError) as caught:
        build_config(flags={"api_key": "sk-secret"})
    assert "sk-secret" not in caught.value.message and "DVAI_API_KEY" in caught.value.message
    with pytest.raises(UsageError) as caught:
        build_config(environ={"DVAI_API_KEY": "sk-secret,"})
    assert "sk-secret" not in caught.value.message
    assert "sk-secret" not in repr(build_config(environ={"DVAI_API_KEY": "sk-secret"}))


@pytest.mark.parametrize("text", ["", "-1", "+5", "5_0", " 5", "5 ", "0x5", "1e2", "９", "99999999999999"])
def test_integers_are_plain_ascii_digits(text):
    with pytest.raises(ValueError, match="whole number"):
        parse_integer(0, 100)(text)


def test_switches_and_lists():
    assert [parse_switch(t) for t in ("TRUE", "on", "1", "No", "off", "0")] == [True, True, True, False, False, False]
    assert parse_list("a, b") == ("a", "b")
    with pytest.raises(ValueError, match="true or false"):
        parse_switch("maybe")


def test_every_field_is_an_option_with_its_own_names():
    options = get_options(Config)
    fields = {f.name for f in dataclasses.fields(Config)}
    for inner, config_class in (("offload", OffloadConfig), ("delegation", DelegationConfig)):
        fields |= {f"{inner}.{f.name}" for f in dataclasses.fields(config_class)}
    assert fields - set(options) == {"offload", "delegation"} | {
        f"offload.{name}" for name in ("on_pairing_request", "on_offload", "custom_discovery")
    }
    flags = [flag for opt in options.values() for flag in opt.flags]
    assert len(flags) == len(set(flags))
    renamed = {"offload.enabled": "offload", "offload.only": "offload_only", "offload.known_peers": "peer"}
    renamed |= {"delegation.provider_public_keys": "delegate", "delegation.timeout": "delegate_timeout"}
    renamed |= {"delegation.provides": "provide", "delegation.is_open": "open"}
    for name, opt in options.items():
        assert opt.name.replace("-", "_") == renamed.get(name, name.rpartition(".")[2])


def test_offload_options_make_a_config_of_their_own():
    config = build_config(
        flags={
            "offload.enabled": "true",
            "offload.discover_lan": "false",
            "offload.known_peers": "http://a:1,http://b/v1",
        },
        environ={"DVAI_MIN_LOCAL_CAPABILITY": "2.5", "DVAI_DISCOVER_LAN": "true"},
    )
    offload = config.offload
    assert offload.is_active and not offload.only and not offload.discover_lan
    assert offload.known_peers == ("http://a:1", "http://b/v1") and offload.min_local_capability == 2.5


@pytest.mark.parametrize(
    "url", ["a", "ftp://a", "http://", "http://u:p@a", "http://a/?x", "http://a:99999", "http://a:x"]
)
def test_a_peer_is_a_base_url(url):
    with pytest.raises(UsageError, match="--peer"):
        build_config(flags={"offload.known_peers": url})


def test_a_switch_that_is_on_can_be_turned_off():
    parse = build_parser().parse_args
    assert vars(parse(["serve", "--no-discover-lan"]))["offload.discover_lan"] == "false"
    assert vars(parse(["serve", "--peer", "http://a", "--peer", "http://b"]))["offload.known_peers"] == [
        "http://a",
        "http://b",
    ]
    assert "`--no-discover-lan`" in build_options_table(Config, "offload")


def test_the_table_lists_each_option_of_its_group():
    table = build_options_table(Config, "server")
    assert "| `--port` `PORT` | `DVAI_PORT`, `LLAMA_ARG_PORT` |" in table and "--model" not in table


def test_a_model_may_be_one_or_several():
    assert build_config().models == () and build_config(flags={"model": "a,b.gguf"}).models == ("a,b.gguf",)
    assert build_config(flags={"model": ["a", "b"]}).models == ("a", "b")
    assert build_config(environ={"DVAI_MODEL": "a\nb"}).models == ("a", "b")
    assert build_config(file={"model": ["a", "b"]}).model == ("a", "b")


def test_never_sleeping_is_written_as_llama_server_does():
    assert build_config(environ={"LLAMA_ARG_SLEEP_IDLE_SECONDS": "-1"}).sleep_idle_seconds == 0
    assert build_config(flags={"sleep_idle_seconds": "90"}).sleep_idle_seconds == 90
    with pytest.raises(UsageError):
        build_config(flags={"sleep_idle_seconds": "-2"})


# Values that a program sets


def test_a_program_may_use_its_own_types(tmp_path):
    offload = OffloadConfig(known_peers=["http://10.0.0.2:1", "http://10.0.0.3:1"], min_local_capability=2)
    config = normalize_config(Config(home=tmp_path, model=tmp_path / "a.gguf", api_key="sk-1", offload=offload))
    assert (config.home, config.model) == (str(tmp_path), str(tmp_path / "a.gguf"))
    assert config.api_key == ("sk-1",), "one key, not its characters"
    assert config.offload.known_peers == ("http://10.0.0.2:1", "http://10.0.0.3:1")
    assert config.offload.min_local_capability == 2.0 and normalize_config(config) == config
    assert normalize_config(Config()) == Config()
    several = normalize_config(Config(model=[tmp_path / "a.gguf", "/b.gguf"]))
    assert several.models == (str(tmp_path / "a.gguf"), "/b.gguf") and normalize_config(several) == several


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (Config(port="x"), "port 'x': it must be a whole number"),
        (Config(parallel=0), "parallel '0'"),
        (Config(timeout=None), "timeout: NoneType"),
        (Config(lan="perhaps"), "lan 'perhaps': it must be true or false"),
        (Config(model=""), "model ''"),
        (Config(api_key=["ok", ""]), "api_key: it must be texts"),
        (Config(offload=OffloadConfig(pairing="maybe")), "OffloadConfig.pairing 'maybe': it must be one of"),
        (Config(offload=OffloadConfig(known_peers="ftp://a")), "OffloadConfig.known_peers 'ftp://a'"),
        (Config(offload=OffloadConfig(expire_after_days=1.5)), "OffloadConfig.expire_after_days '1.5'"),
        (Config(offload=OffloadConfig(rendezvous_url="ftp://relay.example")), "URL of a relay"),
    ],
)
def test_a_wrong_value_of_a_program_names_its_field(config, words):
    with pytest.raises(UsageError) as caught:
        normalize_config(config)
    assert words in caught.value.message


def test_the_file_may_have_decimal_numbers():
    assert build_config(file={"min-local-capability": 2.5}).offload.min_local_capability == 2.5
