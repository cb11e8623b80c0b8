"""Runs a command without root's permission to read and write everything, so that the modes of files count."""

import ctypes
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
LIBC = ctypes.CDLL(None, use_errno=True)
PR_CAPBSET_DROP = 24  # linux/prctl.h
PERMISSIONS = (1, 2)  # CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH, linux/capability.h


def run_as_plain_user(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """`python ARGUMENTS` as the current user. Of root's permissions, those to ignore the modes of files are taken away
    for good, so that root may read what root owns and its mode allows, as any other user."""
    options = {"cwd": ROOT, "encoding": "utf-8", "capture_output": True, **options}
    return subprocess.run([sys.executable, *arguments], preexec_fn=_drop_permissions, **options)


def _drop_permissions() -> None:
    if os.geteuid() == 0:
        for permission in PERMISSIONS:
            if LIBC.prctl(PR_CAPBSET_DROP, permission, 0, 0, 0):
                raise OSError(ctypes.get_errno(), "prctl")
