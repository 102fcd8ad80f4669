"""`hiprune-serve`: vLLM's own server with the HiPrune plugins switched on."""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from importlib.metadata import entry_points
from typing import Any

from hiprune_server import demo
from hiprune_vllm.plan import FIELD, Encoder, PlanError, parse_plan

ENDPOINT_PLUGIN = "hiprune_api"
GENERAL_PLUGIN = "hiprune"

_ANY_ENCODER = Encoder(family="", output_layer=2**31, object_layer=1, has_cls=True)
"""Allows whatever some model allows: the model's own limits are checked once it is known."""

_DEMO_FLAGS = {
    "--served-model-name": f"={demo.NAME}",
    "--host": "=127.0.0.1",
    "--max-model-len": "=4096",
    "--dtype": "=float32",  # faster than bfloat16 on CPUs without instructions for that
    "--enforce-eager": "",  # compiling a model this small takes longer than it ever saves
}


def main(argv: Sequence[str] | None = None) -> None:
    """Parses the command line, prepares the environment and runs the server until it is stopped."""
    own, rest = parse_own(sys.argv[1:] if argv is None else argv)
    allow_plugins()
    if own.demo:
        flags = [flag + v for flag, v in _DEMO_FLAGS.items() if not _has_flag(rest, flag)]
        rest = [str(demo.CHECKPOINT), *flags, *rest]
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB; hundreds of demo requests
    serve(rest, own.hiprune_default)


def parse_own(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Splits the command line into this program's options and vLLM's.

    Returns:
        Namespace with `demo` and `hiprune_default` (a dict or None), and what is vLLM's, untouched.
    """
    parser = argparse.ArgumentParser(
        prog="hiprune-serve",
        usage="hiprune-serve (MODEL | --demo) [--hiprune-default JSON] [any `vllm serve` flag]",
        description="OpenAI-compatible vLLM server with a visual-token budget per request.",
        epilog="Every other flag is vLLM's: hiprune-serve --help=all lists them.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--demo", action="store_true", help="serve the embedded demo model, no network needed"
    )
    parser.add_argument(
        "--hiprune-default",
        metavar="JSON",
        type=_plan_json,
        help="plan for requests that ask for nothing, e.g. '{\"tokens\": 192}' (default: keep all)",
    )
    own, rest = parser.parse_known_args(argv)
    unknown = [flag for flag in rest if flag.startswith("--hiprune")]
    if unknown:
        parser.error(f"unknown flag {unknown[0].split('=')[0]}")
    positional = bool(rest) and not rest[0].startswith("-")
    if own.demo and (positional or _has_flag(rest, "--model")):
        parser.error("--demo serves its own model, got another one as well")
    if not own.demo and not rest:
        parser.error("name a MODEL to serve, or use --demo")
    return own, rest


def _has_flag(flags: Sequence[str], name: str) -> bool:
    return any(flag == name or flag.startswith(f"{name}=") for flag in flags)


def _plan_json(text: str) -> dict[str, Any]:
    try:
        return parse_plan(json.loads(text), _ANY_ENCODER, for_one_image=True).to_dict()
    except json.JSONDecodeError as error:
        raise argparse.ArgumentTypeError(f"must be a JSON object, got {text!r} ({error})") from None
    except PlanError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


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


def serve(flags: Sequence[str], default: dict[str, Any] | None) -> None:
    """Runs `vllm serve` in this process.

    Args:
        flags: command line of `vllm serve`.
        default: engine-wide plan, None for none.
    """
    # vLLM reads its environment when it is imported. The `vllm` command itself does not start
    # with the CPU re-packaging (it looks up a distribution named vllm); its parts do.
    from vllm.entrypoints.cli.serve import ServeSubcommand
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.entrypoints.serve.utils.api_utils import cli_env_setup
    from vllm.logger import configure_logging_from_args
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    cli_env_setup()
    parser = make_arg_parser(FlexibleArgumentParser(prog="hiprune-serve"))
    args = parser.parse_args(list(flags))
    if default is not None:
        kwargs = dict(args.mm_processor_kwargs or {})
        if FIELD in kwargs:
            parser.error(f"--hiprune-default and {FIELD} in --mm-processor-kwargs: give one")
        args.mm_processor_kwargs = {**kwargs, FIELD: default}
    configure_logging_from_args(args)
    command = ServeSubcommand()
    command.validate(args)
    command.cmd(args)
