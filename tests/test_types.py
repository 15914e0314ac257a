"""Types, as mypy sees them: a test, so that its minute of reading the libraries passes beside the others."""

import subprocess
import sys


def test_types_are_right(root):
    done = subprocess.run([sys.executable, "-m", "mypy"], cwd=root, capture_output=True, encoding="utf-8", check=False)
    assert done.returncode == 0, done.stdout + done.stderr
