"""`hiprune-serve`: vLLM's own server with the HiPrune plugins switched on."""

import argparse
import ctypes
import os
import re
import sys
import tempfile
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from hiprune_server import demo
from hiprune_server.operations.config import (
    BUILT_IN,
    DISABLE,
    FILE,
    PIXELS,
    SETTINGS,
    Config,
    ConfigError,
    load,
)
from hiprune_server.wishes.details import PRESETS
from hiprune_vllm.facade import WORKER_EXTENSION
from hiprune_vllm.plan import FIELD, LIMITS, NO_LIMITS, OF_VIDEOS

ENDPOINT_PLUGIN = "hiprune_api"
GENERAL_PLUGIN = "hiprune"

_DEMO_DEFAULTS = {
    "served_model_name": [demo.NAME],
    "host": "127.0.0.1",
    "max_model_len": 4096,
    "dtype": "float32",  # faster than bfloat16 on CPUs without instructions for that
    "mm_processor_cache_gb": 0.5,  # hundreds of pictures; vLLM's own default is 4
    "enable_per_request_metrics": True,  # queue and prefill time of each request, for `make load`
    "enforce_eager": True,  # compiling a model this small takes longer than it ever saves
}
"""Of vLLM's flags, by the names that its parser gives them."""

_DEMO_ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB; hundreds of requests
    # Each number of tokens has compiled primitives of 256 KiB; oneDNN's own default keeps 1,024.
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "128",
    # In the engine's processes glibc gives freed buffers of 1 MiB and more back. It would keep them
    # for later, in holes between what lives long, and their memory would grow without a leak.
    "MALLOC_MMAP_THRESHOLD_": str(2**20),
    # vLLM's sampler compiles what log-probabilities need when they are first asked for: where there
    # is no C++ compiler, that request would end the engine.
    "TORCH_COMPILE_DISABLE": "1",
}

DRAIN_S = 30
"""Seconds that requests have to finish once the server is told to stop; vLLM's own default is 0."""
KEYS = tuple(setting.key for setting in SETTINGS)

SAFE_MEDIA = {
    "VLLM_MEDIA_CONNECTOR": "hiprune",
    "VLLM_MEDIA_URL_ALLOW_REDIRECTS": "0",
    # A host that fails is told to the client at once, which asks again when it likes to.
    "VLLM_MEDIA_FETCH_MAX_RETRIES": "1",
    "VLLM_MAX_MEDIA_DOWNLOAD_SIZE_MB": "64",  # as much as a body may have
}
"""vLLM's own variables, unless they are set: see `hiprune_server.hardening.media`."""
MAX_PIXELS = "VLLM_MAX_IMAGE_PIXELS"
METRICS_DIR = "PROMETHEUS_MULTIPROC_DIR"
KEY = "VLLM_API_KEY"
"""vLLM's own variable: with it every /v1 route asks for this key."""
KEY_FILE = f"{KEY}_FILE"
NUMA = "libnuma.so.1"


def main(argv: Sequence[str] | None = None) -> None:
    """Parses the command line, prepares the environment and runs the server until it is stopped."""
    own, rest, config = parse_own(sys.argv[1:] if argv is None else argv)
    if own.print_config:
        sys.stdout.write(config.text())
        return
    try:
        read_key(os.environ, flag_given="api-key" in names_given(rest))
    except ConfigError as error:
        sys.exit(f"hiprune-serve: error: {error}")
    config.export(os.environ)
    os.environ.update(SAFE_MEDIA | os.environ)
    if config.values[PIXELS].source != BUILT_IN or MAX_PIXELS not in os.environ:
        os.environ[MAX_PIXELS] = str(config[PIXELS])
    allow_plugins()
    defaults: dict[str, Any] = {"shutdown_timeout": DRAIN_S}
    if own.demo:
        rest = [str(demo.CHECKPOINT), *rest]
        defaults |= _DEMO_DEFAULTS
        os.environ.update(_DEMO_ENVIRONMENT | os.environ)
    with metrics_folder(os.environ):  # before anything loads the metrics library
        serve(rest, config, defaults)


@contextmanager
def metrics_folder(environment: MutableMapping[str, str]) -> Iterator[None]:
    """Names the folder through whose files the workers' metrics reach vLLM's `/metrics`.

    vLLM sees to that itself for several API server processes alone, and how many there are is known
    to its own parser only. A folder that was given is emptied of what an earlier server left there,
    since its counters would go on.
    """
    given = environment.get(METRICS_DIR)
    if given:
        try:
            for left in Path(given).glob("*.db"):
                left.unlink()
            with tempfile.TemporaryFile(dir=given):
                pass
        except OSError as error:
            sys.exit(
                f"hiprune-serve: error: {METRICS_DIR} must name a folder that this program may "
                f"write to, got {given} ({error.strerror}): make it so, or unset the variable"
            )
        yield
        return
    with tempfile.TemporaryDirectory(prefix="hiprune-metrics-") as folder:
        environment[METRICS_DIR] = folder
        try:
            yield
        finally:
            del environment[METRICS_DIR]  # the folder goes, and with it the name


def parse_own(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str], Config]:
    """Splits the command line into this program's options and vLLM's, and reads the settings.

    Returns:
        Namespace with `demo` and `print_config`, what is vLLM's, untouched, and the settings.
    """
    parser = argparse.ArgumentParser(
        prog="hiprune-serve",
        usage="hiprune-serve (MODEL | --demo) [settings] [any `vllm serve` flag]",
        description="OpenAI-compatible vLLM server with a visual-token budget per request.",
        epilog="Every other flag is vLLM's: hiprune-serve --help=all lists them.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--demo", action="store_true", help="serve the embedded demo model, no network needed"
    )
    parser.add_argument(
        "--print-config", action="store_true", help="show all settings and their sources, and stop"
    )
    settings = parser.add_argument_group(
        "settings", "before environment variables (HIPRUNE_...) before the file"
    )
    settings.add_argument("--hiprune-config", dest=FILE, metavar="FILE", help="YAML file")
    for one in SETTINGS:
        told = f"{one.help}; {one.variable}".replace("%", "%%")
        settings.add_argument(one.flag, dest=one.key, metavar=one.shape, help=told)
    settings.add_argument(
        "--hiprune-preset", action="append", default=[], metavar="DETAIL=JSON",
        help='the same as --hiprune-preset-low and the like, e.g. low=\'{"ratio": 0.111}\'',
    )  # fmt: skip
    if lost := lost_quotes(argv):
        parser.error(lost)
    own, rest = parser.parse_known_args([_with_dashes(word) for word in argv])
    unknown = [flag for flag in rest if flag.startswith("--hiprune")]
    if unknown:
        parser.error(f"unknown flag {unknown[0].split('=')[0]}")
    positional = bool(rest) and not rest[0].startswith("-")
    if own.demo and (positional or "model" in names_given(rest)):
        parser.error("--demo serves its own model, got another one as well")
    if not own.demo and not rest and not own.print_config:
        parser.error("name a MODEL to serve, or use --demo")
    given = {key: text for key in (FILE, *KEYS) if (text := getattr(own, key)) is not None}
    for preset in own.hiprune_preset:
        detail, _, text = preset.partition("=")
        key = f"presets.{detail}"
        if key not in KEYS or key in given:
            forms = ", ".join(f"{name}=JSON" for name in PRESETS)
            parser.error(f"--hiprune-preset takes {forms}, once each, got {preset!r}")
        given[key] = text
    try:
        return own, rest, load(given, os.environ)
    except ConfigError as error:
        parser.error(str(error))


def _with_dashes(word: str) -> str:
    """A flag of ours with dashes in its name, as vLLM takes underscores for them; others stay."""
    name, assigned, value = word.partition("=")
    ours = name.startswith("--hiprune") or name == "--print_config"
    return name.replace("_", "-") + assigned + value if ours else word


def names_given(flags: Sequence[str]) -> set[str]:
    """Names of vLLM's flags, with dashes, on a command line and in the file of its `--config`.

    vLLM takes underscores for dashes, and reads its file itself: one that cannot be read is its to
    tell of.
    """
    import yaml

    names = {flag[2:].partition("=")[0] for flag in flags if flag.startswith("--")}
    if "--config" in flags[:-1]:
        with suppress(OSError, yaml.YAMLError):
            found = yaml.safe_load(Path(flags[flags.index("--config") + 1]).read_text())
            names |= set(found) if isinstance(found, dict) else set()
    return {str(name).replace("_", "-") for name in names}


_UNQUOTED = re.compile(r"(?:[\w.-]+=)*\{\s*\w[\w.-]*\s*:")
"""A JSON object's beginning whose quotes a shell has taken; nothing else begins like that."""


def lost_quotes(flags: Sequence[str]) -> str:
    """Which flag's JSON has lost its quotes on the way here, as one line; empty where none has.

    A value that Compose, a unit file or a shell has taken apart would be misread: its pieces after
    the first blank are arguments of their own.
    """
    for i, text in enumerate(flags):
        name, assigned, value = text.partition("=") if text.startswith("--") else ("", "", text)
        if not _UNQUOTED.match(value):
            continue
        name = name if assigned else flags[i - 1] if i else "an argument"
        rest = next((n for n in range(i, len(flags)) if flags[n].endswith("}")), i)
        got = " ".join((value, *flags[i + 1 : rest + 1]))
        return (
            f"{name} must be JSON, got {got}, which has lost its quotes to a shell or to Compose: "
            f"put '...' around it, as in {name} '{{\"key\": 1}}'"
        )
    return ""


def read_key(environment: MutableMapping[str, str], *, flag_given: bool) -> None:
    """Takes the API key from the file that VLLM_API_KEY_FILE names, as containers get secrets.

    An empty variable names no file; an empty file is an error, so that a secret that was forgotten
    does not open the server.

    Raises:
        ConfigError: the file cannot be read or is empty, or the key is given in two places.
    """
    path = environment.pop(KEY_FILE, "")
    if not path:
        return
    if flag_given or environment.get(KEY):
        other = "--api-key" if flag_given else KEY
        raise ConfigError(f"the API key is given twice, by {KEY_FILE} and {other}: give one")
    try:
        key = Path(path).read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"{KEY_FILE} must name a readable text file, got {path} ({error})"
        ) from None
    if not key:
        raise ConfigError(f"{KEY_FILE} must name a file with a key in it, {path} is empty")
    environment[KEY] = key


def allow_plugins() -> None:
    """Names our plugins in VLLM_PLUGINS, which vLLM asks for before it loads HTTP routes.

    Setting that variable also filters all other plugins, so where it was unset every installed
    one is named: nothing else changes.
    """
    given = os.environ.get("VLLM_PLUGINS")
    names = (
        [name for name in given.split(",") if name]
        if given is not None
        else [
            plugin.name
            for group in sorted(entry_points().groups)
            if group.startswith("vllm.") and group != "vllm.endpoint_plugins"
            for plugin in entry_points(group=group)
        ]
    )
    os.environ["VLLM_PLUGINS"] = ",".join(dict.fromkeys([*names, GENERAL_PLUGIN, ENDPOINT_PLUGIN]))


def serve(flags: Sequence[str], config: Config, defaults: Mapping[str, Any]) -> None:
    """Runs `vllm serve` in this process.

    Args:
        flags: its command line.
        config: the settings of ours.
        defaults: of its parser in place of its own: what is given goes before them, however it is
            spelled and wherever it stands.
    """
    # vLLM reads its environment when it is imported. The `vllm` command itself does not start
    # with the CPU re-packaging (it looks up a distribution named vllm); its parts do.
    from vllm.entrypoints.cli.serve import ServeSubcommand
    from vllm.logger import configure_logging_from_args
    from vllm.platforms import current_platform
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    from hiprune_server.hardening.releases import cli_env_setup, make_arg_parser
    from hiprune_server.hardening.stopping import let_a_start_be_stopped
    from hiprune_server.routes.endpoint import HiPruneEndpointPlugin

    if current_platform.is_cpu():
        check_libraries()
    cli_env_setup()
    parser = make_arg_parser(FlexibleArgumentParser(prog="hiprune-serve"))
    parser.set_defaults(**defaults)
    args = parser.parse_args(list(flags))
    if args.api_key is not None and not all(args.api_key):
        parser.error("--api-key must not be empty: the server would be open to everybody")
    for name in ("enable_scale_out", "tokens_only"):
        if getattr(args, name):
            parser.error(
                f"--{name.replace('_', '-')} opens /inference/v1/generate, which hands the engine "
                "tokens, lengths and tensors as a client writes them: one that does not fit ends "
                "it for everybody. Leave it out, and scale by whole servers behind a router "
                "(docs/deploy.md)"
            )
    prunes = not config[DISABLE]
    engine_wide: dict[str, Any] = {}
    if prunes and config["default"]:
        engine_wide[FIELD] = config["default"]
    if prunes and config["default_video"]:
        engine_wide[OF_VIDEOS] = config["default_video"]
    if prunes and config.limits != NO_LIMITS:
        engine_wide[LIMITS] = asdict(config.limits)
    kwargs = dict(args.mm_processor_kwargs or {})
    for key in engine_wide.keys() & kwargs.keys():
        parser.error(f"{key} in --mm-processor-kwargs and as a setting of this server: give one")
    if engine_wide:
        args.mm_processor_kwargs = kwargs | engine_wide
    if prunes and config["explain"]:
        if args.worker_extension_cls not in ("", WORKER_EXTENSION):
            parser.error(
                f"--worker-extension-cls {args.worker_extension_cls} takes the place of what "
                "/v1/hiprune/explain asks: switch that off (--hiprune-explain false)"
            )
        args.worker_extension_cls = WORKER_EXTENSION
    configure_logging_from_args(args)
    let_a_start_be_stopped()
    command = ServeSubcommand()
    command.validate(args)
    command.cmd(args)
    # vLLM stops in good order where its engine has died, with status 0, and then a supervisor that
    # restarts what has failed would not.
    if HiPruneEndpointPlugin.engine_died:
        sys.exit("the engine has died")


def check_libraries() -> None:
    """Ends the program where the system lacks what the CPU engine loads.

    The engine would go on without it, and fail for an operation that it does not find.
    """
    try:
        ctypes.CDLL(NUMA)
    except OSError as error:
        sys.exit(
            f"hiprune-serve: error: the CPU engine needs {NUMA}: install libnuma1 (Debian, Ubuntu) "
            f"or numactl-libs (Fedora, RHEL); {error}"
        )
