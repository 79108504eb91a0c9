"""Converting a checkpoint: memory that does not grow with the model, and speed against a plain copy of the files.

A checkpoint of random weights is made on the spot (shape of preset v3-16b with fewer layers, one MTP module, BF16,
4 GB or more), in pieces, so that it never is in memory. Then, in turn and several times: a copy of the folder by
`shutil`, and conversions to other precisions. Each runs in a process of its own and ends when the data are on the disk;
the source is in the page cache, as far as memory allows, for all of them alike.

Two figures of memory: "resident" is the peak that the system reports for the process (`ru_maxrss`), interpreter and
torch's libraries included; "anonymous" is the part that belongs to no file (the peak of RssAnon, looked at a hundred
times a second; Linux only), which is what the conversion itself allocates.

    python benchmarks/bench_convert.py                  # 4 GB: about 20 GB of disk, minutes
    python benchmarks/bench_convert.py --gigabytes 3 --rounds 1
    python benchmarks/bench_convert.py --json           # one JSON object
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

# Neither torch nor dsv3 here: a process inherits the peak memory of the one that starts it.

LIMIT_GB = 1.5
# task -> source folder, arguments of `convert`
TASKS: dict[str, tuple[str, dict[str, Any]]] = {
    "copy": ("bf16", {}),
    "BF16 to BF16": ("bf16", {}),
    "BF16 to FP8": ("bf16", {"fp8": True}),
    "BF16 to FP32": ("bf16", {"dtype": "float32"}),
    "FP8 to BF16": ("fp8", {}),
}


def make_checkpoint(folder: Path, gigabytes: float) -> None:
    """Write a random BF16 checkpoint of at least so many GB."""
    import torch

    from dsv3.checkpoint.encoding import write_model
    from dsv3.checkpoint.names import CanonicalTensor, canonical_tensors
    from dsv3.checkpoint.source import Stored
    from dsv3.config import ModelConfig

    def size(config: ModelConfig) -> int:
        return sum(2 * torch.Size(tensor.shape).numel() for tensor in canonical_tensors(config))

    config = ModelConfig.preset("v3-16b").replace(num_hidden_layers=1)
    while size(config) < gigabytes * 1e9:
        config = config.replace(num_hidden_layers=config.num_hidden_layers + 1)

    def read(tensor: CanonicalTensor, rows: slice) -> Stored:
        shape = (rows.stop - rows.start, *tensor.shape[1:])
        return Stored(torch.empty(shape, dtype=torch.bfloat16).normal_(std=0.02))

    write_model(folder, config, read, lambda tensor: torch.bfloat16, dtype=None, fp8=False, max_shard_bytes=10**9)


def run_task(task: str, source: Path, target: Path) -> None:
    """One conversion or copy."""
    if task == "copy":
        shutil.copytree(source, target)
        for path in target.iterdir():
            with path.open("rb") as file:
                os.fsync(file.fileno())
        return
    import torch

    from dsv3.checkpoint.convert import convert

    options = dict(TASKS[task][1])
    if "dtype" in options:
        options["dtype"] = getattr(torch, options["dtype"])
    convert(source, target, **options)


def child(task: str, source: Path, target: Path, gigabytes: float) -> None:
    """What a process of its own does: a task, timed, and its peak memory, as one line of JSON."""
    peak_anonymous = 0
    done = threading.Event()

    def watch() -> None:
        nonlocal peak_anonymous
        while not done.wait(0.01):
            peak_anonymous = max(peak_anonymous, anonymous_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    import dsv3.checkpoint.convert  # noqa: F401 (no part of the time, and copying has it too)

    start = time.perf_counter()
    if task == "make":
        make_checkpoint(target, gigabytes)
    else:
        run_task(task, source, target)
    seconds = time.perf_counter() - start
    done.set()
    watcher.join()
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    print(json.dumps({"seconds": seconds, "resident": resident, "anonymous": peak_anonymous}))


def anonymous_bytes() -> int:
    """Memory of this process that belongs to no file, 0 where the system does not tell."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return 0
    return next((1024 * int(line.split()[1]) for line in status.splitlines() if line.startswith("RssAnon:")), 0)


def in_process(task: str, source: Path, target: Path, gigabytes: float) -> dict[str, Any]:
    """Run `child`; its report."""
    command = [sys.executable, __file__, "--child", task, str(source), str(target), str(gigabytes)]
    out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    report: dict[str, Any] = json.loads(out.splitlines()[-1])
    return report


def folder_bytes(folder: Path) -> int:
    """Size of the weights in a folder."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Everything that the table shows, as plain values. Exits with a message if the disk is too small."""
    # The source, at least 3 GB and a layer more than asked for; its FP8 form; and the largest result, in FP32.
    needed = 3.8 * (max(arguments.gigabytes, 2.0) + 1.2)
    free = shutil.disk_usage(arguments.folder).free / 1e9
    if free < needed:
        sys.exit(f"{arguments.folder} has {free:.1f} GB free, {needed:.1f} GB are needed: name another --folder")
    runs: dict[str, list[dict[str, Any]]] = {task: [] for task in TASKS}
    with tempfile.TemporaryDirectory(prefix="bench_convert_", dir=arguments.folder) as name:
        work = Path(name)
        made = in_process("make", work, work / "bf16", arguments.gigabytes)
        in_process("BF16 to FP8", work / "bf16", work / "fp8", arguments.gigabytes)
        sizes = {source: folder_bytes(work / source) for source in ("bf16", "fp8")}
        for _ in range(arguments.rounds):  # in turn, so that a busy moment of the machine hits all of them
            for task, (source, _) in TASKS.items():
                report = in_process(task, work / source, work / "target", arguments.gigabytes)
                runs[task].append(report | {"written": folder_bytes(work / "target")})
                shutil.rmtree(work / "target")
    tasks = {}
    for task, (source, _) in TASKS.items():
        seconds = statistics.median(run["seconds"] for run in runs[task])
        moved = sizes[source] + runs[task][0]["written"]
        tasks[task] = {
            "read_bytes": sizes[source],
            "written_bytes": runs[task][0]["written"],
            "seconds": seconds,
            "mb_per_s": moved / 1e6 / seconds,
            "peak_resident_bytes": max(run["resident"] for run in runs[task]),
            "peak_anonymous_bytes": max(run["anonymous"] for run in runs[task]),
        }
    peak = max(task["peak_resident_bytes"] for task in tasks.values())
    return {
        "checkpoint_bytes": sizes["bf16"],
        "rounds": arguments.rounds,
        "making_peak_resident_bytes": made["resident"],
        "tasks": tasks,
        "peak_resident_bytes": peak,
        "within_limit": peak < LIMIT_GB * 1e9,
        "throughput_to_copy": {
            task: figures["mb_per_s"] / tasks["copy"]["mb_per_s"] for task, figures in tasks.items() if task != "copy"
        },
    }


def show(result: dict[str, Any]) -> None:
    """The same for people."""
    print(f"a checkpoint of {result['checkpoint_bytes'] / 1e9:.2f} GB, medians of {result['rounds']} rounds\n")
    columns = ("read GB", "written GB", "seconds", "MB/s moved", "resident MB", "anonymous MB")
    print(f"{'':14}" + "".join(f"{column:>14}" for column in columns))
    for task, figures in result["tasks"].items():
        row = (
            f"{figures['read_bytes'] / 1e9:.2f}",
            f"{figures['written_bytes'] / 1e9:.2f}",
            f"{figures['seconds']:.1f}",
            f"{figures['mb_per_s']:.0f}",
            f"{figures['peak_resident_bytes'] / 1e6:.0f}",
            f"{figures['peak_anonymous_bytes'] / 1e6:.0f}",
        )
        print(f"{task:14}" + "".join(f"{cell:>14}" for cell in row))
    verdict = "below" if result["within_limit"] else "NOT below"
    print(f"\npeak resident memory {result['peak_resident_bytes'] / 1e9:.2f} GB, {verdict} {LIMIT_GB} GB")
    ratios = ", ".join(f"{task} {ratio:.2f}" for task, ratio in result["throughput_to_copy"].items())
    print(f"throughput against a plain copy: {ratios}")


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=4.0, help="least size of the checkpoint (3 at any rate)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="where there is room")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    parsed = _parse()
    if parsed.child is not None:
        what, read_from, write_to, size = parsed.child
        child(what, Path(read_from), Path(write_to), float(size))
    else:
        measured = measure(parsed)
        print(json.dumps(measured)) if parsed.json else show(measured)
