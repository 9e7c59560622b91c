"""Arguments to commands. Nothing heavy is imported before a command runs, so ``--help`` is instant."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

EXAMPLES = """examples:
  vdiff train configs/digits_edm.yaml --out outputs/digits_edm
  vdiff train configs/digits_edm.yaml training.num_steps=500 engine.sampler.num_steps=10
  vdiff sample outputs/digits_edm --num 64 --label 3 --guidance 2 --solver heun --steps 18 --out grid.png
  vdiff sample outputs/digits_text --prompt "a handwritten three" --guidance 3 --negative "a handwritten eight"
  vdiff evaluate outputs/digits_edm
  vdiff describe sampler/heun
  vdiff convert outputs/digits_lora style.safetensors --mixin style
  vdiff convert style.safetensors style_peft --to peft
  vdiff convert v1-5-pruned.ckpt sd15 --to diffusers
"""

EXIT_USER_ERROR = 2


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code: 0, 2 for a user's error, 75 for a run that was told to stop and saved."""
    arguments = parse(argv)
    if arguments.traceback:
        return _run(arguments)
    try:
        return _run(arguments)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # `vdiff list | head`
        sys.stderr.close()
        return 0
    except (ValueError, KeyError, TypeError, ImportError, OSError, RuntimeError) as error:
        message = error.args[0] if isinstance(error, KeyError) and error.args else error
        print(f"vdiff {arguments.command}: {message}\n(--traceback shows where it came from)", file=sys.stderr)
        return EXIT_USER_ERROR


def _run(arguments: argparse.Namespace) -> int:
    module, function = arguments.run
    return getattr(importlib.import_module(f"vdiff.cli.{module}"), function)(arguments) or 0


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The arguments; ``key=value`` overrides may stand before or after the options."""
    top = parser()
    arguments, rest = top.parse_known_args(argv)
    overrides = [word for word in rest if "=" in word and not word.startswith("-")]
    if len(overrides) != len(rest) or (rest and arguments.command not in ("train", "summary")):
        top.error(
            f"unrecognized arguments: {' '.join(word for word in rest if word not in overrides) or ' '.join(rest)}"
        )
    if overrides:
        arguments.config += overrides
    return arguments


def parser() -> argparse.ArgumentParser:
    """All commands and their arguments."""
    top = argparse.ArgumentParser(
        prog="vdiff", description="Image and video diffusion for research.", epilog=EXAMPLES, formatter_class=_Raw
    )
    top.add_argument("--version", action=_Version)
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    train = _command(commands, "train", "training", "train a run file, or continue a run")
    train.add_argument("config", nargs="+", help="run files, later ones over earlier ones, then key=value overrides")
    train.add_argument("--out", help="run folder; by default outputs/ and the name of the last file")
    _imports_argument(train)

    sample = _command(commands, "sample", "sampling", "draw samples from a run")
    _run_arguments(sample)
    sample.add_argument("--num", type=_count, default=64, help="how many (64)")
    sample.add_argument("--prompt", action="append", help="what all samples show; repeat for several, taken in turn")
    sample.add_argument("--prompts", action="append", metavar="FILE", help="prompts from a file, one a line")
    sample.add_argument("--negative", default=None, metavar="PROMPT", help="what guidance moves away from")
    sample.add_argument("--label", type=int, action="append", help="class of all samples; repeat for several")
    sample.add_argument(
        "--image",
        action="append",
        metavar="FILE",
        help="a picture to begin with or go by; repeat for several",
    )
    sample.add_argument(
        "--field", type=_field, action="append", metavar="NAME=VALUE", help="any other condition; repeat for several"
    )
    sample.add_argument("--out", default=None, help="picture (.png), video (.gif, .mp4) or tensor (.safetensors)")
    sample.add_argument("--fps", type=float, default=8.0, help="frames per second of a video (8)")
    sample.add_argument("--columns", type=_count, default=None, help="of the picture")
    sample.add_argument("--upscale", type=_count, default=None, help="size of a pixel in the picture")
    sample.add_argument("--crisp", action="store_true", help="show pixels as squares instead of smoothly")

    evaluate = _command(commands, "evaluate", "sampling", "hold a run's samples against its data")
    _run_arguments(evaluate)
    evaluate.add_argument("--num", type=_count, default=None, help="how many; by default as many as there are examples")
    evaluate.add_argument(
        "--prompts-of", choices=("train", "validation"), help="whose conditions to draw with; by default of both"
    )
    evaluate.add_argument("--metric", action="append", help="by default all; `vdiff list metric`")
    evaluate.add_argument("--out", default=None, help="figures as JSON; RUN/evaluation.json")

    names = _command(commands, "list", "registry", "what is registered, of one kind or of all")
    names.add_argument("kind", nargs="?")

    describe = _command(commands, "describe", "registry", "signature, text and paper of an entry; mixins of a run")
    describe.add_argument(
        "entry", help="KIND/NAME, such as sampler/heun; or a run, or its file: which mixin touches which module"
    )
    _imports_argument(describe)

    inspect = _command(commands, "inspect", "inspection", "what is in a run folder or a weight file")
    inspect.add_argument("path", help="RUN or FILE")
    inspect.add_argument("--depth", type=_count, default=3, help="of the census of keys (3)")
    inspect.add_argument("--keys", action="store_true", help="every name with its shape, below the census")
    inspect.add_argument("--against", metavar="CONFIG", help="what its engine has and the file lacks, and the reverse")
    inspect.add_argument("--slot", default="", help="with --against: of this part, such as denoiser.network")
    _imports_argument(inspect)

    summary = _command(commands, "summary", "summary", "modules of a run file, their parameters, FLOPs and memory")
    summary.add_argument("config", nargs="+", help="run files, or a run's folder, then key=value overrides")
    summary.add_argument("--batch-size", type=_count, default=1, help="rows of the batch that is counted (1)")
    summary.add_argument("--depth", type=_count, default=5, help="levels of modules (5)")
    summary.add_argument("--width", type=_count, default=120, help="of the text (120)")
    summary.add_argument("--device", default="meta", help="meta (computes and stores nothing), cpu, cuda, ...")
    _imports_argument(summary)

    plot = _command(commands, "plot", "plot", "schedules, levels, training curves or solvers, as a picture")
    plot.add_argument("picture", choices=("schedule", "levels", "run", "solvers"))
    plot.add_argument("what", nargs="*", help="schedules or run files; one run file; run folders; solvers")
    plot.add_argument("--discretizer", action="append", help="with schedule: show the levels of these")
    plot.add_argument("--steps", type=_count, default=10, help="with --discretizer (10)")
    plot.add_argument("--out", default=None, help=".png, .pdf or .svg")
    _imports_argument(plot)

    convert = _command(commands, "convert", "conversion", "a checkpoint from one layout to another, or an adapter")
    convert.add_argument("source", metavar="IN", help="checkpoint, or adapter, or RUN for its adapter")
    convert.add_argument("out", metavar="OUT", help="file; for peft, and for diffusers' pipelines, a folder")
    layouts = ("vdiff", "diffusers", "ldm", "sgm", "sat", "lvdm", "dynamicrafter", "dynamicrafter_256")
    formats = (*layouts, "peft", "kohya", "unicon")
    convert.add_argument("--to", choices=formats, default="vdiff", help="layout or format of OUT (vdiff)")
    convert.add_argument("--part", action="append", metavar="NAME", help="of a checkpoint, alone; repeat for several")
    convert.add_argument("--ignore", action="append", metavar="PREFIX", help="names of a checkpoint to leave out")
    convert.add_argument("--shard-size", type=_bytes, default=None, metavar="SIZE", help="of OUT at most, such as 5GB")
    convert.add_argument(
        "--given", type=_given, action="append", metavar="NAME=NUMBER", help="what a checkpoint does not tell"
    )
    convert.add_argument("--host", help="the network, for its modules' names: a run, a run file, sd15, sd2 or sdxl")
    convert.add_argument("--component", help="of a file for a whole pipeline: unet, transformer, text_encoder, ...")
    convert.add_argument("--alpha", type=float, default=None, help="of a file that does not say it (SAT)")
    convert.add_argument("--mixin", default=None, metavar="NAME", help="of a run; by default its only one")
    convert.add_argument("--weights", choices=("ema", "raw"), default="ema", help="of a run or checkpoint (ema)")
    convert.add_argument("--step", type=_checkpoint, default="last", help="of a run: a checkpoint, last or best")
    _imports_argument(convert)

    _command(commands, "doctor", "inspection", "what this machine can do")
    return top


def _command(commands: argparse._SubParsersAction, name: str, module: str, text: str) -> argparse.ArgumentParser:
    command = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
    command.add_argument("--traceback", action="store_true", help="show the traceback of an error")
    command.set_defaults(run=(module, name if name != "list" else "names"))
    return command


def _run_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("folder", metavar="RUN", help="folder of a training run")
    command.add_argument("--weights", choices=("ema", "raw"), default=None, help="ema if the run kept them")
    command.add_argument("--step", type=_checkpoint, default="last", help="number of a checkpoint, last or best")
    command.add_argument("--guidance", type=float, default=None, help="scale; 1 is the plain conditional prediction")
    command.add_argument("--solver", default=None, help="`vdiff list sampler`")
    command.add_argument("--steps", type=_count, default=None, help="steps of the solver")
    command.add_argument("--seed", type=int, default=0, help="of the first sample; the others follow")
    command.add_argument("--batch-size", type=_count, default=256)
    command.add_argument("--device", default="auto")
    _imports_argument(command)


def _imports_argument(command: argparse.ArgumentParser) -> None:
    command.add_argument("--allow-imports", action="store_true", help="let the config import the modules it names")


def _count(word: str) -> int:
    if not word.isdecimal() or int(word) < 1:
        raise argparse.ArgumentTypeError(f"a number, at least 1, and not {word!r}")
    return int(word)


def _field(word: str) -> tuple[str, str]:
    name, sign, value = word.partition("=")
    if not name or not sign:
        raise argparse.ArgumentTypeError(f"NAME=VALUE, such as fps=8, and not {word!r}")
    return name, value


def _given(word: str) -> tuple[str, int]:
    name, value = _field(word)
    return name, _count(value)


def _bytes(word: str) -> int:
    number = word.upper().removesuffix("B")
    unit = {"K": 10**3, "M": 10**6, "G": 10**9}.get(number[-1:], 1)
    digits = number[:-1] if unit > 1 else number
    if not digits.isdecimal() or int(digits) < 1:
        raise argparse.ArgumentTypeError(f"a size, such as 5GB or 200MB, and not {word!r}")
    return int(digits) * unit


def _checkpoint(word: str) -> int | str:
    if word in ("last", "best"):
        return word
    if not word.isdecimal():
        raise argparse.ArgumentTypeError(f"last, best or the number of a step, and not {word!r}")
    return int(word)


class _Raw(argparse.RawDescriptionHelpFormatter):
    pass


class _Version(argparse.Action):
    def __init__(self, option_strings: list[str], dest: str) -> None:
        super().__init__(option_strings, dest, nargs=0, help="show the version")

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from vdiff import __version__

        print(f"vdiff {__version__}")
        parser.exit()
