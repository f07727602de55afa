"""The command ``compress-model``. Nothing heavy is imported before a command needs it, so that help is instant."""

from __future__ import annotations

import argparse
import json
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from compiler import __version__
from compiler.cli_measure import (
    compare_options,
    compare_outputs,
    eval_options,
    evaluate,
    trust_option,
    whole,
    write_page,
)
from compiler.console import Console
from compiler.errors import UsageError, as_ours, nearest
from compiler.executor import NAMES

Handler = Callable[[argparse.Namespace, Console], None]
LONGEST_ANSWER = 1 << 20  # tokens
MOST_THREADS = 1 << 10

OVERVIEW = """\
commands:
  compress-model RECIPE [-o OUT]   do what the recipe says; run it again after an interruption and it resumes
  compress-model plan RECIPE       what it would give: parameters, bytes, FLOPs, cache; reads no weights
  compress-model show MODEL        a model, or what a recipe makes of it, as text
  compress-model eval MODEL        what it is worth, alone or against another: 19 metrics with intervals
  compress-model compare A B C     several outputs: cost against quality, and what is noise
  compress-model diff A B          what differs between two checkpoints
  compress-model run MODEL PROMPT  let a model answer
  compress-model passes [NAME]     every pass and its options
  compress-model schema            the JSON Schema of recipes, for editors

`compress-model COMMAND --help` says more.
"""


class _Parser(argparse.ArgumentParser):
    """argparse whose mistakes are UsageErrors."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(message, remedy=f"see `{self.prog} --help`")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Returns 0 when done, 1 when the input is wrong, 2 when the run failed, 130 when interrupted."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    console = Console()
    try:
        options, handler = _parse(arguments)
        console = Console(quiet=options.quiet)
        with warnings.catch_warnings():
            warnings.simplefilter("default" if options.debug else "ignore")  # other libraries talk to developers
            handler(options, console)
    except KeyboardInterrupt:
        console.error("interrupted")
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains when it exits
        return 0
    except Exception as error:
        if "--debug" in arguments:
            raise
        told = as_ours(error)
        console.error(str(told))
        return told.exit_code
    return 0


def _parse(arguments: Sequence[str]) -> tuple[argparse.Namespace, Handler]:
    if arguments and arguments[0] in COMMANDS:
        name, rest = arguments[0], arguments[1:]
        fill, handler = COMMANDS[name]
        parser = _Parser(prog=f"compress-model {name}", description=handler.__doc__)
    else:
        _check_recipe(arguments[:1])
        rest = arguments or ["--help"]
        fill, handler = _compress_options, _compress
        parser = _Parser(
            prog="compress-model",
            description=handler.__doc__,
            epilog=OVERVIEW,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        parser.add_argument("--version", action="version", version=f"compress-model {__version__}")
    fill(parser)
    parser.add_argument("-q", "--quiet", action="store_true", help="say nothing but results and errors")
    parser.add_argument("--debug", action="store_true", help="show a traceback when something fails")
    return parser.parse_args(rest), handler


def _check_recipe(first: Sequence[str]) -> None:
    """Raises UsageError for a first word that is no option and neither a command nor a path, nor looks like one."""
    for word in first:
        if not word.startswith("-") and not Path(word).suffix and not Path(word).exists():
            raise UsageError(f"there is no command and no recipe `{word}`", remedy=nearest(word, COMMANDS))


def _recipe_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", help="use this model instead of the one the recipe names")
    parser.add_argument("--dump-graphs", metavar="DIR", type=Path, help="write the graph after each pass into DIR")


def _compress_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipes", metavar="RECIPE", type=Path, nargs="+", help="a recipe (.yaml), or several")
    _recipe_options(parser)
    trust_option(parser)
    parser.add_argument(
        "--executor",
        choices=NAMES,
        help="who makes the weights, or does several recipes: threads, worker processes, or a Ray cluster",
    )
    parser.add_argument("--workers", type=whole(1), metavar="N", help="how many of them; default: one a core")
    parser.add_argument(
        "-o",
        "--out",
        metavar="OUT",
        type=Path,
        help="the directory to write, of several recipes a folder of them; default: the recipe's name, here",
    )


def _compress(options: argparse.Namespace, console: Console) -> None:
    """Compress a model as a recipe says: capture, run the passes, write, verify, evaluate, report."""
    from compiler.several import Job, compress_all, load, outputs

    job = Job(options.model, options.executor, options.workers, options.trust_remote_code, options.dump_graphs)
    if len(options.recipes) > 1:
        compress_all(job, outputs(options.recipes, options.out or Path()), console)
        return
    (recipe,) = options.recipes
    console.result(job.run(load(recipe, job), options.out or Path(recipe.stem), console).summary())


def _plan_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", metavar="RECIPE", type=Path, help="a recipe (.yaml)")
    _recipe_options(parser)
    parser.add_argument("--json", action="store_true", help="print the plan as JSON")
    parser.add_argument("--html", metavar="FILE", type=Path, help="also draw it, as one self-contained page")


def _plan(options: argparse.Namespace, console: Console) -> None:
    """What a recipe would give, from the model's config and file headers alone. Ends as the run would."""
    from compiler.plan import make_plan
    from compiler.recipe import Recipe

    recipe = Recipe.load(options.recipe, model=options.model)
    plan = make_plan(recipe, dump_graphs=options.dump_graphs)
    console.result(json.dumps(plan.to_dict(), indent=2) if options.json else plan.text())
    plan.check()
    if options.html is not None:
        from compiler.report.planned import planned_page

        write_page(options.html, planned_page(recipe, plan))


def _show_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="a checkpoint, a config, or a recipe (.yaml)")
    parser.add_argument("--layer", type=int, metavar="N", help="only layer N")
    parser.add_argument("--weights", action="store_true", help="also how every weight is made")
    parser.add_argument("--after", metavar="PASS", help="of a recipe: the graph after this pass, not the last one")


def _show(options: argparse.Namespace, console: Console) -> None:
    """A model as text, one operation a line; of a recipe, what its passes make of its model. Reads no weights."""
    from compiler.ir.text import print_graph
    from compiler.plan import graph_of

    graph = graph_of(options.model, after=options.after)
    console.result(print_graph(graph, weights=options.weights, layer=options.layer))


def _diff_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("left", metavar="A", help="a checkpoint")
    parser.add_argument("right", metavar="B", help="another checkpoint")
    parser.add_argument("--headers-only", action="store_true", help="compare names, shapes and dtypes, not values")


def _diff(options: argparse.Namespace, console: Console) -> None:
    """What differs between two checkpoints: config, how they were made, tensors, values."""
    from compiler.diff import diff

    with console.progress("comparing") as advance:
        text = diff(options.left, options.right, values=not options.headers_only, on_progress=advance)
    console.result(text)


def _run_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="a checkpoint directory, a .gguf file, or an .onnx model")
    parser.add_argument("prompt", metavar="PROMPT", help="what to say to it")
    most = "at most N tokens of answer (64)"
    parser.add_argument("--max-new-tokens", type=whole(0, LONGEST_ANSWER), default=64, metavar="N", help=most)
    parser.add_argument("--tokens-per-second", action="store_true", help="say how fast it was")
    threads = "of an .onnx model; default: all cores"
    parser.add_argument("--threads", type=whole(0, MOST_THREADS), default=0, metavar="N", help=threads)
    trust_option(parser)


def _run(options: argparse.Namespace, console: Console) -> None:
    """Let a model answer a prompt, loaded by plain transformers, an .onnx model by ONNX Runtime alone."""
    _check_prompt(options.prompt)
    if options.model.endswith(".onnx"):
        _run_onnx(options, console)
        return
    from compiler.evaluate import generate

    answer = generate(
        options.model,
        options.prompt,
        options.max_new_tokens,
        on_text=console.stream,
        trust_remote_code=options.trust_remote_code,
    )
    console.result("")
    if options.tokens_per_second:
        console.result(f"{answer.tokens_per_second:.1f} tokens/s")


def _check_prompt(prompt: str) -> None:
    """Raises UsageError for a prompt whose bytes were no UTF-8: Python hands them over as halves of surrogates."""
    try:
        prompt.encode("utf-8")
    except UnicodeEncodeError as reason:
        cause = f"PROMPT is no UTF-8: character {reason.start + 1} is none"
        raise UsageError(cause, remedy="convert it, say with `iconv -f latin1 -t utf-8`") from reason


def _run_onnx(options: argparse.Namespace, console: Console) -> None:
    from backends.onnx.runner import answer

    taken: list[float] = []
    for piece, seconds in answer(Path(options.model), options.prompt, options.max_new_tokens, threads=options.threads):
        console.stream(piece)
        taken.append(seconds)
    console.result("")
    if options.tokens_per_second and len(taken) > 1:
        console.result(f"{(len(taken) - 1) / sum(taken[1:]):.1f} tokens/s, after {taken[0]:.2f} s for the prompt")


def _passes_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="NAME", nargs="?", help="say all about this pass")


def _passes(options: argparse.Namespace, console: Console) -> None:
    """Every pass and its options."""
    from compiler.helptext import pass_help, pass_list

    console.result(pass_help(options.name) if options.name else pass_list())


def _schema_options(parser: argparse.ArgumentParser) -> None:
    parser.epilog = "write it to a file and name that in your editor's YAML settings"


def _schema(options: argparse.Namespace, console: Console) -> None:
    """The JSON Schema of recipes, with every installed pass."""
    from compiler.recipe.json_schema import json_schema

    console.result(json.dumps(json_schema(), indent=2))


COMMANDS: dict[str, tuple[Callable[[argparse.ArgumentParser], None], Handler]] = {
    "plan": (_plan_options, _plan),
    "show": (_show_options, _show),
    "eval": (eval_options, evaluate),
    "compare": (compare_options, compare_outputs),
    "diff": (_diff_options, _diff),
    "run": (_run_options, _run),
    "passes": (_passes_options, _passes),
    "schema": (_schema_options, _schema),
}


if __name__ == "__main__":
    sys.exit(main())
