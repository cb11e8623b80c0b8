"""Fuzzing of every parser that reads files from elsewhere: valid small files are changed at random, then read.

    python -m tests.fuzzing PARSER COUNT [SEED]

The inputs of a run are determined by parser and seed. They run in worker processes, so that a crash or a hang of a
native library is found, counted, and does not end the run. A parser may only raise SamloveError, must not open any
file outside its folder, and must not need more than MEMORY.
"""

import json
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

MEMORY = 256  # MB that a worker may grow by
SECONDS = 20  # for one input
FAULTS = 20  # after which a run ends
LIMIT = 2048  # MB of address space beyond what a worker has when it starts: a larger reservation fails
Attempt = Callable[[random.Random], None]  # changes a valid input, and reads it

NUMBERS = [0, 1, 2, 3, 7, 8, 127, 128, 255, 256, 65535, 65536, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**63, 2**64 - 1]
VALUES: list[Any] = [
    *[n for number in NUMBERS for n in (number, -number)], 10**30, 0.0, -0.0, 1.5, 1e308, float("nan"), float("inf"),
    None, True, False, "", "a", ".", "..", "../x", "/etc/passwd", "a/b", "a\0b", "\ud800", "ü", "x" * 300, "C:\\x",
    "O", "<U8", "V10", "float16", "int8", "uint8", "bool", "i4,i4", "(2,", "zstd", "bytes", "x.int8", "x.scale",
    [], {}, [[]], [1], [-1], [2**40, 2**40], [0, 2**70], [1] * 70, ["a", 10**9], {"a": 1}, [None], [True, True], [1.0],
]  # fmt: skip


def mutate(data: bytes, rng: random.Random) -> bytes:
    """Change some bytes: flip, set, overwrite with numbers, delete, repeat, insert, cut."""
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 3, 8))):
        at, size = rng.randrange(len(out) + 1), rng.choice((1, 2, 4, 8))
        match rng.randrange(8):
            case 0 | 1 if out:
                out[at % len(out)] ^= 1 << rng.randrange(8)
            case 2 if out:
                out[at % len(out)] = rng.choice((0, 1, 32, 47, 127, 128, 255, rng.randrange(256)))
            case 3:
                number = rng.choice(NUMBERS) + rng.choice((0, 0, -1, 1))
                out[at : at + size] = (number % 256**size).to_bytes(size, rng.choice(("little", "big")))
            case 4:
                del out[at : at + rng.choice((1, 4, 64, 512))]
            case 5:
                start = rng.randrange(len(out) + 1)
                out[at:at] = out[start : start + rng.choice((1, 8, 64, 512))]
            case 6:
                out[at:at] = bytes([rng.choice((0, 255, 32, 97))]) * rng.choice((1, 3, 64, 512))
            case 7 if rng.random() < 0.3:
                del out[at:]
    return bytes(out)


def mutate_json(value: Any, rng: random.Random) -> Any:
    """Change one place of a JSON value: another value, one more or less, a missing, added or deeper part."""
    places: list[tuple[Any, Any]] = []

    def collect(part: Any) -> None:
        for key in part if isinstance(part, dict) else range(len(part)) if isinstance(part, list) else ():
            places.append((part, key))
            collect(part[key])

    value = json.loads(json.dumps(value))
    collect(value)
    if not places:
        return rng.choice(VALUES)
    part, key = rng.choice(places)
    match rng.randrange(8):
        case 0:
            del part[key]
        case 1 if isinstance(part[key], int | float):
            part[key] += rng.choice((-1, 1, 0.5, 2**32))
        case 2 if isinstance(part[key], str):
            part[key] = mutate(part[key].encode(errors="surrogatepass"), rng).decode(errors="surrogateescape")
        case 3 if isinstance(part[key], list):
            part[key] = rng.choice((part[key] * 2, part[key][::-1], part[key][1:]))
        case 4 if isinstance(part, dict):
            part[rng.choice(("a", "size", "..", "", "x" * 300, "\ud800", "a/b"))] = part.pop(key)
        case 5:
            other, other_key = rng.choice(places)
            part[key] = json.loads(json.dumps(other[other_key]))
        case 6 if rng.random() < 0.1:
            for _ in range(rng.choice((10, 100, 200))):
                part[key] = [part[key]]
        case _:
            part[key] = rng.choice(VALUES)
    return value


def to_text(value: Any, rng: random.Random) -> bytes:
    """A JSON text of a value, sometimes with damage that no value has."""
    text = json.dumps(value, ensure_ascii=rng.random() < 0.9).encode("utf-8", "surrogatepass")
    match rng.randrange(20):
        case 0:
            return mutate(text, rng)
        case 1:
            return text.replace(b"{", b'{"a": 1, "a": 2, ', 1)
        case 2:
            return b"[" * rng.choice((1000, 100_000)) + text
        case 3:
            return text.replace(b"1", b"1" * rng.choice((2, 20, 5000)), 1)
    return text


def changed(value: Any, rng: random.Random) -> bytes:
    """A JSON text with one to three changes."""
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        value = mutate_json(value, rng)
    return to_text(value, rng)


@dataclass
class Result:
    """What happened to the inputs of a run. faults: what must not happen, each with the number of its input."""

    tried: int = 0
    accepted: int = 0
    refused: int = 0
    confined: int = 0  # refused after the crash or hang of a native library in the child process that is there for it
    megabytes: float = 0.0
    faults: list[str] = field(default_factory=list)

    def add(self, other: "Result") -> None:
        for name in ("tried", "accepted", "refused", "confined", "faults"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.megabytes = max(self.megabytes, other.megabytes)


def run(parser: str, count: int, seed: int = 0) -> Result:
    """Try `count` inputs of a parser, in as many worker processes as it takes."""
    total = Result()
    while total.tried < count and len(total.faults) < FAULTS:
        found, crash = _in_worker(parser, seed, total.tried, count - total.tried)
        if crash:  # at the last input: again, in a worker that keeps the native library in a child process
            found.tried -= 1
            again, crash = _in_worker(parser, seed, total.tried + found.tried, 1, "confined")
            again.confined, again.refused = again.refused, 0
            again.faults += [crash] if crash else []
            total.add(again)
        total.add(found)
    return total


def _in_worker(parser: str, seed: int, first: int, count: int, confined: str = "") -> tuple[Result, str]:
    """The result of `count` inputs from number `first` on, or of those up to one with which the process ended."""
    with tempfile.TemporaryDirectory() as folder:
        work, report = Path(folder, "work"), Path(folder, "report")
        work.mkdir()
        arguments = [parser, str(seed), str(first), str(count), str(work), str(report), confined]
        command = [sys.executable, "-m", "tests.fuzzing", "--worker", *arguments]
        worker = subprocess.run(command, env={**os.environ, "TMPDIR": str(work)}, check=False)
        if not report.exists():
            raise RuntimeError(f"{' '.join(command)} ended with {worker.returncode} before the first input")
        result = Result(**json.loads(report.read_text()))
        if worker.returncode == 0:
            return result, ""
        ended = signal.Signals(-worker.returncode).name if worker.returncode < 0 else worker.returncode
        return result, f"input {first + result.tried - 1}: the process ended with {ended}"


def _worker(parser: str, seed: str, start: str, count: str, folder: str, report: str, confined: str) -> None:
    from samlove.errors import SamloveError
    from stores import sealed
    from tests import fuzzed

    result, root = Result(), os.path.realpath(folder)
    attempt: Attempt = getattr(fuzzed, parser)(Path(root))
    sealed.CHECK_SECONDS = 2
    limit = LIMIT
    if parser.startswith("hdf5") and not confined:  # this process is the child: 10 times as fast
        sealed._fault_in_child = sealed._fault
        limit = sealed.CHECK_MEMORY // 2**20 - 16  # of the child; some memory is mapped already, but not used yet
    file = os.open(report, os.O_RDWR | os.O_CREAT)

    def write() -> None:
        os.pwrite(file, json.dumps(vars(result)).encode() + b" " * 50, 0)  # blanks: an earlier text may be longer

    outside = _watch(root)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    size = psutil.Process().memory_info().vms
    resource.setrlimit(resource.RLIMIT_AS, (size + limit * 2**20, -1))
    for number in range(int(start), int(start) + int(count)):
        result.tried += 1
        write()  # in case this input ends the process
        signal.setitimer(signal.ITIMER_REAL, SECONDS)  # ends the process
        try:
            attempt(random.Random(f"{parser} {seed} {number}"))
            result.accepted += 1
        except SamloveError:
            result.refused += 1
        except BaseException:
            result.faults.append(f"input {number}: {traceback.format_exc()}")
        result.faults += [f"input {number}: {fault}" for fault in outside]
        outside.clear()
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
        if grown > max(MEMORY, 2 * result.megabytes):
            result.faults.append(f"input {number}: {grown:.0f} MB of memory")
        result.megabytes = max(result.megabytes, grown)
        if len(result.faults) >= FAULTS:
            break
    signal.setitimer(signal.ITIMER_REAL, 0)
    write()
    os._exit(0)


def _watch(root: str) -> list[str]:
    """The list to which every file is added that Python opens outside `root` from now on, code and libraries aside."""
    found: list[str] = []
    known = tuple(os.path.realpath(p) for p in (root, sys.prefix, sys.base_prefix, Path(__file__).parents[1], "/proc"))

    def hook(event: str, arguments: tuple) -> None:
        if event in ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.truncate"):
            path = arguments[0] if event != "os.symlink" else arguments[1]
            if isinstance(path, str | bytes | os.PathLike):
                where = os.path.abspath(os.fsdecode(path))
                if not where.startswith(known):
                    found.append(f"{event} {where}")

    sys.addaudithook(hook)
    return found


def main() -> None:
    if sys.argv[1] == "--worker":
        _worker(*sys.argv[2:])
    result = run(sys.argv[1], int(sys.argv[2]), *map(int, sys.argv[3:]))
    for fault in result.faults:
        print(fault)
    print(
        f"{sys.argv[1]}: {result.tried} inputs, {result.accepted} accepted, {result.refused} refused, "
        f"{result.confined} refused after a crash, {len(result.faults)} faults, {result.megabytes:.0f} MB"
    )


if __name__ == "__main__":
    main()
