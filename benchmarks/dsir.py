"""Speed and memory of DSIR against the official package, end to end on one corpus: fit, weigh, choose, write; two processes each.

    python benchmarks/dsir.py make --folder DIR [--megabytes 200]     # a corpus out of WHATMATTERS_DATA
    python benchmarks/dsir.py compare --folder DIR --peer PYTHON      # python of an environment with data-selection==1.0.3
    python benchmarks/dsir.py scale --folder DIR                      # time and peak memory at 1/10, 1/3 and all of the corpus
    python benchmarks/dsir.py kernel --folder DIR                     # one core: reading, scanning, hashing, weighing

Documents are runs of 60 to 200 words at random places of real texts; 15 % of the words are replaced by others, so that most bigrams of a
document are real and many are new. Warm: the files were read once before, the compiled code is in its cache.
"""

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

RESULTS = Path(__file__).with_name("results-dsir.json")
K_SHARE = 0.1
PROCESSES = 2


def make(folder: Path, megabytes: int) -> None:
    """raw.jsonl, and parts of it; target.jsonl: Wikipedia."""
    import numpy as np

    data = Path(os.environ["WHATMATTERS_DATA"])
    stories = json.loads((data / "tinystories_text" / "stories_800.json").read_text())
    texts = {
        "darwin": (data / "darwin_text" / "darwin.txt").read_text(),
        "shakespeare": (data / "tinyshakespeare" / "input.txt").read_text(),
        "wikipedia": (data / "wikitext2_valid" / "valid.txt").read_text(),
        "stories": "\n".join(stories),
        "news": (data / "ag_news" / "ag_news_5600.csv").read_text(),
    }
    words = {name: np.array(text.split(" "), dtype=object) for name, text in texts.items()}
    everything = np.concatenate(list(words.values()))
    draw = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "target.jsonl").open("w") as file:
        for _ in range(2000):
            first = draw.integers(len(words["wikipedia"]) - 200)
            file.write(json.dumps({"text": " ".join(words["wikipedia"][first : first + 128])}) + "\n")
    marks = {megabytes // 10: "raw-10.jsonl", megabytes // 3: "raw-3.jsonl"}
    size, count, names = 0, 0, list(words)
    with (folder / "raw.jsonl").open("wb") as file:
        while size < megabytes * 10**6:
            name = names[draw.integers(len(names))]
            length = int(draw.integers(60, 200))
            first = draw.integers(len(words[name]) - length)
            chosen = words[name][first : first + length].copy()
            other = draw.random(length) < 0.15
            chosen[other] = everything[draw.integers(len(everything), size=int(other.sum()))]
            line = json.dumps({"id": count, "text": " ".join(chosen), "source": name}).encode() + b"\n"
            file.write(line)
            size, count = size + len(line), count + 1
            for limit in [m for m in marks if size >= m * 10**6]:
                file.flush()
                shutil.copy(folder / "raw.jsonl", folder / marks.pop(limit))
    print(f"{count} documents, {size / 1e6:.0f} MB")


PEER = """
import json, sys, time, warnings
import numpy as np
from data_selection import HashedNgramDSIR
raw, target, folder, k, processes = sys.argv[1:6]
spent, start = {}, time.perf_counter()
dsir = HashedNgramDSIR([raw], [target], cache_dir=folder + "/cache", num_proc=int(processes), min_example_length=100)
dsir.fit_importance_estimator(num_tokens_to_fit="all")
spent["fit"] = time.perf_counter() - start
dsir.compute_importance_weights()
spent["weights"] = time.perf_counter() - start - spent["fit"]
dsir.resample(folder + "/out", int(k), cache_dir=folder + "/resampled")
spent["total"] = time.perf_counter() - start
parts = {f"weights{i}": np.load(f"{folder}/cache/log_importance_weights/{i}.npy") for i in range(int(processes))}
np.savez(folder + "/peer.npz", log_diff=dsir.log_diff, **parts)
print("\\n" + json.dumps(spent))
"""


def lines_of(path: Path) -> int:
    with path.open("rb") as file:
        return sum(block.count(b"\n") for block in iter(lambda: file.read(2**24), b""))


def peer(folder: Path, python: str, raw: str) -> dict:
    rows = lines_of(folder / raw)  # also warms the file
    work = Path(tempfile.mkdtemp(dir=folder))
    command = [
        python,
        "-W",
        "ignore",
        "-c",
        PEER,
        str(folder / raw),
        str(folder / "target.jsonl"),
        str(work),
        str(int(K_SHARE * rows)),
        str(PROCESSES),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    spent = json.loads(done.stdout.strip().splitlines()[-1])
    shutil.move(work / "peer.npz", folder / f"peer-{raw}.npz")
    shutil.rmtree(work)
    size = (folder / raw).stat().st_size
    return {"raw": raw, "rows": rows, "bytes": size, "seconds": spent, "rows_per_second": rows / spent["total"]}


def run_ours(folder: Path, raw: str, hash: str, processes: int = PROCESSES) -> dict:
    """One run in this process, from nothing to the written selection."""
    import warnings

    import psutil

    from whatmatters.select import DSIR

    warnings.simplefilter("ignore")
    rows = lines_of(folder / raw)
    settings = {"hash": hash, "n_jobs": processes, "max_ngrams": "all"}
    DSIR(**settings).fit(raw=folder / "target.jsonl", target=folder / "target.jsonl").select(1)  # loads compiled code
    start, spent = time.perf_counter(), {}
    before = psutil.cpu_times()
    dsir = DSIR(**settings).fit(raw=folder / raw, target=folder / "target.jsonl")
    spent["fit"] = time.perf_counter() - start
    dsir._weigh(None)
    spent["weights"] = time.perf_counter() - start - spent["fit"]
    chosen = dsir.select(int(K_SHARE * rows), seed=0)
    spent["select"] = time.perf_counter() - start - spent["fit"] - spent["weights"]
    dsir.write(chosen, folder / f"ours-{hash}", overwrite=True)
    spent["total"] = time.perf_counter() - start
    shutil.rmtree(folder / f"ours-{hash}")
    peak = {
        "own": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "largest_worker": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024,
    }
    busy = psutil.cpu_times().user - before.user
    equal = compare(folder, raw, dsir) if hash == "sha256" else None
    return {
        "raw": raw, "hash": hash, "rows": rows, "bytes": (folder / raw).stat().st_size, "seconds": spent, "processor_seconds": busy,
        "rows_per_second": rows / spent["total"], "peak_bytes": peak, "kl_reduction": chosen.kl_reduction, "equal_to_peer": equal,
    }  # fmt: skip


def compare(folder: Path, raw: str, dsir: object) -> dict | None:
    """Are log ratios and weights the peer's, bit for bit?"""
    import numpy as np

    path = folder / f"peer-{raw}.npz"
    if not path.exists():
        return None
    stored = np.load(path)
    weights = next(iter(dsir.score().values.values())).numpy()
    theirs = np.empty_like(weights)
    for shard in range(PROCESSES):
        theirs[shard::PROCESSES] = stored[f"weights{shard}"]
    return {
        "log_ratio": bool((stored["log_diff"] == dsir.log_ratio_[0]).all()),
        "weights": bool((theirs == weights).all()), "largest_difference": float(np.abs(theirs - weights).max()),
    }  # fmt: skip


def in_process(*words: str) -> dict:
    """A run in a fresh process: peak memory is its own."""
    done = subprocess.run([sys.executable, __file__, *words], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    return json.loads(done.stdout.strip().splitlines()[-1])


def kernel(folder: Path, raw: str) -> dict:
    """MB/s of raw JSON lines on one core, step by step."""
    import numpy as np

    from whatmatters.kernels.json_lines import texts_of_lines
    from whatmatters.kernels.ngrams import Hasher
    from whatmatters.select._pieces import weights

    path, rates = folder / raw, {}
    block = path.read_bytes()[: 2**25]
    block = block[: block.rfind(b"\n") + 1]

    def timed(name: str, work: object) -> object:
        best = 1e9
        for _ in range(3):
            start = time.perf_counter()
            result = work()
            best = min(best, time.perf_counter() - start)
        rates[name] = len(block) / best / 1e6
        return result

    def read() -> int:
        with path.open("rb") as file:
            left = len(block)
            while left > 0:
                left -= len(file.read(min(2**20, left)))
        return left

    timed("read", read)
    text = np.frombuffer(block, np.uint8)
    stops = timed("newlines", lambda: np.flatnonzero(text == 10).astype(np.int64))
    starts = np.concatenate([np.zeros(1, np.int64), stops[:-1] + 1])
    timed("is UTF-8", lambda: block.isascii() or block.decode())
    lines = timed("JSON field", lambda: texts_of_lines(text, starts, stops, "text"))
    parts = np.array_split(np.arange(len(starts)), len(block) // 2**20)
    log_ratio = np.random.default_rng(0).standard_normal((1, 10_000))
    for hash in ("fast", "sha256"):
        hasher = Hasher(2, 10_000, hash)
        timed(f"tokens and {hash}", lambda h=hasher: [h.hashed(lines.plain, lines.begin[p], lines.end[p]) for p in parts])
        if hash == "sha256":
            cold = Hasher(2, 10_000, hash)
            found = [cold.hashed(lines.plain, lines.begin[p], lines.end[p]) for p in parts]
            rates["memo misses, cold, share"] = cold.missed / sum(len(f.ids) for f in found)
        one = hasher.hashed(lines.plain, lines.begin[parts[0]], lines.end[parts[0]])
        timed(f"weights {hash}", lambda h=hasher, o=one: [weights(h, log_ratio, o) for _ in parts])
    timed("counts", lambda: [np.bincount(one.ids, minlength=10_000) for _ in parts])
    return rates


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["make", "compare", "scale", "kernel", "one"])
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--megabytes", type=int, default=200)
    parser.add_argument("--peer", default=sys.executable)
    parser.add_argument("--raw", default="raw.jsonl")
    parser.add_argument("--hash", default="fast")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    if options.what == "make":
        make(options.folder, options.megabytes)
        return
    if options.what == "one":
        print("\n" + json.dumps(run_ours(options.folder, options.raw, options.hash)))
        return
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    if options.what == "kernel":
        results["kernel_megabytes_per_second"] = kernel(options.folder, options.raw)
        print(json.dumps(results["kernel_megabytes_per_second"], indent=1))
    elif options.what == "scale":
        results["scale"] = [
            in_process("one", "--folder", str(options.folder), "--raw", raw, "--hash", hash)
            for hash in ("fast", "sha256")
            for raw in ("raw-10.jsonl", "raw-3.jsonl", "raw.jsonl")
        ]
        for row in results["scale"]:
            told = {name: round(value / 1e6) for name, value in row["peak_bytes"].items()}
            print(f"{row['hash']:6} {row['bytes'] / 1e6:6.0f} MB {row['seconds']['total']:6.2f} s, peak MB {told}")
    else:
        results["peer"] = peer(options.folder, options.peer, options.raw)
        print(f"data-selection {results['peer']['seconds']['total']:.1f} s, {results['peer']['rows_per_second']:.0f} rows/s", flush=True)
        for hash in ("fast", "sha256"):
            words = ("one", "--folder", str(options.folder), "--raw", options.raw, "--hash", hash)
            runs = [in_process(*words) for _ in range(options.rounds)]
            runs.sort(key=lambda run: run["seconds"]["total"])
            middle = results[hash] = runs[len(runs) // 2]
            print(
                hash,
                {name: round(value, 2) for name, value in middle["seconds"].items()},
                f"{middle['rows_per_second']:.0f} rows/s",
                end=" ",
            )
            middle["ratio_to_peer"] = middle["rows_per_second"] / results["peer"]["rows_per_second"]
            print(f"= {middle['ratio_to_peer']:.1f} x data-selection; equal: {middle['equal_to_peer']}", flush=True)
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
