"""The loss of a language model's head, forward and backward: time, memory and error, ours and others'.

python benchmarks/lm_head.py --out benchmarks/results      # everything, some minutes on an H200
python benchmarks/lm_head.py --shapes gemma --data zipf --only exact filtered eager
python benchmarks/lm_head.py --shapes tiny                 # on a CPU too, to see that it works
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lm_head_plot
import report
import torch
from lm_head_data import KINDS, SHAPES, Problem, Shape, draw_problem, draw_weight
from lm_head_methods import METHODS, Loss, Method, OurFilter, attempt, eager
from lm_head_timing import bare_matmul, free, peak_mib, run_step, seconds, seconds_beside
from lm_head_truth import EPS, Gradients, SpotCheck, facts, gradients, relative_error, worst
from torch import Tensor

ERROR_TOKENS = 1024
REPEATS, QUICK_REPEATS = 2, 1
LONG_TOKENS = 16384  # from here on a step takes a third of a second, and others' most of a second or more
LOSS_TOLERANCE = 1e-2
GRADIENT_TOLERANCE = 5e-2
FILTER_SLACK = 3.0  # our filter's tiles are its own: this often the error of Apple's rule is no mistake yet
GRADS = ("dE", "dW")
CASE_KEYS = ("shape", "data", "tokens")
JSON_ONLY = (*CASE_KEYS, "key", "ours", "f", "dropped")  # a table's heading says it, or another table does
Row = dict[str, Any]

NOTE = f"""bfloat16. G is one bare `hidden @ weight.T` of the same problem by cuBLAS, timed right before and
right after what it is the unit of. "fwd" is the forward of a training step; several methods form the
gradients there. Memory is the peak over the inputs, in the last such column without dE and dW, which every
method returns. Times are means of runs back to back. "error at N" is the largest relative error on the
problem that was timed: of the loss, of some rows of dE, of some rows of dW. The tables of errors are of the
first {ERROR_TOKENS:,} tokens against float64 (norm of the difference over norm), and as multiples of eager's.

The filters' eps is 2^-12. f is the share of tiles that live, "dropped" the mean probability that a token's
gradient loses. "Apple's rule" is tiles of 128x128 with the words sorted by mean logit, applied in float64:
the errors of the rule alone, where cut-cross-entropy's own, in the tables of errors, have its sums as well.
How the data is drawn is in lm_head_data.py."""


@dataclass(frozen=True)
class Case:
    """One problem to time."""

    shape: Shape
    kind: str
    num_tokens: int

    @property
    def keys(self) -> Row:
        return {"shape": self.shape.name, "data": self.kind, "tokens": self.num_tokens}

    @property
    def heading(self) -> str:
        return heading_of(self.keys)


def all_cases() -> list[Case]:
    """What runs where nothing is chosen."""
    wanted = [
        ("gemma", "zipf", (8192, 65536)),
        ("llama", "zipf", (8192, 65536)),
        ("gemma", "flat", (8192,)),
        ("llama", "flat", (8192,)),
        ("qwen", "zipf", (8192,)),
        ("odd", "zipf", (12345,)),
        ("gemma", "zipf-sharp", (8192,)),
    ]
    return [Case(SHAPES[shape], kind, tokens) for shape, kind, lengths in wanted for tokens in lengths]


def chosen_cases(args: argparse.Namespace) -> list[Case]:
    """The product of what was chosen; what was not is Gemma's and Llama's heads, zipf, a shape's tokens."""
    if not (args.shapes or args.tokens or args.data or args.quick):
        return all_cases()
    return [
        Case(SHAPES[shape], kind, num_tokens)
        for shape in args.shapes or ("gemma", "llama")
        for kind in args.data or ("zipf",)
        for num_tokens in args.tokens or (SHAPES[shape].num_tokens,)
    ]


class Bench:
    """Runs the cases and keeps the rows; a case is printed as soon as it is done."""

    def __init__(self, methods: list[Method], repeats: int, device: str, out: Path | None) -> None:
        self.methods, self.repeats, self.device, self.out = methods, repeats, device, out
        self.rows: list[Row] = []
        self.error_rows: list[Row] = []
        self.filter_rows: list[Row] = []
        self.data_rows: list[Row] = []

    def run(self, cases: list[Case]) -> None:
        groups: dict[tuple[Shape, str], list[Case]] = {}
        for case in cases:
            groups.setdefault((case.shape, case.kind), []).append(case)
        for (shape, kind), group in groups.items():
            weight = draw_weight(shape, kind, self.device)
            apples = self.find_errors(shape, kind, weight)
            for case in group:
                self.run_case(case, weight, apples)
                self.write()
            weight.grad = None
            del weight
            free(self.device)

    def find_errors(self, shape: Shape, kind: str, weight: Tensor) -> Row:
        """Every method against float64 on few tokens; returns the errors of Apple's rule."""
        num_tokens = min(ERROR_TOKENS, shape.num_tokens)
        problem = draw_problem(shape, kind, weight, num_tokens)
        truth = gradients(problem)
        apples = errors(gradients(problem, filtered=True), truth)
        yardstick = errors(run_step(eager, problem), truth)
        where = {"shape": shape.name, "data": kind, "tokens": num_tokens}
        for method in self.methods_of(Case(shape, kind, num_tokens)):
            if method.forward_only:
                continue
            found = attempt(method, lambda loss: errors(run_step(loss, problem), truth), self.device)
            note = found.pop("note")
            if note is None:
                gradient_error = worst(found["dE error"], found["dW error"])
                refuse_if_wrong(method, found["loss error"], gradient_error, apples, heading_of(where))
                for name in GRADS:
                    found[f"{name} / eager"] = found[f"{name} error"] / yardstick[f"{name} error"]
            self.error_rows.append(
                where | {"key": method.key, "method": method.label} | found | {"note": note}
            )
        problem.weight.grad = None
        return apples

    def run_case(self, case: Case, weight: Tensor, apples: Row) -> None:
        """Time and memory of every method; no row is kept of a case in which one of ours is wrong."""
        problem = draw_problem(case.shape, case.kind, weight, case.num_tokens)
        about = facts(problem)
        check = SpotCheck(problem)
        free(self.device)
        bare = bare_matmul(problem)
        g_s = seconds(bare, self.repeats)
        found: list[tuple[Method, Row]] = []
        for method in self.methods_of(case):
            row = attempt(
                method, lambda loss, m=method: self.measure(m, loss, problem, check, bare), self.device
            )
            if row["note"] is None:
                refuse_if_wrong(method, row["loss error at N"], row["error at N"], apples, case.heading)
            found.append((method, row))
        rows = [case.keys | {"method": "bare logits matmul (G)", "fwd ms": g_s * 1e3, "fwd G": 1.0}]
        rows += [case.keys | in_order(method, row) for method, row in found]
        self.rows += rows
        sizes = {"V": case.shape.vocab_size, "D": case.shape.width}
        self.data_rows.append(case.keys | sizes | about)
        for method, row in found:
            if method.key == "filtered":
                self.filter_rows.append(case.keys | self.filter_row(case, row, about, apples))
        problem.weight.grad = None
        print(f"\n{case.heading}\n{report.markdown(to_read(rows))}", flush=True)

    def methods_of(self, case: Case) -> list[Method]:
        """All at the main cases; elsewhere those that the case is about."""
        main = case.kind == "zipf" and case.shape in (SHAPES["gemma"], SHAPES["llama"], SHAPES["tiny"])
        if case.num_tokens >= LONG_TOKENS:
            return [method for method in self.methods if method.ours or method.key == "liger"]
        return [method for method in self.methods if main or method.ours or method.everywhere]

    def measure(
        self, method: Method, loss: Loss, problem: Problem, check: SpotCheck, bare: Callable[[], None]
    ) -> Row:
        """Everything about one method on one problem; the first steps warm it up."""
        inputs = problem.hidden, problem.weight, problem.labels
        found: Row = {}
        if method.forward_only:
            loss = torch.no_grad()(loss)
            found["loss error at N"], found["error at N"] = check.errors(loss(*inputs), None, None)
        else:
            run_step(loss, problem)
            step = run_step(loss, problem)
            found["loss error at N"], found["error at N"] = check.errors(step.loss, step.hidden, step.weight)
            del step
        if isinstance(loss, OurFilter):
            found |= loss.facts(lambda: run_step(loss, problem))
        problem.hidden.grad = problem.weight.grad = None
        found["fwd MiB"] = peak_mib(lambda: loss(*inputs), self.device)
        timed = seconds_beside(lambda: loss(*inputs), bare, self.repeats)
        found["fwd s"], found["fwd G s"] = timed
        if method.forward_only:
            return found
        peak = peak_mib(lambda: run_step(loss, problem), self.device)
        found["fwd+bwd MiB"] = peak
        gradients_mib = (problem.hidden.nbytes + problem.weight.nbytes) / 2**20
        found["beside dE, dW MiB"] = None if peak is None else peak - gradients_mib
        timed = seconds_beside(lambda: run_step(loss, problem), bare, self.repeats)
        found["fwd+bwd s"], found["fwd+bwd G s"] = timed
        return found

    def filter_row(self, case: Case, ours: Row, about: Row, apples: Row) -> Row:
        """Our filter beside Apple's rule: what lives, what is dropped, and what it does to the gradients."""
        row = {
            "f, ours": ours.get("f"),
            "f, Apple's rule": about["f, sorted"],
            "dropped, ours": ours.get("dropped"),
            "dropped, Apple's rule": about["dropped, sorted"],
        }
        mine = next(
            row
            for row in self.error_rows
            if row["key"] == "filtered" and (row["shape"], row["data"]) == (case.shape.name, case.kind)
        )
        for name in GRADS:
            row[f"{name} error, ours"] = mine.get(f"{name} error")
            row[f"{name} error, Apple's rule"] = apples[f"{name} error"]
        return row

    def write(self, *, show: bool = False) -> None:
        """Keep what there is so far; a run that is cut short has kept its cases."""
        report.write(
            "lm_head",
            "The loss of a language model's head, forward and backward",
            self.rows,
            self.out,
            tables=self.tables(),
            note=NOTE,
            show=show,
            errors=self.error_rows,
            filters=self.filter_rows,
            data=self.data_rows,
            filter_eps=EPS,
        )

    def tables(self) -> list[tuple[str, list[Row]]]:
        """All tables with their headings, in the order in which they are read."""
        found = []
        for kind, rows in (("", self.rows), ("Errors: ", self.error_rows)):
            cases: dict[str, list[Row]] = {}
            for row in rows:
                cases.setdefault(kind + heading_of(row), []).append(row)
            found += [(heading, to_read(of_case)) for heading, of_case in cases.items()]
        if self.filter_rows:
            found.append(("The filters, eps 2^-12", self.filter_rows))
        return [*found, ("The data", self.data_rows)]


def heading_of(row: Row) -> str:
    return f"{row['shape']}, {row['tokens']:,} tokens, {row['data']}"


def to_read(rows: list[Row]) -> list[Row]:
    """The columns that a table under its heading needs; no column of nothing."""
    names = [name for name in dict.fromkeys(name for row in rows for name in row) if name not in JSON_ONLY]
    names = [name for name in names if any(row.get(name) is not None for row in rows)]
    return [{name: row.get(name) for name in names} for row in rows]


def errors(found: Gradients, truth: Gradients) -> Row:
    return {
        "loss error": relative_error(found.loss, truth.loss),
        "dE error": relative_error(found.hidden, truth.hidden),
        "dW error": relative_error(found.weight, truth.weight),
    }


def refuse_if_wrong(method: Method, loss_error: float, error: float, apples: Row, where: str) -> None:
    """A time of a wrong result is no time.

    Raises:
        SystemExit: A method of ours is not what float64 says, up to what its filter may drop.
    """
    if not method.ours:
        return
    allowed = GRADIENT_TOLERANCE
    if method.filtered:
        allowed += FILTER_SLACK * max(apples["dE error"], apples["dW error"])
    if not (loss_error < LOSS_TOLERANCE and error < allowed):  # a NaN is refused too
        raise SystemExit(
            f"{method.label} disagrees with float64 on {where}: the loss by {loss_error:.3g} (allowed "
            f"{LOSS_TOLERANCE:g}), at worst by {error:.3g} (allowed {allowed:.3g}); nothing is reported."
        )


def in_order(method: Method, found: Row) -> Row:
    """A row with all columns, those that could not be had empty."""
    row: Row = {"key": method.key, "method": method.label, "ours": method.ours}
    for phase in ("fwd", "fwd+bwd"):
        took = found.get(f"{phase} s")
        row[f"{phase} ms"] = None if took is None else took * 1e3
        row[f"{phase} G"] = None if took is None else took / found[f"{phase} G s"]
    for name in ("fwd MiB", "fwd+bwd MiB", "beside dE, dW MiB", "error at N", "f", "dropped", "note"):
        row[name] = found.get(name)
    return row


def parser() -> argparse.ArgumentParser:
    options = report.arguments(__doc__.splitlines()[0])
    keys = [method.key for method in METHODS]
    options.add_argument("--only", nargs="+", choices=keys, metavar="METHOD", help=f"of {', '.join(keys)}")
    options.add_argument("--shapes", nargs="+", choices=SHAPES)
    options.add_argument("--tokens", nargs="+", type=int, help="default: 8192 (odd: 8191, tiny: 300)")
    options.add_argument("--data", nargs="+", choices=KINDS)
    options.add_argument("--quick", action="store_true", help="gemma and llama, zipf, fewer repeats")
    return options


def main(arguments: list[str] | None = None) -> None:
    args = parser().parse_args(arguments)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and set(args.shapes or ()) != {"tiny"}:
        raise SystemExit("A head of this size needs a CUDA GPU; on a CPU give --shapes tiny.")
    bench = Bench(
        [method for method in METHODS if not args.only or method.key in args.only],
        QUICK_REPEATS if args.quick else REPEATS,
        device,
        args.out,
    )
    bench.run(chosen_cases(args))
    bench.write(show=True)
    if args.out is not None:
        lm_head_plot.draw(bench.rows, args.out / "lm_head.png")


if __name__ == "__main__":
    main()
