# The environment and a copy of this clone; runs the test suite as a user who is not root.
#   docker build -t samlove .                          torch for the CPU
#   docker build -t samlove --build-arg TORCH=cu130 .  torch for CUDA 13
FROM python:3.11-slim-bookworm
ARG TORCH=cpu
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --no-install-recommends --yes gcc git libc6-dev make \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 1000 samlove
USER 1000
WORKDIR /home/samlove/samlove
# The packages before the code: an edit of the code then installs nothing again.
COPY --chown=1000 constraints.txt ./
RUN python -m venv .venv \
    && .venv/bin/pip install --no-cache-dir -c constraints.txt torch torchvision \
        --index-url "https://download.pytorch.org/whl/${TORCH}"
COPY --chown=1000 Makefile README.md pyproject.toml setup.py ./
COPY --chown=1000 samlove/__init__.py samlove/
COPY --chown=1000 stores/__init__.py stores/
COPY --chown=1000 pipelines/__init__.py pipelines/
RUN PIP_NO_CACHE_DIR=1 make install
COPY --chown=1000 . .
# Newer than every file, so that make does not install again.
RUN touch .venv/.installed
CMD ["make", "test"]
