"""`longseq`: everything a person types."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from .. import __version__
from .exit_status import INTERRUPTED, status_of

if TYPE_CHECKING:
    from .config import RunConfig


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; its exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    launcher_args: list[str] = []
    if "--" in words:
        cut = words.index("--")
        words, launcher_args = words[:cut], words[cut + 1 :]
    parser = _parser()
    args, rest = parser.parse_known_args(words)
    # argparse takes no positional words behind an option; people write key=value wherever they like.
    if any(word.startswith("-") or "=" not in word for word in rest) or not hasattr(args, "overrides"):
        parser.parse_args(words)
    elif rest:
        args.overrides = [*args.overrides, *rest]
    args.launcher_args = launcher_args
    if launcher_args and args.command not in ("train", "doctor", "bench"):
        parser.error(
            f"{' '.join(launcher_args)}: words behind -- are for the launcher that `train`, `doctor` and "
            "`bench` start"
        )
    try:
        return args.run(args) or 0
    except (ValueError, NotImplementedError, OSError) as error:
        if args.traceback:
            raise
        print(f"longseq {args.command}: {error}", file=sys.stderr)
        return status_of(error)
    except KeyboardInterrupt:
        if args.traceback:
            raise
        if os.environ.get("RANK", "0") == "0":  # of several processes one says it
            print(f"longseq {args.command}: interrupted", file=sys.stderr)
        return INTERRUPTED


USUAL_WAY = """\
The usual way: `doctor` on a new machine, then for a run of yours `check`, `plan`, `train`, and `plot` or
`export` of what it left. A CONFIG is a preset (`longseq config list`) or a YAML file; `key=value` behind it
sets any of its keys. `longseq COMMAND --help` says more."""


class _Parser(argparse.ArgumentParser):
    """Says where to read on when it is given words that it does not know; so do the commands' parsers."""

    def error(self, message: str) -> NoReturn:
        super().error(f"{message}; try `{self.prog} --help`.")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="longseq",
        description="Train language models on sequences that do not fit in memory.",
        epilog=USUAL_WAY,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"longseq {__version__}")
    parser.add_argument("--traceback", action="store_true", help="show where an error came from")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", title="commands")
    _before_a_run(commands)
    _of_a_run(commands)
    _after_a_run(commands)
    return parser


def _before_a_run(commands) -> None:
    doctor = _config_command(
        commands, "doctor", _doctor, "find what of this machine would stop or slow a run", is_optional=True
    )
    _launcher_options(doctor)
    _config_command(
        commands, "check", _check, "validate a config, show what of its data carries loss, and plan it"
    )
    plan = _config_command(
        commands, "plan", _plan, "will it fit, how fast, with which settings; needs no GPU"
    )
    plan.add_argument("--gpu", help="a GPU that is not here, such as h100-80g")
    plan.add_argument("--num-gpus", type=int, help="how many of them; the same as parallel.num_gpus=N")
    plan.add_argument("--gpus-per-node", type=int, help="of a machine that is not here; default: 8 at most")
    plan.add_argument(
        "--host-memory",
        help="of each node, such as 1.9T or 512G; default: this machine's, or 128 GiB a GPU that is not here",
    )
    plan.add_argument("--json", action="store_true", help="print JSON instead of tables")
    plan.add_argument("--plot", type=Path, metavar="PNG", help="draw the memory as bars")
    plan.add_argument(
        "--calibrate",
        action="store_true",
        help="time the GPU that is here for 20 seconds, and keep its figures",
    )
    verify = _config_command(
        commands, "verify", _verify, "compare a small model like yours with plain PyTorch in float64"
    )
    verify.add_argument("--json", action="store_true", help="print JSON instead of tables")
    _bench_command(commands)
    _config_command(commands, "prepare", _prepare, "tokenise the data of a config, and show its lengths")


def _bench_command(commands) -> None:
    bench = _config_command(
        commands, "bench", _bench, "time whole training steps here, on random weights and made-up documents"
    )
    _launcher_options(bench)
    bench.add_argument("--steps", type=int, help="that are timed; default: 2, and 1 with --memory-only")
    bench.add_argument(
        "--no-warm-up",
        action="store_true",
        help="time the first step too, after one of a few thousand tokens",
    )
    bench.add_argument(
        "--memory-only",
        action="store_true",
        help="leave attention and products out, not their memory: no seconds, no loss",
    )
    bench.add_argument("--gpu-memory", metavar="SIZE", help="behave as on a smaller card, such as 80G")
    bench.add_argument(
        "--host-memory", metavar="SIZE", help="of each node, such as 115G; default: what there is"
    )
    bench.add_argument(
        "--document-tokens", metavar="N", help="pack documents of so many; default: one a sequence"
    )
    bench.add_argument("--profile", action="store_true", help="take one more step apart, kernel by kernel")
    bench.add_argument("--json", type=Path, metavar="FILE", help="keep all that is found, as it is found")


def _of_a_run(commands) -> None:
    train = _config_command(commands, "train", _train, "train, or go on with a run that was stopped")
    _launcher_options(train)
    train.add_argument(
        "--max-restarts",
        type=int,
        default=0,
        metavar="N",
        help="go on by itself after a crash, N times at most",
    )


def _after_a_run(commands) -> None:
    plot = commands.add_parser("plot", help="draw the loss of one run, or of several over each other")
    plot.add_argument("runs", type=Path, nargs="+", metavar="RUN")
    plot.add_argument("--out", type=Path, help="image to write; default: loss.png in the (first) run")
    plot.set_defaults(run=_plot)

    export = commands.add_parser("export", help="write a checkpoint's model in Hugging Face's layout")
    export.add_argument("checkpoint", type=Path, help="RUN/checkpoints/step-*, or RUN for its newest")
    export.add_argument("out", type=Path, help="folder to write")
    export.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: as it was trained")
    export.add_argument(
        "--adapters",
        choices=("merge", "apart"),
        default="merge",
        help="LoRA: merged into the model, or alone",
    )
    export.add_argument("--overwrite", action="store_true", help="replace what is at OUT")
    export.set_defaults(run=_export)

    config = commands.add_parser("config", help="list and show presets; print the schema")
    verbs = config.add_subparsers(dest="verb", required=True, metavar="VERB")
    verbs.add_parser("list", help="every preset with what it is for").set_defaults(run=_config_list)
    show = verbs.add_parser("show", help="a preset as it is shipped")
    show.add_argument("preset")
    show.set_defaults(run=_config_show)
    verbs.add_parser("schema", help="JSON schema, for editors").set_defaults(run=_config_schema)


def _launcher_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("--num-gpus", type=int, help="processes in all; the same as parallel.num_gpus=N")
    command.add_argument("--hostfile", help="DeepSpeed hostfile, to start on several nodes")
    command.epilog = "What stands behind -- goes to DeepSpeed's launcher."


def _config_command(
    commands, name: str, run, help: str, *, is_optional: bool = False
) -> argparse.ArgumentParser:
    command = commands.add_parser(name, help=help, description=help[0].upper() + help[1:] + ".")
    what = "`longseq config list` names the presets"
    if is_optional:
        what += "; without one it is the machine alone"
    command.add_argument("config", metavar="CONFIG", help=what, nargs="?" if is_optional else None)
    command.add_argument("overrides", nargs="*", metavar="key=value", help="such as sequence.length=128k")
    command.set_defaults(run=run)
    return command


def _train(args: argparse.Namespace) -> int:
    def work(config: RunConfig) -> int:
        from .worker import run_worker

        return run_worker(config)

    if args.max_restarts < 0:
        raise ValueError(f"--max-restarts {args.max_restarts} must be 0 or more.")
    if args.max_restarts:
        from .config_file import load_config
        from .restarts import supervise

        # Before anything is started: what is wrong with a config is so at every start.
        config = load_config(args.config, _overrides(args))
        return supervise(_words_of(args), Path(config.log.run_dir), args.max_restarts)
    return _on_processes(args, work)


def _words_of(args: argparse.Namespace) -> list[str]:
    """The command that `train` was given, without what supervises it."""
    words = ["--traceback"] if args.traceback else []
    words += ["train", args.config, *args.overrides]
    words += [] if args.num_gpus is None else ["--num-gpus", str(args.num_gpus)]
    words += [] if args.hostfile is None else ["--hostfile", args.hostfile]
    return [*words, "--", *args.launcher_args] if args.launcher_args else words


def _doctor(args: argparse.Namespace) -> int:
    from .config_file import load_config
    from .doctor import EXAMINED, doctor, examine
    from .processes import is_launched

    if args.config is None:
        if args.num_gpus is not None or args.hostfile is not None or args.launcher_args:
            raise ValueError(
                "--num-gpus, --hostfile and words behind -- need a CONFIG, which is then compared."
            )
        return doctor()
    config = load_config(args.config, _overrides(args))
    # On other machines the processes that are started there look at them.
    if args.hostfile is None and not is_launched():
        if doctor(config):
            print("Several processes are compared once these errors are gone.")
            return 1
        os.environ[EXAMINED] = "1"
    return _on_processes(args, examine)


def _plan(args: argparse.Namespace) -> int:
    from .planner.command import plan

    return plan(args)


def _bench(args: argparse.Namespace) -> int:
    from .bench.command import bench

    return bench(args)


def _check(args: argparse.Namespace) -> int:
    from .check.command import check

    return check(args.config, args.overrides)


def _verify(args: argparse.Namespace) -> int:
    from .verify.command import verify

    return verify(args.config, args.overrides, as_json=args.json)


def _on_processes(args: argparse.Namespace, work: Callable[[RunConfig], int]) -> int:
    """Do the work of one process, or start as many as the config asks for."""
    from .config_file import check_count, load_config
    from .launcher import launch, num_processes
    from .processes import is_launched

    overrides = _overrides(args)
    config = load_config(args.config, overrides)
    # With a hostfile this is a launcher, even where srun started one on each node.
    if args.hostfile is not None or not is_launched():
        count = num_processes(config, args.hostfile, args.launcher_args)
        check_count(config, count)
        if count != 1 or args.hostfile is not None:
            return launch(
                args.config,
                overrides,
                num_gpus=count,
                command=args.command,
                hostfile=args.hostfile,
                launcher_args=args.launcher_args,
            )
    if args.launcher_args:
        raise ValueError(
            f"{' '.join(args.launcher_args)} behind -- is for DeepSpeed's launcher, which one process does "
            "not start; leave it out, or ask for more with --num-gpus."
        )
    return work(config)


def _overrides(args: argparse.Namespace) -> list[str]:
    given = [] if args.num_gpus is None else [f"parallel.num_gpus={args.num_gpus}"]
    return [*args.overrides, *given]


def _prepare(args: argparse.Namespace) -> None:
    from .config_file import load_config
    from .data.prepare import prepare

    config = load_config(args.config, args.overrides)
    prepare(config.data, config.data.tokenizer or config.model.name or "bytes", progress=True)


def _export(args: argparse.Namespace) -> None:
    from .checkpoint import newest_checkpoint
    from .export import export_checkpoint

    print(
        export_checkpoint(
            newest_checkpoint(args.checkpoint),
            args.out,
            dtype=args.dtype,
            overwrite=args.overwrite,
            adapters=args.adapters,
        )
    )


def _plot(args: argparse.Namespace) -> None:
    from .plot import plot_runs

    print(plot_runs(args.runs, args.out))


def _config_list(args: argparse.Namespace) -> None:
    from .config_file import list_presets

    presets = list_presets()
    width = max(len(name) for name, _ in presets)
    for name, description in presets:
        print(f"{name:{width}}  {description}")


def _config_show(args: argparse.Namespace) -> None:
    from .config_file import show_preset

    print(show_preset(args.preset), end="")


def _config_schema(args: argparse.Namespace) -> None:
    from .config_file import schema_json

    print(schema_json())


if __name__ == "__main__":
    sys.exit(main())
