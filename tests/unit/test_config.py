"""The operator's settings: where they come from, which one counts, how a wrong one is told."""

import pytest
import yaml

from hiprune_server.operations import cli
from hiprune_server.operations.config import SETTINGS, ConfigError, load
from hiprune_vllm.plan import NO_LIMITS

FILE = """
default: {tokens: 100}
presets: {low: {tokens: 50, alpha: 0.2}}
limits: {min_tokens: 8, methods: [hiprune, random], fixed: [alpha]}
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "settings.yaml"
    path.write_text(FILE)
    return path


def test_nothing_set_is_what_is_built_in():
    config = load({}, {"HOME": "/root"})
    assert config["default"] == {}
    assert config.presets == {
        "low": {"ratio": 0.111},
        "high": {"ratio": 1.0},
        "original": {"ratio": 1.0},
    }
    assert config.limits == NO_LIMITS
    assert {found.source for found in config.values.values()} == {"built in"}


def test_an_empty_variable_says_nothing():
    """As Compose passes on a line of `.env` that has no value."""
    empty = load({}, {setting.variable: "" for setting in SETTINGS})
    assert empty.values == load({}, {}).values


def test_flags_come_before_variables_before_the_file(file):
    flags = {"config": str(file), "default": '{"tokens": 300}'}
    variables = {
        "HIPRUNE_DEFAULT": '{"tokens": 200}',
        "HIPRUNE_LIMITS_MIN_TOKENS": "16",
        "HIPRUNE_LIMITS_MAX_FULL_TOKENS": "9000",
    }
    config = load(flags, variables)
    told = {key: (found.value, found.source) for key, found in config.values.items()}
    assert told["default"] == ({"tokens": 300}, "--hiprune-default")
    assert told["limits.min_tokens"] == (16, "HIPRUNE_LIMITS_MIN_TOKENS")
    assert told["presets.low"] == ({"tokens": 50, "alpha": 0.2}, f"{file}: presets.low")
    assert told["presets.high"] == ({"ratio": 1.0}, "built in")
    assert config.limits.methods == ("hiprune", "random")
    assert config.limits.fixed == ("alpha",)
    assert config.limits.max_full_tokens == 9000
    assert load({}, {"HIPRUNE_CONFIG": str(file)})["default"] == {"tokens": 100}


def test_what_is_exported_is_read_back_the_same(file):
    config = load({"config": str(file), "limits.max_tokens": "192"}, {})
    environment = {"HIPRUNE_CONFIG": str(file), "OTHER": "x"}
    config.export(environment)
    again = load({}, environment)
    assert {k: v.value for k, v in again.values.items()} == {
        k: v.value for k, v in config.values.items()
    }
    assert "HIPRUNE_CONFIG" not in environment
    assert "HIPRUNE_PRESETS_HIGH" not in environment


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "defaults: {}",
            "settings.yaml: defaults is unknown; known are default, default_video,",
        ),
        ("limits: {min: 1}", "settings.yaml: limits.min is unknown"),
        ("limits: 3", "settings.yaml: limits must hold keys and values, got 3"),
        ("default: {tokens: 0}", "default.tokens must be an integer in"),
        ("default: 192", "default must be an object, got 192"),
        ("default: {total_tokens: 5}", "default.total_tokens is unknown"),
        ("presets: {low: {ratio: 2}}", "presets.low.ratio must be a number in (0, 1], got 2"),
        ("explain: 1", "explain must be true or false, got 1"),
        ("playground: yess", "playground must be true or false, got 'yess'"),
        ("limits: {min_tokens: true}", "limits.min_tokens must be an integer >= 1, got True"),
        ("limits: {methods: []}", "limits.methods must be a list of hiprune, attention"),
        ("limits: {methods: hiprune}", "limits.methods must be a list"),
        ("limits: {fixed: [tokens]}", "limits.fixed must be a list of alpha, object_layer"),
        ("- 1", "must hold keys and values, got a list"),
        ("a: [", "is not YAML"),
        ("limits: {min_tokens: 9, max_tokens: 8}", "must not be above limits.max_tokens, got 9"),
        (
            "limits: {max_body_bytes: 9, max_held_bytes: 8}",
            "must not be below limits.max_body_bytes, got 8 and 9",
        ),
        ("metrics_key: 1", "metrics_key must be true or false, got 1"),
        ("{default: {tokens: 9}, limits: {max_tokens: 8}}", "within the limits [1, 8], got 9"),
        ("{presets: {low: {method: random}}, limits: {methods: [hiprune]}}", "limits.methods"),
    ],
)
def test_a_wrong_file_is_told_with_its_key(text, message, tmp_path):
    path = tmp_path / "settings.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as told:
        load({"config": str(path)}, {})
    assert message in str(told.value)


def test_a_switch_takes_the_words_that_people_write():
    for text, value in (("1", True), ("true", True), ("True", True), ("0", False), ("", False)):
        assert load({}, {"HIPRUNE_DISABLE": text})["disable"] is value
    with pytest.raises(ConfigError, match="HIPRUNE_DISABLE must be true or false, got 'maybe'"):
        load({}, {"HIPRUNE_DISABLE": "maybe"})


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("HIPRUNE_DEFALT", "{}", "HIPRUNE_DEFALT is unknown; known are HIPRUNE_CONFIG,"),
        ("HIPRUNE_DEFAULT", "{", "HIPRUNE_DEFAULT must be JSON, got '{'"),
        ("HIPRUNE_LIMITS_MAX_TOKENS", "many", "must be an integer >= 1, got 'many'"),
        ("HIPRUNE_LIMITS_MAX_FULL_TOKENS", "0", "must be an integer >= 1, got 0"),
        ("HIPRUNE_LIMITS_METHODS", "best", "must be a list of hiprune, attention"),
    ],
)
def test_a_wrong_variable_is_told_with_its_name(name, text, message):
    with pytest.raises(ConfigError) as told:
        load({}, {name: text})
    assert message in str(told.value)


def test_print_config_shows_values_and_sources_and_starts_nothing(file, capsys, monkeypatch):
    monkeypatch.setenv("HIPRUNE_LIMITS_MAX_TOKENS", "288")
    cli.main(
        [
            "--print-config",
            "--hiprune-config",
            str(file),
            "--hiprune-preset",
            'high={"tokens": 200}',
        ]
    )
    out = capsys.readouterr().out
    assert 'default: {"tokens": 100}  # ' + f"{file}: default" in out
    assert "limits.max_tokens: 288  # HIPRUNE_LIMITS_MAX_TOKENS" in out
    assert 'presets.high: {"tokens": 200}  # --hiprune-preset-high' in out
    assert "limits.min_tokens: 8  # " in out
    assert set(yaml.safe_load(out)) == {setting.key for setting in SETTINGS}
