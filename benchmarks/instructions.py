"""Instructions of a call, counted by valgrind's callgrind: a figure that no other work of the machine disturbs.

A script is run a second time below valgrind, with an option by which it hands its contenders to :func:`run`. That marks
where counting begins and ends by a call of the C library that nothing else makes, at which callgrind writes down what
it has counted since the mark before.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

# Valgrind knows no instructions later than those of AVX2. Inductor's compiler takes later ones, if not the plainest.
ALWAYS = {"OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0"}
AVX2 = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"} | ALWAYS
PLAIN = {
    "ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41", "MKL_ENABLE_INSTRUCTIONS": "SSE4_2",
    "TORCHINDUCTOR_CPP_SIMDLEN": "1",
} | ALWAYS  # fmt: skip
SEPARATOR, MARK = "\t", "getppid"


def count(file, *options, settings=PLAIN):
    """Instructions of one call, by what :func:`run` called the contender when the script is given these options."""
    with tempfile.TemporaryDirectory() as folder:
        # Compiled code of other settings is not wanted.
        env = os.environ | settings | {"TORCHINDUCTOR_CACHE_DIR": f"{folder}/cache"}
        command = ["valgrind", "--tool=callgrind", f"--dump-before={MARK}", f"--callgrind-out-file={folder}/%p"]
        command += [sys.executable, file, *options]
        pipe = subprocess.PIPE
        process = subprocess.Popen(command, env=env, stdout=pipe, stderr=pipe, text=True)
        said, errors = process.communicate()
        if process.returncode:
            raise RuntimeError(errors[-2000:])
        found = [line.split(SEPARATOR) for line in said.splitlines() if SEPARATOR in line]
        # Every second file is of what came between two contenders.
        totals = [_total(Path(folder, f"{process.pid}.{2 * i + 2}")) for i in range(len(found))]
    return {tuple(words): total / int(calls) for (*words, calls), total in zip(found, totals, strict=True)}


def run(words, call, calls=2):
    """Hand a contender over, which is called once before it counts.

    Args:
        words: What it is called.
        calls: That are counted.
    """
    call()
    os.getppid()
    for _ in range(calls):
        call()
    os.getppid()
    print(*words, calls, sep=SEPARATOR, flush=True)


def spelled(settings=PLAIN):
    """The settings, for a report."""
    return " ".join(f"{name}={value}" for name, value in settings.items())


def _total(file):
    return int(re.search(r"^totals: (\d+)", file.read_text(), re.MULTILINE)[1])
