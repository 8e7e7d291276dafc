"""Measures sleep and wake beside the link's rate, the bare driver calls, and peers.

    python benchmarks/sleep_wake.py --output RESULT.json
    python benchmarks/sleep_wake.py --peers PEERS --programs BUILD --output RESULT.json
    python benchmarks/sleep_wake.py --small     # a dry run without a GPU

Each contender of a part runs in its own process, one after another, or several times in turns if
the part says so. If the part copies, the link's rate is measured before and after. A separate
process touches host memory before anything is timed, and each process does so again, since some
virtual machines grow it on first use. A pause follows every transition, since some drivers scrub
released memory. The record is written after every process.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import bars
import contenders
import host_memory
import machine
import table
from bench import GIB, PAUSE_S, Bench, Settings, merged, summary
from link import Link
from parts import PARTS, Part

NOTES = [
    "Medians; every sample is listed. Floors are bytes over the pinned rate of that direction, "
    "measured in the same process before and after.",
    f"{PAUSE_S} s pass after every sleep and every wake, for every contender.",
    "First sleeps of cumempool: each sample is of a process of its own.",
    "Segments: a sample is the median of a process; the contenders' processes take turns.",
    "Peak device bytes are sampled every millisecond during a cycle that is not timed.",
]

#: Host memory that all parts take together; processes reuse memory that earlier ones gave back.
WARM_UP_BYTES = 72 * GIB

#: Options that take a path, and the names that replace it in records.
PATHS = {
    "--peers": "PEERS",
    "--programs": "BUILD",
    "--directory": "DIRECTORY",
    "--output": "RESULT.json",
}

# ---- one process ---------------------------------------------------------------------------------


def add_floors(result: dict[str, Any], link: Link) -> None:
    """Adds the ratio of sleeps and wakes to the time that the link needs for their bytes."""
    result["link_gb_per_s"] = link.rates()
    size = result.get("bytes") or result.get("workload", {}).get("bytes")
    for phase in result.values():
        if size and isinstance(phase, dict) and {"sleep_s", "wake_s"} <= set(phase):
            phase["over_floor"] = {
                "sleep": phase["sleep_s"]["median"] / link.floor("to_host", size),
                "wake": phase["wake_s"]["median"] / link.floor("to_device", size),
            }


def write(path: Path, content: dict[str, Any]) -> None:
    """Replaces the file at once, so that a killed process leaves the last whole state."""
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(content, indent=1) + "\n")
    partial.replace(path)


def measure(part: Part, contender: str, bench: Bench, result_path: Path) -> None:
    """Measures a part, between two measurements of the link if the part copies."""
    host_memory.touch(8 * 1024**2 if bench.small else part.host_gib * GIB)
    link = Link(bench) if part.on_the_link else None
    result: dict[str, Any] = {}

    def note(found: dict[str, Any]) -> None:
        result.update(found)
        if link is not None:
            add_floors(result, link)
        write(result_path, result)

    if link is not None:
        link.measure()
    for found in part.run(bench, contender):
        note(found)
    if link is not None:
        link.measure()
    note({})


def run_one(part: str, contender: str, settings: Settings, result_path: Path) -> None:
    """Measures, and writes the results so far after each step."""
    if part == "machine":
        write(result_path, machine.describe(settings))
        return
    if part == "warm-up":
        for _ in range(3):  # a machine that grows shows more of its memory each time
            host_memory.touch(min(WARM_UP_BYTES, int(0.7 * (host_memory.available_bytes() or 0))))
        write(result_path, {})
        return
    bench = Bench(settings)
    measure(PARTS[part], contender, bench, result_path)
    sys.stdout.flush()
    os._exit(0)  # some peers fail at the end of the process


# ---- all processes -------------------------------------------------------------------------------


@dataclass
class Runner:
    """Runs parts in separate processes until the time is over."""

    settings: Settings
    time_limit_s: float
    started: float = field(default_factory=time.monotonic)

    def run(self, part: str, contender: str, limit_s: float) -> dict[str, Any]:
        left = self.time_limit_s - (time.monotonic() - self.started)
        if left <= 0:
            return {"error": f"not run: the time limit of {self.time_limit_s:.0f} s was over"}
        with tempfile.TemporaryDirectory() as folder:
            return self._run(part, contender, min(limit_s, left), Path(folder))

    def _run(self, part: str, contender: str, limit_s: float, folder: Path) -> dict[str, Any]:
        result_path, log_path = folder / "result.json", folder / "log"
        one = ["--one", part, contender, json.dumps(self.settings.to_dict()), str(result_path)]
        error, start = None, time.monotonic()
        with log_path.open("w") as log:
            try:
                done = subprocess.run(
                    [sys.executable, __file__, *one],
                    env=self._environment(),
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    timeout=limit_s,
                    check=False,
                )
                if done.returncode != 0:
                    error = f"ended with {done.returncode}"
            except subprocess.TimeoutExpired:
                error = f"ended by the time limit, after {limit_s:.0f} s"
        result: dict[str, Any] = json.loads(result_path.read_text()) if result_path.exists() else {}
        result["process_s"] = round(time.monotonic() - start, 1)
        if error is not None:
            result["error"] = f"{error}: {log_path.read_text(errors='replace')[-2000:]}"
        return result

    def _environment(self) -> dict[str, str]:
        paths = [self.settings.peers, os.environ.get("PYTHONPATH")]
        return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}


def reason_against(part: Part, settings: Settings, found: dict[str, Any]) -> str | None:
    """Returns the reason why a part cannot run on the machine, or None if it can."""
    if settings.driver != "cuda":
        return None if settings.small else "full sizes need the cuda driver"
    devices = found["machine"]["devices"]
    if len(devices) < part.devices:
        return f"needs {part.devices} GPUs"
    if devices[0]["bytes"] < part.device_gib * GIB:
        return f"needs {part.device_gib} GiB of device memory"
    available = found["machine"]["host_memory_available_bytes"]
    if available is not None and available < part.host_gib * GIB:
        return f"needs {part.host_gib} GiB of host memory"
    return None


def chosen_contenders(part: Part, settings: Settings, asked: list[str] | None) -> list[str]:
    names = [
        name
        for name in part.contenders
        if (settings.peers is not None or name not in contenders.PEERS)
        and (settings.driver == "cuda" or name != "bare")
    ]
    return [name for name in names if asked is None or name in asked]


def command_line() -> str:
    """Returns the command with names in place of this machine's paths."""
    words, placeholder = ["python", "benchmarks/sleep_wake.py"], None
    for word in sys.argv[1:]:
        flag, _, value = word.partition("=")
        words.append(placeholder or (f"{flag}={PATHS[flag]}" if flag in PATHS and value else word))
        placeholder = PATHS.get(word)
    return shlex.join(words)


def new_record(settings: Settings, found: dict[str, Any]) -> dict[str, Any]:
    return {
        "benchmark": "sleep_wake",
        "format": 2,
        "command": command_line(),
        "commit": machine.commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "settings": {"driver": settings.driver, "small": settings.small},
        "machine": found.get("machine", {}),
        "versions": found.get("versions", {}),
        "notes": NOTES,
        "parts": {},
        "bars": [],
    }


def kept_parts(output: Path | None) -> dict[str, Any]:
    """Returns the parts of an earlier record, each with the command that made it."""
    if output is None or not output.exists():
        return {}
    earlier = json.loads(output.read_text())
    return dict(earlier["parts"]) if earlier.get("format") == 2 else {}


def add_first(result: dict[str, Any], again: dict[str, Any]) -> None:
    """Adds another process's first sleep to the samples; each process has its own floor."""
    if "first" not in result or "first" not in again:
        result.setdefault("error", again.get("error", "a first sleep was not measured"))
        return
    for kind, key in (("sleep_s", "sleep"), ("wake_s", "wake")):
        samples = [*result["first"][kind]["samples"], *again["first"][kind]["samples"]]
        result["first"][kind] = summary(samples)
        ratios = result["first"].setdefault("over_floor_samples", {})
        ratios.setdefault(key, [result["first"]["over_floor"][key]])
        ratios[key].append(again["first"]["over_floor"][key])
        result["first"]["over_floor"][key] = statistics.median(ratios[key])


def run_contender(runner: Runner, name: str, contender: str) -> dict[str, Any]:
    """Runs one process, and then the processes that add first sleeps."""
    part = PARTS[name]
    result = runner.run(name, contender, part.limit_s)
    if contender == "cumempool" and not runner.settings.small:
        for _ in range(part.first_again):
            add_first(result, runner.run(name, "cumempool-first", part.limit_s))
    return result


def run_parts(
    runner: Runner, record: dict[str, Any], names: list[str], arguments: argparse.Namespace
) -> None:
    for name in names:
        part = PARTS[name]
        content: dict[str, Any] = {
            "title": part.title,
            "command": record["command"],
            "commit": record["commit"],
            "gpus": [device["name"] for device in record["machine"].get("devices", [])],
            "results": {},
        }
        record["parts"][name] = content
        found: dict[str, list[dict[str, Any]]] = {}
        chosen = chosen_contenders(part, runner.settings, arguments.contenders)
        for index in range(min(part.rounds, 2) if runner.settings.small else part.rounds):
            for contender in reversed(chosen) if index % 2 else chosen:
                result = run_contender(runner, name, contender)
                found.setdefault(contender, []).append(result)
                failed = next((each for each in found[contender] if "error" in each), None)
                content["results"][contender] = failed or merged(found[contender])
                state = "failed" if "error" in result else f"{result['process_s']} s"
                print(f"{name}, {contender}: {state}", flush=True)
                if not runner.settings.small:
                    record["bars"] = bars.results(record)
                if arguments.output:
                    write(arguments.output, record)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", type=lambda text: text.split(","), help="such as llama8b,kv")
    parser.add_argument("--contenders", type=lambda text: text.split(","), help="only these")
    parser.add_argument("--list", action="store_true", help="list the parts and end")
    parser.add_argument("--small", action="store_true", help="tiny sizes; no figures to rely on")
    parser.add_argument("--driver", choices=("cuda", "host"), help="host with --small, else cuda")
    parser.add_argument("--peers", help="a directory to import peers from")
    parser.add_argument("--vllm-version", help="of that vLLM, if its metadata is missing")
    parser.add_argument("--programs", help="the build folder with the C++ benchmarks")
    parser.add_argument("--directory", default=tempfile.gettempdir(), help="for the file tier")
    parser.add_argument("--output", type=Path, help="the record; the plot goes beside it")
    parser.add_argument("--keep", action="store_true", help="keep parts of OUTPUT not run now")
    parser.add_argument("--time-limit", type=float, default=3600, metavar="SECONDS")
    parser.add_argument("--one", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if unknown := sorted(set(arguments.parts or ()) - set(PARTS)):
        parser.error(f"no such parts: {', '.join(unknown)}; there are {', '.join(PARTS)}")
    return arguments


def draw(record_path: Path) -> None:
    """Draws the plot beside the record, if matplotlib is installed."""
    try:
        import plot
    except ImportError as error:
        print(f"no plot ({error}); elsewhere: python benchmarks/plot.py {record_path}")
        return
    print(plot.draw(record_path))


def main() -> None:
    arguments = parse()
    if arguments.one:
        part, contender, settings_text, result_path = arguments.one
        run_one(part, contender, Settings(**json.loads(settings_text)), Path(result_path))
        return
    settings = Settings(
        driver=arguments.driver or ("host" if arguments.small else "cuda"),
        small=arguments.small,
        directory=arguments.directory,
        programs=arguments.programs,
        peers=arguments.peers,
        vllm_version=arguments.vllm_version,
    )
    runner = Runner(settings, arguments.time_limit)
    found = runner.run("machine", "", limit_s=120)
    if "error" in found:
        sys.exit(f"the machine cannot be described: {found['error']}")
    against = {name: reason_against(part, settings, found) for name, part in PARTS.items()}
    if arguments.list:
        for name, part in PARTS.items():
            print(f"{name}: {part.title}{f' ({against[name]})' if against[name] else ''}")
        return
    if not settings.small:
        runner.run("warm-up", "", limit_s=120)
    record = new_record(settings, found)
    if arguments.keep:
        record["parts"] = kept_parts(arguments.output)
    names = arguments.parts or [name for name in PARTS if against[name] is None]
    run_parts(runner, record, names, arguments)
    print(table.text(record))
    if arguments.output:
        draw(arguments.output)
    sys.exit(1 if table.failures(record) else 0)


if __name__ == "__main__":
    main()
