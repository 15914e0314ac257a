"""`make mutants`: break the library in every way that mutmut knows, and count what the tests notice.

mutmut names modules by their path below `src`, so it works on a copy, in scratch/mutants, where the library lies there;
an interrupted run goes on where it was. After a change remove that folder first: which test reaches what is written
down there. The modules and tests are listed in pyproject.toml, [tool.mutmut].
"""

import os
import shutil
import subprocess
import sys
from collections import Counter, defaultdict
from pathlib import Path

ROOT = Path(__file__).parents[1]
COPY = ROOT / "scratch/mutants"
KILLED = ("killed", "timeout", "caught by type check")


def main() -> None:
    """Run, and print a row for each module and the mutants that no test noticed."""
    skipped = shutil.ignore_patterns("__pycache__")
    for there, here in (("lib", "src"), ("tests", "tests"), ("conf", "conf")):
        shutil.copytree(ROOT / there, COPY / here, dirs_exist_ok=True, ignore=skipped)
    shutil.copy2(ROOT / "pyproject.toml", COPY)
    mutmut = Path(sys.executable).with_name("mutmut")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1"}
    subprocess.run([mutmut, "run", *sys.argv[1:]], cwd=COPY, env=environment, check=True)
    told = subprocess.check_output([mutmut, "results", "--all", "true"], cwd=COPY, env=environment, encoding="utf-8")
    statuses = dict(line.strip().split(": ") for line in told.splitlines() if "__mutmut_" in line)
    modules: dict[str, Counter[str]] = defaultdict(Counter)
    for name, status in statuses.items():
        modules[name.rpartition(".")[0]][status] += 1
    print("\n| module | mutants | noticed | share |\n|---|---|---|---|")
    for module, found in [*sorted(modules.items()), ("all", Counter(statuses.values()))]:
        noticed, total = sum(found[each] for each in KILLED), found.total()
        print(f"| `{module}` | {total} | {noticed} | {noticed / total:.0%} |")
    print("\nNot noticed:", *sorted(name for name, status in statuses.items() if status not in KILLED), sep="\n")


if __name__ == "__main__":
    main()
