import argparse
import json
import os
import re
from importlib.metadata import entry_points
from pathlib import Path

import pytest

from hiprune_server.operations import cli
from hiprune_server.operations.banner import banner, sample_picture


def test_other_flags_are_vllms_untouched():
    argv = ["some/model", "--port", "81", "--hiprune-default", '{"tokens": 192}', "-tp", "2"]
    own, rest, config = cli.parse_own(argv)
    assert config["default"] == {"tokens": 192}
    assert not own.demo
    assert rest == ["some/model", "--port", "81", "-tp", "2"]


def test_our_flags_take_underscores_for_dashes_as_vllms_do():
    given = ["m", "--hiprune_min_tokens=8", "--hiprune_preset", "low={}", "--print_config"]
    own, rest, config = cli.parse_own([*given, "--max_model_len", "hiprune_x"])
    assert own.print_config
    assert rest == ["m", "--max_model_len", "hiprune_x"]
    assert (config["limits.min_tokens"], config["presets.low"]) == (8, {})


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "name a MODEL to serve, or use --demo"),
        (["--demo", "some/model"], "--demo serves its own model"),
        (["--demo", "--model=x"], "--demo serves its own model"),
        (["m", "--hiprune-default", "192"], "--hiprune-default must be an object, got 192"),
        (["m", "--hiprune-default", "{tokens: 1}"], "--hiprune-default must be JSON"),
        (
            ["m", "--hiprune-default", '{"tokens": 0}'],
            "--hiprune-default.tokens must be an integer",
        ),
        (["m", "--hiprune-preset", "medium={}"], "takes low=JSON, high=JSON, original=JSON,"),
        (["m", "--hiprune-preset", "low={}", "--hiprune-preset-low", "{}"], "once each"),
        (["m", "--hiprune-config", "/nowhere.yaml"], "/nowhere.yaml cannot be read"),
        (
            ["m", "--limit-mm-per-prompt", "{image:", "4,", "video:", "0}", "--port", "81"],
            "--limit-mm-per-prompt must be JSON, got {image: 4, video: 0}, which has lost",
        ),
        (["m", "--limit-mm-per-prompt={image:4}"], "--limit-mm-per-prompt must be JSON, got {ima"),
        (["--demo", "--hiprune-default", "{tokens:", "64}"], "--hiprune-default must be JSON, got"),
        (["m", "--hiprune-preset", "low={tokens:64}"], "--hiprune-preset must be JSON, got low={t"),
        (["m", "--hiprune-defaults", "{}"], "unknown flag --hiprune-defaults"),
    ],
)
def test_a_wrong_command_line_is_explained(argv, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.parse_own(argv)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "value",
    ['{"image": 4}', "{}", '{ "a": {"b": 1}}', "{{ messages }}", "{% for m in messages %}", "a:b"],
)
def test_json_and_templates_on_the_command_line_are_left_alone(value):
    argv = ["m", "--some-flag", value, f"--some-flag={value}"]
    assert cli.parse_own(argv)[1] == argv


@pytest.fixture(autouse=True)
def _environment_as_before():
    """`main` prepares the environment of the server that the process becomes."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


def served(argv, monkeypatch, tmp_path):
    """What `main` hands to vLLM."""
    calls = []
    monkeypatch.setattr(cli, "serve", lambda *given: calls.append(given))
    monkeypatch.setattr(cli.demo, "CHECKPOINT", tmp_path)
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    monkeypatch.setenv("VLLM_PLUGINS", "")
    cli.main(argv)
    (call,) = calls
    return call


def parsed(flags, defaults):
    """What vLLM makes of a command line with our defaults."""
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    from hiprune_server.hardening.releases import make_arg_parser

    parser = make_arg_parser(FlexibleArgumentParser())
    parser.set_defaults(**defaults)
    return parser.parse_args(list(flags))


def test_the_demo_has_defaults_of_its_own_that_can_be_overridden(monkeypatch, tmp_path):
    argv = ["--demo", "--port", "9", "--host", "::"]
    flags, config, defaults = served(argv, monkeypatch, tmp_path)
    assert list(flags) == [str(tmp_path), *argv[1:]]
    assert config["default"] == {}
    args = parsed(flags, defaults)
    assert (args.host, args.port, args.served_model_name) == ("::", 9, ["hiprune-demo"])
    assert (args.max_model_len, args.enforce_eager, args.shutdown_timeout) == (4096, True, 30)


@pytest.mark.parametrize("as_file", [False, True])
@pytest.mark.parametrize(
    "spelling", ["--shutdown-timeout", "--shutdown_timeout", "--shutdown-timeout="]
)
def test_what_is_given_goes_before_our_defaults_however_it_is_spelled(
    spelling, as_file, monkeypatch, tmp_path
):
    if as_file:
        name = spelling.strip("-=")
        (tmp_path / "vllm.yaml").write_text(f"{name}: 1\nmax_model_len: 77\nhost: '::'\n")
        given = ["--config", str(tmp_path / "vllm.yaml")]
    else:
        given = [spelling + "1"] if spelling.endswith("=") else [spelling, "1"]
        given += ["--max_model_len=77", "--host", "::"]
    for argv in (["--demo", *given], ["some/model", *given]):
        flags, _, defaults = served(argv, monkeypatch, tmp_path)
        args = parsed(flags, defaults)
        assert (args.shutdown_timeout, args.max_model_len, args.host) == (1, 77, "::")


def test_every_default_of_ours_is_one_of_vllms_flags():
    args = vars(parsed(["some/model"], {}))
    assert {"shutdown_timeout", *cli._DEMO_DEFAULTS} <= args.keys()


@pytest.mark.parametrize(
    ("flags", "names"),
    [
        (["--api-key", "x"], {"api-key"}),
        (["--api_key=x", "-tp", "2"], {"api-key"}),
        (["m", "--port", "1", "--model"], {"port", "model"}),
        ([], set()),
    ],
)
def test_names_are_read_however_they_are_spelled(flags, names):
    assert cli.names_given(flags) == names


def test_names_are_read_from_vllms_file_too(tmp_path, capsys):
    path = tmp_path / "vllm.yaml"
    path.write_text("api_key: s3cret\nmodel: x\n")
    assert cli.names_given(["--config", str(path)]) == {"config", "api-key", "model"}
    for text in ("", "- 1", "a: ["):
        path.write_text(text)
        assert cli.names_given(["m", "--config", str(path)]) == {"config"}
    assert cli.names_given(["m", "--config"]) == {"config"}
    assert cli.names_given(["m", "--config", "/nowhere"]) == {"config"}
    path.write_text("model: x\n")
    with pytest.raises(SystemExit):
        cli.parse_own(["--demo", "--config", str(path)])
    assert "--demo serves its own model" in capsys.readouterr().err


def test_a_folder_for_metrics_that_was_given_begins_empty(monkeypatch, tmp_path):
    left, other = tmp_path / "counter_7.db", tmp_path / "notes.txt"
    left.write_text("of a server that was killed")
    other.write_text("kept")
    monkeypatch.setenv(cli.METRICS_DIR, str(tmp_path))
    served(["m"], monkeypatch, tmp_path)
    assert not left.exists()
    assert other.exists()
    assert os.environ[cli.METRICS_DIR] == str(tmp_path)


@pytest.mark.parametrize("kind", ["absent", "a file"])
def test_a_folder_for_metrics_that_cannot_be_written_stops_the_start(kind, monkeypatch, tmp_path):
    path = tmp_path / "metrics"
    if kind == "a file":
        path.write_text("")
    monkeypatch.setenv(cli.METRICS_DIR, str(path))
    with pytest.raises(SystemExit, match=f"{cli.METRICS_DIR} must name a folder .* got {path}"):
        served(["m"], monkeypatch, tmp_path)


@pytest.mark.parametrize("flags", ["", "--data-parallel-size 2 --api-server-count 1"])
def test_metrics_go_through_a_folder_that_is_there_while_the_server_runs(monkeypatch, flags):
    monkeypatch.delenv(cli.METRICS_DIR, raising=False)
    seen = []

    def serve(flags, config, defaults):
        folder = Path(os.environ[cli.METRICS_DIR])
        seen.extend([folder, folder.is_dir()])

    monkeypatch.setattr(cli, "serve", serve)
    cli.main(["some/model", *flags.split()])
    folder, was_there = seen
    assert was_there
    assert not folder.exists()
    assert cli.METRICS_DIR not in os.environ


@pytest.mark.parametrize(
    ("content", "argv", "variables", "message"),
    [
        (" \n", ["m"], {}, "is empty"),
        (None, ["m"], {}, "must name a readable text file"),
        ("s3cret", ["m"], {cli.KEY: "other"}, "given twice, by VLLM_API_KEY_FILE and VLLM_API_KEY"),
        ("s3cret", ["m", "--api-key", "other"], {}, "and --api-key"),
    ],
)
def test_an_api_key_file_that_gives_no_one_key_stops_the_start(
    content, argv, variables, message, monkeypatch, tmp_path
):
    path = tmp_path / "api_key"
    if content is not None:
        path.write_text(content)
    os.environ.update({cli.KEY_FILE: str(path)} | variables)
    with pytest.raises(SystemExit, match=message) as stopped:
        served(argv, monkeypatch, tmp_path)
    assert "s3cret" not in str(stopped.value)


@pytest.mark.parametrize(("content", "key"), [("s3cret\n", "s3cret"), (None, None)])
def test_the_api_key_is_read_from_the_file_that_a_variable_names(
    content, key, monkeypatch, tmp_path
):
    os.environ.pop(cli.KEY, None)
    os.environ[cli.KEY_FILE] = ""  # as a compose file leaves it where there is no secret
    if content is not None:
        (tmp_path / "api_key").write_text(content)
        os.environ[cli.KEY_FILE] = str(tmp_path / "api_key")
    served(["m"], monkeypatch, tmp_path)
    assert os.environ.get(cli.KEY) == key
    assert cli.KEY_FILE not in os.environ  # vLLM knows no such variable


def test_both_plugins_are_allowed_and_others_stay(monkeypatch):
    monkeypatch.setenv("VLLM_PLUGINS", "other")
    cli.allow_plugins()
    assert os.environ["VLLM_PLUGINS"] == "other,hiprune,hiprune_api"
    monkeypatch.delenv("VLLM_PLUGINS")
    cli.allow_plugins()
    names = os.environ["VLLM_PLUGINS"].split(",")
    assert {"hiprune", "hiprune_api"} <= set(names)
    for point in entry_points(group="vllm.general_plugins"):
        assert point.name in names


def arguments(**changes):
    standard = {
        "model": "some/model",
        "host": "127.0.0.1",
        "port": 8000,
        "ssl_certfile": None,
        "api_key": None,
    }
    return argparse.Namespace(**(standard | changes))


@pytest.mark.parametrize(
    ("changes", "address"),
    [
        ({}, "http://127.0.0.1:8000/v1"),
        ({"host": None}, "http://127.0.0.1:8000/v1"),
        ({"host": "0.0.0.0", "port": 1}, "http://127.0.0.1:1/v1"),
        ({"host": "::"}, "http://[::1]:8000/v1"),
        ({"host": "fe80::1"}, "http://[fe80::1]:8000/v1"),
        ({"host": "gpu-1", "ssl_certfile": "x"}, "https://gpu-1:8000/v1"),
    ],
)
def test_the_banner_names_model_address_and_a_budget(changes, address):
    text = banner(arguments(**changes), "my-model")
    assert f"my-model at {address}" in text
    assert f"curl -s {address}/chat/completions" in text
    body = text[text.index("-d '") + 4 : text.rindex("'")]
    request = json.loads(body)
    assert request["model"] == "my-model"
    assert request["hiprune"] == {"tokens": 192}


def test_the_banner_keeps_the_api_key_to_itself():
    text = banner(arguments(api_key=["secret"]), "my-model")
    assert "secret" not in text
    assert "Bearer $API_KEY" in text


def test_the_demos_banner_asks_about_a_picture_that_it_knows():
    text = banner(arguments(model=str(cli.demo.CHECKPOINT)), "hiprune-demo")
    assert f"Pictures and questions for it: {cli.demo.SAMPLES}" in text
    (path,) = re.findall(r"base64 -w0 (\S+)\)", text)
    assert Path(path).is_file()


def test_the_sample_picture_is_a_picture():
    import base64
    import io

    from PIL import Image

    data = base64.b64decode(sample_picture().split(",")[1])
    image = Image.open(io.BytesIO(data))
    assert image.size == (16, 16)
    assert image.getpixel((0, 0)) == (0x30, 0x50, 0xC0)
    assert image.getpixel((8, 8)) == (0xD0, 0x30, 0x30)


def test_a_system_without_what_the_cpu_engine_loads_is_told_what_to_install(monkeypatch):
    monkeypatch.setattr(cli, "NUMA", "libnothing.so.1")
    with pytest.raises(SystemExit, match=r"needs libnothing\.so\.1: install libnuma1"):
        cli.check_libraries()
