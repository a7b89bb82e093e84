"""`terrazzo bench compare --git REF`: one suite on two builds, that of REF in a worktree of its own, and the package as it is now.

The worktree is a temporary folder and gone afterwards; objects that setup.py compiled before come from the compiler cache, if there is one.
Both sides run the suite of this checkout, so that the protocol and the inputs are the same.
"""
import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from multiprocessing import Pipe
from pathlib import Path

PASSES = 5  # of each side: where its memory happens to lie makes a process some per cent faster or slower, as long as it lives
BENCH = Path(__file__).resolve().parent


class RevisionError(Exception):
    """Git, the build or a run at the revision failed; the message is theirs."""


def _call(*command, cwd, env=None, what):
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True)
    if done.returncode:
        raise RevisionError(f"terrazzo bench compare: {what} failed (exit {done.returncode}):\n{(done.stderr or done.stdout).strip()[-2000:]}")
    return done.stdout.strip()


@contextlib.contextmanager
def checkout(ref):
    """A folder with the files of `ref`, for as long as the context lasts."""
    root = _call("git", "rev-parse", "--show-toplevel", cwd=BENCH, what="looking for the repository (--git needs an editable install of a checkout)")
    sha = _call("git", "rev-parse", "--verify", "--end-of-options", f"{ref}^{{commit}}", cwd=root, what=f"git: finding {ref!r}")
    with tempfile.TemporaryDirectory(prefix="terrazzo-compare-") as folder:
        tree = Path(folder) / "tree"
        _call("git", "worktree", "add", "--detach", str(tree), sha, cwd=root, what=f"git: checking out {ref!r}")
        try:
            yield tree
        finally:
            _call("git", "worktree", "remove", "--force", str(tree), cwd=root, what="git: removing the worktree")


def build(tree):
    """Builds the package of a checkout -> the folder to import it from."""
    lib = tree / "build/compare/lib"
    _call(sys.executable, "setup.py", "-q", "build", "--build-base", "build/compare", "--build-lib", str(lib), cwd=tree, what="building the revision")
    shutil.copytree(BENCH, lib / "terrazzo/bench", dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__", "results"))
    return lib


def measure(ref, options, before, after, passes=PASSES, on_step=lambda text: None):
    """Runs the suite with `options` at `ref` and as it is now, by turns, into two JSONL files. `on_step(text)` follows the work."""
    with checkout(ref) as tree:
        on_step(f"building {ref}")
        lib = build(tree)
        sides = {f"at {ref}": (lib, before), "on this checkout": (None, after)}
        for number in range(1, passes + 1):
            on_step(f"measuring {ref} and this checkout by turns, {number} of {passes}")
            by_turns(sides, options, tree.parent, number, passes)


def by_turns(sides, options, folder, number=1, passes=1):
    """Runs the suite in two processes that take turns (turns.py), each side as the first in every other pass.

    sides: {name: (where to import the package from, None for the installed one; the result file, which is appended to)}.
    """
    ends = Pipe()
    with contextlib.ExitStack() as stack:
        running = {}
        for (name, (path, file)), end, place in zip(sides.items(), ends, ("first", "second") if number % 2 else ("second", "first"), strict=True):
            env, python = dict(os.environ), [sys.executable]
            if path is not None:  # without site (-S): an editable install's import hook would lend its extension
                env["PYTHONPATH"] = os.pathsep.join((str(path), *filter(None, sys.path)))
                python.append("-S")
            command = [*python, "-m", "terrazzo.bench", "run", *options, "--out", str(file), "--turns", f"{end.fileno()}:{place}:{number}:{passes}"]
            errors = stack.enter_context(tempfile.TemporaryFile("w+"))
            running[name] = subprocess.Popen(command, cwd=folder, env=env, stdout=subprocess.DEVNULL, stderr=errors, pass_fds=(end.fileno(),)), errors
            stack.callback(running[name][0].kill)
        for end in ends:
            end.close()  # so that each side notices the other's end
        while any(process.poll() is None for process, _ in running.values()):
            time.sleep(0.05)
            for name, (process, errors) in running.items():
                if process.poll() not in (None, 0, 1):  # 1: a provider was wrong or failed, a row with the reason
                    errors.seek(0)
                    raise RevisionError(f"terrazzo bench compare: the suite failed {name}:\n{errors.read().strip()[-2000:]}")
