"""Import time of weightdyn beside that of torch and pandas, which it cannot do without.

python benchmarks/bench_import.py
"""

import statistics
import subprocess
import sys
import time

ROUNDS = 7


def seconds(statement: str) -> float:
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", statement], check=True)
    return time.perf_counter() - start


def main() -> None:
    for statement in ("import torch, pandas", "import weightdyn"):
        seconds(statement)  # bytecode and file cache
    pairs = [(seconds("import torch, pandas"), seconds("import weightdyn")) for _ in range(ROUNDS)]
    base, own = (statistics.median(side) for side in zip(*pairs, strict=True))
    print(
        f"import torch, pandas {base:.2f} s; import weightdyn {own:.2f} s: {own - base:+.2f} s (budget +0.3 s)"
    )


if __name__ == "__main__":
    main()
