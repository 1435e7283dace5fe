"""The warp-specialized kernels under random delays: bitwise as without them, and not once a wait is missing.

Their warpgroups hand data on through shared memory guarded by mbarriers. compute-sanitizer's racecheck reports hazards
in them that it also reports in Triton's own dispatch of a kernel that does nothing else, so it cannot tell a race here.
Instead, warps sleep for random times in front of what a hand-over is made of: accesses to shared memory, products,
barriers, arrivals. Were a wait missing, some warpgroup would read or write too early and the result would change.
With --mutants each wait is removed in turn, which shows that it does.

Usage: python tests/delays.py [--kernel decode|prefill] [--repeats N] [--mutants [--jobs N]]
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import itertools
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NoReturn

import torch
from calling import decode_call, prefill_call
from sanitize import CAPACITY, DEVICE, PAGES, cache_of, hostile
from triton.compiler import make_backend

import dsv4x
from dsv4x import layouts
from dsv4x.common.core.calls import Local
from dsv4x.cuda.hopper import decode as decode_hopper
from dsv4x.cuda.hopper import prefill as prefill_hopper

KERNELS = {"prefill": prefill_hopper, "decode": decode_hopper}
SCHEDULES: tuple[int | None, ...] = (None, 0, 1, 2)
"""The warpgroup that sleeps at every other site where the others do at one of 16; None: each in turn, or none."""

Result = tuple[torch.Tensor, torch.Tensor]
Launch = Callable[[], Result]

HUNG_AFTER = 20.0
"""Seconds; a launch takes milliseconds, and several processes may share the GPU."""
CHILD_LIMIT = 300.0
READY, EQUAL, NOTICED = "ready", 0, 3

_INSTRUCTION = re.compile(r"\s*(?:@!?%\w+\s+)?([a-z]\w*(?:\.[\w:]+)*)[\s;]")
_SITES = (
    ("store", ("st.shared", "stmatrix")),
    ("load", ("ld.shared", "ldmatrix")),
    ("arrive", ("mbarrier.arrive", "cp.async.mbarrier.arrive")),
    ("copy", ("cp.async.ca.", "cp.async.cg.")),
    # Nothing may come between a fence and its products: ptxas would wait for each of them.
    ("product", ("wgmma.fence", "wgmma.mma_async")),
    ("barrier", ("bar.sync", "barrier.sync")),
)
_BREAKS = ("bra", "mbarrier", "wgmma", "cp.async", "fence", "setmaxnreg", "ret")
_SINGLE = ("arrive", "barrier")
_WAIT = re.compile(r"^\s*mbarrier\.try_wait\b.*\n(?:\s*\.loc\b.*\n)*\s*@!\w+ bra\.uni \w+;.*\n", re.M)

# %clock is what a warp's sleep is drawn from: no two warps or launches meet the same one at a site. Branches could
# part a warp's threads, so the sleep is 0 where there is none.
_DELAY = """\
	{{
	.reg .pred slow, late;
	.reg .b32 now, warp, group, cta, turn, draw, share, sleep;
	mov.u32 now, %clock;
	mov.u32 warp, %tid.x;
	shr.u32 warp, warp, 5;
	shr.u32 group, warp, 2;
	mov.u32 cta, %ctaid.x;
{turn}
	setp.eq.u32 slow, group, turn;
	mad.lo.u32 draw, warp, 0x9E3779B1, now;
	mad.lo.u32 draw, cta, 0x85EBCA77, draw;
	mul.lo.u32 draw, draw, 0x9E3779B1;
	shr.u32 sleep, draw, 15;
	xor.b32 draw, draw, sleep;
	mul.lo.u32 draw, draw, 0x85EBCA77;
	shr.u32 sleep, draw, 28;
	selp.u32 share, 8, 1, slow;
	setp.lt.u32 late, sleep, share;
	bfe.u32 sleep, draw, 16, 12;
	selp.u32 sleep, sleep, 0, late;
	nanosleep.u32 sleep;
	}}
"""
# About 40 us a turn, in which the others get as far ahead as the barriers let them.
_TURNS = """\
	shr.u32 turn, now, 16;
	mad.lo.u32 turn, cta, 0x85EBCA77, turn;
	mul.lo.u32 turn, turn, 0x9E3779B1;
	shr.u32 turn, turn, 30;"""


def sites(ptx: str) -> list[tuple[int, str]]:
    """(line, kind) of the first of each run of accesses of a kind, of every arrival and of every barrier."""
    found = []
    previous = None
    for number, line in enumerate(ptx.splitlines()):
        if re.match(r"\s*[\w$]+:", line):
            previous = None
            continue
        match = _INSTRUCTION.match(line)
        if match is None:
            continue
        name = match.group(1)
        kind = next((kind for kind, starts in _SITES if name.startswith(starts)), None)
        if kind is not None:
            if kind != previous or kind in _SINGLE:
                found.append((number, kind))
            previous = kind
        elif name.startswith(_BREAKS):
            previous = None
    return found


def delayed(ptx: str, slow: int | None = None) -> str:
    """The PTX with a sleep of up to about 4 us, mostly none, in front of every site."""
    delay = _DELAY.format(turn=_TURNS if slow is None else f"\tmov.u32 turn, {slow};")
    lines = ptx.splitlines(keepends=True)
    for number, _ in reversed(sites(ptx)):
        lines.insert(number, delay)
    return "".join(lines)


def waits(ptx: str) -> list[str]:
    """The source line, where the PTX names it, of every wait for an mbarrier."""
    found = []
    for match in _WAIT.finditer(ptx):
        before = ptx[: ptx.rindex("// begin inline asm", 0, match.start())]
        lines = re.findall(r"\t\.loc\t.*// (\S+\.py:\d+)", before[-4000:])
        found.append(lines[-1] if lines else "?")
    return found


def without_waits(ptx: str, removed: Collection[int]) -> str:
    """The PTX with some waits passed at once; try_wait itself goes too, which suspends a thread for a while."""
    number = itertools.count()
    return _WAIT.sub(lambda match: "" if next(number) in removed else match.group(), ptx)


def assemble(compiled: Any, ptx: str) -> bytes:
    """The cubin of other PTX, as Triton would have made it of the kernel's own."""
    target = compiled.metadata.target
    return make_backend(target).make_cubin(ptx, {}, compiled.metadata, target.arch)


def variant(compiled: Any, ptx: str) -> Any:
    """A compiled kernel that runs other PTX. Triton's caches never see it."""
    made = copy.copy(compiled)
    made.module = made.function = made._run = None
    made.kernel = assemble(compiled, ptx)
    return made


@contextlib.contextmanager
def replaced(launcher: Any, rewrite: Callable[[str], str]) -> Iterator[None]:
    """Launch the rewritten PTX of every kernel the launcher has launched before, and nothing else."""
    before = launcher._compiled
    untouched = {id(compiled): compiled for compiled in before.values()}
    with ThreadPoolExecutor() as pool:
        made = pool.map(lambda compiled: variant(compiled, rewrite(compiled.asm["ptx"])), untouched.values())
        variants = dict(zip(untouched, made))

    def refuse(*_: object) -> None:
        raise AssertionError("a launch of the untouched kernel was about to be taken for one with delays")

    launcher._compiled = {key: variants[id(compiled)] for key, compiled in before.items()}
    launcher._launch = refuse
    try:
        yield
    finally:
        launcher._compiled = before
        del launcher._launch


def some_lens(tokens: int, width: int) -> torch.Tensor:
    """Lengths from below none to past all; every fifth 0, where a role meets the fewest waits."""
    lens = torch.randint(-1, width + 3, (tokens,), device=DEVICE).int()
    lens[::5] = 0
    return lens


def prefill_launches() -> list[Launch]:
    """Tokens enough that a multiprocessor takes several, and from one tile to ten, an even number and an odd one."""
    kv = torch.full((CAPACITY, 512), float("nan"), device=DEVICE).bfloat16()
    live = torch.arange(0, CAPACITY, 3, device=DEVICE)
    kv[live] = torch.randn(len(live), 512, device=DEVICE).bfloat16() / 4
    found: list[Launch] = []
    for tokens, heads in ((300, 1), (270, 64), (140, 65), (140, 128)):
        q = torch.randn(tokens, heads, 512, device=DEVICE).bfloat16()
        for width in (64, 208, 640):
            for given, sunk, index in (
                (False, False, torch.int32), (True, True, torch.int32),
                (False, True, torch.int64), (True, False, torch.int64),
            ):  # fmt: skip
                indices = hostile(tokens, width, live).to(index)
                lens = some_lens(tokens, width) if given else None
                sink = torch.randn(heads, device=DEVICE) if sunk else None

                def launch(q=q, indices=indices, lens=lens, sink=sink) -> Result:
                    return prefill_hopper.sparse_mla_prefill(prefill_call(q, kv, indices, lens, sink, 0.05))

                found.append(launch)
    return found


def decode_launches() -> list[Launch]:
    """Items enough that every program takes several, whole and split, with and without the extra cache.

    Where rows are split and have lengths, programs pass by the items of splits that a row is too short for.
    """
    swa, live = cache_of(layouts.DSV4)
    extra, filled = (cache_of(layouts.DSV4)[0] for _ in range(2))
    every = torch.arange(CAPACITY, device=DEVICE)
    dsv4x.quantize_and_insert_k_cache(torch.randn(CAPACITY, 512, device=DEVICE).bfloat16() / 4, filled, every)
    table = torch.randint(-1, PAGES + 1, (3, PAGES), device=DEVICE).int()
    found: list[Launch] = []
    # Up to 16 heads another kernel runs, without mbarriers.
    for tokens, heads in ((500, 17), (400, 64), (200, 65), (150, 128)):
        q = torch.randn(tokens, heads, 512, device=DEVICE).bfloat16()
        request, visible = (torch.randint(-1, most, (tokens,), device=DEVICE).int() for most in (4, CAPACITY + 9))
        for extra_width, given, sunk, splits, mapped in (
            (320, False, False, 1, False), (320, True, True, 1, False), (None, True, True, 1, False),
            (30, False, False, 1, True), (320, False, True, 3, True), (320, True, False, 3, False),
            (None, False, True, 2, False), (1000, True, True, 16, False),
        ):  # fmt: skip
            swa_indices = hostile(tokens, 128, live)
            swa_lens = some_lens(tokens, 128) if given else None
            more: tuple[Any, ...] = (None, None, None)
            if extra_width is not None:
                lens = some_lens(tokens, extra_width) if given else None
                indices = hostile(tokens, extra_width, live)
                more = filled if mapped else extra, indices.long() if given else indices, lens
            sink = torch.randn(heads, device=DEVICE) if sunk else None
            local = Local(request, visible, table, PAGES) if mapped else None

            def launch(q=q, given=(swa, swa_indices, swa_lens, *more, sink), splits=splits, local=local) -> Result:
                return decode_hopper.sparse_mla_decode(decode_call(q, *given, 0.05, split_k=splits, local=local))

            found.append(launch)
    # As many splits as the kernel likes, which only few tokens get: rows of every length, most of them short.
    for tokens, heads in ((1, 64), (6, 64), (20, 128), (70, 64)):
        q = torch.randn(tokens, heads, 512, device=DEVICE).bfloat16()
        for most in (200, 4000):
            lens = torch.randint(-1, most, (tokens,), device=DEVICE).int()
            lens[:1] = 4000
            windows = swa, hostile(tokens, 128, live), some_lens(tokens, 128)
            more = extra, hostile(tokens, 4000, live), lens, torch.randn(heads, device=DEVICE)

            def launch(q=q, given=(*windows, *more)) -> Result:
                return decode_hopper.sparse_mla_decode(decode_call(q, *given, 0.05))

            found.append(launch)
    return found


LAUNCHES = {"prefill": prefill_launches, "decode": decode_launches}


def named(slow: int | None) -> str:
    return "warpgroups slow in turn" if slow is None else f"warpgroup {slow} slow"


def hangs() -> bool:
    """Wait for the GPU; True where it does not finish."""
    done = torch.cuda.Event()
    done.record()
    deadline = time.monotonic() + HUNG_AFTER
    while not done.query():
        if time.monotonic() > deadline:
            return True
        time.sleep(0.0002)
    return False


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view({2: torch.int16, 4: torch.int32}[tensor.element_size()])


def untouched_results(launches: list[Launch]) -> list[Result]:
    results = [launch() for launch in launches]
    for out, lse in results:
        if out.isnan().any() or lse.isnan().any():
            raise AssertionError("the kernel as it is left results unwritten, or made NaN")
    return results


def differing(launches: list[Launch], wanted: list[Result]) -> str | None:
    """What is wrong with the first launch whose result is not the wanted one, bit by bit."""
    for number, (launch, want) in enumerate(zip(launches, wanted)):
        got = launch()
        if hangs():
            return f"launch {number} hangs"
        counts = [int((bits(a) != bits(b)).sum()) for a, b in zip(got, want)]
        if any(counts):
            return f"launch {number} differs in {counts[0]} values and {counts[1]} lse"
    return None


@contextlib.contextmanager
def nan_in_empty() -> Iterator[None]:
    """Fresh memory holds NaN, not the last launch's results, which nothing written would pass for."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def leave(code: int) -> NoReturn:
    """Exit without waiting for the GPU, which may never finish."""
    sys.stdout.flush()
    os._exit(code)


def check(name: str, repeats: int) -> tuple[bool, list[str]]:
    """Compare a kernel under every schedule with itself; (equal, its waits)."""
    launcher = KERNELS[name]._launch
    launches = LAUNCHES[name]()
    with nan_in_empty():
        wanted = untouched_results(launches)
        compiled = list({id(kernel): kernel for kernel in launcher._compiled.values()}.values())
        ptx = [kernel.asm["ptx"] for kernel in compiled]
        lines = waits(ptx[0])
        # A wait is removed from all of them by its number.
        if any(waits(text) != lines for text in ptx):
            raise AssertionError(f"{name}: the waits of its compilations are in different orders")
        start = time.monotonic()
        problem = differing(launches, wanted)
        alone = time.monotonic() - start
        # Were the kernel not deterministic, delays would prove nothing.
        if problem is not None:
            print(f"{name}: without delays, {problem}", flush=True)
            return False, lines
        took, runs = 0.0, 0
        for slow in SCHEDULES:
            with replaced(launcher, lambda text, slow=slow: delayed(text, slow)):
                start = time.monotonic()
                for _ in range(repeats):
                    problem = differing(launches, wanted)
                    if problem is not None:
                        print(f"{name}: {problem}, {named(slow)}", flush=True)
                        if "hangs" in problem:
                            leave(1)
                        return False, lines
                    runs += 1
                took += time.monotonic() - start
    delays = [len(sites(text)) for text in ptx]
    slower = took / runs / alone
    print(
        f"{name}: {len(compiled)} compilations, {min(delays)} to {max(delays)} delays each; {len(launches)} inputs, "
        f"{len(SCHEDULES)} schedules, {runs * len(launches)} launches compared, {slower:.1f} times as long, all equal",
        flush=True,
    )
    return True, lines


def mutant(name: str, removed: Collection[int], repeats: int) -> NoReturn:
    """The process of one mutant: ends with NOTICED or EQUAL."""
    launcher = KERNELS[name]._launch
    launches = LAUNCHES[name]()
    with nan_in_empty():
        wanted = untouched_results(launches)
        for slow in SCHEDULES:

            def rewrite(ptx: str, slow: int | None = slow) -> str:
                return delayed(without_waits(ptx, removed), slow)

            with replaced(launcher, rewrite):
                print(READY, flush=True)
                for _ in range(repeats):
                    problem = differing(launches, wanted)
                    if problem is not None:
                        print(f"{problem}, {named(slow)}", flush=True)
                        leave(NOTICED)
    leave(EQUAL)


def run_mutant(name: str, removed: tuple[int, ...], repeats: int) -> tuple[bool | None, str]:
    """(noticed, how) of a mutant; None where it ended before its first launch, which says nothing."""
    command = [sys.executable, __file__, "--kernel", name, "--repeats", str(repeats), "--without", *map(str, removed)]
    try:
        ended = subprocess.run(command, capture_output=True, text=True, timeout=CHILD_LIMIT)
    except subprocess.TimeoutExpired as error:
        printed = error.stdout or b""
        text = printed.decode() if isinstance(printed, bytes) else printed
        return (True if READY in text else None), "ran out of time"
    said = [line for line in ended.stdout.splitlines() if line != READY]
    if READY not in ended.stdout:
        return None, ended.stderr[-2000:]
    if ended.returncode in (EQUAL, NOTICED):
        return ended.returncode == NOTICED, said[-1] if said else "no launch differs"
    return True, f"ended with {ended.returncode}: {(ended.stderr.splitlines() or ['?'])[-1]}"


def run_mutants(
    found: dict[str, list[str]], tasks: list[tuple[str, tuple[int, ...]]], repeats: int, jobs: int
) -> list[bool | None]:
    """Whether each was noticed."""
    verdicts = []
    with ThreadPoolExecutor(jobs) as pool:
        for (name, removed), (seen, how) in zip(tasks, pool.map(lambda task: run_mutant(*task, repeats), tasks)):
            what = ", ".join(f"wait {wait} ({found[name][wait]})" for wait in removed)
            verdict = {True: "noticed", False: "not noticed", None: "failed"}[seen]
            print(f"{name} {f'without {what}' if what else 'with every wait'}: {verdict}, {how}", flush=True)
            verdicts.append(seen)
    return verdicts


def mutate(found: dict[str, list[str]], repeats: int, jobs: int) -> bool:
    """Remove each wait in turn; False where a process failed or the one with every wait in place is not equal.

    Other waits may imply one, two warpgroups' of the same line each other: those are removed together as well.
    """
    whole = run_mutants(found, [(name, ()) for name in found], repeats, jobs)
    tasks = [(name, (wait,)) for name, lines in found.items() for wait in range(len(lines))]
    verdicts = run_mutants(found, tasks, repeats, jobs)
    unnoticed: dict[tuple[str, str], list[int]] = {}
    for (name, (wait,)), seen in zip(tasks, verdicts):
        if seen is False:
            unnoticed.setdefault((name, found[name][wait]), []).append(wait)
    together = [(name, tuple(group)) for (name, _), group in unnoticed.items() if len(group) > 1]
    verdicts += run_mutants(found, together, repeats, jobs)
    for name, lines in found.items():
        noticed = sum(seen is True for (of, _), seen in zip(tasks, verdicts) if of == name)
        print(f"{name}: {noticed} of {len(lines)} waits are noticed when removed", flush=True)
    return not any(whole) and None not in whole + verdicts


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kernel", choices=KERNELS, help="this one alone")
    parser.add_argument("--repeats", type=int, default=5, help="sweeps of every schedule")
    parser.add_argument("--mutants", action="store_true", help="remove each wait in turn as well")
    parser.add_argument("--jobs", type=int, default=4, help="mutants at a time")
    parser.add_argument("--without", type=int, nargs="*", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    if arguments.without is not None:
        mutant(arguments.kernel, arguments.without, arguments.repeats)
    with tempfile.TemporaryDirectory() as folder:
        # Compiled anew, and once for every mutant.
        os.environ["TRITON_CACHE_DIR"] = folder
        names = [arguments.kernel] if arguments.kernel else list(KERNELS)
        checked = {name: check(name, arguments.repeats) for name in names}
        fine = all(equal for equal, _ in checked.values())
        if fine and arguments.mutants:
            fine = mutate({name: lines for name, (_, lines) in checked.items()}, arguments.repeats, arguments.jobs)
    sys.exit(not fine)


if __name__ == "__main__":
    main()
