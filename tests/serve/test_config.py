"""The configuration: defaults, a file, flags; what is wrong in it is one line that says where.

python -m pytest tests/serve/test_config.py
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from qwen3c.cli.options import new_parser
from qwen3c.cli.serve import SETTINGS
from qwen3c.serve.config import ModelSettings, Settings, UpstreamSettings, read, settings, size, to_toml

NAMES = {setting: "--" + dest.replace("_", "-") for dest, setting in SETTINGS.items()} | {
    "default_model": "MODEL"
}


def load(folder: Path, text: str, **flags: Any) -> Settings:
    (folder / "serve.toml").write_text(text)
    return settings(str(folder / "serve.toml"), flags, NAMES)


def test_flags_win_over_the_file_and_the_file_over_defaults(tmp_path: Path) -> None:
    made = load(tmp_path, 'port = 1\nqueue = 2\ncache_memory = "1.5 GiB"\n[models]\na = "a.bin"', port=3)
    assert (made.port, made.queue, made.running, made.cache_memory) == (3, 2, 64, 3 << 29)
    assert made.models == {"a": ModelSettings(str(tmp_path / "a.bin"))}


def test_the_file_of_what_is_spent_lies_beside_the_file_that_names_it(tmp_path: Path) -> None:
    made = load(tmp_path, '[upstream]\nurl = "https://u/v1"\nmodel = "m"\nstate_file = "spent"')
    assert made.upstream is not None and made.upstream.state_file == str(tmp_path / "spent")


def test_models_of_flags_come_before_those_of_the_file_and_in_place_of_namesakes(tmp_path: Path) -> None:
    text = '[models]\na = "a.bin"\nb = { path = "/b.bin", kv = "int8" }'
    made = load(tmp_path, text, models={"c": "/c.bin", "a": "/other.bin"}, default_model="b")
    assert {alias: model.path for alias, model in made.models.items()} == {
        "c": "/c.bin",
        "a": "/other.bin",
        "b": "/b.bin",
    }
    assert made.models["b"].kv == "int8"


def test_what_is_printed_can_be_read_back(tmp_path: Path) -> None:
    """Every setting, with values that need quoting."""
    made = Settings(
        host="::1",
        port=1,
        fd=3,
        models={"a/b:c": ModelSettings('/tmp/"x"\\ü\x7f\n.bin', "f32", 9, 5, 2), "d": ModelSettings("/d")},
        default_model="d",
        max_gap=0.2,
        cache_memory=5,
        key_running=1,
        key_queue=0,
        idle_unload=60.0,
        context=9,
        threads=2,
        isa="scalar",
        huge_pages=True,
        api_keys_file="/keys",
        allowed_hosts=("a", "b:1"),
        cors_origins=("https://x.y",),
        drain=0.0,
        metrics=False,
        log_json=True,
        log_level="debug",
        offline=True,
        mcp_servers="/m.json",
        drafts=False,
        draft="/small.bin",
        upstream=UpstreamSettings("https://u/v1", "big", tokens_per_day=7, state_file="/s"),
    )
    assert load(tmp_path, to_toml(made)) == made
    assert load(tmp_path, to_toml(load(tmp_path, ""))) == Settings()
    unset = {line.split()[1] for line in to_toml(made).splitlines() if line.startswith("# ")}
    assert unset == {"kv", "context", "cache_memory", "threads", "draft", "requests_per_day"}, (
        "a setting of this test has its default"
    )


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("prot = 1", "prot: there is no such setting; did you mean port?"),
        ("zzz = 1", "zzz: there is no such setting; there are host, port"),
        ("port = 'x'", "port: expected a whole number from 0 to 65535, not 'x'"),
        ("port = true", "port: expected a whole number from 0 to 65535, not True"),
        ("port = 65536", "port: expected a whole number from 0 to 65535, not 65536"),
        ("port = 1.0", "port: expected a whole number"),
        ("drain = -1", "drain: expected seconds from 0 to 3600, not -1"),
        ("drain = nan", "drain: expected seconds"),
        ("drain = inf", "drain: expected seconds"),
        ("max_gap = true", "max_gap: expected seconds"),
        ("metrics = 1", "metrics: expected true or false, not 1"),
        ("kv = 'int4'", "kv: expected one of int8, f16, f32, not 'int4'"),
        ("cache_memory = '2 G'", "cache_memory: expected bytes, such as"),
        ("cache_memory = -1", "cache_memory: expected bytes"),
        ("cors_origins = 'https://x'", "cors_origins: expected a list of origins"),
        ("cors_origins = ['x']", "cors_origins: expected an origin such as"),
        ("cors_origins = ['https://x/']", "cors_origins: expected an origin"),
        ("allowed_hosts = ['http://x']", "allowed_hosts: expected host names"),
        ("models = 'x'", "models: expected a table such as"),
        ("[models]\na = 1", "models.a: expected a table with path"),
        ("[models.a]\nkv = 'f16'", "models.a: path is missing"),
        ("[models.a]\npath = 'x'\npaht = 1", "models.a.paht: there is no such setting; did you mean path?"),
        ("[models]\n'a b' = 'x'", "models: 'a b' is no alias"),
        ("default_model = 'x'", "default_model is x, but the models are: none"),
        ("[upstream]\nurl = 'https://u'", "upstream: model is missing"),
        (
            "[upstream]\nmodel = 'm'\nurl = 'https://me:sk-canary@u'",
            "upstream.url: expected a URL without a password",
        ),
        (
            "[upstream]\nmodel = 'm'\nurl = 'https://u?key=sk-canary'",
            "upstream.url: expected a URL without a password",
        ),
        ("[upstream]\nmodel = 'm'\nurl = 'ftp://u'", "upstream.url: expected a URL such as"),
        ("[upstream]\nkey = 'sk'", "upstream.key: there is no such setting"),
        ("host = '0.0.0.0'", "--host 0.0.0.0 lets other computers in, which takes keys: --api-keys FILE"),
        ("cors_origins = ['*']", "--cors-origin '*' lets the page of any site ask, which takes keys"),
        ("port = ", "not TOML: "),
        ("\x00", "not TOML: "),
        ("port = 1\nport = 2", "not TOML: "),
        ("a = " + "[" * 5000, "not TOML: "),
    ],
)
def test_what_is_wrong_is_one_line(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(ValueError) as error:
        load(tmp_path, text)
    assert said in str(error.value) and "canary" not in str(error.value)
    assert str(error.value).count("\n") == 0


def test_a_flag_out_of_range_is_named_as_a_flag() -> None:
    with pytest.raises(ValueError, match=r"^--max-gap: expected seconds from 0\.01 to 60, not 99\.0$"):
        settings(None, {"max_gap": 99.0}, NAMES)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.2", "example.com", "169.254.1.1"])
def test_an_address_that_others_reach_takes_keys(host: str) -> None:
    with pytest.raises(ValueError, match="takes keys"):
        settings(None, {"host": host}, NAMES)
    assert settings(None, {"host": host, "api_keys_file": "keys"}, NAMES).public


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1", "[::1]", "127.8.9.1"])
def test_the_loopback_interface_takes_none(host: str) -> None:
    assert not settings(None, {"host": host}, NAMES).public


def test_keys_handed_over_by_systemd_are_used_unless_others_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path))
    assert settings(None, {}, NAMES).api_keys_file is None
    (tmp_path / "api-keys").write_text("alice k\n")
    assert settings(None, {}, NAMES).api_keys_file == str(tmp_path / "api-keys")
    assert settings(None, {"api_keys_file": "/mine"}, NAMES).api_keys_file == "/mine"


def test_sizes() -> None:
    assert [size(given) for given in (0, 5, "7", "1 KiB", "2GiB", "1.5 MiB", "3 KB")] == [
        0,
        5,
        7,
        1024,
        2 << 30,
        3 << 19,
        3000,
    ]
    for wrong in ("", "GiB", "1 gib", "-1", True, 1.5, None, "1e3", "9" * 30):
        with pytest.raises(ValueError):
            size(wrong)


def test_a_file_too_large_or_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at most"):
        read("/dev/zero")
    with pytest.raises(OSError):
        read(str(tmp_path / "nothing"))


def test_every_flag_of_the_mode_sets_a_setting_that_there_is() -> None:
    fields = {item.name for item in dataclasses.fields(Settings)}
    dests = {action.dest for action in new_parser()._actions}
    assert set(SETTINGS.values()) <= fields and set(SETTINGS) <= dests
