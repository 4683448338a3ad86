"""Speed of hessnb's curvature against published packages: the same network and samples, alternating runs, as ratios.

    python tests/benchmarks/curvature_speed.py [--only NAME ...] [--rounds 5] [--threads 1] [--publish FILE]

pyhessian        top 20, both at tol=1e-4, which mean different things: PyHessian's bounds the change of an eigenvalue
                 between two iterations, hessnb's the residual |Hv - lambda v| / |lambda|
pyhessian-equal  the first few eigenvalues, PyHessian with the fewest iterations for residuals as small as asked
curvlinops       top 20 with its operator in SciPy's eigsh, at the loosest tolerance with residuals as small as asked
eigenthings      top 20 with its Lanczos, at the smallest number of steps with residuals as small as asked
product          one Hessian-vector product in gradients, by batch size
inputs           largest eigenvalue of each sample's input Hessian, against a power iteration on all samples at once
memory           peak memory of a top 20 of C1 on CIFAR-10 (nothing is compared)

The network is M1, trained here to a loss of 0.02 on 5,000 MNIST digits. Every ratio is the peer's seconds over
hessnb's, run in turns in one process on the same number of threads, construction of the operator included (and of
curvlinops', with the determinism check that it makes by default). What a solver claims counts for nothing: the
residuals of both are measured with a double backward pass in float64 that uses neither package. "As small as asked" is
1e-4, or what hessnb attains where that is more; the peer's settings are tried from the cheapest on and only the one
that will do counts. hessnb's products include those that check for missed eigenvalues; no peer makes such a check.
Seconds are those of the processor, summed over threads, so that other work on the machine does not count.
Batches are of equal size, since one peer averages them without weights; 250 digits suit all of them (see `product`).
Nothing is asserted. Needs MNIST, for `memory` CIFAR-10 (HESSNB_DATA), and the peers: pip install -e '.[bench]'.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import math
import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import peers
import torch
import torch.nn.functional as F
from peers import Batches, InputEigenvalues, Solution, alternate, short, spread
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]
from torch import nn

from hessnb import data
from hessnb.curvature import EigenResult, HessianOperator, input_hessian_eigenvalues, lanczos
from hessnb.experiments.provenance import provenance
from hessnb.models import build, parameter_count
from hessnb.training import Recipe, train

TOL = 1e-4
BATCH = 250
PRODUCT_BATCHES = (125, 250, 500)
GIB = 2**30

Row = dict[str, Any]
Solver = Callable[[], Solution]


@lru_cache
def network() -> nn.Module:
    """Return M1, trained on the first 5,000 digits to a loss of 0.02 and in eval mode."""
    model = build("M1", seed=0)
    digits = data.load("mnist", n_train=5000, n_test=1000)
    train(model, digits, Recipe(batch_size=64, lr=0.01, momentum=0.9, max_epochs=30, seed=0, loss_target=0.02))
    return model.eval()


def digits(chosen: argparse.Namespace, batch_size: int = BATCH) -> Batches:
    return data.load("mnist", n_train=chosen.digits).train.batches(batch_size)


def solve(H: HessianOperator, k: int, max_basis: int | None = None) -> EigenResult:
    """Run hessnb's eigen-solver; the only place where its options are."""
    return lanczos(H, k=k, tol=TOL, max_basis=max_basis)


def ours(batches: Batches, k: int) -> Solution:
    result = solve(HessianOperator(network(), F.cross_entropy, batches), k)
    return Solution(result.eigenvalues, result.eigenvectors, result.n_matvecs, "")


def compared(name: str, what: str, peer: str, ours: list[float], theirs: list[float], **more: Any) -> Row:
    """Return a row: median seconds of both, and the ratio round by round."""
    return {
        "name": name,
        "what": what,
        "peer": peer,
        "rounds": len(ours),
        "our_seconds": short(statistics.median(ours)),
        "peer_seconds": short(statistics.median(theirs)),
        "ratio": spread(their / our for our, their in zip(ours, theirs, strict=True)),
        **more,
    }


def top(
    chosen: argparse.Namespace, name: str, peer: str, k: int, attempts: Iterable[Solver], *, equal: bool = True
) -> Row:
    """Compare the top k with the peer's first attempt, or with its first whose residuals are as small as asked."""
    batches = digits(chosen)
    mine: Solver = partial(ours, batches, k)
    seconds, solved = alternate(1, {"ours": mine})
    we = peers.judge(network(), batches, solved["ours"])
    tried: list[str] = []
    for attempt in attempts:
        their_seconds, their_solved = alternate(1, {"peer": attempt})
        seconds, solved = seconds | their_seconds, solved | their_solved
        they = peers.judge(network(), batches, solved["peer"])
        finished = solved["peer"].finished
        reached = finished and bool(they.residuals.max() <= max(TOL, float(we.residuals.max())))
        cost = f"{solved['peer'].products} products, {seconds['peer'][0]:.3g} s"
        tried.append(f"{solved['peer'].note}: {cost}, residual {they.residuals.max():.1e}")
        print(f"{name}: {tried[-1]}", flush=True)
        if reached or not finished or not equal:
            break
    if finished and (reached or not equal):
        more, _ = alternate(chosen.rounds - 1, {"ours": mine, "peer": attempt})
        seconds = {who: seconds[who] + more[who] for who in seconds}
    tried.append(f"ours: {solved['ours'].products} products, residual {we.residuals.max():.1e}")
    if len(they.eigenvalues) == k:
        tried[-1] += f"; eigenvalues differ by at most {(they.eigenvalues / we.eigenvalues - 1).abs().max():.1e}"
    return compared(
        name,
        f"top {k} of M1 on {chosen.digits:,} digits, {'equal residuals' if equal else 'both at tol=1e-4'}",
        peer,
        seconds["ours"],
        seconds["peer"],
        at_least=not finished or (equal and not reached),
        residual_max={"ours": short(float(we.residuals.max())), "peer": short(float(they.residuals.max()))},
        residual_median={"ours": short(float(we.residuals.median())), "peer": short(float(they.residuals.median()))},
        products={who: solution.products for who, solution in solved.items()},
        notes=tried,
    )


def pyhessian(chosen: argparse.Namespace) -> list[Row]:
    run = partial(peers.pyhessian, network(), digits(chosen), chosen.count, TOL, chosen.max_iter, chosen.limit)
    return [top(chosen, "pyhessian", peers.version("PyHessian"), chosen.count, [run], equal=False)]


def pyhessian_equal(chosen: argparse.Namespace) -> list[Row]:
    """Take tol=1e-7 and 1e-8; where float32 quotients agree too early by chance, then more and more iterations.

    A power iteration with a ratio r of eigenvalues is stopped at a relative residual of r^2 sqrt(tol / (1 + r)).
    """
    run = partial(peers.pyhessian, network(), digits(chosen), chosen.few)
    iterations = 0

    def attempt(tol: float, max_iter: int) -> Solution:
        nonlocal iterations
        solution = run(tol, max_iter, chosen.limit)
        iterations = solution.iterations
        return solution

    def attempts() -> Iterator[Solver]:
        yield from (partial(attempt, tol, chosen.max_iter) for tol in (1e-7, 1e-8))
        while iterations < chosen.max_iter:
            yield partial(attempt, 0.0, min(math.ceil(1.2 * iterations), chosen.max_iter))

    return [top(chosen, "pyhessian-equal", peers.version("PyHessian"), chosen.few, attempts())]


def curvlinops(chosen: argparse.Namespace) -> list[Row]:
    attempts = [partial(peers.curvlinops, network(), digits(chosen), chosen.count, tol) for tol in (1e-3, 1e-4, 1e-5)]
    return [top(chosen, "curvlinops", peers.version("curvlinops-for-pytorch"), chosen.count, attempts)]


def eigenthings(chosen: argparse.Namespace) -> list[Row]:
    """Its number of steps is the caller's to know: what hessnb needed, less 20, then 4 more at each attempt."""
    needed = ours(digits(chosen), chosen.count).products
    run = partial(peers.eigenthings, network(), digits(chosen), chosen.count)
    attempts = [partial(run, steps) for steps in range(max(needed - 20, chosen.count), 2 * needed, 4)]
    return [top(chosen, "eigenthings", peers.version("hessian-eigenthings"), chosen.count, attempts)]


def product(chosen: argparse.Namespace) -> list[Row]:
    """One product over all digits, in gradients: forward, and one gradient of the mean loss, over the same batches."""
    rows = []
    model = network()
    vector = torch.randn(parameter_count(model), generator=torch.Generator().manual_seed(0))
    for size in PRODUCT_BATCHES:
        batches = digits(chosen, size)
        kept = HessianOperator(model, F.cross_entropy, batches)
        anew = HessianOperator(model, F.cross_entropy, batches, graph_memory=0)
        subjects = peers.products(model, batches, vector)
        theirs = list(subjects)
        subjects |= {"gradient": partial(peers.gradient, model, batches)}
        subjects |= {"kept": partial(kept.matvec, vector), "anew": partial(anew.matvec, vector)}
        alternate(1, subjects)
        seconds, _ = alternate(chosen.rounds, subjects)
        pairs = {who: zip(seconds[who], seconds["gradient"], strict=True) for who in subjects}
        gradients = {who: spread(s / g for s, g in pairs[who]) for who in subjects}
        for who in theirs:
            what = f"one product with M1 on {chosen.digits:,} digits in batches of {size}"
            cost = {"ours": gradients["kept"], "ours, no graph kept": gradients["anew"], "peer": gradients[who]}
            row = compared(f"product-{size}-{who.lower()}", what, peers.version(who), seconds["kept"], seconds[who])
            medians = ", ".join(f"{subject} {spread['median']}" for subject, spread in cost.items())
            notes = [f"in gradients of {statistics.median(seconds['gradient']):.3g} s: {medians}"]
            rows.append({**row, "gradients": cost, "notes": notes})
    return rows


def inputs(chosen: argparse.Namespace) -> list[Row]:
    model = network()
    test = data.load("mnist", n_test=chosen.inputs).test

    def mine() -> InputEigenvalues:
        return InputEigenvalues(input_hessian_eigenvalues(model, test.images, k=1)[:, 0].detach())

    power = partial(peers.input_power_iteration, model, test.images, test.labels)
    subjects: dict[str, Callable[[], InputEigenvalues]] = {"ours": mine}
    subjects |= {rule: partial(power, rule) for rule in ("residual", "change")}
    mine()
    seconds, found = alternate(chosen.rounds, subjects)
    truth = peers.input_eigenvalues_float64(model, test.images)
    large = truth > 1e-3 * truth.max()
    rows = []
    for rule in ("residual", "change"):
        we, they, vain = found["ours"].eigenvalues, found[rule].eigenvalues, found[rule].seconds_in_vain
        pairs = {"between both": (they, we), "ours from float64": (we, truth), "peer's from float64": (they, truth)}
        relative = {what: (a.double() / b.double() - 1).abs() for what, (a, b) in pairs.items()}
        useful = [t - vain for t in seconds[rule]]
        row = compared(
            f"inputs-{rule}",
            f"largest input eigenvalue of each of {len(test):,} MNIST test digits, M1",
            f"batched power iteration to a relative {rule} of 1e-4",
            seconds["ours"],
            seconds[rule],
            ratio_until_last_converged=spread(t / s for t, s in zip(useful, seconds["ours"], strict=True)),
            unconverged=found[rule].unconverged,
            difference_max={what: short(float(r.max())) for what, r in relative.items()},
            difference_max_of_large={what: short(float(r[large].max())) for what, r in relative.items()},
        )
        row["notes"] = [
            f"{row['unconverged']} samples not converged after 1,000 iterations, {vain:.3g} s spent on these alone: "
            f"without, the ratio is {row['ratio_until_last_converged']['median']}",
            f"largest relative difference: {row['difference_max']}",
            f"of the {int(large.sum())} above 1e-3 of the largest: {row['difference_max_of_large']}",
        ]
        rows.append(row)
    return rows


def memory(chosen: argparse.Namespace) -> list[Row]:
    with multiprocessing.get_context("spawn").Pool(1) as fresh:
        return [fresh.apply(memory_of_solve, (chosen,))]


def memory_of_solve(chosen: argparse.Namespace) -> Row:
    """Return the row of a top 20 of C1, measured in this process, which must be a fresh one, on Linux."""
    threadpool_limits(chosen.threads)
    split = data.load("cifar10", n_train=chosen.images, n_test=1).train
    model = build("C1", seed=0)
    train(model, data.Splits(split, split.head(1), ()), Recipe(100, lr=0.01, momentum=0.9, max_epochs=1, seed=0))
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # or what the training freed would be used again unseen
    Path("/proc/self/clear_refs").write_text("5")  # sets the peak to what is resident now
    before = resident("VmHWM")
    started = time.perf_counter()
    H = HessianOperator(model, F.cross_entropy, split.batches(BATCH), graph_memory=int(chosen.graph_memory * GIB))
    result = solve(H, chosen.count, chosen.max_basis)
    seconds = time.perf_counter() - started
    rows = min(chosen.max_basis or H.shape[0], result.n_matvecs + 1)
    basis = rows * H.shape[0] * 8
    return {
        "name": "memory",
        "what": f"peak memory of the top {chosen.count} of C1 on {chosen.images:,} CIFAR-10 images",
        "our_seconds": short(seconds),
        "peak_gib": short((resident("VmHWM") - before) / GIB),
        "graph_memory_gib": chosen.graph_memory,
        "basis_rows": rows,
        "basis_gib": short(basis / GIB),
        "products": {"ours": result.n_matvecs},
        "residual_max": {"ours": short(float(result.residuals.max()))},
        "notes": [f"graphs may take {chosen.graph_memory:g} GiB; {rows} rows of the basis are {basis / GIB:.3g} GiB"],
    }


def resident(key: str) -> int:
    """Return a memory figure of this process from the kernel, in bytes."""
    return 1024 * int(Path("/proc/self/status").read_text().split(f"{key}:")[1].split()[0])


ROWS: dict[str, Callable[[argparse.Namespace], list[Row]]] = {
    row.__name__.replace("_", "-"): row
    for row in (pyhessian, pyhessian_equal, curvlinops, eigenthings, product, inputs, memory)
}


def publish(rows: list[Row], path: Path) -> None:
    """Put the rows into a JSON file, in the place of those of the same names."""
    there = json.loads(path.read_text())["rows"] if path.exists() else []
    merged = {row["name"]: row for row in [*there, *rows]}
    path.write_text(json.dumps({"rows": [merged[name] for name in sorted(merged)]}, indent=1, sort_keys=True) + "\n")


def line(row: Row) -> str:
    if "ratio" not in row:
        return f"{row['name']:32} {row['what']}: {row['peak_gib']} GiB in {row['our_seconds']} s"
    ratio, sign = row["ratio"], ">" if row.get("at_least") else " "
    return (
        f"{row['name']:32} {row['our_seconds']:9.4g} s {row['peer_seconds']:9.4g} s   "
        f"{sign}{ratio['median']:.3g} ({ratio['min']:.3g} to {ratio['max']:.3g})   {row['peer']}; {row['what']}"
    )


def measure(chosen: argparse.Namespace, rows_of: Mapping[str, Callable[[argparse.Namespace], list[Row]]]) -> None:
    """Measure the rows that were asked for on as many threads, publish each as it is there, and print all."""
    threadpool_limits(chosen.threads)
    torch.set_num_threads(chosen.threads)
    rows: list[Row] = []
    for name in chosen.only:
        started = time.perf_counter()
        measured = rows_of[name](chosen)
        facts = provenance(device=torch.device("cpu"), seed=0, seconds=time.perf_counter() - started)
        rows += [{**row, "provenance": facts} for row in measured]
        if chosen.publish:
            publish(rows, chosen.publish)
    print(f"torch {torch.__version__}, {chosen.threads} threads; seconds of hessnb and of the peer, peer / hessnb")
    for row in rows:
        print(line(row))
        for note in row["notes"]:
            print(f"    {note}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=ROWS, default=list(ROWS), metavar="NAME", help="rows to measure")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--digits", type=int, default=5000, help="MNIST training digits of the Hessian")
    parser.add_argument("--count", type=int, default=20, help="eigenvalues")
    parser.add_argument("--few", type=int, default=2, help="eigenvalues of pyhessian-equal")
    parser.add_argument("--max-iter", type=int, default=1000, help="PyHessian's maxIter")
    parser.add_argument("--limit", type=float, default=7200, help="seconds after which PyHessian is stopped")
    parser.add_argument("--inputs", type=int, default=1000, help="MNIST test digits of the input Hessians")
    parser.add_argument("--images", type=int, default=2000, help="CIFAR-10 training images of the memory row")
    parser.add_argument("--graph-memory", type=float, default=1.0, help="GiB of kept graphs in the memory row")
    parser.add_argument("--max-basis", type=int, help="rows of the basis in the memory row (default: no bound)")
    parser.add_argument("--publish", type=Path, metavar="FILE", help="JSON file to put the rows into")
    chosen = parser.parse_args()
    if chosen.digits % max(PRODUCT_BATCHES):
        parser.error(f"--digits must be a multiple of {max(PRODUCT_BATCHES)}: batches are of equal size")
    peers.check(chosen.only)
    measure(chosen, ROWS)


if __name__ == "__main__":
    main()
