"""Adds to a wheel what the commands need outside the repository: the profile `micro` and its weights.

pyproject.toml has everything else. An editable install uses these folders where they are.
"""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

SHIPPED = ("configs/micro", "weights/micro")  # copied to samlove/_shipped


class BuildWithShipped(build_py):
    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            for folder in SHIPPED:
                target = Path(self.build_lib, "samlove", "_shipped", folder)
                shutil.rmtree(target, ignore_errors=True)  # of an earlier build
                shutil.copytree(folder, target)


setup(cmdclass={"build_py": BuildWithShipped})
