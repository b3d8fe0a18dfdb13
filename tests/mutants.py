"""One-line breakages of the sources, each of which must turn a named test red: proof that the tests can fail.

    python tests/mutants.py [NUMBER ...]      (make mutants; by hand, not in CI: every mutant runs its test twice)

mutants.json lists them: file, the old fragment (it occurs once), the new one, the test, and what would go wrong. Each
is applied to a copy of the sources, never to the sources themselves. Exits 1 if a mutant survives, or if its test is
red without it.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
os.environ.setdefault("RLVER_DATA", str(ROOT.parent / "shared" / "data"))  # the copy lies elsewhere
PATIENCE = 200  # seconds
LEFT_OUT = shutil.ignore_patterns(".venv*", ".git", "models", "runs", "__pycache__", ".pytest_cache", ".hypothesis")


def passes(folder: Path, test: str) -> bool:
    """Whether the test is green in that copy, within PATIENCE. Raises RuntimeError where it was not run at all."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
    command.append(f"tests/{test.removeprefix('tests/')}")
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=PATIENCE)
    except subprocess.TimeoutExpired:  # a mutant may go round for ever
        return False
    if done.returncode not in (0, 1):
        raise RuntimeError(f"{test}: pytest exited with {done.returncode}\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return done.returncode == 0


def main(argv: list[str]) -> int:
    mutants = json.loads((Path(__file__).parent / "mutants.json").read_text(encoding="utf-8"))
    chosen = [int(number) for number in argv] or range(1, len(mutants) + 1)
    wrong, sound = 0, {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "rlver"
        shutil.copytree(ROOT, folder, ignore=LEFT_OUT)
        (folder / "models").symlink_to(ROOT / "models")
        for number in chosen:
            mutant = mutants[number - 1]
            path, test = folder / mutant["file"], mutant["test"]
            source = path.read_text(encoding="utf-8")
            if test not in sound:
                sound[test] = passes(folder, test)
            if source.count(mutant["old"]) != 1:
                verdict = f"STALE: the old fragment occurs {source.count(mutant['old'])} times"
            elif not sound[test]:
                verdict = "BROKEN: the test is red without it"
            else:
                path.write_text(source.replace(mutant["old"], mutant["new"]), encoding="utf-8")
                verdict = "SURVIVED" if passes(folder, test) else "killed"
                path.write_text(source, encoding="utf-8")
            wrong += verdict != "killed"
            print(f"{number:>2} {verdict:<9} {mutant['file']:<13} {mutant['why']}  [{test}]", flush=True)
    print(f"{len(chosen) - wrong} of {len(chosen)} mutants killed")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
